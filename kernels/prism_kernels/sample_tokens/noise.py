"""Gumbel noise from a counter: the same bits of the same (seed, response, step, word) on every device, in any batch.

Bits. Philox 4x32-10 (Salmon, Moraes, Dror and Shaw, Parallel random numbers: as easy as 1, 2, 3, SC 2011) makes four
words of 32 bits from a key of 64 bits and a counter of 128. The schedule, no bit of which is shared:

    key      seed, low and high half
    counter  [word // 256 * 64 + word % 64, step, response low half, response high half]
    output   number word // 64 % 4

So one call serves the words w, w + 64, w + 128 and w + 192, and 64 neighbouring words lie in 64 neighbouring calls:
vectors and warps need no shuffle.

From bits to noise. b is uniform among 2^32 integers; u = (b + 1/2) / 2^32 is never 0 nor 1, and noise is
``-log(-log(u))``, in [-3.14, 22.88]. Computed from u in fp32 it would end at 16.6: no number lies between 1 - 2^-24 and
1. So the upper half starts from 1 - u, which integers know exactly, as log1p(-(1 - u)). Only sums, products and
operations on integers are used, each rounded once as IEEE 754 says and none fused, so that C++ and a GPU give the same
bits, which a library's log would not. The error is below `ERROR`.

How far 32 bits part the draws from the softmax. The noise of one word has a distribution function within 2^-33 of
Gumbel's (steps of 2^-32, cut in the middle). Exchange the noise of one word after another: while the others are held,
that word wins beyond a threshold, so an exchange moves at most 2^-33 of probability. In all at most V * 2^-33 in total
variation: 1.8e-5 for V = 151,936. Roundings of fp32 scores below 32 in size, 2^-20 at most, change no ratio of
probabilities by more than 2^-19 of itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

LANES = 64  # neighbouring words that share an output number
BLOCK = 4 * LANES  # words of LANES calls
LARGEST = 23.0  # above all noise
ERROR = 2.0**-21  # of noise over the larger of 1 and its size: two logarithms of at most 4 roundings of 2^-24 each

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
MASK = (1 << 32) - 1

SQRT_HALF_BITS = 0x3F3504F3  # of fp32 sqrt(1/2)
FAR = 0.2928932309150696  # fp32 1 - sqrt(1/2)
LOG_2 = 0.693147182464599609375  # fp32
# log1p(f) = f - f^2 / 2 + f^3 P(f) for f in [sqrt(1/2) - 1, sqrt(2) - 1]: a minimax fit, in fp32; relative error 6e-9
POLYNOMIAL = (
    0.3333333134651184,
    -0.2500081956386566,
    0.20001226663589478,
    -0.16623356938362122,
    0.14201758801937103,
    -0.13160182535648346,
    0.12761574983596802,
    -0.07634492963552475,
)


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four words of 32 bits of four, by a key of two; all int64 in [0, 2^32), broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for turn in range(ROUNDS):
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]  # 64 bits, whatever their sign
        c0, c2 = _high(p1) ^ c1 ^ k0, _high(p0) ^ c3 ^ k1
        c1, c3 = p1 & MASK, p0 & MASK
        if turn + 1 < ROUNDS:
            k0, k1 = (k0 + KEY_STEPS[0]) & MASK, (k1 + KEY_STEPS[1]) & MASK
    return c0, c1, c2, c3


def _high(x: Tensor) -> Tensor:
    return (x >> 32) & MASK


def bits(seed: Tensor, response: Tensor, step: Tensor, word: Tensor) -> Tensor:
    """int64 in [0, 2^32) of these integers, int64 and broadcast: any words, one Philox call each."""
    column = (word // BLOCK) * LANES + word % LANES
    outputs = philox((column, step & MASK, response & MASK, _high(response)), (seed & MASK, _high(seed)))
    number = word // LANES % 4
    low = torch.where(number == 0, outputs[0], outputs[1])
    high = torch.where(number == 2, outputs[2], outputs[3])
    return torch.where(number < 2, low, high)


def calls(words: int) -> int:
    """Philox calls that serve the first words of a row."""
    return -(-words // BLOCK) * LANES


def row_bits(seed: Tensor, response: Tensor, step: Tensor, words: int) -> Tensor:
    """(B, words) bits of the first words of every row, a fourth of the calls of `bits`; response and step (B,)."""
    column = torch.arange(calls(words), device=response.device)
    key = seed & MASK, _high(seed)
    outputs = philox((column, *(x[:, None] for x in (step & MASK, response & MASK, _high(response)))), key)
    stacked = torch.stack([x.view(len(response), -1, LANES) for x in outputs], 2)
    return stacked.view(len(response), -1)[:, :words]


def gumbel(b: Tensor) -> Tensor:
    """fp32 noise of uniform bits, int64 in [0, 2^32)."""
    upper = b >> 31 == 1
    x = (torch.where(upper, MASK - b, b).float() + 0.5) * 2.0**-32  # u, or 1 - u: in (0, 1/2]
    normal, exponent = _split(x)
    far = x > FAR
    beside = torch.where(far, 1.0 - (x + x), -x)  # 1 - x = (1 + this), or half of it
    f = torch.where(upper, beside, normal)
    e = torch.where(upper, -far.float(), exponent)
    exponential = -(e * LOG_2 + _log1p(f))  # -log(u)
    f, e = _split(exponential)
    return -(e * LOG_2 + _log1p(f))


def _split(x: Tensor) -> tuple[Tensor, Tensor]:
    """(f, e) with x = (1 + f) 2^e, f in [sqrt(1/2) - 1, sqrt(2) - 1]; x fp32, normal, > 0."""
    shifted = x.view(torch.int32) - SQRT_HALF_BITS
    mantissa = ((shifted & 0x7FFFFF) + SQRT_HALF_BITS).view(torch.float32)
    return mantissa - 1.0, (shifted >> 23).float()


def _log1p(f: Tensor) -> Tensor:
    p = torch.full_like(f, POLYNOMIAL[-1])
    for coefficient in POLYNOMIAL[-2::-1]:
        p = p * f + coefficient
    square = f * f
    return f + (square * f * p - square * 0.5)
