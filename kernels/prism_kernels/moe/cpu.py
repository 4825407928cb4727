"""CPU forms with their own backward: routing in a few passes, experts as GEMMs over their own rows alone.

Dimensions: T tokens, H hidden, E experts, k experts per token, I intermediate, S = T*k slots; n rows of one chunk.
The results repeat bit for bit: every sum has a fixed order, and nothing is added from two threads.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.amp import custom_bwd, custom_fwd

from prism_kernels.moe.functions import Parts, run_experts
from prism_kernels.moe.routing import Experts, RouteArguments, RouteSaved, Routing, RoutingStats, own_index
from prism_kernels.operators import first_derivative

# Rows of one expert that pass through GEMMs and SwiGLU together: bounds what lies between two GEMMs to a few
# megabytes. Fewer rows make the GEMMs slower, more rows gain nothing.
_CHUNK = 2048


def _math(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def moe_route(hidden: Tensor, router_weight: Tensor, arguments: RouteArguments) -> tuple[Routing, Tensor]:
    """The routing, and the hidden states, to whose gradient the router adds its own."""
    index, weight, order, offset, counts, prob_sum, hidden = _Route.apply(hidden, router_weight, arguments)
    return Routing(index, weight, order, offset, RoutingStats(counts, prob_sum)), hidden


class _Route(torch.autograd.Function):
    @staticmethod
    @custom_fwd(device_type="cpu")
    def forward(ctx, hidden, router_weight, arguments):
        *outputs, probability = route_forward(hidden, router_weight, arguments)
        index, _, order, offset, counts, _ = outputs
        ctx.save_for_backward(hidden, router_weight, probability, index, arguments.segment_kind)
        ctx.renormalize, ctx.num_kinds = arguments.renormalize, arguments.num_kinds
        ctx.mark_non_differentiable(index, order, offset, counts)
        ctx.set_materialize_grads(False)
        return *outputs, hidden

    @staticmethod
    @first_derivative("moe_route")
    @custom_bwd(device_type="cpu")
    def backward(ctx, _index, d_weight, _order, _offset, _counts, d_prob_sum, passed):
        hidden, router_weight, probability, index, kind = ctx.saved_tensors
        saved = RouteSaved(hidden, router_weight, probability, index, kind, ctx.renormalize)
        d_weight = probability.new_zeros(index.shape) if d_weight is None else d_weight
        if d_prob_sum is None:
            d_prob_sum = probability.new_zeros(ctx.num_kinds, probability.shape[1])
        d_hidden, d_router = route_backward(saved, d_weight, d_prob_sum, *ctx.needs_input_grad[:2])
        return d_hidden if d_hidden is None or passed is None else d_hidden + passed, d_router, None


def route_forward(hidden: Tensor, router_weight: Tensor, arguments: RouteArguments) -> tuple[Tensor, ...]:
    """index, weight, order, offset, counts, prob_sum; and the probabilities (T, E), for the backward."""
    top_k, renormalize, segment_kind, num_kinds, expert_index = arguments
    math = _math(hidden.dtype)
    experts = router_weight.shape[0]
    probability = F.linear(hidden.to(math), router_weight.to(math)).softmax(dim=-1)  # (T, E)
    if expert_index is None:  # a stable sort puts ties in index order, which topk does not
        expert_index = probability.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    index = expert_index.long()
    weight = probability.gather(1, index)
    if renormalize:
        weight /= weight.sum(dim=-1, keepdim=True)
    order, offset = plan_routing(index, experts)

    if segment_kind is None:
        counts, prob_sum = offset.diff()[None].float(), probability.sum(dim=0, keepdim=True)
    else:
        kind = segment_kind.long()
        cell = (kind[:, None] * experts + index).flatten()
        counts = cell.bincount(minlength=num_kinds * experts).view(num_kinds, experts).float()
        prob_sum = probability.new_zeros(num_kinds, experts).index_add_(0, kind, probability)
    return own_index(expert_index), weight, order, offset, counts, prob_sum, probability


def route_backward(
    saved: RouteSaved, d_weight: Tensor, d_prob_sum: Tensor, want_hidden: bool, want_router: bool
) -> tuple[Tensor | None, Tensor | None]:
    hidden, router_weight, probability, index, kind, renormalize = saved
    index = index.long()
    if renormalize:  # weight = q / sum(q): d_q = (d_weight - sum(d_weight * weight)) / sum(q)
        q = probability.gather(1, index)
        total = q.sum(dim=-1, keepdim=True)
        d_weight = (d_weight - (d_weight * q).sum(dim=-1, keepdim=True) / total) / total
    d_probability = d_prob_sum.expand(len(index), -1) if kind is None else d_prob_sum[kind.long()]
    d_probability = d_probability.scatter_add(1, index, d_weight)
    d_logits = probability * (d_probability - (probability * d_probability).sum(dim=-1, keepdim=True))
    d_hidden = d_router = None
    if want_hidden:
        d_hidden = (d_logits @ router_weight.to(d_logits.dtype)).to(hidden.dtype)
    if want_router:
        d_router = (d_logits.T @ hidden.to(d_logits.dtype)).to(router_weight.dtype)
    return d_hidden, d_router


def plan_routing(expert_index: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """(T, k) -> token_order (T*k,), expert_offset (E+1,), both int32. NumPy sorts small integers by radix."""
    flat = expert_index.flatten()
    keys = flat.numpy().astype(np.uint8 if num_experts <= 256 else np.int32)
    order = torch.from_numpy(keys.argsort(kind="stable").astype(np.int32))
    return order, F.pad(flat.bincount(minlength=num_experts).cumsum(0), (1, 0)).int()


def moe_mlp(hidden: Tensor, gate_up: Tensor, down: Tensor, routing: Routing) -> Tensor:
    """``gate_up`` (E, 2I, H) and ``down`` (E, H, I), whatever their strides.

    Kept are the inputs and the (S, 2I) products; the activation is computed again, the down product is not needed.
    Routing weights multiply rows of H, before or after a GEMM, never rows of I: H is the shorter one.
    """
    plan = routing.weight, routing.token_order, routing.expert_offset
    return run_experts(PARTS, Experts(hidden, gate_up, down, *plan))


def gate_up_forward(inputs: Experts) -> tuple[list[Tensor], list[Tensor]]:
    """The (n, 2I) products, one tensor per chunk: the allocator recycles these, but not one large block."""
    return list(_products(inputs)), []


def _products(inputs: Experts) -> Iterator[Tensor]:
    hidden, gate_up, _, weight, token_order, expert_offset = inputs
    token = token_order.long() // weight.shape[1]
    for e, rows, _ in _chunks(expert_offset, hidden.dtype):
        yield hidden.index_select(0, token[rows]) @ gate_up[e].T


def down_forward(inputs: Experts, products: Iterable[Tensor], passed: list[Tensor]) -> Tensor:
    """(T, H). A product is let go before the next one is asked for."""
    hidden, _, down, weight, token_order, expert_offset = inputs
    order = token_order.long()
    y = hidden.new_empty(len(order), hidden.shape[1])
    products = iter(products)
    for e, rows, _ in _chunks(expert_offset, hidden.dtype):
        torch.mm(_swiglu(next(products)), down[e].T, out=y[rows])
    return _combine(y, weight, order).to(hidden.dtype)


def experts_forward(inputs: Experts) -> Tensor:
    """(T, H), of which nothing is kept: chunk by chunk."""
    return down_forward(inputs, _products(inputs), [])


def experts_backward(
    inputs: Experts,
    products: Sequence[Tensor],
    d_out: Tensor,
    want_hidden: bool,
    want_gate_up: bool,
    want_down: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor]:
    hidden, gate_up, down, weight, token_order, expert_offset = inputs
    order = token_order.long()
    token = order // weight.shape[1]
    math = _math(hidden.dtype)
    slot_weight = weight.flatten()[order][:, None].to(hidden.dtype)  # (S, 1)
    d_rows = hidden.new_empty(len(order), hidden.shape[1])
    d_gate_up = _new_gradient(gate_up, expert_offset) if want_gate_up else None
    d_down = _new_gradient(down, expert_offset) if want_down else None
    d_weight = weight.new_empty(weight.numel())
    for (e, rows, first), product in zip(_chunks(expert_offset, hidden.dtype), products):
        dy = d_out.index_select(0, token[rows])
        d_activation = dy @ down[e]
        activation, d_product = _swiglu_backward(product, d_activation)
        d_weight[order[rows]] = torch.linalg.vecdot(d_activation.to(math), activation.to(math)).to(weight.dtype)
        beta = 0 if first else 1  # 0: what the new tensor holds is not read
        if d_down is not None:
            d_down[e].addmm_(dy.mul_(slot_weight[rows]).T, activation, beta=beta)
        if d_gate_up is not None:
            x = hidden.index_select(0, token[rows]).mul_(slot_weight[rows])
            d_gate_up[e].addmm_(d_product.T, x, beta=beta)
        if want_hidden:
            torch.mm(d_product, gate_up[e], out=d_rows[rows])
    d_hidden = _combine(d_rows, weight, order).to(hidden.dtype) if want_hidden else None
    return d_hidden, d_gate_up, d_down, d_weight.view_as(weight)


PARTS = Parts(gate_up_forward, down_forward, experts_backward, experts_forward, passes=0)


def as_chunks(product: Tensor, inputs: Experts) -> list[Tensor]:
    """The products of every chunk out of those of all rows (S, 2I), which an operator saves."""
    return [product[rows] for _, rows, _ in _chunks(inputs.expert_offset, inputs.hidden.dtype)]


def _new_gradient(weight: Tensor, expert_offset: Tensor) -> Tensor:
    """Strided like ``weight``; zero for experts without rows, the others are written by their first chunk."""
    gradient = torch.empty_like(weight)
    for e in (expert_offset.diff() == 0).nonzero().flatten().tolist():
        gradient[e].zero_()
    return gradient


def _chunks(expert_offset: Tensor, dtype: torch.dtype) -> Iterator[tuple[int, slice, bool]]:
    """(expert, rows in grouped order, whether they are its first); experts without rows do not appear."""
    edge = expert_offset.tolist()
    # Weight gradients add up over chunks: in bf16 and fp16 that would round each time, so there is one chunk.
    step = _CHUNK if dtype == _math(dtype) else max(1, edge[-1])
    for e, (start, end) in enumerate(pairwise(edge)):
        for row in range(start, end, step):
            yield e, slice(row, min(row + step, end)), row == start


def _swiglu(product: Tensor) -> Tensor:
    """(n, 2I) -> silu(gate) * up, (n, I)."""
    gate, up = product.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def _swiglu_backward(product: Tensor, d_activation: Tensor) -> tuple[Tensor, Tensor]:
    """Activation (n, I), and the gradient of the (n, 2I) product."""
    gate, up = product.chunk(2, dim=-1)
    silu = F.silu(gate)
    d_product = torch.empty_like(product)
    d_gate, d_up = d_product.chunk(2, dim=-1)
    torch.mul(d_activation, silu, out=d_up)
    torch.ops.aten.silu_backward.grad_input(d_activation * up, gate, grad_input=d_gate)
    return silu.mul_(up), d_product


def _combine(rows: Tensor, weight: Tensor, order: Tensor) -> Tensor:
    """out[t] = sum_j weight[t, j] * rows[row of slot (t, j)], in the order of j, fp32 or wider."""
    row = torch.empty_like(order)
    row[order] = torch.arange(len(order))
    math = _math(rows.dtype)
    return F.embedding_bag(row.view(weight.shape), rows.to(math), mode="sum", per_sample_weights=weight.to(math))
