"""The plan in Triton: which token stands where among its expert's rows; no sort, atomics or host synchronisation.

Legend: T tokens, E experts (padded to a power of two), K experts per token, C kinds of token, B blocks of BLOCK_T
tokens, S = T*K slots.

1. count: slots per expert of every block. The router does it besides, with the statistics of kinds (triton_route.py).
2. scan (a program per expert): prefix of the slots over blocks, sums of the statistics in a fixed order.
3. order: every slot's place = expert's offset + slots of earlier blocks + earlier slots of its own block.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

SCAN_BLOCK = 1024  # blocks a step of the scan


def padded(experts: int) -> int:
    """Columns of a tile: a power of two, and at least 16, which tl.dot needs."""
    return max(16, triton.next_power_of_2(experts))


def block_tokens(experts: int) -> int:
    """BLOCK_T of the forward kernels, which share their blocks."""
    return 32 if padded(experts) <= 64 else 16


def order_options(experts: int) -> dict[str, int]:
    return {"BLOCK_T": block_tokens(experts), "num_warps": 8 if padded(experts) == 64 else 4}


@triton.jit
def moe_plan_fwd_count_kernel(
    index_ptr,  # (T, K)
    block_count_ptr,  # (E, B) int32 out
    num_tokens,
    num_experts,
    num_blocks,
    K: tl.constexpr,
    E_PAD: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Slots of every expert in a block, for indices that another router chose."""
    i_block = tl.program_id(0)
    token = i_block * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = token < num_tokens
    expert = tl.arange(0, E_PAD)
    count = tl.zeros([E_PAD], dtype=tl.int32)
    for j in tl.static_range(K):
        best = tl.load(index_ptr + token.to(tl.int64) * K + j, mask=inside, other=0)
        hit = (expert[None, :] == best[:, None]) & inside[:, None]
        count += tl.sum(hit.to(tl.int32), 0)
    tl.store(block_count_ptr + expert.to(tl.int64) * num_blocks + i_block, count, mask=expert < num_experts)


@triton.jit
def moe_plan_fwd_scan_kernel(
    block_count_ptr,  # (E, B) int32 in; out: slots of the expert in earlier blocks
    total_ptr,  # (E,) int32 out
    kind_count_ptr,  # (C, E, B) int32
    kind_probability_ptr,  # (C, E, B)
    counts_ptr,  # (C, E) fp32 out
    prob_sum_ptr,  # (C, E) out
    num_experts,
    num_kinds,
    num_blocks,
    SCAN_BLOCK: tl.constexpr,
):
    i_expert = tl.program_id(0)
    p_count = block_count_ptr + i_expert.to(tl.int64) * num_blocks
    before = tl.zeros([], dtype=tl.int32)
    for start in range(0, num_blocks, SCAN_BLOCK):
        block = start + tl.arange(0, SCAN_BLOCK)
        inside = block < num_blocks
        count = tl.load(p_count + block, mask=inside, other=0)
        tl.store(p_count + block, before + tl.cumsum(count, 0) - count, mask=inside)
        before += tl.sum(count, 0)
    tl.store(total_ptr + i_expert, before)

    cell = i_expert.to(tl.int64)  # (c, expert) of the statistics
    for _ in range(num_kinds):
        b_count = tl.zeros([SCAN_BLOCK], dtype=tl.int32)
        b_probability = tl.zeros([SCAN_BLOCK], dtype=prob_sum_ptr.dtype.element_ty)
        for start in range(0, num_blocks, SCAN_BLOCK):
            block = start + tl.arange(0, SCAN_BLOCK)
            inside = block < num_blocks
            b_count += tl.load(kind_count_ptr + cell * num_blocks + block, mask=inside, other=0)
            b_probability += tl.load(kind_probability_ptr + cell * num_blocks + block, mask=inside, other=0.0)
        tl.store(counts_ptr + cell, tl.sum(b_count, 0).to(tl.float32))
        tl.store(prob_sum_ptr + cell, tl.sum(b_probability, 0))
        cell += num_experts


