"""Checks of what only values show, where the host can see them: on a CPU, when an op or its operator runs."""

from __future__ import annotations

import torch
from torch import Tensor

from prism_kernels.checks import check_values, host_sees, wrong


def check_indices(
    num_experts: int, expert_index: Tensor | None, segment_kind: Tensor | None = None, num_kinds: int = 0
) -> None:
    """Experts and kinds that exist."""
    if expert_index is not None:
        check_values("expert_index", expert_index, "E", num_experts)
    if segment_kind is not None:
        check_values("segment_kind", segment_kind, "num_kinds", num_kinds)


def check_plan(order: Tensor, offset: Tensor, expert_index: Tensor | None = None) -> None:
    """Every slot in one row, every row at one expert, which is the slot's where that is given."""
    check_values("routing.token_order", order, "T*k", len(order))
    if host_sees(order) and len(order) and int(order.bincount().max()) > 1:  # a slot without a row would be undefined
        raise wrong("routing.token_order", f"every one of T*k = {len(order)} slots once", "a slot twice")
    if host_sees(offset):
        edges = offset.tolist()
        if edges != sorted(edges) or (edges[0], edges[-1]) != (0, len(order)):
            raise wrong("routing.expert_offset", f"to rise from 0 to T*k = {len(order)}", str(edges))
        if expert_index is not None and host_sees(expert_index):
            planned = torch.arange(len(edges) - 1).repeat_interleave(offset.diff())
            if not torch.equal(expert_index.flatten()[order.long()].long(), planned):
                remedy = "make it by moe_route or plan_routing"
                raise wrong("routing.expert_index", "the experts of token_order and expert_offset", "others", remedy)
