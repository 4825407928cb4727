"""Router in Triton: one launch and the plan's two forward (triton_plan.py), two and a small sum backward.

Legend: T tokens, H hidden, E experts (padded to a power of two), K experts per token, C kinds of token, B blocks of
BLOCK_T tokens. Everything after the GEMM is fp32 (fp64 for fp64 hidden states).

The forward reads x once: GEMM, softmax, top-k, weights; per block the slots per expert and the statistics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.amp import custom_bwd, custom_fwd

from prism_kernels.moe.routing import RouteArguments, RouteSaved, Routing, RoutingStats, own_index
from prism_kernels.moe.triton_plan import block_tokens, finish_plan, padded
from prism_kernels.operators import first_derivative
from prism_kernels.tuned_options import tuned

SPLITS = 32  # parts of T whose router gradients are summed last


def route_options(experts: int, top_k: int, itemsize: int) -> dict[str, int]:
    """Blocks of the fused router, by experts, choices and bytes of an operand; others spill (dev/LOG.md)."""
    pad, few = padded(experts), top_k <= 4
    if pad > 64:
        block_h, warps = {2: 128, 4: 64, 8: 16}[itemsize], 8
    elif itemsize == 2:
        block_h, warps = 128 if pad == 16 and few else 64, 4
    elif itemsize == 4:
        block_h, warps = (16, 8) if pad == 32 or (pad == 64 and few) else (32, 4)
    else:
        block_h, warps = 16, 8 if few else 4
    options = {"BLOCK_H": block_h, "num_warps": warps}
    key = f"route {itemsize} E{pad}{'' if few else ' many'}"
    return {"BLOCK_T": block_tokens(experts), **tuned("moe", key, options)}


def d_logits_options(experts: int, itemsize: int) -> dict[str, int]:
    """``itemsize``: bytes of a probability."""
    warps = 8 if padded(experts) >= 128 and itemsize == 8 else 4
    return {"BLOCK_T": max(1, min(32, 4096 // itemsize // padded(experts))), "num_warps": warps}


def d_router_options(experts: int, itemsize: int) -> dict[str, int]:
    """``itemsize``: bytes of a probability."""
    if itemsize == 8:
        return {"BLOCK_T": 16, "BLOCK_H": 16, "num_warps": 4}
    pad = padded(experts)
    if pad == 16:  # without a bound ptxas settles for 128 registers on sm_100, and spills
        return {"BLOCK_T": 32, "BLOCK_H": 64, "num_warps": 4, "maxnreg": 168}
    if pad == 32:
        return {"BLOCK_T": 32, "BLOCK_H": 64, "num_warps": 8}
    return {"BLOCK_T": 32 if pad <= 64 else 16, "BLOCK_H": 32 if pad <= 64 else 16, "num_warps": 8}


@triton.jit
def _dot(a, b, acc):
    """acc + a @ b; 16-bit operands on tensor cores with fp32 sums, others in full precision."""
    if a.dtype == b.dtype and a.dtype.primitive_bitwidth == 16:
        return tl.dot(a, b, acc)
    else:  # triton 3.6 compiles what follows such a return
        return tl.dot(a.to(acc.dtype), b.to(acc.dtype), acc, input_precision="ieee", out_dtype=acc.dtype)


@triton.jit
def _dot_exact(a, b, acc):
    """acc + a @ b of wide operands; fp32 in three tf32 products, good to 2^-21, as a full-precision one spills here."""
    if acc.dtype == tl.float64:
        return tl.dot(a, b, acc, input_precision="ieee", out_dtype=acc.dtype)
    else:
        return tl.dot(a, b, acc, input_precision="tf32x3")


@triton.jit
def moe_route_fwd_kernel(
    x_ptr,  # (T, H), last stride 1
    router_ptr,  # (E, H) contiguous
    kind_ptr,  # (T,) integer, or router_ptr
    index_ptr,  # (T, K) int32: out, or in where FORCED
    weight_ptr,  # (T, K) out
    probability_ptr,  # (T, E) out
    block_count_ptr,  # (E, B) int32 out: slots of an expert in a block
    kind_count_ptr,  # (C, E, B) int32 out
    kind_probability_ptr,  # (C, E, B) out
    num_tokens,
    hidden,
    num_experts,
    num_kinds,
    num_blocks,
    x_stride,
    K: tl.constexpr,
    K_PAD: tl.constexpr,
    E_PAD: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    HAS_KIND: tl.constexpr,
    FORCED: tl.constexpr,
    RENORMALIZE: tl.constexpr,
):
    i_block = tl.program_id(0)
    token = i_block * BLOCK_T + tl.arange(0, BLOCK_T)  # (T,)
    inside = token < num_tokens
    expert = tl.arange(0, E_PAD)  # (E,)
    exists = expert < num_experts
    wide = weight_ptr.dtype.element_ty

    p_x = x_ptr + token.to(tl.int64)[:, None] * x_stride
    p_router = router_ptr + expert.to(tl.int64)[None, :] * hidden
    logits = tl.zeros([BLOCK_T, E_PAD], dtype=wide)
    for start in range(0, hidden, BLOCK_H):
        column = start + tl.arange(0, BLOCK_H)
        in_row = column < hidden
        b_x = tl.load(p_x + column[None, :], mask=inside[:, None] & in_row[None, :], other=0.0)  # (T, H)
        b_router = tl.load(p_router + column[:, None], mask=in_row[:, None] & exists[None, :], other=0.0)  # (H, E)
        logits = _dot(b_x, b_router, logits)

    logits = tl.where(exists[None, :], logits, float("-inf"))
    e = tl.exp(logits - tl.max(logits, 1)[:, None])
    probability = e * (1.0 / tl.sum(e, 1))[:, None]  # (T, E)
    flat = token.to(tl.int64)
    p_probability = probability_ptr + flat[:, None] * num_experts + expert[None, :]
    tl.store(p_probability, probability, mask=inside[:, None] & exists[None, :])

    # NaN ranks above all, so that a token of NaN still gets experts that exist; padding ranks below all.
    rank = tl.where(probability == probability, probability, 2.0)
    rank = tl.where(exists[None, :], rank, -1.0)
    slot = tl.arange(0, K_PAD)
    weight = tl.zeros([BLOCK_T, K_PAD], dtype=wide)
    index = tl.zeros([BLOCK_T, K_PAD], dtype=tl.int32)
    chosen = tl.zeros([BLOCK_T, E_PAD], dtype=tl.int32)
    total = tl.zeros([BLOCK_T], dtype=wide)
    in_slot = inside[:, None] & (slot < K)[None, :]
    if FORCED:
        index = tl.load(index_ptr + flat[:, None] * K + slot[None, :], mask=in_slot, other=0)
    for j in tl.static_range(K):
        if FORCED:
            best = tl.sum(tl.where(slot[None, :] == j, index, 0), 1)
        else:
            _, best = tl.max(rank, 1, return_indices=True, return_indices_tie_break_left=True)
        hit = expert[None, :] == best[:, None]
        q = tl.sum(tl.where(hit, probability, 0.0), 1)
        rank = tl.where(hit, -2.0, rank)
        weight = tl.where(slot[None, :] == j, q[:, None], weight)
        if not FORCED:
            index = tl.where(slot[None, :] == j, best[:, None], index)
        chosen += hit.to(tl.int32)
        total += q
    if RENORMALIZE:
        weight = weight * (1.0 / total)[:, None]
    tl.store(weight_ptr + flat[:, None] * K + slot[None, :], weight, mask=in_slot)
    if not FORCED:
        tl.store(index_ptr + flat[:, None] * K + slot[None, :], index, mask=in_slot)

    chosen = tl.where(inside[:, None], chosen, 0)
    p_cell = expert.to(tl.int64) * num_blocks + i_block
    tl.store(block_count_ptr + p_cell, tl.sum(chosen, 0), mask=exists)
    kind = tl.zeros([BLOCK_T], dtype=tl.int32)
    if HAS_KIND:
        kind = tl.load(kind_ptr + token, mask=inside, other=0).to(tl.int32)
    for c in range(num_kinds):
        counted = (inside & (kind == c))[:, None]
        tl.store(kind_count_ptr + p_cell, tl.sum(tl.where(counted, chosen, 0), 0), mask=exists)
        tl.store(kind_probability_ptr + p_cell, tl.sum(tl.where(counted, probability, 0.0), 0), mask=exists)
        p_cell += num_experts * num_blocks


@triton.jit
def moe_route_bwd_dlogits_kernel(
    probability_ptr,  # (T, E)
    index_ptr,  # (T, K)
    d_weight_ptr,  # (T, K)
    kind_ptr,  # (T,) integer, or index_ptr
    d_prob_sum_ptr,  # (C, E)
    d_logits_ptr,  # (T, E) out
    num_tokens,
    num_experts,
    num_kinds,
    K: tl.constexpr,
    E_PAD: tl.constexpr,
    BLOCK_T: tl.constexpr,
    HAS_KIND: tl.constexpr,
    RENORMALIZE: tl.constexpr,
):
    """Through the statistics, the renormalisation (weight = q / sum q) and the softmax."""
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = token < num_tokens
    flat = token.to(tl.int64)
    expert = tl.arange(0, E_PAD)
    exists = expert < num_experts
    in_tile = inside[:, None] & exists[None, :]
    probability = tl.load(probability_ptr + flat[:, None] * num_experts + expert[None, :], mask=in_tile, other=0.0)

    total = tl.full([BLOCK_T], 1.0, dtype=probability.dtype)
    inner = tl.zeros([BLOCK_T], dtype=probability.dtype)  # sum of d_weight * weight
    if RENORMALIZE:
        total = tl.where(inside, 0.0, 1.0).to(probability.dtype)
        for j in tl.static_range(K):
            best = tl.load(index_ptr + flat * K + j, mask=inside, other=0)
            q = tl.sum(tl.where(expert[None, :] == best[:, None], probability, 0.0), 1)
            total += q
            inner += q * tl.load(d_weight_ptr + flat * K + j, mask=inside, other=0.0)
        inner = inner / total

    kind = tl.zeros([BLOCK_T], dtype=tl.int32)
    if HAS_KIND:
        kind = tl.load(kind_ptr + token, mask=inside, other=0).to(tl.int32)
    known = in_tile & ((kind >= 0) & (kind < num_kinds))[:, None]
    d_probability = tl.load(d_prob_sum_ptr + kind[:, None] * num_experts + expert[None, :], mask=known, other=0.0)
    for j in tl.static_range(K):
        best = tl.load(index_ptr + flat * K + j, mask=inside, other=0)
        d_q = (tl.load(d_weight_ptr + flat * K + j, mask=inside, other=0.0) - inner) / total
        d_probability += tl.where(expert[None, :] == best[:, None], d_q[:, None], 0.0)
    centred = d_probability - tl.sum(probability * d_probability, 1)[:, None]
    tl.store(d_logits_ptr + flat[:, None] * num_experts + expert[None, :], probability * centred, mask=in_tile)


@triton.jit
def moe_route_bwd_drouter_kernel(
    d_logits_ptr,  # (T, E)
    x_ptr,  # (T, H), last stride 1
    router_ptr,  # (E, H) contiguous
    d_x_ptr,  # (T, H) contiguous, out
    passed_ptr,  # (T, H) contiguous: another part of it, or d_x_ptr
    d_router_ptr,  # (SPLITS, E, H) out, to be summed
    num_tokens,
    tokens_per_split,  # a multiple of BLOCK_T
    hidden,
    num_experts,
    x_stride,
    E_PAD: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    WITH_D_X: tl.constexpr,
    HAS_PASSED: tl.constexpr,
):
    """d_x = d_logits @ router [+ passed] and one split's part of d_router = d_logits^T @ x: x is read once."""
    i_split = tl.program_id(1)
    column = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    in_row = column < hidden
    expert = tl.arange(0, E_PAD)
    exists = expert < num_experts
    wide = d_logits_ptr.dtype.element_ty
    in_router = exists[:, None] & in_row[None, :]
    cell = expert.to(tl.int64)[:, None] * hidden + column[None, :]
    b_router = tl.load(router_ptr + cell, mask=in_router, other=0.0).to(wide)  # (E, H)
    d_router = tl.zeros([E_PAD, BLOCK_H], dtype=wide)
    first = i_split * tokens_per_split
    for start in range(first, tl.minimum(first + tokens_per_split, num_tokens), BLOCK_T):
        token = (start + tl.arange(0, BLOCK_T)).to(tl.int64)
        inside = token < num_tokens
        p_d = d_logits_ptr + token[:, None] * num_experts + expert[None, :]
        b_d = tl.load(p_d, mask=inside[:, None] & exists[None, :], other=0.0)  # (T, E)
        in_x = inside[:, None] & in_row[None, :]
        b_x = tl.load(x_ptr + token[:, None] * x_stride + column[None, :], mask=in_x, other=0.0)  # (T, H)
        d_router = _dot_exact(tl.trans(b_d), b_x.to(wide), d_router)
        if WITH_D_X:
            d_x = _dot_exact(b_d, b_router, tl.zeros([BLOCK_T, BLOCK_H], dtype=wide))
            at = token[:, None] * hidden + column[None, :]
            if HAS_PASSED:
                d_x += tl.load(passed_ptr + at, mask=in_x, other=0.0).to(wide)
            tl.store(d_x_ptr + at, d_x.to(d_x_ptr.dtype.element_ty), mask=in_x)
    tl.store(d_router_ptr + i_split.to(tl.int64) * num_experts * hidden + cell, d_router, mask=in_router)


