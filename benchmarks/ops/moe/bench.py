"""Mixture of experts: the router with its plan and statistics, and the experts of a given routing.

The experts' limit: six dense products of as many FLOPs, measured in the same run. "us_<part>" split one call by
torch.profiler: which kernels or operators took how long.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import prism_kernels
from benchmarks.harness.measure import breakdown, graphed, saved_bytes
from benchmarks.harness.op import Call, Contender, Op, Outputs, Problem, Shape, Tolerance
from benchmarks.ops.moe import peers
from benchmarks.ops.moe.data import Layer, make_layer, truth_experts, truth_route
from prism_kernels.moe import plan_routing

_ERRORS = {"bf16": (2e-2, 1e-1), "fp16": (5e-3, 5e-2), "fp32": (1e-5, 1e-2)}
PARTS = (
    ("products", r"gemm|cutlass|nvjet|cublas|matmul|::mm$|::addmm|::bmm|grouped|_proj_"),
    ("route", r"moe_route|softmax|topk"),
    ("plan", r"moe_plan|sort|histc|bincount|cumsum|nonzero|scan"),
    ("activation", r"swiglu|silu"),
    ("permute", r"permute|index_select|gather|::index$|indexSelect|index_elementwise"),
    ("combine", r"combine|embedding_bag|index_add|aggregat|reduce"),
)


def problems(shape: Shape, device: torch.device) -> list[Problem]:
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


def _routers(layer: Layer, shape: Shape, device: torch.device) -> list[Contender]:
    k, hidden = shape["k"], layer.hidden.detach()

    @torch.no_grad()
    def ours() -> Outputs:
        routing = prism_kernels.moe_route(hidden, layer.router, k)
        return {"weight": routing.weight, "counts": routing.stats.counts[0], "prob_sum": routing.stats.prob_sum[0]}

    @torch.no_grad()
    def eager() -> Outputs:
        """The same outputs in plain torch, plan included."""
        probability = F.linear(hidden, layer.router).float().softmax(-1)
        top = probability.topk(k)
        flat = top.indices.flatten()
        counts = F.one_hot(flat, shape["E"]).sum(0)
        plan = {"order": flat.argsort(stable=True), "offset": counts.cumsum(0)}
        weight = top.values / top.values.sum(-1, keepdim=True)
        return {"weight": weight, "counts": counts, "prob_sum": probability.sum(0), **plan}

    return [
        Contender("prism", lambda: ours, "ours"),
        Contender("prism, graph replay", lambda: graphed(ours, device), "ours"),
        Contender("torch eager", lambda: eager),
        Contender("torch.compile", lambda: torch.compile(eager), compiles=True),
    ]


def _experts(layer: Layer, shape: Shape, device: torch.device) -> list[Contender]:
    def contender(name: str, make: Callable[[], Callable[[], Tensor]], role: str = "peer") -> Contender:
        kept: dict[str, Callable] = {}

        def prepare() -> Call:
            forward = kept["forward"] = make()
            return lambda: layer.gradients(forward())

        def extra() -> dict[str, float]:
            forward = kept["forward"]
            saved = saved_bytes(forward, [*layer.leaves, layer.index])
            parts = _parts(breakdown(lambda: layer.gradients(forward()), device))
            return {"saved_bytes_per_token": saved / shape["T"], **parts}

        return Contender(name, prepare, role, extra)

    def ours() -> Tensor:
        routing = plan_routing(layer.index, layer.weight, layer.down.shape[0])
        return prism_kernels.moe_mlp(layer.hidden, layer.gate_up, layer.down, routing)

    return [
        contender("prism", lambda: ours, "ours"),
        Contender("six dense products", lambda: peers.dense(layer, shape), "limit"),
        contender("transformers eager experts", lambda: peers.transformers(layer, "eager")),
        contender("transformers grouped_mm experts", lambda: peers.transformers(layer, "grouped_mm")),
        contender(peers.LIGER, lambda: peers.liger(layer, shape)),
        Contender("ScatterMoE", lambda: peers.scattermoe(layer, shape)),
    ]


def _parts(times: dict[str, float]) -> dict[str, float]:
    found = {f"us_{part}": 0.0 for part, _ in PARTS} | {"us_other": 0.0}
    for name, value in times.items():
        part = next((part for part, pattern in PARTS if re.search(pattern, name)), "other")
        found[f"us_{part}"] += value
    return found


def _sweep(shape: Shape) -> list[Shape]:
    rows = [{**shape, "T": max(1, int(shape["T"] * factor))} for factor in (0.5, 1, 2, 4)]
    return [*rows, *({**shape, "skew": skew} for skew in (1.0, 2.0))]


_SIZES = {"T": 8192, "H": 2048, "I": 6144, "E": 4, "k": 2, "skew": 0.0, "dtype": "bf16"}
_TINY = {"T": 32, "H": 32, "I": 48}
BENCH = Op(
    op="moe",
    description=__doc__,
    problems=problems,
    names=("route", "experts"),
    shapes={
        "published": [
            _SIZES,
            {**_SIZES, "T": 16384},
            {**_SIZES, "T": 65536},
            {**_SIZES, "T": 16384, "skew": 1.5},
            {**_SIZES, "T": 16384, "I": 768, "E": 64},
        ],
        "cpu": [{**_SIZES, "T": 4096, "H": 256, "I": 768, "dtype": "fp32"}],
        "tiny": [{**_SIZES, **_TINY, "dtype": "fp32"}],
    },
    tiny=_TINY,
    sweep=_sweep,
)
