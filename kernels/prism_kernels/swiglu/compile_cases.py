"""Production configurations of SwiGLU's kernels, for the compile gate."""

from __future__ import annotations

from dataclasses import replace

import triton.language as tl

from prism_kernels.compile_gate import Configuration
from prism_kernels.swiglu.triton_kernel import block_options, swiglu_bwd_kernel, swiglu_fwd_kernel


def configurations() -> list[Configuration]:
    """I is no constant of the kernels: 6144, 9728 and 12288 are multiples of 16, as strides are; "odd I" is none."""
    rows = []
    for dtype in ("bf16", "fp16", "fp32", "fp64"):
        wide = tl.float64 if dtype == "fp64" else tl.float32
        for direction, kernel in (("forward", swiglu_fwd_kernel), ("backward", swiglu_bwd_kernel)):
            options = block_options(direction)
            warps = options.pop("num_warps")
            pointers, lengths = ("gate_ptr", "up_ptr"), ("width", "gate_stride", "up_stride")
            if direction == "forward":
                pointers += ("out_ptr",)
            else:
                pointers += ("d_out_ptr", "d_gate_ptr", "d_up_ptr")
                lengths += ("d_out_stride", "d_stride")
            signature = {**dict.fromkeys(pointers, f"*{dtype}"), **dict.fromkeys(lengths, "i32")}
            flags = {"WIDE": wide, **options}
            row = Configuration(f"{direction} {dtype}", kernel, signature, flags, warps, divisible_by_16=lengths)
            rows += [row, replace(row, name=f"{row.name} odd I", divisible_by_16=())]
    return rows
