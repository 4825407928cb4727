"""Production configurations of the norms' kernels, for the compile gate."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
import triton.language as tl

from prism_kernels.compile_gate import Configuration
from prism_kernels.rms_norm.triton_launch import norm_options, rotate_options
from prism_kernels.rms_norm.triton_norm import rms_norm_bwd_kernel, rms_norm_fwd_kernel
from prism_kernels.rms_norm.triton_rotate import qk_norm_rotate_bwd_kernel, qk_norm_rotate_fwd_kernel

# (x, weight, cos and sin, wide): models of bf16, master weights of fp32 beside them; what tests and other users run.
TRAINED = (("bf16", "bf16", "fp32", "fp32"), ("bf16", "fp32", "bf16", "fp32"))
OTHERS = (
    ("fp16", "fp16", "fp32", "fp32"),
    ("fp32", "fp32", "fp32", "fp32"),
    ("fp64", "fp64", "fp64", "fp64"),
)
# H of 2B, 4B, 8B and 32B, no multiple of 16, and more than a program holds
WIDTHS = (2048, 2560, 4096, 5120, 2561, 16384)
FEW_WIDTHS = (2560, 2561, 16384)
HEADS = ((16, 8, 128), (32, 8, 128), (32, 8, 64), (32, 8, 256), (15, 7, 90))  # Hq, Hkv, D; the last of odd strides
TRITON = {"fp32": tl.float32, "fp64": tl.float64}
TORCH = {"fp32": torch.float32, "fp64": torch.float64}


def configurations() -> list[Configuration]:
    rows = []
    for dtypes, width in [*product(TRAINED, WIDTHS), *product(OTHERS, FEW_WIDTHS)]:
        rows += _norm(dtypes, width)
    for dtypes, heads in product((*TRAINED, *OTHERS), HEADS):
        rows += _rotate(dtypes, heads)
    return rows


def _launch(options: dict[str, Any], wide: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(constexprs, launch options)"""
    launch = {key: value for key, value in options.items() if key in ("num_warps", "maxnreg")}
    constants = {key: value for key, value in options.items() if key not in (*launch, "PROGRAMS")}
    return {"WIDE": TRITON[wide], **constants}, launch


def _norm(dtypes: tuple[str, str, str, str], width: int) -> list[Configuration]:
    dtype, weight, _, wide = dtypes
    name, shared = f"{dtype}, weight {weight}, H {width}", {"weight_ptr": f"*{weight}", "scale_ptr": f"*{wide}"}
    shared |= {"width": "i32", "x_stride": "i32", "inverse_width": "fp64"}
    rows = []
    for residual in (False, True):
        constants, launch = _launch(norm_options(width, TORCH[wide], "forward"), wide)
        pointers = {f"{tensor}_ptr": f"*{dtype}" for tensor in ("x", "residual", "y", "total")}
        signature = {**shared, **pointers, "residual_stride": "i32", "eps": "fp64"}
        aligned = () if width % 16 else ("width", "x_stride", "residual_stride")
        title = f"norm {name}{' residual' if residual else ''}"
        constants["HAS_RESIDUAL"] = residual
        rows.append(Configuration(title, rms_norm_fwd_kernel, signature, constants, divisible_by_16=aligned, **launch))
    for d_total, with_weight in product((False, True), repeat=2):
        constants, launch = _launch(norm_options(width, TORCH[wide], "backward"), wide)
        pointers = {f"{tensor}_ptr": f"*{dtype}" for tensor in ("d_y", "d_total", "x", "d_x")}
        signature = {**shared, **pointers, "partial_ptr": f"*{wide if with_weight else dtype}"}
        signature |= {"num_rows": "i32", "d_y_stride": "i32", "d_total_stride": "i32"}
        aligned = () if width % 16 else ("width", "x_stride", "d_y_stride", "d_total_stride")
        title = f"norm backward {name}{' d_total' if d_total else ''}{'' if with_weight else ' frozen'}"
        constants |= {"HAS_D_TOTAL": d_total, "WITH_WEIGHT": with_weight}
        rows.append(Configuration(title, rms_norm_bwd_kernel, signature, constants, divisible_by_16=aligned, **launch))
    return rows


def _rotate(dtypes: tuple[str, str, str, str], heads: tuple[int, int, int]) -> list[Configuration]:
    dtype, weight, angle, wide = dtypes
    q_heads, k_heads, width = heads
    strides = ("q_stride", "q_head_stride", "k_stride", "k_head_stride", "cos_stride", "sin_stride")
    upstream = tuple(f"d_{tensor}_out{of}_stride" for tensor in ("q", "k") for of in ("", "_head"))
    shared = {"q_ptr": f"*{dtype}", "k_ptr": f"*{dtype}", "q_weight_ptr": f"*{weight}", "k_weight_ptr": f"*{weight}"}
    shared |= {"cos_ptr": f"*{angle}", "sin_ptr": f"*{angle}", "eps": "fp64", "inverse_width": "fp64"}
    shared |= dict.fromkeys(("q_heads", "k_heads", "half", *strides), "i32")
    forward = {**shared, "q_out_ptr": f"*{dtype}", "k_out_ptr": f"*{dtype}"}
    backward = {**shared, **dict.fromkeys(("d_q_out_ptr", "d_k_out_ptr", "d_q_ptr", "d_k_ptr"), f"*{dtype}")}
    backward |= {"partial_ptr": f"*{wide}", "num_tokens": "i32", **dict.fromkeys(upstream, "i32")}
    rows = []
    for direction, kernel, signature, more in (
        ("forward", qk_norm_rotate_fwd_kernel, forward, ()),
        ("backward", qk_norm_rotate_bwd_kernel, backward, upstream),
    ):
        options = rotate_options(width // 2, max(q_heads, k_heads), TORCH[wide], direction)
        constants, launch = _launch(options, wide)
        aligned = () if width % 16 else ("half", *strides, *more)
        title = f"rotate {direction} {dtype}, weight {weight}, heads {q_heads} {k_heads} {width}"
        rows.append(Configuration(title, kernel, signature, constants, divisible_by_16=aligned, **launch))
    return rows
