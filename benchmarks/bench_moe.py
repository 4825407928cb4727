"""Mixture of experts: the router with its plan and statistics, and the experts of a given routing.

The experts' limit: six dense products of as many FLOPs, measured in the same run. "us_<part>" split one call by
torch.profiler: which kernels or operators took how long.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import prism_kernels
from benchmarks.__main__ import main
from benchmarks.harness import Contender, Problem, Tolerance
from benchmarks.measure import Unavailable, breakdown, graphed, saved_bytes
from benchmarks.moe_data import Layer, make_layer, truth_experts, truth_route
from benchmarks.peers import attribute, need
from benchmarks.precompile import PRECOMPILED, precompile
from prism_kernels.moe import plan_routing

TESTS = ["tests/kernels/moe/test_moe.py", "tests/kernels/moe/test_products.py", "tests/kernels/moe/test_triton.py"]
TINY = {"T": 32, "H": 32, "I": 48}
_BASE = {"T": 8192, "H": 2048, "I": 6144, "E": 4, "k": 2, "skew": 0.0, "dtype": "bf16"}
SHAPES: dict[str, list[dict[str, Any]]] = {
    "published": [
        dict(_BASE),
        {**_BASE, "T": 16384},
        {**_BASE, "T": 65536},
        {**_BASE, "T": 16384, "skew": 1.5},
        {**_BASE, "T": 16384, "I": 768, "E": 64},
    ],
    "cpu": [{**_BASE, "T": 4096, "H": 256, "I": 768, "dtype": "fp32"}],
    "tiny": [{**_BASE, **TINY, "dtype": "fp32"}],
}
GPU_PART = ("moe", 110)
GPU_ARGUMENTS = ["--seconds", "3"]

LIGER = "Liger fused MoE"
_precompiled: set[tuple[int, int]] = set()  # (H, I)
_ERRORS = {"bf16": (2e-2, 1e-1), "fp16": (5e-3, 5e-2), "fp32": (1e-5, 1e-2)}
PARTS = (
    ("products", r"gemm|cutlass|nvjet|cublas|matmul|::mm$|::addmm|::bmm|grouped|_proj_"),
    ("route", r"moe_route|softmax|topk"),
    ("plan", r"moe_plan|sort|histc|bincount|cumsum|nonzero|scan"),
    ("activation", r"swiglu|silu"),
    ("permute", r"permute|index_select|gather|::index$|indexSelect|index_elementwise"),
    ("combine", r"combine|embedding_bag|index_add|aggregat|reduce"),
)


def sweep(shape: dict[str, Any]) -> list[dict[str, Any]]:
    rows = [{**shape, "T": max(1, int(shape["T"] * factor))} for factor in (0.5, 1, 2, 4)]
    return [*rows, *({**shape, "skew": skew} for skew in (1.0, 2.0))]


def problems(shape: dict[str, Any], device: torch.device) -> list[Problem]:
    layer = make_layer(shape, device)
    tokens, width, inner, experts, k = (shape[key] for key in ("T", "H", "I", "E", "k"))
    item, slots = layer.hidden.element_size(), shape["T"] * shape["k"]
    weights = 3.0 * experts * inner * width * item
    moved = 2 * weights + 4.0 * tokens * width * item
    bound = Tolerance("relative", *_ERRORS[shape["dtype"]])
    names = ("out", "dx", "d_gate_up", "d_down", "d_weight")
    route = {
        "weight": Tolerance("max", 1e-3 if shape["dtype"] != "fp32" else 1e-5, 5e-2),
        "counts": Tolerance("relative", 1e-2, 5e-2),  # near ties may fall either way
        "prob_sum": Tolerance("relative", 1e-3, 5e-2),
    }
    return [
        Problem(
            "route", "router, plan and statistics, forward", shape, 2.0 * tokens * width * experts,
            tokens * width * item + slots * 12.0, _routers(layer, shape, device), lambda: truth_route(layer, k), route,
        ),
        Problem(
            "experts", "experts of a given routing, forward + backward", shape, 18.0 * slots * width * inner, moved,
            _experts(layer, shape, device), lambda: truth_experts(layer), dict.fromkeys(names, bound),
            limit=("six dense products", 1),
        ),
    ]  # fmt: skip


def _routers(layer: Layer, shape: dict[str, Any], device: torch.device) -> list[Contender]:
    k, hidden = shape["k"], layer.hidden.detach()

    @torch.no_grad()
    def ours() -> dict[str, Tensor]:
        routing = prism_kernels.moe_route(hidden, layer.router, k)
        return {"weight": routing.weight, "counts": routing.stats.counts[0], "prob_sum": routing.stats.prob_sum[0]}

    @torch.no_grad()
    def eager() -> dict[str, Tensor]:
        """The same outputs in plain torch, plan included."""
        probability = F.linear(hidden, layer.router).float().softmax(-1)
        top = probability.topk(k)
        flat = top.indices.flatten()
        order = flat.argsort(stable=True)
        counts = F.one_hot(flat, shape["E"]).sum(0)
        weight = top.values / top.values.sum(-1, keepdim=True)
        return {
            "weight": weight,
            "counts": counts,
            "prob_sum": probability.sum(0),
            "order": order,
            "offset": counts.cumsum(0),
        }

    return [
        Contender("prism", lambda: ours, "ours"),
        Contender("prism, graph replay", lambda: graphed(ours, device), "ours"),
        Contender("torch eager", lambda: eager),
        Contender("torch.compile", lambda: torch.compile(eager), compiles=True),
    ]


def _experts(layer: Layer, shape: dict[str, Any], device: torch.device) -> list[Contender]:
    def contender(name: str, make: Callable[[], Callable[[], Tensor]], role: str = "peer") -> Contender:
        kept: dict[str, Callable] = {}

        def prepare() -> Callable[[], dict[str, Tensor]]:
            forward = kept["forward"] = make()
            return lambda: layer.gradients(forward())

        def extra() -> dict[str, float]:
            forward = kept["forward"]
            saved = saved_bytes(forward, [*layer.leaves, layer.index])
            parts = _parts(breakdown(lambda: layer.gradients(forward()), device))
            return {"saved_bytes_per_token": saved / shape["T"], **parts}

        return Contender(name, prepare, role, extra)

    return [
        contender("prism", lambda: lambda: _ours(layer), "ours"),
        Contender("six dense products", lambda: _dense(layer, shape), "limit"),
        contender("transformers eager experts", lambda: _transformers(layer, "eager")),
        contender("transformers grouped_mm experts", lambda: _transformers(layer, "grouped_mm")),
        contender(LIGER, lambda: _liger(layer, shape, device)),
        _scattermoe(layer, shape, device),
    ]


def _parts(times: dict[str, float]) -> dict[str, float]:
    found = {f"us_{part}": 0.0 for part, _ in PARTS} | {"us_other": 0.0}
    for name, value in times.items():
        part = next((part for part, pattern in PARTS if re.search(pattern, name)), "other")
        found[f"us_{part}"] += value
    return found


def _ours(layer: Layer) -> Tensor:
    routing = plan_routing(layer.index, layer.weight, layer.down.shape[0])
    return prism_kernels.moe_mlp(layer.hidden, layer.gate_up, layer.down, routing)


def _dense(layer: Layer, shape: dict[str, Any]) -> Callable[[], dict[str, Tensor]]:
    """Forward up and down, backward to inputs and weights, as if one expert took all T k slots."""
    slots, width, inner = shape["T"] * shape["k"], shape["H"], shape["I"]
    up, down = layer.gate_up[0].detach(), layer.down[0].detach()  # (2I, H), (H, I)

    def rows(columns: int) -> Tensor:
        return torch.randn(slots, columns, device=up.device).to(up.dtype)

    x, product, activation, dy = rows(width), rows(2 * inner), rows(inner), rows(width)
    outs = [torch.empty_like(t) for t in (product, x, activation, down, x, up)]

    def call() -> dict[str, Tensor]:
        torch.mm(x, up.T, out=outs[0])
        torch.mm(activation, down.T, out=outs[1])
        torch.mm(dy, down, out=outs[2])
        torch.mm(dy.T, activation, out=outs[3])
        torch.mm(product, up, out=outs[4])
        torch.mm(product.T, x, out=outs[5])
        return {}

    return call


def _transformers(layer: Layer, implementation: str) -> Callable[[], Tensor]:
    package = "transformers"
    module = need("transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe", package)
    configuration = need("transformers.models.qwen3_vl_moe.configuration_qwen3_vl_moe", package)
    experts, width, inner = layer.down.shape
    config = attribute(configuration, "Qwen3VLMoeTextConfig", package)(
        num_experts=experts, hidden_size=width, moe_intermediate_size=inner, hidden_act="silu"
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        block = attribute(module, "Qwen3VLMoeTextExperts", package)(config)
    for name, value in (("gate_up_proj", layer.gate_up), ("down_proj", layer.down)):
        delattr(block, name)
        setattr(block, name, value)  # the leaf itself: no copy, and its gradient is the benchmark's
    weight_dtype = layer.hidden.dtype
    return lambda: block(layer.hidden, layer.index.long(), layer.weight.to(weight_dtype))


def _liger(layer: Layer, shape: dict[str, Any], device: torch.device) -> Callable[[], Tensor]:
    module = need("liger_kernel.ops", "liger-kernel", device)
    op = attribute(module, "LigerFusedMoEFunction", "liger-kernel").apply
    # Its autotuner tries 240 configurations for every new H and I, minutes of compilation. T is no part of a kernel.
    if PRECOMPILED not in os.environ and (shape["H"], shape["I"]) not in _precompiled:
        _precompiled.add((shape["H"], shape["I"]))
        small = {**shape, "T": min(shape["T"], 2048)}
        precompile({"op": "moe", "problem": "experts", "shape": small, "contender": LIGER})
    return lambda: op(layer.hidden, layer.gate_up, layer.down, layer.index, layer.weight)


def _scattermoe(layer: Layer, shape: dict[str, Any], device: torch.device) -> Contender:
    """Its experts hold [up | gate], a copy of ours; that gradient is computed and not compared."""

    def prepare() -> Callable[[], dict[str, Tensor]]:
        module = need("scattermoe.mlp", "scattermoe", device)
        experts, width, inner = layer.down.shape
        with torch.device("meta"):
            block = attribute(module, "GLUMLP", "scattermoe")(width, inner, experts, shape["k"])
        gate, up = layer.gate_up.detach().chunk(2, 1)
        up_gate = torch.cat([up, gate], 1).requires_grad_()
        for part, value in ((block.experts, up_gate), (block.output_experts, layer.down)):
            if tuple(part.weight.shape) != tuple(value.shape):
                raise Unavailable(f"scattermoe holds weights as {tuple(part.weight.shape)}, not {tuple(value.shape)}")
            del part.weight
            part.weight = value
        leaves = [layer.hidden, layer.down, layer.weight, up_gate]

        def call() -> dict[str, Tensor]:
            out = block(layer.hidden, layer.weight, layer.index.long())
            dx, d_down, d_weight, _ = torch.autograd.grad(out, leaves, layer.d_out)
            return {"out": out.detach(), "dx": dx, "d_down": d_down, "d_weight": d_weight}

        return call

    return Contender("ScatterMoE", prepare)


if __name__ == "__main__":
    sys.exit(main(["moe", *sys.argv[1:]]))