def moe_route(hidden: Tensor, router_weight: Tensor, arguments: RouteArguments) -> tuple[Routing, Tensor]:
    """The routing, and the hidden states, to whose gradient the router adds its own in the pass that computes it."""
    index, weight, order, offset, counts, prob_sum, hidden = _Route.apply(hidden, router_weight, arguments)
    return Routing(index, weight, order, offset, RoutingStats(counts, prob_sum)), hidden


class _Route(torch.autograd.Function):
    @staticmethod
    @custom_fwd(device_type="cuda")
    def forward(ctx, hidden, router_weight, arguments):
        *outputs, probability = route_forward(hidden, router_weight, arguments)
        index, _, order, offset, counts, _ = outputs
        ctx.save_for_backward(hidden, router_weight, probability, index, arguments.segment_kind)
        ctx.renormalize, ctx.num_kinds = arguments.renormalize, arguments.num_kinds
        ctx.mark_non_differentiable(index, order, offset, counts)
        ctx.set_materialize_grads(False)
        return *outputs, hidden

    @staticmethod
    @first_derivative("moe_route", batches=False)
    @custom_bwd(device_type="cuda")
    def backward(ctx, _index, d_weight, _order, _offset, _counts, d_prob_sum, passed):
        hidden, router_weight, probability, index, kind = ctx.saved_tensors
        saved = RouteSaved(hidden, router_weight, probability, index, kind, ctx.renormalize)
        d_weight = probability.new_zeros(index.shape) if d_weight is None else d_weight
        if d_prob_sum is None:
            d_prob_sum = probability.new_zeros(ctx.num_kinds, probability.shape[1])
        return *route_backward(saved, d_weight, d_prob_sum, *ctx.needs_input_grad[:2], passed), None


