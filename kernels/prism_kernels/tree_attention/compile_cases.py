"""Production configurations of the kernels that merge a library's calls, and of decoding, for the compile gate."""

from __future__ import annotations

from itertools import product

from prism_kernels.compile_gate import Configuration
from prism_kernels.tree_attention import decode_cases
from prism_kernels.tree_attention.triton_merge import (
    SUM_BLOCK,
    SUM_WARPS,
    WARPS,
    tile_of,
    tree_attention_bwd_sum_kernel,
    tree_attention_fwd_mask_kernel,
    tree_attention_fwd_merge_kernel,
)

DIMS = (64, 72, 128, 256)
GRADIENTS = ("dq_ptr", "dk_ptr", "dv_ptr")


def configurations() -> list[Configuration]:
    rows = []
    for part, wide, dim, scatter, last in product(("bf16", "fp16"), (False, True), DIMS, (False, True), (False, True)):
        if last and scatter:  # rows that no part has are left: tree_attention_fwd_mask_kernel settles all
            continue
        out = "fp32" if wide else part
        signature = {"out_ptr": f"*{out}", "lse_ptr": "*fp32", "part_ptr": f"*{part}", "part_lse_ptr": "*fp32"}
        signature |= {"row_ptr": "*i32" if scatter else "*fp32", **dict.fromkeys(("total", "count", "heads"), "i32")}
        flags = {"SCATTER": scatter, "LAST": last, **tile_of(dim)}
        said = f"{part} into {out}, D {dim}{', rows' if scatter else ''}{', last' if last else ''}"
        signature["eighths"] = "i32"
        divisible = ("eighths",) if dim % 128 == 0 else ()
        kernel = tree_attention_fwd_merge_kernel
        rows.append(Configuration(f"merge {said}", kernel, signature, flags, WARPS, divisible_by_16=divisible))
    for out, dim in product(("bf16", "fp16", "fp32"), DIMS):
        signature = {"out_ptr": f"*{out}", "lse_ptr": "*fp32", **dict.fromkeys(("total", "heads", "eighths"), "i32")}
        divisible = ("eighths",) if dim % 128 == 0 else ()
        kernel, flags = tree_attention_fwd_mask_kernel, tile_of(dim)
        rows.append(Configuration(f"mask {out}, D {dim}", kernel, signature, flags, WARPS, divisible_by_16=divisible))
    for part, wide, scatter in product(("bf16", "fp16"), (False, True), (False, True)):
        signature = {name: "*fp32" if wide else f"*{part}" for name in GRADIENTS}
        signature |= {f"part_{name}_ptr": f"*{part}" for name in "qkv"} | {"row_ptr": "*i32" if scatter else f"*{part}"}
        sizes = ("size_q", "size_k", "width")
        name = f"sum {part}{' into fp32' if wide else ''}{', rows' if scatter else ''}"
        kernel, flags = tree_attention_bwd_sum_kernel, {"SCATTER": scatter, "BLOCK": SUM_BLOCK}
        signature |= dict.fromkeys(sizes, "i32")
        rows.append(Configuration(name, kernel, signature, flags, SUM_WARPS, divisible_by_16=sizes))
    return rows + decode_cases.configurations()