@triton.jit
def moe_plan_fwd_order_kernel(
    index_ptr,  # (T, K)
    before_ptr,  # (E, B) int32: slots of the expert in earlier blocks
    total_ptr,  # (E,) int32
    order_ptr,  # (S,) int32 out
    offset_ptr,  # (E+1,) int32 out
    num_tokens,
    num_experts,
    num_blocks,
    K: tl.constexpr,
    E_PAD: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    i_block = tl.program_id(0)
    expert = tl.arange(0, E_PAD)
    exists = expert < num_experts
    total = tl.load(total_ptr + expert, mask=exists, other=0)
    upto = tl.cumsum(total, 0)
    if i_block == 0:
        tl.store(offset_ptr + expert + 1, upto, mask=exists)
        tl.store(offset_ptr, 0)
    first = upto - total + tl.load(before_ptr + expert.to(tl.int64) * num_blocks + i_block, mask=exists, other=0)

    token = i_block * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = token < num_tokens
    flat = token.to(tl.int64) * K
    chosen = tl.zeros([BLOCK_T, E_PAD], dtype=tl.int32)
    for j in tl.static_range(K):
        best = tl.load(index_ptr + flat + j, mask=inside, other=0)
        chosen += ((expert[None, :] == best[:, None]) & inside[:, None]).to(tl.int32)
    place = first[None, :] + tl.cumsum(chosen, 0) - chosen  # (T, E): of a token's next slot at this expert
    for j in tl.static_range(K):
        best = tl.load(index_ptr + flat + j, mask=inside, other=0)
        hit = expert[None, :] == best[:, None]
        tl.store(order_ptr + tl.sum(tl.where(hit, place, 0), 1), (flat + j).to(tl.int32), mask=inside)
        place += hit.to(tl.int32)


def plan_routing(expert_index: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """(T, k) -> token_order (T*k,), expert_offset (E+1,), both int32."""
    tokens, top_k = expert_index.shape
    index = expert_index.int().contiguous()
    options = order_options(num_experts)
    blocks = triton.cdiv(tokens, options["BLOCK_T"])
    block_count = torch.empty(num_experts, blocks, dtype=torch.int32, device=index.device)
    if tokens:
        moe_plan_fwd_count_kernel[(blocks,)](
            index, block_count, tokens, num_experts, blocks, K=top_k, E_PAD=padded(num_experts), **options
        )
    none = block_count.new_empty(0, num_experts, blocks)
    return finish_plan(index, block_count, none, none.float())[:2]


def finish_plan(index: Tensor, block_count: Tensor, kind_count: Tensor, kind_probability: Tensor) -> tuple[Any, ...]:
    """token_order, expert_offset, counts, prob_sum from what the blocks counted; overwrites ``block_count``."""
    tokens, top_k = index.shape
    kinds, experts, blocks = kind_count.shape
    order = torch.empty(tokens * top_k, dtype=torch.int32, device=index.device)
    offset = torch.zeros(experts + 1, dtype=torch.int32, device=index.device)
    total = torch.empty(experts, dtype=torch.int32, device=index.device)
    counts = torch.empty(kinds, experts, dtype=torch.float32, device=index.device)
    prob_sum = kind_probability.new_empty(kinds, experts)
    moe_plan_fwd_scan_kernel[(experts,)](
        block_count,
        total,
        kind_count,
        kind_probability,
        counts,
        prob_sum,
        experts,
        kinds,
        blocks,
        SCAN_BLOCK=SCAN_BLOCK,
    )
    if tokens:
        moe_plan_fwd_order_kernel[(blocks,)](
            index,
            block_count,
            total,
            order,
            offset,
            tokens,
            experts,
            blocks,
            K=top_k,
            E_PAD=padded(experts),
            **order_options(experts),
        )
    return order, offset, counts, prob_sum
