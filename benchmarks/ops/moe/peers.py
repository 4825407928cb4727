"""Other libraries' experts on the same tensors, and the library's dense products as a limit."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.harness.measure import Unavailable
from benchmarks.harness.op import Call, Outputs, Shape
from benchmarks.harness.peers import needed
from benchmarks.harness.processes import PRECOMPILED, precompile
from benchmarks.ops.moe.data import Layer

LIGER = "Liger fused MoE"
_precompiled: set[tuple[int, int]] = set()  # (H, I)


def dense(layer: Layer, shape: Shape) -> Call:
    """Forward up and down, backward to inputs and weights, as if one expert took all T k slots."""
    slots, width, inner = shape["T"] * shape["k"], shape["H"], shape["I"]
    up, down = layer.gate_up[0].detach(), layer.down[0].detach()  # (2I, H), (H, I)

    def rows(columns: int) -> Tensor:
        return torch.randn(slots, columns, device=up.device).to(up.dtype)

    x, product, activation, dy = rows(width), rows(2 * inner), rows(inner), rows(width)
    factors = ((x, up.T), (activation, down.T), (dy, down), (dy.T, activation), (product, up), (product.T, x))
    outs = [torch.empty_like(t) for t in (product, x, activation, down, x, up)]

    def call() -> Outputs:
        for (a, b), out in zip(factors, outs):
            torch.mm(a, b, out=out)
        return {}

    return call


def transformers(layer: Layer, implementation: str) -> Callable[[], Tensor]:
    package, where = "transformers", "transformers.models.qwen3_vl_moe."
    experts, width, inner = layer.down.shape
    sizes = {"num_experts": experts, "hidden_size": width, "moe_intermediate_size": inner, "hidden_act": "silu"}
    config = needed(where + "configuration_qwen3_vl_moe", "Qwen3VLMoeTextConfig", package)(**sizes)
    config._experts_implementation = implementation
    with torch.device("meta"):
        block = needed(where + "modeling_qwen3_vl_moe", "Qwen3VLMoeTextExperts", package)(config)
    for name, value in (("gate_up_proj", layer.gate_up), ("down_proj", layer.down)):
        delattr(block, name)
        setattr(block, name, value)  # the leaf itself: no copy, and its gradient is the benchmark's
    weight_dtype = layer.hidden.dtype
    return lambda: block(layer.hidden, layer.index.long(), layer.weight.to(weight_dtype))


def liger(layer: Layer, shape: Shape) -> Callable[[], Tensor]:
    op = needed("liger_kernel.ops", "LigerFusedMoEFunction", "liger-kernel", layer.hidden.device).apply
    # Its autotuner tries 240 configurations for every new H and I, minutes of compilation. T is no part of a kernel.
    if PRECOMPILED not in os.environ and (shape["H"], shape["I"]) not in _precompiled:
        _precompiled.add((shape["H"], shape["I"]))
        small = {**shape, "T": min(shape["T"], 2048)}
        module = "benchmarks.ops.moe.bench"
        precompile({"module": module, "problem": "experts", "shape": small, "contender": LIGER})
    return lambda: op(layer.hidden, layer.gate_up, layer.down, layer.index, layer.weight)


def scattermoe(layer: Layer, shape: Shape) -> Call:
    """Its experts hold [up | gate], a copy of ours; that gradient is computed and not compared."""
    make = needed("scattermoe.mlp", "GLUMLP", "scattermoe", layer.hidden.device)
    experts, width, inner = layer.down.shape
    with torch.device("meta"):
        block = make(width, inner, experts, shape["k"])
    gate, up = layer.gate_up.detach().chunk(2, 1)
    up_gate = torch.cat([up, gate], 1).requires_grad_()
    for part, value in ((block.experts, up_gate), (block.output_experts, layer.down)):
        if tuple(part.weight.shape) != tuple(value.shape):
            raise Unavailable(f"scattermoe holds weights as {tuple(part.weight.shape)}, not {tuple(value.shape)}")
        del part.weight
        part.weight = value
    leaves = [layer.hidden, layer.down, layer.weight, up_gate]

    def call() -> Outputs:
        out = block(layer.hidden, layer.weight, layer.index.long())
        dx, d_down, d_weight, _ = torch.autograd.grad(out, leaves, layer.d_out)
        return {"out": out.detach(), "dx": dx, "d_down": d_down, "d_weight": d_weight}

    return call
