"""Router, plan and experts as operators: what torch.compile, which cannot look into them, puts into its graph.

Outside torch.compile the Functions are called directly: there the experts' products are kept chunk by chunk, which one
output of an operator cannot be. An operator that runs checks the values that no trace shows.
``impl`` is an implementation other than the reference, whose module has the functions called here.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prism_kernels.dispatch import implementation
from prism_kernels.moe.checks import check_indices, check_plan
from prism_kernels.moe.functions import new_handle, wants_gradient
from prism_kernels.moe.routing import Experts, RouteArguments, RouteSaved, Routing, RoutingStats
from prism_kernels.operators import check_first_derivative, operator


class Wanted(NamedTuple):
    """Gradients of a router's tensors that somebody asks for."""

    d_hidden: bool
    d_router: bool


class WantedOfExperts(NamedTuple):
    """Of the experts' tensors."""

    d_hidden: bool
    d_gate_up: bool
    d_down: bool


def _module(op: str, impl: str) -> Any:
    """Of the implementation: its forward and backward, which its Function calls too."""
    return import_module(implementation(op, impl).__module__)


def _given(gradient: Tensor | None, like: Tensor) -> Tensor:
    """An operator has an output for every gradient: an empty one where there is none."""
    return like.new_empty(0) if gradient is None else gradient


# ------------------------------------------------------------------------------------------------- router and plan


@operator("plan_routing")
def plan(expert_index: Tensor, num_experts: int, impl: str) -> tuple[Tensor, Tensor]:
    check_indices(num_experts, expert_index)
    return _module("plan_routing", impl).plan_routing(expert_index, num_experts)


@plan.fake
def _(expert_index: Tensor, num_experts: int, impl: str) -> tuple[Tensor, Tensor]:
    return _int32(expert_index, expert_index.numel()), _int32(expert_index, num_experts + 1)


