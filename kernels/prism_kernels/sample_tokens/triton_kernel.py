"""One pass over the logits, cut so that a few rows fill a GPU, and a merge of the cuts: two launches, no wait.

Legend: B rows, S splits of a row, W words of one step of a program (4 * CALLS: Philox makes four at a time).
Noise is that of noise.py bit for bit: sums and products alone, and none fused (enable_fp_fusion=False). A step whose
largest logit lies `noise.LARGEST` below the best score so far makes no noise. What NaN is: see api.py.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from prism_kernels.sample_tokens import noise
from prism_kernels.sample_tokens.records import Draw

PROGRAMS = 512  # to fill a GPU with
MOST_SPLITS = 128
PARTS = 4  # numbers a program leaves: largest logit, sum of exp, best score, its logit
LARGEST = tl.constexpr(noise.LARGEST)
SQRT_HALF = tl.constexpr(noise.SQRT_HALF_BITS)
LOG_2 = tl.constexpr(noise.LOG_2)
FAR = tl.constexpr(noise.FAR)
P0, P1, P2, P3, P4, P5, P6, P7 = (tl.constexpr(coefficient) for coefficient in noise.POLYNOMIAL)
NOWHERE = tl.constexpr((1 << 62) - 1)  # a word beyond all


def step_options() -> dict[str, int]:
    return {"CALLS": 512, "num_warps": 4}


@triton.jit
def _log1p(f):
    p = f * P7 + P6
    p = p * f + P5
    p = p * f + P4
    p = p * f + P3
    p = p * f + P2
    p = p * f + P1
    p = p * f + P0
    square = f * f
    return f + (square * f * p - square * 0.5)


@triton.jit
def _mantissa(x):
    shifted = x.to(tl.int32, bitcast=True) - SQRT_HALF
    return ((shifted & 0x7FFFFF) + SQRT_HALF).to(tl.float32, bitcast=True) - 1.0


@triton.jit
def _exponent(x):
    return ((x.to(tl.int32, bitcast=True) - SQRT_HALF) >> 23).to(tl.float32)


@triton.jit
def _gumbel(bits):
    upper = bits.to(tl.int32, bitcast=True) >> 31  # all bits or none
    x = ((bits.to(tl.int32, bitcast=True) ^ upper).to(tl.float32) + 0.5) * 2.3283064365386963e-10  # 2^-32
    far = x > FAR
    f = tl.where(upper != 0, tl.where(far, 1.0 - (x + x), 0.0 - x), _mantissa(x))
    e = tl.where(upper != 0, tl.where(far, -1.0, 0.0), _exponent(x))
    exponential = 0.0 - (e * LOG_2 + _log1p(f))
    return 0.0 - (_exponent(exponential) * LOG_2 + _log1p(_mantissa(exponential)))


@triton.jit
def _scores(logits_ptr, base, word, num_words, inverse, forbidden_ptr, num_forbidden, first, last, WIDE: tl.constexpr):
    """(CALLS,) logits of words, scaled; -inf for what may not be drawn."""
    z = tl.load(logits_ptr + base + word, mask=word < num_words, other=float("-inf")).to(WIDE) * inverse
    for i in range(num_forbidden):
        barred = tl.load(forbidden_ptr + i)
        if (barred >= first) & (barred < last):
            z = tl.where(word == barred, float("-inf"), z)
    return z


@triton.jit
def _number(z):
    """NaN as -inf."""
    return tl.where(z == z, z, float("-inf"))


@triton.jit
def _better(score, z, word, best, best_z, best_word):
    """The first of equals is kept: words come in ascending order."""
    wins = score > best
    return tl.where(wins, score, best), tl.where(wins, z, best_z), tl.where(wins, word, best_word)


@triton.jit
def sample_tokens_split_kernel(
    logits_ptr,  # (B, V), last stride 1
    seed_ptr,  # (1,) int64
    response_ptr,  # (B,) int64
    step_ptr,  # (B,) int64
    forbidden_ptr,  # ascending int64, or seed_ptr
    part_ptr,  # (B, S, 4) out
    word_ptr,  # (B, S) int64 out
    row_stride,
    num_words,
    num_forbidden,
    num_splits,
    split_words,  # a multiple of W
    inverse: tl.float64,
    NOISY: tl.constexpr,
    WIDE: tl.constexpr,
    CALLS: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    i_split = tl.program_id(1).to(tl.int64)
    base = i_row * row_stride
    inverse = (tl.zeros([1], tl.float64) + inverse).to(WIDE)
    call = tl.arange(0, CALLS)
    inside = (call // 64) * 256 + call % 64  # of a step: the first of the four words that a call serves
    response = tl.load(response_ptr + i_row)
    low, high = response.to(tl.uint32), (response >> 32).to(tl.uint32)
    turn = tl.load(step_ptr + i_row).to(tl.uint32)
    seed = tl.load(seed_ptr)

    never = float("-inf")
    top = tl.full([], never, WIDE)
    total = tl.full([], 0.0, WIDE)
    bar = tl.full([], never, WIDE)  # the best score so far
    best = tl.full([CALLS], never, WIDE)
    best_z = tl.full([CALLS], never, WIDE)
    best_word = tl.full([CALLS], NOWHERE, tl.int64)
    begin = i_split * split_words
    end = tl.minimum(begin + split_words, num_words)
    for first in range(begin, end, 4 * CALLS):
        w0 = first + inside.to(tl.int64)
        last = first + 4 * CALLS
        z0 = _scores(logits_ptr, base, w0, end, inverse, forbidden_ptr, num_forbidden, first, last, WIDE)
        z1 = _scores(logits_ptr, base, w0 + 64, end, inverse, forbidden_ptr, num_forbidden, first, last, WIDE)
        z2 = _scores(logits_ptr, base, w0 + 128, end, inverse, forbidden_ptr, num_forbidden, first, last, WIDE)
        z3 = _scores(logits_ptr, base, w0 + 192, end, inverse, forbidden_ptr, num_forbidden, first, last, WIDE)
        here = tl.max(tl.maximum(tl.maximum(_number(z0), _number(z1)), tl.maximum(_number(z2), _number(z3))), 0)
        higher = tl.maximum(top, here)
        shift = tl.where(higher == never, 0.0, higher)
        some = tl.exp(z0 - shift) + tl.exp(z1 - shift) + tl.exp(z2 - shift) + tl.exp(z3 - shift)
        total = total * tl.exp(top - shift) + tl.sum(some, 0)  # NaN where a number is NaN or +inf
        top = higher
        if NOISY:
            if here + LARGEST >= bar:
                column = (w0 // 4 - inside.to(tl.int64) // 4 + call).to(tl.uint32)
                b0, b1, b2, b3 = tl.philox(seed, column, turn, low, high, 10)
                z0, z1, z2, z3 = _number(z0), _number(z1), _number(z2), _number(z3)
                best, best_z, best_word = _better(z0 + _gumbel(b0), z0, w0, best, best_z, best_word)
                best, best_z, best_word = _better(z1 + _gumbel(b1), z1, w0 + 64, best, best_z, best_word)
                best, best_z, best_word = _better(z2 + _gumbel(b2), z2, w0 + 128, best, best_z, best_word)
                best, best_z, best_word = _better(z3 + _gumbel(b3), z3, w0 + 192, best, best_z, best_word)
                bar = tl.max(best, 0)
        else:
            if here > bar:
                z0, z1, z2, z3 = _number(z0), _number(z1), _number(z2), _number(z3)
                best, best_z, best_word = _better(z0, z0, w0, best, best_z, best_word)
                best, best_z, best_word = _better(z1, z1, w0 + 64, best, best_z, best_word)
                best, best_z, best_word = _better(z2, z2, w0 + 128, best, best_z, best_word)
                best, best_z, best_word = _better(z3, z3, w0 + 192, best, best_z, best_word)
                bar = tl.max(best, 0)
    token = tl.min(tl.where((best == bar) & (best > never), best_word, NOWHERE), 0)
    at = i_row * num_splits + i_split
    tl.store(part_ptr + at * 4, top)
    tl.store(part_ptr + at * 4 + 1, total)
    tl.store(part_ptr + at * 4 + 2, bar)
    tl.store(part_ptr + at * 4 + 3, tl.max(tl.where(best_word == token, best_z, never), 0))
    tl.store(word_ptr + at, token)


@triton.jit
def sample_tokens_merge_kernel(
    part_ptr,  # (B, S, 4)
    word_ptr,  # (B, S) int64
    token_ptr,  # (B,) int64 out
    logprob_ptr,  # (B,) fp32 out
    num_splits,
    first_allowed,
    BLOCK: tl.constexpr,  # of splits
):
    i_row = tl.program_id(0).to(tl.int64)
    i_split = tl.arange(0, BLOCK)
    here = i_split < num_splits
    p_part = part_ptr + (i_row * num_splits + i_split) * 4
    never = float("-inf")
    top = tl.load(p_part, mask=here, other=never)  # (S,)
    total = tl.load(p_part + 1, mask=here, other=0.0)
    best = tl.load(p_part + 2, mask=here, other=never)
    best_z = tl.load(p_part + 3, mask=here, other=never)
    word = tl.load(word_ptr + i_row * num_splits + i_split, mask=here, other=NOWHERE)
    highest = tl.max(top, 0)
    shift = tl.where(highest == never, 0.0, highest)
    total = tl.sum(total * tl.exp(top - shift), 0)
    wins = (best == tl.max(best, 0)) & (best > never)
    token = tl.min(tl.where(wins, word, NOWHERE), 0)
    z = tl.max(tl.where(wins & (word == token), best_z, never), 0)
    found = token < NOWHERE
    tl.store(token_ptr + i_row, tl.where(found, token, first_allowed))
    logprob = tl.where(found, (z - shift) - tl.log(total), float("nan"))
    tl.store(logprob_ptr + i_row, logprob.to(tl.float32))


@lru_cache(maxsize=16)
def _ids(forbidden: tuple[int, ...], device: torch.device) -> Tensor:
    """Kept, as a captured graph reads them."""
    return torch.tensor(forbidden, dtype=torch.int64, device=device)


def splits(rows: int, words: int, step: int) -> tuple[int, int]:
    """(splits of a row, words of each, a multiple of ``step``)."""
    steps = triton.cdiv(words, step)
    wanted = max(1, min(MOST_SPLITS, steps, triton.cdiv(PROGRAMS, rows)))
    each = triton.cdiv(steps, wanted)
    return triton.cdiv(steps, each), each * step


def sample_tokens(draw: Draw) -> tuple[Tensor, Tensor]:
    logits = draw.logits if draw.logits.stride(1) == 1 else draw.logits.contiguous()
    rows = logits.shape[0]
    options: dict[str, Any] = step_options()
    num_splits, split_words = splits(rows, draw.words, 4 * options["CALLS"])
    part = logits.new_empty(rows, num_splits, PARTS, dtype=draw.wide)
    word = draw.response.new_empty(rows, num_splits)
    token, logprob = draw.response.new_empty(rows), logits.new_empty(rows, dtype=torch.float32)
    seed = draw.seed
    forbidden = _ids(tuple(draw.forbidden), logits.device) if draw.forbidden else seed
    sample_tokens_split_kernel[(rows, num_splits)](
        logits, seed, draw.response.contiguous(), draw.step.contiguous(), forbidden, part, word, logits.stride(0),
        draw.words, len(draw.forbidden), num_splits, split_words, draw.inverse, NOISY=draw.temperature > 0,
        WIDE=tl.float64 if draw.wide == torch.float64 else tl.float32, enable_fp_fusion=False, **options,
    )  # fmt: skip
    sample_tokens_merge_kernel[(rows,)](
        part, word, token, logprob, num_splits, draw.first_allowed, BLOCK=MOST_SPLITS, num_warps=1
    )
    return token, logprob