def route_forward(hidden: Tensor, router_weight: Tensor, arguments: RouteArguments) -> tuple[Tensor, ...]:
    """index, weight, order, offset, counts, prob_sum; and the probabilities (T, E), for the backward."""
    top_k, renormalize, segment_kind, num_kinds, expert_index = arguments
    tokens, experts = hidden.shape[0], router_weight.shape[0]
    x, router = rows_of(hidden), router_weight.contiguous()
    kind = None if segment_kind is None else segment_kind.contiguous()
    options = route_options(experts, top_k, torch.promote_types(hidden.dtype, router_weight.dtype).itemsize)
    blocks = triton.cdiv(tokens, options["BLOCK_T"])
    wide = {"dtype": torch.promote_types(hidden.dtype, torch.float32), "device": hidden.device}
    integer = {"dtype": torch.int32, "device": hidden.device}
    weight = torch.empty(tokens, top_k, **wide)
    probability = torch.empty(tokens, experts, **wide)
    index = torch.empty(tokens, top_k, **integer) if expert_index is None else own_index(expert_index)
    block_count = torch.empty(experts, blocks, **integer)
    kind_count = torch.empty(num_kinds, experts, blocks, **integer)
    kind_probability = torch.empty(num_kinds, experts, blocks, **wide)
    if tokens:
        moe_route_fwd_kernel[(blocks,)](
            x,
            router,
            router if kind is None else kind,
            index,
            weight,
            probability,
            block_count,
            kind_count,
            kind_probability,
            tokens,
            hidden.shape[1],
            experts,
            num_kinds,
            blocks,
            x.stride(0),
            K=top_k,
            K_PAD=triton.next_power_of_2(top_k),
            E_PAD=padded(experts),
            HAS_KIND=kind is not None,
            FORCED=expert_index is not None,
            RENORMALIZE=renormalize,
            **options,
        )
    order, offset, counts, prob_sum = finish_plan(index, block_count, kind_count, kind_probability)
    return index, weight, order, offset, counts, prob_sum, probability


