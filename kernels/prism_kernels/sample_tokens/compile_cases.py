"""Production configurations, for the compile gate."""

from __future__ import annotations

from itertools import product
from typing import Any

import triton.language as tl

from prism_kernels.compile_gate import Configuration
from prism_kernels.sample_tokens import triton_kernel

EXACT = {"enable_fp_fusion": False}


def configurations() -> list[Configuration]:
    """V (151,936) is a multiple of 16; "odd V" is none."""
    rows = []
    for dtype, noisy, odd in product(("fp32", "bf16", "fp16", "fp64"), (True, False), (False, True)):
        wide = "fp64" if dtype == "fp64" else "fp32"
        signature = {"logits_ptr": f"*{dtype}", "part_ptr": f"*{wide}", "inverse": "fp64"}
        signature |= dict.fromkeys(("seed_ptr", "response_ptr", "step_ptr", "forbidden_ptr", "word_ptr"), "*i64")
        lengths = ("row_stride", "num_words", "num_forbidden", "num_splits", "split_words")
        constants: dict[str, Any] = triton_kernel.step_options()
        warps = constants.pop("num_warps")
        constants |= {"NOISY": noisy, "WIDE": tl.float64 if wide == "fp64" else tl.float32}
        name = f"split {dtype}{'' if noisy else ' no noise'}{' odd V' if odd else ''}"
        aligned = ("split_words",) if odd else ("split_words", "row_stride", "num_words")
        rows.append(
            Configuration(
                name, triton_kernel.sample_tokens_split_kernel, signature | dict.fromkeys(lengths, "i32"), constants,
                warps, divisible_by_16=aligned, options=EXACT,
            )
        )  # fmt: skip
    for wide in ("fp32", "fp64"):
        signature = {"part_ptr": f"*{wide}", "word_ptr": "*i64", "token_ptr": "*i64", "logprob_ptr": "*fp32"}
        signature |= {"num_splits": "i32", "first_allowed": "i32"}
        constants = {"BLOCK": triton_kernel.MOST_SPLITS}
        rows.append(
            Configuration(f"merge {wide}", triton_kernel.sample_tokens_merge_kernel, signature, constants, num_warps=1)
        )
    return rows
