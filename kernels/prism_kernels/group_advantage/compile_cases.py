"""Production configurations of the advantage kernels, for the compile gate."""

from __future__ import annotations

from itertools import product

from prism_kernels.compile_gate import Configuration
from prism_kernels.group_advantage.rules import RULES
from prism_kernels.group_advantage.triton_kernel import (
    I_BLOCK,
    J_BLOCK,
    WARPS,
    advantage_fwd_kernel,
    group_normalize_fwd_kernel,
    rule_constants,
)

BLOCKS = {"I_BLOCK": I_BLOCK, "J_BLOCK": J_BLOCK}


def configurations() -> list[Configuration]:
    rows = []
    for dtype, leave_one_out, by_std in product(("bf16", "fp32", "fp64"), (False, True), (False, True)):
        signature = {"score_ptr": f"*{dtype}", "id_ptr": "*i64", "out_ptr": "*fp64" if dtype == "fp64" else "*fp32"}
        signature |= {"num_responses": "i32", "score_stride": "i32", "eps_high": "fp32", "eps_low": "fp32"}
        flags = {"LEAVE_ONE_OUT": leave_one_out, "BY_STD": by_std, **BLOCKS}
        name = f"normalize {dtype}{' leave_one_out' if leave_one_out else ''}{' std' if by_std else ''}"
        rows.append(Configuration(name, group_normalize_fwd_kernel, signature, flags, num_warps=WARPS))
    numbers = ("perception_weight", "reasoning_weight", "align_scale", "wrong_penalty", "format_penalty")
    numbers += ("wrong_fine", "format_fine", "accuracy_weight", "format_weight", "eps")
    for (rule, row), dtype, has_valid in product(RULES.items(), ("fp32", "fp64"), (False, True)):
        signature = {"perception_ptr": f"*{dtype}", "reasoning_ptr": f"*{dtype}", "id_ptr": "*i64"}
        signature |= {"valid_ptr": "*u8" if has_valid else "*i64", "out_ptr": "*fp32", "num_responses": "i32"}
        signature |= {"accuracy_ptr": "*fp32" if row.reads_accuracy else "*i64"}
        signature |= dict.fromkeys((*numbers, *(f"{number}_rest" for number in numbers)), "fp32")
        flags = {"HAS_VALID": has_valid, **rule_constants(row), **BLOCKS}
        name = f"{rule} {dtype}{' format_valid' if has_valid else ''}"
        rows.append(Configuration(name, advantage_fwd_kernel, signature, flags, num_warps=WARPS))
    return rows
