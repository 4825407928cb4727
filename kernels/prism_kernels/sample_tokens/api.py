"""The contract: arguments, checks, dispatch. Dimensions: B rows, V words."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from prism_kernels.checks import (
    FLOATING,
    check_device,
    check_tensor,
    check_values,
    describe,
    host_sees,
    integer,
    items,
    number,
    shown,
    wrong,
)
from prism_kernels.dispatch import Impl, Implementation, Op, need_triton
from prism_kernels.native import need_native
from prism_kernels.sample_tokens import operators
from prism_kernels.sample_tokens.records import Draw

_PACKAGE = "prism_kernels.sample_tokens"
_OP = Op(
    "sample_tokens",
    [
        Implementation(Impl.TRITON, f"{_PACKAGE}.triton_kernel:sample_tokens", ("cuda",), need_triton, fake=True),
        Implementation(Impl.NATIVE, f"{_PACKAGE}.native:sample_tokens", ("cpu",), need_native),
        Implementation(Impl.CPU, f"{_PACKAGE}.cpu:sample_tokens", ("cpu",)),
        Implementation(Impl.REFERENCE, f"{_PACKAGE}.reference:sample_tokens", ("cpu", "cuda")),
    ],
)

COLDEST = 1e-6  # a temperature below scales logits to numbers that fp32 cannot tell apart


def sample_tokens(
    logits: Tensor,
    *,
    temperature: float,
    seed: int | Tensor,
    response: Tensor,
    step: int | Tensor,
    forbidden: Sequence[int] = (),
    vocab_size: int | None = None,
    impl: str | Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """One token per row, and its log-prob, by Gumbel-max (Gumbel 1954; Maddison, Tarlow and Minka, arXiv 1411.0030).

    Equals, in at least fp32, with -inf for what may not be drawn::

        z = logits / temperature
        token = (z - (-uniform.log()).log()).argmax(-1)         # the first of equals
        logprob = z.log_softmax(-1).gather(-1, token[:, None])[:, 0]

    where ``uniform`` (B, V) is a function of (seed, response, step, word) alone: Philox 4x32-10, whose key schedule and
    distance to the true distribution (at most V * 2^-33 in total variation) stand in sample_tokens/noise.py. So a row
    draws the same token whatever the batch holds besides, on any device: noise and scores are the same bits
    everywhere, and only logits that differ by rounding can part near ties.

    Args:
        logits: (B, V) floating; -inf is never drawn. No gradient goes through. B may be 0.
        temperature: >= 1e-6, or 0: the most probable token, the first of equals, its log-prob at temperature 1.
        seed: in [0, 2^64), or one int64 on the device of ``logits``, whose bits count: a captured graph reads it anew.
        response: (B,) int64: what tells a run's responses apart, whatever batch they are in.
        step: in [0, 2^32), or (B,) int64 of them: index of the token in its response.
        forbidden: ids in [0, V) that have probability 0; a few, as all are looked at for each block of words.
        vocab_size: ids from there on have probability 0 (an embedding may hold more rows than words). Default V.
        impl: "auto", "triton" (one pass), "native" (C++, one pass), "cpu" (plain torch that makes noise where it can
            matter) or "reference".

    Returns:
        token (B,) int64; logprob (B,) fp32, of the distribution that is drawn from.

    Raises:
        ValueError: an argument of another shape, dtype, device or range; names it. Where the host sees values, too, a
            row with NaN, +inf, or nothing but -inf; elsewhere such a row has log-prob NaN, and a token that is allowed:
            NaN counts as -inf, and where nothing else is left, the smallest id.
        RuntimeError: ``impl`` cannot run here.
    """
    check_tensor("logits", logits, {"B": None, "V": None}, FLOATING)
    rows, columns = logits.shape
    if columns < 1:
        raise wrong("logits", "V >= 1", describe(logits))
    check_tensor("response", response, {"B": rows}, [torch.int64])
    check_device("response", response, "logits", logits)
    temperature = number("temperature", temperature, at_least=0)
    if 0 < temperature < COLDEST:
        raise wrong("temperature", f"0 (the most probable token) or a number >= {COLDEST}", shown(temperature))
    words = columns if vocab_size is None else integer("vocab_size", vocab_size, 1, columns)
    ids = [integer("forbidden", word, 0, columns - 1) for word in items("forbidden", forbidden, "a list of ids")]
    barred, first_allowed = _barred(tuple(ids), words)
    draw = Draw(
        logits.detach(), _seed(seed, logits), response, _step(step, logits), temperature, barred, words, first_allowed
    )
    chosen, run = _OP.select(impl, logits.device, logits, response, draw.step, draw.seed)
    if rows == 0:
        return response.new_empty(0), logits.new_empty(0, dtype=torch.float32)
    if logits.device.type == "cpu" and not torch.compiler.is_compiling():
        token, logprob = run(draw)  # an operator's call costs as much as the draw
    else:
        token, logprob = operators.sample(draw, str(chosen))
    if host_sees(logits):
        _check_drawn(logprob)
    return token, logprob


def _seed(seed: int | Tensor, logits: Tensor) -> Tensor:
    """(1,) int64 of its 64 bits."""
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise wrong("seed", "an integer, or one int64", describe(seed))
        check_device("seed", seed, "logits", logits)
        return seed.reshape(1)
    seed = integer("seed", seed, 0, (1 << 64) - 1)
    return torch.full((1,), seed - (seed >> 63 << 64), dtype=torch.int64, device=logits.device)


def _step(step: int | Tensor, logits: Tensor) -> Tensor:
    rows = logits.shape[0]
    if not isinstance(step, Tensor) or (step.dim() == 0 and step.device.type == "cpu"):
        step = integer("step", step, 0, (1 << 32) - 1)
        return torch.full((rows,), step, dtype=torch.int64, device=logits.device)
    check_tensor("step", step, {"B": rows}, [torch.int64])
    check_device("step", step, "logits", logits)
    check_values("step", step, "2^32", 1 << 32)
    return step


@lru_cache(maxsize=16)
def _barred(forbidden: tuple[int, ...], words: int) -> tuple[list[int], int]:
    """(ids below ``words`` that may not be drawn, ascending; the smallest id that may)."""
    barred = sorted({word for word in forbidden if word < words})
    if len(barred) == words:
        raise wrong("forbidden", "ids that leave a word to draw", f"all of [0, {words})")
    first_allowed = next((i for i, word in enumerate(barred) if word != i), len(barred))
    return barred, first_allowed


def _check_drawn(logprob: Tensor) -> None:
    odd = logprob.isnan()
    if odd.any():
        row = int(odd.nonzero()[0])
        raise wrong("logits", "numbers or -inf, and a number for some word that may be drawn", f"row {row} with others")
