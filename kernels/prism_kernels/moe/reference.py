"""The definition: plain torch and autograd, fp32 inside (fp64 stays), any device.

Dimensions: T tokens, H hidden, E experts, k experts per token, I intermediate.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from prism_kernels.moe.routing import RouteArguments, Routing, RoutingStats


def moe_route(hidden: Tensor, router_weight: Tensor, arguments: RouteArguments) -> tuple[Routing, Tensor]:
    """The routing, and the hidden states as they are."""
    top_k, renormalize, segment_kind, num_kinds, expert_index = arguments
    math = torch.promote_types(hidden.dtype, torch.float32)
    experts = router_weight.shape[0]
    probability = (hidden.to(math) @ router_weight.to(math).T).softmax(dim=-1)  # (T, E)
    if expert_index is None:  # a stable sort puts ties in index order
        expert_index = probability.detach().sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    index = expert_index.long()
    weight = probability.gather(1, index)
    if renormalize:
        weight = weight / weight.sum(dim=-1, keepdim=True)

    kind = torch.zeros_like(index[:, 0]) if segment_kind is None else segment_kind.long()
    kinds = [(kind == i)[:, None] for i in range(num_kinds)]  # (T, 1) each
    chosen = (index[..., None] == torch.arange(experts, device=index.device)).sum(dim=1).float()  # (T, E)
    stats = RoutingStats(
        counts=torch.stack([torch.where(of_kind, chosen, 0.0).sum(dim=0) for of_kind in kinds]),
        prob_sum=torch.stack([torch.where(of_kind, probability, 0.0).sum(dim=0) for of_kind in kinds]),
    )
    return Routing(index.int(), weight, *plan_routing(index, experts), stats), hidden


def plan_routing(expert_index: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """(T, k) -> token_order (T*k,), expert_offset (E+1,), both int32."""
    flat = expert_index.flatten()
    counts = (flat[:, None] == torch.arange(num_experts, device=flat.device)).sum(dim=0)
    return flat.argsort(stable=True).int(), F.pad(counts.cumsum(0), (1, 0)).int()


def moe_mlp(hidden: Tensor, gate_up: Tensor, down: Tensor, routing: Routing) -> Tensor:
    """``gate_up`` (E, 2I, H) and ``down`` (E, H, I), whatever their strides. Reads expert_index and weight alone."""
    math = torch.promote_types(hidden.dtype, torch.float32)
    x = hidden.to(math)
    out = torch.zeros_like(x)
    for e in range(gate_up.shape[0]):
        token, slot = (routing.expert_index == e).nonzero(as_tuple=True)
        gate, up = (x[token] @ gate_up[e].to(math).T).chunk(2, dim=-1)
        y = (F.silu(gate) * up) @ down[e].to(math).T
        out = out.index_add(0, token, y * routing.weight[token, slot, None].to(math))
    return out.to(hidden.dtype)
