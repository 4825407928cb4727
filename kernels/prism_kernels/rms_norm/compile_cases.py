"""Production configurations of the norms' kernels, for the compile gate."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import torch
import triton.language as tl

from prism_kernels.compile_gate import Configuration
from prism_kernels.rms_norm.triton_launch import norm_options, rotate_options
from prism_kernels.rms_norm.triton_norm import rms_norm_bwd_kernel, rms_norm_fwd_kernel
from prism_kernels.rms_norm.triton_rotate import qk_norm_rotate_bwd_kernel, qk_norm_rotate_fwd_kernel

# (x, weight, cos and sin, wide). Models of bf16, master weights of fp32 beside them, and what tests run.
DTYPES = (
    ("bf16", "bf16", "fp32", "fp32"),
    ("bf16", "fp32", "bf16", "fp32"),
    ("fp16", "fp16", "fp32", "fp32"),
    ("fp32", "fp32", "fp32", "fp32"),
    ("fp64", "fp64", "fp64", "fp64"),
)
WIDTHS = (2048, 2560, 4096, 5120, 16384)  # H: of 2B, 4B, 8B, 32B, and one that does not fit a program
HEADS = ((16, 8, 128), (32, 8, 128), (64, 8, 128), (32, 8, 64), (32, 8, 256), (16, 16, 96))  # Hq, Hkv, D
WIDE = {"fp32": tl.float32, "fp64": tl.float64}
TORCH = {"fp32": torch.float32, "fp64": torch.float64}


def configurations() -> list[Configuration]:
    rows = []
    for (dtype, weight, _, wide), width in product(DTYPES, WIDTHS):
        rows += _norm(f"{dtype}, weight {weight}, H {width}", dtype, weight, wide, width)
    for dtypes, heads in product(DTYPES, HEADS):
        rows += _rotate(dtypes, heads)
    return rows


def _launch(options: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """(constexprs, warps)"""
    return {k: v for k, v in options.items() if k not in ("num_warps", "PROGRAMS")}, options["num_warps"]


def _norm(name: str, dtype: str, weight: str, wide: str, width: int) -> list[Configuration]:
    flags = {"WIDE": WIDE[wide]}
    numbers = {"eps": "fp64", "inverse_width": "fp64"}
    rows = []
    for residual in (False, True):
        blocks, warps = _launch(norm_options(width, TORCH[wide], "forward"))
        strides = ("width", "x_stride", "residual_stride")
        pointers = {f"{tensor}_ptr": f"*{dtype}" for tensor in ("x", "residual", "y", "total")}
        signature = {**pointers, "weight_ptr": f"*{weight}", "scale_ptr": f"*{wide}"}
        signature |= {**dict.fromkeys(strides, "i32"), **numbers}
        constants = {"HAS_RESIDUAL": residual, **flags, **blocks}
        title = f"norm {name}{' residual' if residual else ''}"
        rows.append(Configuration(title, rms_norm_fwd_kernel, signature, constants, warps, divisible_by_16=strides))
    for d_total, with_weight in product((False, True), repeat=2):
        blocks, warps = _launch(norm_options(width, TORCH[wide], "backward"))
        strides = ("width", "d_y_stride", "d_total_stride", "x_stride")
        pointers = {f"{tensor}_ptr": f"*{dtype}" for tensor in ("d_y", "d_total", "x", "d_x")}
        signature = {**pointers, "weight_ptr": f"*{weight}", "scale_ptr": f"*{wide}"}
        signature |= {"partial_ptr": f"*{wide if with_weight else dtype}", "num_rows": "i32"}
        signature |= {**dict.fromkeys(strides, "i32"), "inverse_width": "fp64"}
        constants = {"HAS_D_TOTAL": d_total, "WITH_WEIGHT": with_weight, **flags, **blocks}
        title = f"norm backward {name}{' d_total' if d_total else ''}{'' if with_weight else ' frozen'}"
        rows.append(Configuration(title, rms_norm_bwd_kernel, signature, constants, warps, divisible_by_16=strides))
    odd = [row for row in rows if width == WIDTHS[1] and row.constexprs.get("WITH_WEIGHT", True)]
    return rows + [replace(row, name=f"{row.name} odd H", divisible_by_16=()) for row in odd]


def _rotate(dtypes: tuple[str, str, str, str], heads: tuple[int, int, int]) -> list[Configuration]:
    dtype, weight, angle, wide = dtypes
    q_heads, k_heads, width = heads
    rows = []
    shared = {"q_ptr": f"*{dtype}", "k_ptr": f"*{dtype}", "q_weight_ptr": f"*{weight}", "k_weight_ptr": f"*{weight}"}
    shared |= {"cos_ptr": f"*{angle}", "sin_ptr": f"*{angle}", "eps": "fp64", "inverse_width": "fp64"}
    shared |= dict.fromkeys(("q_heads", "k_heads", "half"), "i32")
    strides = tuple(f"{tensor}{of}_stride" for tensor in ("q", "k") for of in ("", "_head"))
    tables = ("cos_stride", "sin_stride")
    for direction, kernel in (("forward", qk_norm_rotate_fwd_kernel), ("backward", qk_norm_rotate_bwd_kernel)):
        blocks, warps = _launch(rotate_options(width // 2, max(q_heads, k_heads), direction))
        outputs, more = ("q_out_ptr", "k_out_ptr"), {}
        given = (*strides, *tables)
        if direction == "backward":
            outputs = ("d_q_out_ptr", "d_k_out_ptr", "d_q_ptr", "d_k_ptr")
            more = {"partial_ptr": f"*{wide}", "num_tokens": "i32"}
            given += tuple(f"d_{tensor}_out{of}_stride" for tensor in ("q", "k") for of in ("", "_head"))
        signature = {**shared, **dict.fromkeys(outputs, f"*{dtype}"), **more, **dict.fromkeys(given, "i32")}
        aligned = (*given, "q_heads", "half")
        title = f"rotate {direction} {dtype}, weight {weight}, heads {q_heads} {k_heads} {width}"
        constants = {"WIDE": WIDE[wide], **blocks}
        rows.append(Configuration(title, kernel, signature, constants, warps, divisible_by_16=aligned))
    odd = rows if heads == HEADS[-1] else []
    return rows + [replace(row, name=f"{row.name} odd strides", divisible_by_16=()) for row in odd]
