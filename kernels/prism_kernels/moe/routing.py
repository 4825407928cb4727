"""The records of routing, and the loss that reads them. Dimensions: T tokens, k experts per token, E experts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from prism_kernels.checks import FLOATING, check_tensor, integer, wrong


class RoutingStats(NamedTuple):
    """Loads of one layer by kind of token (prompt, image, caption, ...), over the tokens of one call.

    Two tokens of kinds 0 and 1 with probabilities (.7, .2, .1) and (.1, .6, .3), top-2::

        counts    [[1, 1, 0], [0, 1, 1]]          no gradient
        prob_sum  [[.7, .2, .1], [.1, .6, .3]]    differentiable in hidden states and router weight
    """

    counts: Tensor  # (kinds, E) fp32: slots that chose the expert
    prob_sum: Tensor  # (kinds, E) fp32 (fp64 for fp64 hidden states): sum of the softmax over all experts


class Routing(NamedTuple):
    """Which experts a token goes to, and the plan that groups the T*k slots by expert.

    The two tokens above, renormalised::

        expert_index   [[0, 1], [1, 2]]           slots 0 1 2 3 = (token 0, 0) (token 0, 1) (token 1, 0) (token 1, 1)
        weight         [[.78, .22], [.67, .33]]
        token_order    [0, 1, 2, 3]               slots of expert 0, then of expert 1, ...; in slot order within one
        expert_offset  [0, 1, 3, 4]
    """

    expert_index: Tensor  # (T, k) int32, by falling probability; ties to the lowest index
    weight: Tensor  # (T, k) fp32 (fp64 for fp64 hidden states), differentiable
    token_order: Tensor  # (T*k,) int32: flat slots t*k+j, stable by expert
    expert_offset: Tensor  # (E+1,) int32: expert e owns token_order[expert_offset[e]:expert_offset[e+1]]
    stats: RoutingStats | None  # None where another router chose (plan_routing)


class RouteArguments(NamedTuple):
    """The arguments of a router besides hidden states and weights, checked; as in :func:`moe_route`."""

    top_k: int
    renormalize: bool
    segment_kind: Tensor | None  # (T,) integer; None: all tokens are of kind 0
    num_kinds: int  # >= 1
    expert_index: Tensor | None  # (T, k) integer: the experts to take; None: choose


class RouteSaved(NamedTuple):
    """What a router's backward reads."""

    hidden: Tensor
    router_weight: Tensor
    probability: Tensor  # (T, E)
    index: Tensor  # (T, k)
    segment_kind: Tensor | None
    renormalize: bool


class Experts(NamedTuple):
    """The tensors of one call of :func:`moe_mlp`, checked; the weights in layout "v5"."""

    hidden: Tensor  # (T, H)
    gate_up: Tensor  # (E, 2I, H)
    down: Tensor  # (E, H, I)
    weight: Tensor  # (T, k)
    token_order: Tensor  # (T*k,) int32
    expert_offset: Tensor  # (E+1,) int32


def own_index(expert_index: Tensor) -> Tensor:
    """A new int32 tensor: an output of a Function or an operator must not be its input."""
    return expert_index.to(torch.int32, copy=True, memory_format=torch.contiguous_format)


def load_balancing_loss(stats_of_all_layers: Sequence[RoutingStats], top_k: int) -> Tensor:
    """Auxiliary loss ``E * sum_e f_e P_e``: f_e slots per token on expert e, P_e its mean probability, over all layers.

    Equals transformers' ``load_balancing_loss_func(router_logits, E, top_k)``, which joins the tokens of all layers
    first (Switch Transformer, arXiv 2101.03961, equations 4 to 6), and is differentiable in ``prob_sum``. Perfectly
    even routing gives ``top_k``. No tokens give 0.

    Args:
        stats_of_all_layers: one :class:`RoutingStats` per MoE layer; kinds are summed.
        top_k: experts per token of these layers.

    Returns:
        Scalar in the dtype of ``prob_sum``.

    Raises:
        ValueError: no layer, layers of different E, or top_k outside [1, E].
    """
    name, expected = "stats_of_all_layers", "one RoutingStats per MoE layer"
    if not isinstance(stats_of_all_layers, Iterable) or isinstance(stats_of_all_layers, RoutingStats | Tensor):
        raise wrong(name, expected, type(stats_of_all_layers).__name__, "is it a list?")
    layers = list(stats_of_all_layers)
    if not layers:
        raise wrong(name, expected, "none")
    for i, stats in enumerate(layers):
        if not isinstance(stats, RoutingStats):
            raise wrong(f"{name}[{i}]", "RoutingStats", type(stats).__name__)
        experts = layers[0].counts.shape[-1] if i else None
        check_tensor(f"{name}[{i}].counts", stats.counts, {"kinds": None, "E": experts}, FLOATING)
        kinds, experts = stats.counts.shape
        check_tensor(f"{name}[{i}].prob_sum", stats.prob_sum, {"kinds": kinds, "E": experts}, FLOATING)
    experts = layers[0].counts.shape[-1]
    top_k = integer("top_k", top_k, 1, experts)
    device = layers[0].prob_sum.device
    counts = torch.stack([stats.counts.sum(dim=0).to(device) for stats in layers]).sum(dim=0)
    prob_sum = torch.stack([stats.prob_sum.sum(dim=0).to(device) for stats in layers]).sum(dim=0)
    tokens = (counts.sum() / top_k).clamp_min(1.0)  # clamped: no tokens give 0, not NaN
    return (counts.to(prob_sum.dtype) / tokens * (prob_sum / tokens)).sum() * experts
