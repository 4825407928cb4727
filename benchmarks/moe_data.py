"""Inputs of the MoE benchmarks, and their truth in float64, expert by expert.

T tokens, H hidden, E experts, k experts per token, I intermediate. ``skew``: the experts' router logits fall from +skew
to -skew, so that the first experts get most tokens; 0 is even.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import DTYPES


@dataclass
class Layer:
    hidden: Tensor  # (T, H), wants a gradient, as do the next two and weight
    gate_up: Tensor  # (E, 2I, H)
    down: Tensor  # (E, H, I)
    weight: Tensor  # (T, k) fp32
    index: Tensor  # (T, k) int32
    router: Tensor  # (E, H)
    d_out: Tensor  # (T, H)

    @property
    def leaves(self) -> list[Tensor]:
        return [self.hidden, self.gate_up, self.down, self.weight]

    def gradients(self, out: Tensor) -> dict[str, Tensor]:
        names = ("dx", "d_gate_up", "d_down", "d_weight")
        return {"out": out.detach(), **dict(zip(names, torch.autograd.grad(out, self.leaves, self.d_out)))}


def make_layer(shape: dict[str, Any], device: torch.device, seed: int = 0) -> Layer:
    tokens, width, inner, experts = shape["T"], shape["H"], shape["I"], shape["E"]
    dtype = DTYPES[shape["dtype"]]
    random = torch.Generator(device).manual_seed(seed)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*size, generator=random, device=device).mul_(scale).to(dtype)

    # A common direction of all hidden states carries the skew: hidden . direction = 1.
    direction = torch.full((width,), width**-0.5, device=device)
    hidden = normal(tokens, width) + direction.to(dtype)
    tilt = torch.linspace(1, -1, experts, device=device) * shape["skew"]
    router = (normal(experts, width, scale=width**-0.5).float() + tilt[:, None] * direction).to(dtype)
    probability = (hidden.float() @ router.float().T).softmax(-1)
    top = probability.topk(shape["k"])
    weight = top.values / top.values.sum(-1, keepdim=True)
    gate_up = normal(experts, 2 * inner, width, scale=width**-0.5)
    down = normal(experts, width, inner, scale=inner**-0.5)
    layer = Layer(hidden, gate_up, down, weight, top.indices.int(), router, normal(tokens, width))
    for leaf in layer.leaves:
        leaf.requires_grad_()
    return layer


def truth_experts(layer: Layer) -> dict[str, Tensor]:
    """float64 {"out", "dx", "d_gate_up", "d_down", "d_weight"} of the experts for the given routing."""
    x, d_out = layer.hidden.detach().double(), layer.d_out.double()
    weight = layer.weight.detach().double()
    out, dx, d_weight = torch.zeros_like(x), torch.zeros_like(x), torch.zeros_like(weight)
    d_gate_up = torch.empty_like(layer.gate_up, dtype=torch.float64, requires_grad=False)
    d_down = torch.empty_like(layer.down, dtype=torch.float64, requires_grad=False)
    for e in range(layer.down.shape[0]):
        token, slot = (layer.index == e).nonzero(as_tuple=True)
        up_matrix, down_matrix = layer.gate_up[e].detach().double(), layer.down[e].detach().double()
        gate, up = (x[token] @ up_matrix.T).chunk(2, -1)
        sigmoid = gate.sigmoid()
        activation = F.silu(gate) * up
        y = activation @ down_matrix.T
        w = weight[token, slot, None]
        out.index_add_(0, token, y * w)
        d_weight[token, slot] = (y * d_out[token]).sum(-1)
        dy = d_out[token] * w
        d_down[e] = dy.T @ activation
        d_activation = dy @ down_matrix
        d_gate = d_activation * up * sigmoid * (1 + gate * (1 - sigmoid))
        d_product = torch.cat([d_gate, d_activation * F.silu(gate)], -1)
        d_gate_up[e] = d_product.T @ x[token]
        dx.index_add_(0, token, d_product @ up_matrix)
    return {"out": out, "dx": dx, "d_gate_up": d_gate_up, "d_down": d_down, "d_weight": d_weight}


def truth_route(layer: Layer, top_k: int) -> dict[str, Tensor]:
    """float64 {"weight" (T, k), "counts" (E,), "prob_sum" (E,)}."""
    probability = (layer.hidden.detach().double() @ layer.router.double().T).softmax(-1)
    top = probability.topk(top_k)
    counts = top.indices.flatten().bincount(minlength=probability.shape[1]).double()
    return {
        "weight": top.values / top.values.sum(-1, keepdim=True),
        "counts": counts,
        "prob_sum": probability.sum(0),
    }
