"""AdamW in plain torch: the definition, of which other implementations give every bit.

    w  <-  w * (1 - lr * weight_decay)
    m  <-  fma(1 - beta1, g - m, m)
    v  <-  fma((1 - beta2) * g, g, v * beta2)
    w  <-  w + (-lr / (1 - beta1^t) * m) / (sqrt(v) / sqrt(1 - beta2^t) + eps)

in fp32, where fma is rounded once and all else after every operation. torch.optim.AdamW computes the same on a CPU with
AVX2 or AVX-512, but for the square root of its foreach form (MKL's, one off in places) and the ends of its fused form.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prism_kernels.adamw.remainder import QUIET, join_master, split_master
from prism_kernels.adamw.table import Constants, Factors, Operands


def adamw_step(operands: Operands, numbers: list[Factors], constants: Constants, clip: Tensor | None) -> None:
    if clip is not None and not bool(clip.isfinite()):
        return
    new_average, beta2, new_square, eps = constants
    for parameter, gradient, remainder, exp_avg, exp_avg_sq, own in zip(*operands, numbers):
        g = gradient.float() if clip is None else gradient.float() * clip
        w = parameter if remainder is None else join_master(parameter, remainder)
        m, v = exp_avg.float(), exp_avg_sq.float()
        m = fma(torch.full_like(m, new_average), g - m, m)
        v = fma(g * new_square, g, v * beta2)
        w = w * own.decay + (m * own.step_size) / (root(v) / own.correction + eps)
        if remainder is None:
            parameter.copy_(w)
        else:
            for held, value in zip((parameter, remainder), split_master(w)):
                held.copy_(value)
        for held, value, shift in ((exp_avg, m, 0), (exp_avg_sq, v, 16)):
            if held.dtype == torch.bfloat16:
                value = round_stochastically(value, (random_bits(own.key, value) >> shift) & 0xFFFF)
            held.copy_(value)


def root(v: Tensor) -> Tensor:
    """The square root, rounded once; torch's own of fp32 is one off in places on a CPU (MKL's)."""
    return v.double().sqrt().float()


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a * b + c of fp32 tensors, rounded once.

    In fp64 the product is exact and the sum is rounded to odd, so that the rounding to fp32 is the only one that counts
    (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", 2008).
    """
    product, c = a.double() * b.double(), c.double()
    total = product + c
    back = total - product
    error = (product - (total - back)) + (c - back)  # exact: Knuth's two-sum
    bits = total.view(torch.int64)
    outwards = torch.where((error > 0) == (total > 0), 1, -1)
    inexact = (error != 0) & total.isfinite() & (bits & 1 == 0)
    return torch.where(inexact, bits + outwards, bits).view(torch.float64).float()


def random_bits(key: int, like: Tensor) -> Tensor:
    """32 bits of every element, int64: a function of the key and its index alone."""
    index = torch.arange(like.numel(), device=like.device).view(like.shape)
    low, high = index & 0xFFFFFFFF, index >> 32
    return _mixed(_mixed(low ^ (key & 0xFFFFFFFF)) ^ (key >> 32) ^ high)


def _mixed(x: Tensor) -> Tensor:
    """A permutation of 32 bits: xor-shifts and products with odd numbers ("lowbias32", C. Wellons)."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & 0xFFFFFFFF
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def round_stochastically(value: Tensor, random: Tensor) -> Tensor:
    """fp32 -> bf16, up or down with the probability that makes the mean exact; ``random``: 16 bits, as integers."""
    bits = value.view(torch.int32)
    bits = torch.where(value.isnan(), bits | QUIET, bits + random.to(torch.int32))
    return (bits >> 16).to(torch.int16).view(torch.bfloat16)