def route_backward(
    saved: RouteSaved,
    d_weight: Tensor,
    d_prob_sum: Tensor,
    want_hidden: bool,
    want_router: bool,
    passed: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """``passed`` (T, H): what the gradient of hidden has from elsewhere, and is added to."""
    hidden, router_weight, probability, index, segment_kind, renormalize = saved
    tokens, experts = probability.shape
    if tokens == 0:
        return torch.zeros_like(hidden), torch.zeros_like(router_weight)
    kind = None if segment_kind is None else segment_kind.contiguous()
    x, router = rows_of(hidden), router_weight.contiguous()
    options = d_logits_options(experts, probability.itemsize)
    d_logits = torch.empty_like(probability)
    moe_route_bwd_dlogits_kernel[(triton.cdiv(tokens, options["BLOCK_T"]),)](
        probability,
        index,
        d_weight.contiguous(),
        index if kind is None else kind,
        d_prob_sum.contiguous(),
        d_logits,
        tokens,
        experts,
        d_prob_sum.shape[0],
        K=index.shape[1],
        E_PAD=padded(experts),
        HAS_KIND=kind is not None,
        RENORMALIZE=renormalize,
        **options,
    )
    width = hidden.shape[1]
    options = d_router_options(experts, probability.itemsize)
    blocks = triton.cdiv(tokens, options["BLOCK_T"])
    splits = min(SPLITS, blocks)
    tokens_per_split = triton.cdiv(blocks, splits) * options["BLOCK_T"]
    d_hidden = hidden.new_empty(tokens, width)
    parts = d_logits.new_empty(splits, experts, width)
    moe_route_bwd_drouter_kernel[(triton.cdiv(width, options["BLOCK_H"]), splits)](
        d_logits,
        x,
        router,
        d_hidden,
        d_hidden if passed is None else passed.contiguous(),
        parts,
        tokens,
        tokens_per_split,
        width,
        experts,
        x.stride(0),
        E_PAD=padded(experts),
        WITH_D_X=want_hidden,
        HAS_PASSED=passed is not None,
        **options,
    )
    d_router = parts.sum(dim=0).to(router_weight.dtype) if want_router else None
    return d_hidden if want_hidden else None, d_router


def rows_of(tensor: Tensor) -> Tensor:
    """The tensor, copied where its last stride is not 1."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