def _int32(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(*shape, dtype=torch.int32)


def moe_route(hidden: Tensor, router_weight: Tensor, arguments: RouteArguments, impl: str) -> Routing:
    weight, prob_sum, _, index, order, offset, counts = _route(hidden, router_weight, arguments, impl)
    return Routing(index, weight, order, offset, RoutingStats(counts, prob_sum))


@operator("moe_route")
def _route(
    hidden: Tensor, router_weight: Tensor, arguments: RouteArguments, impl: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """weight, prob_sum, the probabilities (T, E); index, order, offset, counts, which have no gradient."""
    check_indices(router_weight.shape[0], arguments.expert_index, arguments.segment_kind, arguments.num_kinds)
    outputs = _module("moe_route", impl).route_forward(hidden, router_weight, arguments)
    index, weight, order, offset, counts, prob_sum, probability = outputs
    return weight, prob_sum, probability, index, order, offset, counts


@_route.fake
def _(
    hidden: Tensor, router_weight: Tensor, arguments: RouteArguments, impl: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    tokens, experts, kinds = hidden.shape[0], router_weight.shape[0], arguments.num_kinds
    weight = hidden.new_empty(tokens, arguments.top_k, dtype=torch.promote_types(hidden.dtype, torch.float32))
    return (
        weight,
        weight.new_empty(kinds, experts),
        weight.new_empty(tokens, experts),
        _int32(hidden, tokens, arguments.top_k),
        _int32(hidden, tokens * arguments.top_k),
        _int32(hidden, experts + 1),
        hidden.new_empty(kinds, experts, dtype=torch.float32),
    )


@operator("moe_route_backward")
def _route_backward(
    saved: RouteSaved, d_weight: Tensor, d_prob_sum: Tensor, wanted: Wanted, impl: str
) -> tuple[Tensor, Tensor]:
    d_hidden, d_router = _module("moe_route", impl).route_backward(saved, d_weight, d_prob_sum, *wanted)
    return _given(d_hidden, saved.hidden), _given(d_router, saved.router_weight)


@_route_backward.fake
def _(saved: RouteSaved, d_weight: Tensor, d_prob_sum: Tensor, wanted: Wanted, impl: str) -> tuple[Tensor, Tensor]:
    return _fake(saved.hidden, wanted.d_hidden), _fake(saved.router_weight, wanted.d_router)


def _fake(like: Tensor, wanted: bool) -> Tensor:
    return like.new_empty(like.shape if wanted else 0)


def _setup_route(ctx: Any, inputs: tuple, output: tuple) -> None:
    hidden, router_weight, arguments, ctx.impl = _route.records(*inputs)
    _, _, probability, *constants = output
    ctx.renormalize, ctx.num_inputs = arguments.renormalize, len(inputs)
    ctx.mark_non_differentiable(probability, *constants)
    ctx.save_for_backward(hidden, router_weight, probability, constants[0], arguments.segment_kind)


def _backward_route(ctx: Any, d_weight: Tensor, d_prob_sum: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    check_first_derivative("moe_route")
    wanted = Wanted(*ctx.needs_input_grad[:2])
    hidden, router_weight, probability, index, kind = ctx.saved_tensors
    saved = RouteSaved(hidden, router_weight, probability, index, kind, ctx.renormalize)
    gradients = _route_backward(saved, d_weight, d_prob_sum, wanted, ctx.impl)
    return (*(g if want else None for g, want in zip(gradients, wanted)), *[None] * (ctx.num_inputs - 2))


_route_backward.constant()
_route.differentiate(_setup_route, _backward_route)


# ------------------------------------------------------------------------------------------------------- experts


def moe_mlp(inputs: Experts, impl: str) -> Tensor:
    if not wants_gradient(inputs):
        return _experts(inputs, impl)
    handle, product, passed = _gate_up(inputs, impl)
    return _down(handle, product, passed, inputs, impl)


@operator("moe_mlp")
def _experts(inputs: Experts, impl: str) -> Tensor:
    """(T, H), without a gradient."""
    check_plan(inputs.token_order, inputs.expert_offset)
    return _module("moe_mlp", impl).experts_forward(inputs)


@_experts.fake
def _(inputs: Experts, impl: str) -> Tensor:
    return inputs.hidden.new_empty(inputs.hidden.shape)


_experts.constant()


@operator("moe_mlp_gate_up")
def _gate_up(inputs: Experts, impl: str) -> tuple[Tensor, Tensor, Tensor]:
    """The handle (functions.py), the products (S, 2I), and what else ``moe_mlp_down`` reads: (S,) or empty."""
    check_plan(inputs.token_order, inputs.expert_offset)
    products, passed = _module("moe_mlp", impl).gate_up_forward(inputs)
    none = inputs.hidden.new_empty(0, inputs.gate_up.shape[1])
    product = products[0] if len(products) == 1 else torch.cat([none, *products])
    return new_handle(inputs.hidden), product, passed[0] if passed else _int32(inputs.token_order, 0)


@_gate_up.fake
def _(inputs: Experts, impl: str) -> tuple[Tensor, Tensor, Tensor]:
    rows = inputs.token_order.shape[0]
    passed = _int32(inputs.token_order, rows if _module("moe_mlp", impl).PARTS.passes else 0)
    return new_handle(inputs.hidden), inputs.hidden.new_empty(rows, inputs.gate_up.shape[1]), passed


@operator("moe_mlp_down")
def _down(handle: Tensor, product: Tensor, passed: Tensor, inputs: Experts, impl: str) -> Tensor:
    module = _module("moe_mlp", impl)
    return module.down_forward(inputs, module.as_chunks(product, inputs), [passed])


@_down.fake
def _(handle: Tensor, product: Tensor, passed: Tensor, inputs: Experts, impl: str) -> Tensor:
    return inputs.hidden.new_empty(inputs.hidden.shape)


def _setup_down(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.num_inputs = len(inputs)


_down.differentiate(_setup_down, lambda ctx, d_out: (d_out, *[None] * (ctx.num_inputs - 1)))


@operator("moe_mlp_backward")
def _experts_backward(
    inputs: Experts, product: Tensor, d_out: Tensor, wanted: WantedOfExperts, impl: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    module = _module("moe_mlp", impl)
    gradients = module.experts_backward(inputs, module.as_chunks(product, inputs), d_out, *wanted)
    d_hidden, d_gate_up, d_down, d_weight = (_given(g, t) for g, t in zip(gradients, inputs))
    return d_hidden, d_gate_up, d_down, d_weight


@_experts_backward.fake
def _(
    inputs: Experts, product: Tensor, d_out: Tensor, wanted: WantedOfExperts, impl: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_hidden = _fake(inputs.hidden, wanted.d_hidden)
    d_gate_up, d_down = (
        torch.empty_like(weight) if want else weight.new_empty(0)
        for weight, want in zip((inputs.gate_up, inputs.down), wanted[1:])
    )
    return d_hidden, d_gate_up, d_down, inputs.weight.new_empty(inputs.weight.shape)


def _setup_gate_up(ctx: Any, inputs: tuple, output: tuple) -> None:
    tensors, ctx.impl = _gate_up.records(*inputs)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # else autograd would make zeros of the products' size
    ctx.num_inputs = len(inputs)
    ctx.save_for_backward(*tensors, output[1])


def _backward_gate_up(ctx: Any, d_out: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    check_first_derivative("moe_mlp")
    if d_out is None:
        return (None,) * ctx.num_inputs
    *tensors, product = ctx.saved_tensors
    wanted = WantedOfExperts(*ctx.needs_input_grad[:3])
    gradients = _experts_backward(Experts(*tensors), product, d_out, wanted, ctx.impl)
    asked = ctx.needs_input_grad[:4]
    return (*(g if want else None for g, want in zip(gradients, asked)), *[None] * (ctx.num_inputs - 4))


_experts_backward.constant()
_gate_up.differentiate(_setup_gate_up, _backward_gate_up)
