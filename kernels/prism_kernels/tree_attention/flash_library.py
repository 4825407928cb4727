"""FlashAttention's calls over sequences of any length, by whoever brings them, as library.py asks for them.

In this order, or as ``PRISM_FLASH`` says: "fa3", torch's calls with FlashAttention 3's wheel behind them (sm_90);
"torch", torch's own FlashAttention 2; "package", the package flash-attn. bf16 and fp16, heads of up to 256, sm_80 on.

What the three share, and what callers need not know (read in torch 2.13, whose calls 2.11 takes too, and in flash-attn
2.8, to which 2.10 is equal):

- log-sum-exps are natural logs, (Hq, N) in fp32; of a query without keys +inf (version 2) or -inf (3), its output 0;
- causal sequences end together; a query before all of its keys has none;
- where no sequence has two queries, version 2 takes their number for that of the sequences, which is wrong beside
  sequences without queries: they are told of two;
- gradients are rounded to the dtype of q, k and v; of grouped heads version 2 rounds those of every query head and then
  their sum;
- rows of 16 bytes: a head's numbers lie together, strides are multiples of 8, D is (flash.py pads it);
- the backward is deterministic on demand; version 3's refuses to be with heads of more than 192, ``PRISM_FLASH=torch``
  is the way out;
- the scale is positive: a negative one turns the maximum that they subtract into a minimum.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from prism_kernels.checks import wrong
from prism_kernels.tree_attention.call_plan import Sequences

FA3_MODULE = "flash_attn_interface"  # of its wheel


class Aten:
    """``aten::_flash_attention_forward`` and ``_backward``: FlashAttention 2, or 3 once torch has been told so.

    The backward is deterministic under ``torch.use_deterministic_algorithms``.
    """

    def forward(self, q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, scale: float) -> tuple[Tensor, Tensor]:
        given = (aligned(q.contiguous()), aligned(k), aligned(v), *_sequences(sequences))
        out, lse, *_ = _aten()._flash_attention_forward(*given, 0.0, sequences.causal, False, scale=scale)
        return out, _checked(lse, q)

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        sequences: Sequences,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        given = (*map(aligned, (dout, q.contiguous(), k, v)), out, lse, *_sequences(sequences))
        # The state of a random generator: without dropout nobody reads it.
        random = (torch.empty(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device))
        gradients = _aten()._flash_attention_backward(*given, 0.0, sequences.causal, *random, scale=scale)
        d_q, d_k, d_v = (x.contiguous() for x in gradients)
        return d_q, d_k, d_v


class Package:
    """The package flash-attn, from 2.7 on; deterministic where torch's algorithms are."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, scale: float) -> tuple[Tensor, Tensor]:
        given = (aligned(q.contiguous()), aligned(k), aligned(v), *_sequences(sequences))
        run = _package()._flash_attn_varlen_forward
        out, lse, *_ = run(*given, dropout_p=0.0, softmax_scale=scale, causal=sequences.causal)
        return out, _checked(lse, q)

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        sequences: Sequences,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        d_q, d_k, d_v = gradients = tuple(x.new_empty(x.shape) for x in (q, k, v))
        given = (*map(aligned, (dout, q.contiguous(), k, v)), out, lse, *gradients, *_sequences(sequences))
        _package()._flash_attn_varlen_backward(
            *given,
            dropout_p=0.0,
            softmax_scale=scale,
            causal=sequences.causal,
            window_size_left=-1,
            window_size_right=-1,
            softcap=0.0,
            alibi_slopes=None,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return d_q, d_k, d_v


def _sequences(sequences: Sequences) -> tuple[Tensor, Tensor, int, int]:
    return sequences.cu_q, sequences.cu_k, max(2, sequences.max_q), sequences.max_k


def aligned(x: Tensor) -> Tensor:
    """As it is, where its rows of 16 bytes can be loaded at once; else a copy."""
    *outer, last = x.stride()
    fits = last == 1 and all(stride > 0 and stride % 8 == 0 for stride in outer) and x.data_ptr() % 16 == 0
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def _checked(lse: Tensor, q: Tensor) -> Tensor:
    if lse.shape != (q.shape[1], q.shape[0]) or lse.dtype != torch.promote_types(q.dtype, torch.float32):
        raise RuntimeError(
            f"tree_attention: this FlashAttention gives log-sum-exps as {tuple(lse.shape)} {lse.dtype}, expected "
            f"{(q.shape[1], q.shape[0])} torch.float32; use impl='sdpa' instead"
        )
    return lse


def _aten() -> Any:
    return torch.ops.aten


def _package() -> Any:
    return importlib.import_module("flash_attn.flash_attn_interface")


def _no_gpu() -> str | None:
    if torch.version.hip is not None:
        return "its calls are those of NVIDIA's GPUs"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    major, minor = torch.cuda.get_device_capability()
    return None if major >= 8 else f"it needs compute capability 8.0, this GPU has {major}.{minor}"


def _no_torch() -> str | None:
    built = torch.backends.cuda.is_flash_attention_available()
    return _no_gpu() or (None if built else "this torch was built without FlashAttention")


def _no_fa3() -> str | None:
    if importlib.util.find_spec(FA3_MODULE) is None:
        return f"its wheel is not installed (module {FA3_MODULE})"
    if why_not := _no_torch():
        return why_not
    if torch.cuda.get_device_capability()[0] != 9:
        return "it needs compute capability 9"
    import torch.nn.attention as attention

    if "FA3" not in getattr(attention, "list_flash_attention_impls", list)():
        return f"torch {torch.__version__} takes none"
    return None


def _no_package() -> str | None:
    if importlib.util.find_spec("flash_attn") is None:
        return "flash-attn is not installed (pip install 'prism-fast[flash]')"
    if why_not := _no_gpu():
        return why_not
    try:
        found = _package()
    except ImportError as error:  # built for another torch
        return f"flash-attn cannot be imported: {' '.join(str(error).split())[:120]}"
    fits = hasattr(found, "_wrapped_flash_attn_varlen_forward")
    return None if fits else "flash-attn is older than 2.7"


SOURCES: dict[str, tuple[str, str, Callable[[], str | None]]] = {  # library.LIBRARIES' name, what is said, why not
    "fa3": ("aten", "FlashAttention 3 by torch", _no_fa3),
    "torch": ("aten", "torch's FlashAttention 2", _no_torch),
    "package": ("flash_attn", "the package flash-attn", _no_package),
}


@lru_cache
def _found(asked: str) -> tuple[str | None, str]:
    """(one of SOURCES, or None; what it is, or why there is none)."""
    if asked and asked not in SOURCES:
        raise wrong("PRISM_FLASH", f"one of {sorted(SOURCES)}", repr(asked))
    passed = []
    for name in [asked] if asked else SOURCES:
        _, said, why_not = SOURCES[name]
        reason = why_not()
        if reason is None:
            return name, said
        passed.append(f"{said}: {reason}")
    return None, ", ".join(passed)


def _source() -> tuple[str | None, str]:
    return _found(os.environ.get("PRISM_FLASH", ""))


def unavailable() -> str | None:
    """Why no library can run here, or None."""
    name, said = _source()
    return said if name is None else None


def detail() -> str:
    """Whose kernels run."""
    return _source()[1]


def library(device: str) -> str:
    """The name in library.LIBRARIES of the one that runs; on "meta" none does."""
    name, _ = _source()
    if name is None or device == "meta":
        return "aten"
    if name == "fa3":
        _activate_fa3()
    return SOURCES[name][0]


setattr(library, "_dynamo_marked_constant", True)  # noqa: B010  # to torch.compile, as dispatch.choose is


@lru_cache
def _activate_fa3() -> None:
    """For this process, torch's scaled_dot_product_attention included; an activation by somebody else stays."""
    import torch.nn.attention as attention

    if attention.current_flash_attention_impl() is None:
        attention.activate_flash_attention_impl("FA3")
