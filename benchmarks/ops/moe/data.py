"""Inputs of the MoE benchmarks, and their truth in float64, expert by expert.

T tokens, H hidden, E experts, k experts per token, I intermediate. ``skew``: the experts' router logits fall from +skew
to -skew, so that the first experts get most tokens; 0 is even.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness.measure import DTYPES
from benchmarks.harness.op import Outputs, Shape


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

    def gradients(self, out: Tensor) -> Outputs:
        names = ("dx", "d_gate_up", "d_down", "d_weight")
        return {"out": out.detach(), **dict(zip(names, torch.autograd.grad(out, self.leaves, self.d_out)))}


def make_layer(shape: Shape, device: torch.device, seed: int = 0) -> Layer:
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


def truth_experts(layer: Layer) -> Outputs:
    """float64 {"out", "dx", "d_gate_up", "d_down", "d_weight"} of the experts for the given routing."""
    x, d_out, weight = (t.detach().double() for t in (layer.hidden, layer.d_out, layer.weight))
    found = {"out": torch.zeros_like(x), "dx": torch.zeros_like(x), "d_weight": torch.zeros_like(weight)}
    for name, matrices in (("d_gate_up", layer.gate_up), ("d_down", layer.down)):
        found[name] = torch.empty_like(matrices, dtype=torch.float64, requires_grad=False)
    for e in range(layer.down.shape[0]):
        token, slot = (layer.index == e).nonzero(as_tuple=True)
        own = [x[token], layer.gate_up[e].detach().double(), layer.down[e].detach().double(), weight[token, slot]]
        rows, up_matrix, down_matrix, w = (t.requires_grad_() for t in own)
        gate, up = (rows @ up_matrix.T).chunk(2, -1)
        out = ((F.silu(gate) * up) @ down_matrix.T) * w[:, None]
        dx, found["d_gate_up"][e], found["d_down"][e], d_weight = torch.autograd.grad(out, own, d_out[token])
        found["out"].index_add_(0, token, out.detach())
        found["dx"].index_add_(0, token, dx)
        found["d_weight"][token, slot] = d_weight
    return found


def truth_route(layer: Layer, top_k: int) -> Outputs:
    """float64 {"weight" (T, k), "counts" (E,), "prob_sum" (E,)}."""
    probability = (layer.hidden.detach().double() @ layer.router.double().T).softmax(-1)
    top = probability.topk(top_k)
    counts = top.indices.flatten().bincount(minlength=probability.shape[1]).double()
    return {
        "weight": top.values / top.values.sum(-1, keepdim=True),
        "counts": counts,
        "prob_sum": probability.sum(0),
    }
