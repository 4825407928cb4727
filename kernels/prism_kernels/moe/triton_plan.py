"""The plan in Triton: which token stands where among its expert's rows; no sort, atomics or host synchronisation.

Legend: T tokens, E experts (padded to a power of two), K experts per token, C kinds of token, B blocks of BLOCK_T
tokens, S = T*K slots. Two launches, without a memset.

1. count: slots per expert of every block. The router does it besides, with the statistics of kinds (triton_route.py).
2. order: every slot's place = expert's offset + slots of earlier blocks + earlier slots of its own block. A program
   adds up what all blocks counted (E x B numbers out of the L2), then walks over blocks of its own; the statistics'
   sums over blocks, in a fixed order, are spread over the programs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 128  # of the order kernel at most: each adds up all counts
SUM_CELLS = 2048  # counts a step of that sum
STATISTICS_BLOCK = 1024  # blocks a step of a statistic's sum


def padded(experts: int) -> int:
    """Columns of a tile: a power of two, and at least 16, which tl.dot needs."""
    return max(16, triton.next_power_of_2(experts))


def block_tokens(experts: int) -> int:
    """BLOCK_T of the forward kernels, which share their blocks."""
    return 32 if padded(experts) <= 64 else 16


def order_options(experts: int) -> dict[str, int]:
    pad = padded(experts)
    options = {"BLOCK_T": block_tokens(experts), "SUM_BLOCK": max(16, SUM_CELLS // pad)}
    options |= {"STATISTICS_BLOCK": STATISTICS_BLOCK, "num_warps": 8 if pad == 64 else 4}
    # Without a bound ptxas settles for 80, 96 or 128 registers and spills; E 128 needs more than 128.
    return options | {"maxnreg": 128 if pad <= 64 else 192}


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
def moe_plan_fwd_order_kernel(
    index_ptr,  # (T, K)
    block_count_ptr,  # (E, B) int32
    kind_count_ptr,  # (C, E, B) int32
    kind_probability_ptr,  # (C, E, B)
    order_ptr,  # (S,) int32 out
    offset_ptr,  # (E+1,) int32 out
    counts_ptr,  # (C, E) fp32 out
    prob_sum_ptr,  # (C, E) out
    num_tokens,
    num_experts,
    num_kinds,
    num_blocks,
    blocks_per_program,
    K: tl.constexpr,
    E_PAD: tl.constexpr,
    BLOCK_T: tl.constexpr,
    SUM_BLOCK: tl.constexpr,
    STATISTICS_BLOCK: tl.constexpr,
):
    i_program = tl.program_id(0)
    first_block = i_program * blocks_per_program
    last_block = tl.minimum(first_block + blocks_per_program, num_blocks)
    expert = tl.arange(0, E_PAD)
    exists = expert < num_experts

    total = tl.zeros([E_PAD, SUM_BLOCK], dtype=tl.int32)
    before = tl.zeros([E_PAD, SUM_BLOCK], dtype=tl.int32)
    p_count = block_count_ptr + expert.to(tl.int64)[:, None] * num_blocks
    for start in range(0, num_blocks, SUM_BLOCK):
        block = start + tl.arange(0, SUM_BLOCK)
        count = tl.load(p_count + block[None, :], mask=exists[:, None] & (block < num_blocks)[None, :], other=0)
        total += count
        before += tl.where((block < first_block)[None, :], count, 0)
    slots = tl.sum(total, 1)
    upto = tl.cumsum(slots, 0)
    if i_program == 0:
        tl.store(offset_ptr + expert + 1, upto, mask=exists)
        tl.store(offset_ptr, 0)
    first = upto - slots + tl.sum(before, 1)  # (E,): place of the next slot of an expert

    for i_block in range(first_block, last_block):
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
        first += tl.sum(chosen, 0)

    cell = i_program.to(tl.int64)  # (c, expert) of the statistics
    while cell < num_kinds * num_experts:
        at = cell * num_blocks
        b_count = tl.zeros([STATISTICS_BLOCK], dtype=tl.int32)
        b_probability = tl.zeros([STATISTICS_BLOCK], dtype=prob_sum_ptr.dtype.element_ty)
        for start in range(0, num_blocks, STATISTICS_BLOCK):
            block = start + tl.arange(0, STATISTICS_BLOCK)
            b_count += tl.load(kind_count_ptr + at + block, mask=block < num_blocks, other=0)
            b_probability += tl.load(kind_probability_ptr + at + block, mask=block < num_blocks, other=0.0)
        tl.store(counts_ptr + cell, tl.sum(b_count, 0).to(tl.float32))
        tl.store(prob_sum_ptr + cell, tl.sum(b_probability, 0))
        cell += tl.num_programs(0)


def plan_routing(expert_index: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """(T, k) -> token_order (T*k,), expert_offset (E+1,), both int32."""
    tokens, top_k = expert_index.shape
    index = expert_index.int().contiguous()
    size = block_tokens(num_experts)
    blocks = triton.cdiv(tokens, size)
    block_count = torch.empty(num_experts, blocks, dtype=torch.int32, device=index.device)
    if tokens:
        moe_plan_fwd_count_kernel[(blocks,)](
            index,
            block_count,
            tokens,
            num_experts,
            blocks,
            K=top_k,
            E_PAD=padded(num_experts),
            BLOCK_T=size,
            num_warps=order_options(num_experts)["num_warps"],
        )
    none = block_count.new_empty(0, num_experts, blocks)
    return finish_plan(index, block_count, none, none.float())[:2]


def finish_plan(index: Tensor, block_count: Tensor, kind_count: Tensor, kind_probability: Tensor) -> tuple[Any, ...]:
    """token_order, expert_offset, counts, prob_sum from what the blocks counted."""
    tokens, top_k = index.shape
    kinds, experts, blocks = kind_count.shape
    allocate = index.new_empty if tokens else index.new_zeros
    order, offset = allocate(tokens * top_k), allocate(experts + 1)
    counts = allocate(kinds, experts, dtype=torch.float32)
    prob_sum = allocate(kinds, experts, dtype=kind_probability.dtype)
    if tokens:
        each = triton.cdiv(blocks, PROGRAMS)
        moe_plan_fwd_order_kernel[(triton.cdiv(blocks, each),)](
            index,
            block_count,
            kind_count,
            kind_probability,
            order,
            offset,
            counts,
            prob_sum,
            tokens,
            experts,
            kinds,
            blocks,
            each,
            K=top_k,
            E_PAD=padded(experts),
            **order_options(experts),
        )
    return order, offset, counts, prob_sum
