"""Production configurations of the advantage kernels, for the compile gate."""

from __future__ import annotations

from itertools import product

from prism_kernels.compile_gate import Configuration
from prism_kernels.group_advantage.rules import RULES
from prism_kernels.group_advantage.triton_kernel import (
    GROUP_BLOCK,
    GROUP_WARPS,
    I_BLOCK,
    J_BLOCK,
    WARPS,
    advantage_fwd_kernel,
    group_normalize_fwd_kernel,
    rule_constants,
)

PAIRS = {"SORTED": False, "I_BLOCK": I_BLOCK, "J_BLOCK": J_BLOCK}
SORTED = {"SORTED": True, "I_BLOCK": 1, "J_BLOCK": GROUP_BLOCK}
WAYS = (("", PAIRS, WARPS), (" sorted", SORTED, GROUP_WARPS))
GROUPS = {"id_ptr": "*i64", "order_ptr": "*i64", "end_ptr": "*i64"}


def configurations() -> list[Configuration]:
    rows = []
    for dtype, leave_one_out, by_std, (way, blocks, warps) in product(
        ("bf16", "fp32", "fp64"), (False, True), (False, True), WAYS
    ):
        signature = {"score_ptr": f"*{dtype}", **GROUPS, "out_ptr": "*fp64" if dtype == "fp64" else "*fp32"}
        signature |= {"num_responses": "i32", "score_stride": "i32", "eps": "fp64"}
        flags = {"LEAVE_ONE_OUT": leave_one_out, "BY_STD": by_std, **blocks}
        name = f"normalize {dtype}{' leave_one_out' if leave_one_out else ''}{' std' if by_std else ''}{way}"
        rows.append(Configuration(name, group_normalize_fwd_kernel, signature, flags, num_warps=warps))
    numbers = ("perception_weight", "reasoning_weight", "align_scale", "wrong_penalty", "format_penalty")
    numbers += ("wrong_fine", "format_fine", "accuracy_weight", "format_weight", "eps", "min_std")
    for (rule, row), dtype, has_valid, (way, blocks, warps) in product(
        RULES.items(), ("fp32", "fp64"), (False, True), WAYS
    ):
        if dtype == "fp64" and not blocks["SORTED"]:  # never launched
            continue
        signature = {"perception_ptr": f"*{dtype}", "reasoning_ptr": f"*{dtype}", **GROUPS}
        signature |= {"valid_ptr": "*u8" if has_valid else "*i64", "out_ptr": "*fp32", "num_responses": "i32"}
        signature |= {"accuracy_ptr": "*fp32" if row.reads_accuracy else "*i64"}
        signature |= dict.fromkeys(numbers, "fp64")
        flags = {"HAS_VALID": has_valid, **rule_constants(row), **blocks}
        name = f"{rule} {dtype}{' format_valid' if has_valid else ''}{way}"
        rows.append(Configuration(name, advantage_fwd_kernel, signature, flags, num_warps=warps))
    return rows
