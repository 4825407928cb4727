"""Experts on a GPU: Triton between the six grouped GEMMs, which a backend of grouped_gemm.py computes.

Legend: T tokens, H hidden, E experts, K experts per token, I intermediate, S = T*K slots in grouped order (by expert),
slot t*K+j. Forward: permute, GEMM, SwiGLU, GEMM, combine. Saved are the inputs and the (S, 2I) product; permuted
rows and activations are made again, and the router's gradient is sum(d_activation * activation), so that the down
product is not needed. Sums over the K slots of a token run in the order of j: nothing is added by atomics.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from prism_kernels.moe.functions import Parts, run_experts
from prism_kernels.moe.grouped_gemm_choice import choose
from prism_kernels.moe.routing import Experts, Routing
from prism_kernels.moe.triton_route import rows_of
from prism_kernels.tuned_options import tuned

COPY_BLOCK = 1024  # columns a step of a memory-bound kernel


def block_options(width: int) -> dict[str, int]:
    block = min(COPY_BLOCK, triton.next_power_of_2(width))
    return tuned("moe", f"columns {block}", {"BLOCK": block, "num_warps": 4 if block >= 512 else 1})


@triton.jit
def moe_mlp_permute_kernel(
    source_ptr,  # (T, H), last stride 1
    order_ptr,  # (S,) int32: slot of a row
    out_ptr,  # (S, H) contiguous, out
    position_ptr,  # (S,) int32 out: row of a slot; written where WITH_POSITION
    width,
    source_stride,
    K: tl.constexpr,
    WITH_POSITION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_row = tl.program_id(0)
    slot = tl.load(order_ptr + i_row)
    if WITH_POSITION:
        tl.store(position_ptr + slot, i_row)
    p_in = source_ptr + (slot // K).to(tl.int64) * source_stride
    p_out = out_ptr + i_row.to(tl.int64) * width
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        tl.store(p_out + column, tl.load(p_in + column, mask=inside), mask=inside)


@triton.jit
def moe_mlp_fwd_swiglu_kernel(
    product_ptr,  # (S, 2I) contiguous: [gate | up]
    out_ptr,  # (S, I) contiguous, out
    intermediate,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    p_in = product_ptr + i_row * 2 * intermediate
    p_out = out_ptr + i_row * intermediate
    for start in range(0, intermediate, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < intermediate
        gate = tl.load(p_in + column, mask=inside, other=0.0).to(WIDE)
        up = tl.load(p_in + intermediate + column, mask=inside, other=0.0).to(WIDE)
        activation = gate / (1.0 + tl.exp(-gate)) * up
        tl.store(p_out + column, activation.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def moe_mlp_bwd_swiglu_kernel(
    product_ptr,  # (S, 2I) contiguous: [gate | up]
    d_activation_ptr,  # (S, I) contiguous, before the routing weight
    weight_ptr,  # (S,) by slot
    order_ptr,  # (S,) int32: slot of a row
    d_product_ptr,  # (S, 2I) contiguous, out
    activation_ptr,  # (S, I) contiguous, out: times the routing weight
    d_weight_ptr,  # (S,) by slot, out
    intermediate,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_row = tl.program_id(0)
    slot = tl.load(order_ptr + i_row)
    weight = tl.load(weight_ptr + slot).to(WIDE)
    at = i_row.to(tl.int64) * intermediate
    p_in = product_ptr + 2 * at
    p_out = d_product_ptr + 2 * at
    d_weight = tl.zeros([BLOCK], dtype=WIDE)
    for start in range(0, intermediate, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < intermediate
        gate = tl.load(p_in + column, mask=inside, other=0.0).to(WIDE)
        up = tl.load(p_in + intermediate + column, mask=inside, other=0.0).to(WIDE)
        d_activation = tl.load(d_activation_ptr + at + column, mask=inside, other=0.0).to(WIDE)
        sigmoid = 1.0 / (1.0 + tl.exp(-gate))
        silu = gate * sigmoid
        activation = silu * up
        d_weight += d_activation * activation
        d_activation *= weight
        d_gate = d_activation * up * (sigmoid + silu * (1.0 - sigmoid))
        narrow = d_product_ptr.dtype.element_ty
        tl.store(p_out + column, d_gate.to(narrow), mask=inside)
        tl.store(p_out + intermediate + column, (d_activation * silu).to(narrow), mask=inside)
        tl.store(activation_ptr + at + column, (activation * weight).to(narrow), mask=inside)
    tl.store(d_weight_ptr + slot, tl.sum(d_weight, 0).to(d_weight_ptr.dtype.element_ty))


@triton.jit
def moe_mlp_combine_kernel(
    rows_ptr,  # (S, H) contiguous
    position_ptr,  # (S,) int32: row of a slot
    weight_ptr,  # (S,) by slot, or rows_ptr
    out_ptr,  # (T, H) contiguous, out
    width,
    K: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_token = tl.program_id(0).to(tl.int64)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        total = tl.zeros([BLOCK], dtype=WIDE)
        for j in tl.static_range(K):
            row = tl.load(position_ptr + i_token * K + j).to(tl.int64)
            value = tl.load(rows_ptr + row * width + column, mask=inside, other=0.0).to(WIDE)
            if HAS_WEIGHT:
                value *= tl.load(weight_ptr + i_token * K + j).to(WIDE)
            total += value
        tl.store(out_ptr + i_token * width + column, total.to(out_ptr.dtype.element_ty), mask=inside)


def moe_mlp(hidden: Tensor, gate_up: Tensor, down: Tensor, routing: Routing) -> Tensor:
    """``gate_up`` (E, 2I, H) and ``down`` (E, H, I), whatever their strides."""
    plan = routing.weight, routing.token_order, routing.expert_offset
    return run_experts(PARTS, Experts(hidden, gate_up, down, *plan))


def gate_up_forward(inputs: Experts) -> tuple[list[Tensor], list[Tensor]]:
    """The (S, 2I) product, and the row of every slot (S,), which the combine reads."""
    hidden, gate_up, down, weight, token_order, expert_offset = inputs
    if hidden.shape[0] == 0:
        return [hidden.new_empty(0, gate_up.shape[1])], [torch.empty_like(token_order)]
    x, position = _permute(hidden, token_order, weight.shape[1], with_position=True)
    return [choose(gate_up, down).rows(x, gate_up.transpose(1, 2), expert_offset)], [position]


def down_forward(inputs: Experts, products: list[Tensor], passed: list[Tensor]) -> Tensor:
    """(T, H); takes the product out of its list."""
    hidden, gate_up, down, weight, _, expert_offset = inputs
    if hidden.shape[0] == 0:
        return torch.empty_like(hidden)
    activation = _swiglu(products.pop())
    y = choose(gate_up, down).rows(activation, down.transpose(1, 2), expert_offset)
    del activation
    return _combine(y, passed.pop(), weight.contiguous(), weight.shape[1])


def experts_forward(inputs: Experts) -> Tensor:
    """(T, H), of which nothing is kept."""
    return down_forward(inputs, *gate_up_forward(inputs))


def experts_backward(
    inputs: Experts,
    products: Sequence[Tensor],
    d_out: Tensor,
    want_hidden: bool,
    want_gate_up: bool,
    want_down: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor]:
    hidden, gate_up, down, weight, token_order, expert_offset = inputs
    if d_out.shape[0] == 0:
        return *map(torch.zeros_like, (hidden, gate_up, down)), torch.zeros_like(weight)
    gemm, top_k = choose(gate_up, down), weight.shape[1]
    dy, position = _permute(d_out, token_order, top_k, with_position=True)
    d_activation = gemm.rows(dy, down, expert_offset)
    d_product, activation, d_weight = _swiglu_backward(products[0], d_activation, weight.contiguous(), token_order)
    del d_activation
    d_down = gemm.outer(dy, activation, expert_offset, down) if want_down else None
    del dy, activation
    d_hidden = d_gate_up = None
    if want_hidden:
        d_hidden = _combine(gemm.rows(d_product, gate_up, expert_offset), position, None, top_k)
    if want_gate_up:
        x, _ = _permute(hidden, token_order, top_k)
        d_gate_up = gemm.outer(d_product, x, expert_offset, gate_up)
    return d_hidden, d_gate_up, d_down, d_weight


PARTS = Parts(gate_up_forward, down_forward, experts_backward, experts_forward, passes=1)


def as_chunks(product: Tensor, inputs: Experts) -> list[Tensor]:
    """The products of all rows (S, 2I), which an operator saves, as the backward takes them."""
    return [product]


def _wide(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


def _permute(source: Tensor, order: Tensor, top_k: int, with_position: bool = False) -> tuple[Tensor, Tensor]:
    """(T, H) -> rows in grouped order (S, H), and the row of every slot (S,) int32 where asked for."""
    source = rows_of(source)
    out = source.new_empty(len(order), source.shape[1])
    position = torch.empty_like(order) if with_position else order
    moe_mlp_permute_kernel[(len(order),)](
        source,
        order,
        out,
        position,
        source.shape[1],
        source.stride(0),
        K=top_k,
        WITH_POSITION=with_position,
        **block_options(source.shape[1]),
    )
    return out, position


def _swiglu(product: Tensor) -> Tensor:
    slots, intermediate = product.shape[0], product.shape[1] // 2
    out = product.new_empty(slots, intermediate)
    moe_mlp_fwd_swiglu_kernel[(slots,)](
        product, out, intermediate, WIDE=_wide(product.dtype), **block_options(intermediate)
    )
    return out


def _swiglu_backward(
    product: Tensor, d_activation: Tensor, weight: Tensor, order: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of the (S, 2I) product, weighted activation (S, I), gradient of the weight (T, K)."""
    d_product, activation, d_weight = map(torch.empty_like, (product, d_activation, weight))
    intermediate = d_activation.shape[1]
    moe_mlp_bwd_swiglu_kernel[(len(order),)](
        product,
        d_activation,
        weight,
        order,
        d_product,
        activation,
        d_weight,
        intermediate,
        WIDE=_wide(product.dtype),
        **block_options(intermediate),
    )
    return d_product, activation, d_weight


def _combine(rows: Tensor, position: Tensor, weight: Tensor | None, top_k: int) -> Tensor:
    """(S, H) -> (T, H): the weighted sum of every token's rows."""
    tokens, width = len(position) // top_k, rows.shape[1]
    out = rows.new_empty(tokens, width)
    moe_mlp_combine_kernel[(tokens,)](
        rows,
        position,
        rows if weight is None else weight,
        out,
        width,
        K=top_k,
        HAS_WEIGHT=weight is not None,
        WIDE=_wide(rows.dtype),
        **block_options(width),
    )
    return out
