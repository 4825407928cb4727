"""The experts' six grouped GEMMs on a GPU, and on any device by a loop: who can compute them, and how.

====== ============================================================== ================================
name   the GEMMs come from                                            runs on
====== ============================================================== ================================
torch  torch's grouped GEMM (``torch._grouped_mm``)                   bf16, sm_90 and sm_100, 16-byte rows
triton ours (triton_grouped_gemm.py)                                  any dtype
loop   one library GEMM per expert; reads E + 1 integers back         any dtype and device
====== ============================================================== ================================

grouped_gemm_choice.py chooses among them.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

BACKENDS = ("torch", "triton", "loop")


class GroupedGemm(NamedTuple):
    """``rows(a (S, R), b (E, R, N), offset) -> (S, N)`` multiplies every row with its expert's matrix;
    ``outer(a (S, M), b (S, N), offset, like (E, M, N)) -> (E, M, N)``, strided as ``like``, is a^T b over an expert's
    rows, zeros where it has none. Rows are grouped by expert, offset is (E+1,) int32, b and like have any strides."""

    name: str
    rows: Callable[[Tensor, Tensor, Tensor], Tensor]
    outer: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def load(name: str) -> GroupedGemm:
    """The backend of this name, one of BACKENDS."""
    if name == "triton":
        from prism_kernels.moe import triton_grouped_gemm

        return GroupedGemm("triton", triton_grouped_gemm.rows, triton_grouped_gemm.outer)
    return _TABLE[name]


def able(gate_up: Tensor, down: Tensor) -> list[str]:
    """Backends that can multiply with these experts, (E, 2I, H) and (E, H, I)."""
    return [name for name in BACKENDS if why_not(name, gate_up, down) is None]


def why_not(name: str, gate_up: Tensor, down: Tensor) -> str | None:
    """Why a backend cannot multiply with these experts, or None."""
    if name != "torch":
        return None
    if _library_grouped() is None:
        return "this torch has no grouped GEMM"
    if gate_up.device.type != "cuda":
        return "it is for CUDA tensors"
    if gate_up.dtype != torch.bfloat16:
        return f"it takes bfloat16, not {gate_up.dtype}"
    if torch.cuda.get_device_capability(gate_up.device)[0] not in (9, 10):
        # There torch itself loops over the experts and waits for the offsets (2.9 to 2.11): that is our "loop".
        return "torch has a kernel for compute capability 9 and 10 alone"
    return unaligned(gate_up, down)


def unaligned(gate_up: Tensor, down: Tensor) -> str | None:
    """Why the library's loads of 16 bytes do not fit, or None."""
    for label, weight in (("gate_up", gate_up), ("down", down)):
        steps = [step for step in weight.stride() if step != 1] + [
            weight.data_ptr() // weight.itemsize,
            *weight.shape[1:],
        ]
        if 1 not in weight.stride()[1:] or any(step * weight.itemsize % 16 for step in steps):
            return (
                f"{label} needs sizes and rows at multiples of 16 bytes, "
                f"got {tuple(weight.shape)} with strides {tuple(weight.stride())}"
            )
    return None


def _library_grouped() -> Any:
    """torch's grouped GEMM, or None."""
    return getattr(torch.nn.functional, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)


def _torch_rows(a: Tensor, b: Tensor, offset: Tensor) -> Tensor:
    return _library_grouped()(a, b, offs=offset[1:])


def _torch_outer(a: Tensor, b: Tensor, offset: Tensor, like: Tensor) -> Tensor:
    """The library allocates its result, row-major: for a column-major ``like`` it computes the transposed GEMM."""
    grouped = _library_grouped()
    from prism_kernels.moe.triton_grouped_gemm import clear_empty

    columns_first = like.stride(1) == 1 and like.stride(2) != 1
    result = grouped(b.T, a, offs=offset[1:]) if columns_first else grouped(a.T, b, offs=offset[1:])
    clear_empty(result, offset)  # what the library leaves where an expert has no rows is not specified
    return result.transpose(1, 2) if columns_first else result


def _loop_rows(a: Tensor, b: Tensor, offset: Tensor) -> Tensor:
    out = a.new_empty(a.shape[0], b.shape[2])
    for e, (first, last) in enumerate(pairwise(offset.tolist())):
        if first < last:
            torch.mm(a[first:last], b[e], out=out[first:last])
    return out


def _loop_outer(a: Tensor, b: Tensor, offset: Tensor, like: Tensor) -> Tensor:
    out = torch.empty_like(like)
    for e, (first, last) in enumerate(pairwise(offset.tolist())):
        if first < last:
            torch.mm(a[first:last].T, b[first:last], out=out[e])
        else:
            out[e].zero_()
    return out


_TABLE = {
    "torch": GroupedGemm("torch", _torch_rows, _torch_outer),
    "loop": GroupedGemm("loop", _loop_rows, _loop_outer),
}
