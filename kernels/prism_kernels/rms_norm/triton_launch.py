"""What triton_norm.py and triton_rotate.py share: block sizes, programs, rows of tensors, numbers."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from prism_kernels.tuned_options import tuned

LARGEST = 32768  # bytes of a row, wide, that stays in registers
TILE = {"forward": 4096, "backward": 1024}  # elements of x a program holds at a time: a few heads of a token


@triton.jit
def _number(value, WIDE: tl.constexpr):
    """An fp64 argument in fp32 or fp64; the interpreter passes it as a Python float."""
    return (tl.zeros([], tl.float64) + value).to(WIDE)


def norm_options(width: int, wide: torch.dtype, direction: str) -> dict[str, Any]:
    """``WHOLE``: a program holds a row. ``PROGRAMS``, of a backward: so many per multiprocessor, each with a partial of
    the weight's gradient; with ``maxnreg`` registers a thread all of them are resident (65,536 are there)."""
    block = triton.next_power_of_2(width)
    whole = block * wide.itemsize <= LARGEST
    block = block if whole else LARGEST // wide.itemsize // 4
    options: dict[str, Any] = {"BLOCK": block, "num_warps": _warps(block * wide.itemsize // 64, 16)}
    if direction == "backward":
        warps = _warps(block * wide.itemsize // 32, 16)
        few = block * wide.itemsize <= 32 * 32 * warps and width % 16 == 0
        registers = 64 if few else 128
        options |= {"num_warps": warps, "maxnreg": registers, "PROGRAMS": max(1, 2048 // registers // warps)}
    key = f"{direction} {block}{'' if whole else ' of more'}"
    return {"WHOLE": whole, **tuned("rms_norm", key, options)}


def rotate_options(half: int, heads: int, wide: torch.dtype, direction: str) -> dict[str, Any]:
    """Of heads of 2 * ``half``. ``HEADS``: so many at a time, at most ``heads``."""
    block = triton.next_power_of_2(half)
    at_once = max(1, min(TILE[direction] // (2 * block), triton.next_power_of_2(heads)))
    warps = _warps(block * at_once // 4, 4)
    options: dict[str, Any] = {"BLOCK": block, "HEADS": at_once, "num_warps": warps}
    if direction == "backward":
        registers = 128 if wide == torch.float32 else 255
        options |= {"maxnreg": registers, "PROGRAMS": 2048 // registers // warps}
    return tuned("rms_norm", f"rotate {direction} {block} x {at_once}", options)


def _warps(threads: int, most: int) -> int:
    return max(1, min(most, threads // 32))


def num_programs(rows: int, device: torch.device, per_multiprocessor: int) -> int:
    """Programs of a backward, which share the rows; in the interpreter as many as one multiprocessor has."""
    gpu = device.type == "cuda"
    processors = torch.cuda.get_device_properties(device).multi_processor_count if gpu else 1
    return max(1, min(rows, processors * per_multiprocessor))


def rows_of(x: Tensor) -> Tensor:
    """(..., H) as (T, H) with last stride 1; copied where that is no view of it."""
    return contiguous_last(x.reshape(-1, x.shape[-1]))


def contiguous_last(x: Tensor) -> Tensor:
    """The tensor, copied where its last stride is not 1."""
    return x if x.stride(-1) == 1 else x.contiguous()


def as_triton(dtype: torch.dtype) -> tl.dtype:
    """Of float32 and float64."""
    return tl.float64 if dtype == torch.float64 else tl.float32
