"""What one step is told: its tensors, the numbers of each tensor, those of all; and the table that C++ reads."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

_ROW = struct.Struct("<5Q2qQ3f4x")  # csrc/adamw.h: Row
_MASK = (1 << 64) - 1


class Operands(NamedTuple):
    """One entry per tensor in each list, all of one shape; moments are of one dtype."""

    parameter: list[Tensor]  # fp32, or bf16 with a remainder
    gradient: list[Tensor]  # fp32 or bf16
    remainder: list[Tensor | None]  # int16
    exp_avg: list[Tensor]  # fp32 or bf16
    exp_avg_sq: list[Tensor]


class Factors(NamedTuple):
    """Of one tensor. Numbers are fp32 ones, held as Python's."""

    decay: float  # 1 - lr * weight_decay
    step_size: float  # -lr / (1 - beta1^step)
    correction: float  # sqrt(1 - beta2^step)
    key: int  # 64 bits, of the bits that bf16 moments are rounded with


class Constants(NamedTuple):
    """Of all tensors, fp32 numbers too."""

    new_average: float  # 1 - beta1
    beta2: float
    new_square: float  # 1 - beta2
    eps: float


class Table(NamedTuple):
    """The tensors of one kind, as csrc/adamw.h reads them."""

    kind: int  # 1: weights are split; 2: gradients are bf16; 4: moments are bf16
    rows: bytes
    num_rows: int
    num_chunks: int


def constants(betas: tuple[float, float], eps: float) -> Constants:
    beta1, beta2 = betas
    return Constants(fp32(1 - beta1), fp32(beta2), fp32(1 - beta2), fp32(eps))


def factors(lr: float, betas: tuple[float, float], weight_decay: float, step: int, key: int) -> Factors:
    """In double precision, then rounded: as torch.optim.AdamW computes them."""
    beta1, beta2 = betas
    return Factors(fp32(1 - lr * weight_decay), fp32(-(lr / (1 - beta1**step))), fp32((1 - beta2**step) ** 0.5), key)


def fp32(value: float) -> float:
    """The nearest fp32 number."""
    return struct.unpack("f", struct.pack("f", value))[0]


def key(seed: int, step: int, number: int) -> int:
    """64 bits of a seed, a step and a tensor's number, by the finaliser of SplitMix64 over one after the other."""
    state = 0
    for word in (seed, step, number):
        state = (state + word + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


def tables(operands: Operands, numbers: list[Factors], chunk: int) -> Iterator[Table]:
    """One table per kind of tensors. ``chunk``: elements that a block updates."""
    split = [tensor is not None for tensor in operands.remainder]
    gradients = [tensor.dtype is torch.bfloat16 for tensor in operands.gradient]
    moments = [tensor.dtype is torch.bfloat16 for tensor in operands.exp_avg]
    kinds = [a + 2 * b + 4 * c for a, b, c in zip(split, gradients, moments)]
    addresses = [[0 if tensor is None else tensor.data_ptr() for tensor in held] for held in operands]
    sizes = [tensor.numel() for tensor in operands.parameter]
    for kind in dict.fromkeys(kinds):
        rows, chunks = [], 0
        for own_kind, five, size, own in zip(kinds, zip(*addresses), sizes, numbers):
            if own_kind == kind:
                rows.append(_ROW.pack(*five, size, chunks, own.key, own.decay, own.step_size, own.correction))
                chunks += -(-size // chunk)
        yield Table(kind, b"".join(rows), len(rows), chunks)
