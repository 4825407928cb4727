"""Production configurations of decoding, for the compile gate."""

from __future__ import annotations

from typing import Any

import triton.language as tl

from prism_kernels.compile_gate import Configuration
from prism_kernels.tree_attention import triton_decode

ITEM = {"bf16": 2, "fp16": 2, "fp32": 4}
WIDTH = 16  # rows of a tile


def configurations() -> list[Configuration]:
    """Heads of 64 and 128; 2, 4 and 8 query heads to a key-value head; numbers of rows and tables' sizes are any."""
    rows = []
    for dtype, size in ITEM.items():
        for dim in (64, 128):
            for rep in (2, 4, 8):
                rows.append(_decode(dtype, size, dim, rep))
    return rows


def _decode(dtype: str, size: int, dim: int, rep: int) -> Configuration:
    names = ("q", "k", "v", "k_pages", "v_pages")
    signature = dict.fromkeys((f"{name}_ptr" for name in names), f"*{dtype}")
    signature |= dict.fromkeys(("q_weight_ptr", "k_weight_ptr", "cos_ptr", "sin_ptr", "out_ptr"), f"*{dtype}")
    tables = ("prompt_page", "prompt_length", "own_page", "own_length", "group", "tile_row", "arrived")
    signature |= dict.fromkeys((f"{name}_ptr" for name in tables), "*i32")
    signature |= {"part_ptr": "*fp32", "sum_ptr": "*fp32", "scale": "fp64", "eps": "fp64"}
    strides = ("q_row_stride", "k_row_stride", "v_row_stride")
    lengths = (
        "num_heads",
        "num_kv_heads",
        "num_tiles",
        "width",
        "prompt_pages",
        "own_pages",
        "prompt_cuts",
        "own_cuts",
    )
    tile = triton_decode.tile_queries(WIDTH * rep, size, dim)
    constants: dict[str, Any] = triton_decode.launch_options(size, dim, tile)
    warps, stages = constants.pop("num_warps"), constants.pop("num_stages")
    constants |= {"TILE_M": tile, "ROW_M": triton_decode.padded(rep), "NORM": True}
    constants |= {"DIM": dim, "D_PAD": dim, "WIDE": tl.float32}
    return Configuration(
        f"decode {dtype} D{dim} rep {rep}", triton_decode.shared_prompt_decode_kernel,
        signature | dict.fromkeys((*strides, *lengths), "i32"), constants, warps, stages, divisible_by_16=strides,
    )  # fmt: skip
