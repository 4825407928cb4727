"""SwiGLU between an MLP's products, forward + backward: [gate | up] in one tensor, and as two.

It moves bytes and computes little: GB/s over those that must move is what counts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import prism_kernels
from benchmarks.harness.measure import DTYPES
from benchmarks.harness.op import Call, Contender, Op, Outputs, Problem, Shape, Tolerance
from benchmarks.harness.peers import needed

ERRORS = {"bf16": (5e-3, 5e-2), "fp16": (1e-3, 1e-2), "fp32": (1e-5, 1e-2)}  # of ours, of peers
LIGER = ("liger_kernel.ops.swiglu", "liger-kernel")


def problems(shape: Shape, device: torch.device) -> list[Problem]:
    random = torch.Generator(device).manual_seed(0)
    dtype, elements = DTYPES[shape["dtype"]], shape["T"] * shape["I"]
    gate, up, upstream = (
        torch.randn(shape["T"], shape["I"], generator=random, device=device).to(dtype) for _ in range(3)
    )
    tolerance = Tolerance("relative", *ERRORS[shape["dtype"]])
    found = []
    for name, title, leaves in (
        ("packed", "[gate | up] in one tensor", [torch.cat([gate, up], -1)]),
        ("apart", "gate and up in two tensors", [gate, up]),
    ):
        leaves = [x.requires_grad_() for x in leaves]
        wide = [x.detach().double().requires_grad_() for x in leaves]
        names = ("out", "d0", "d1")[: 1 + len(leaves)]
        contenders = [
            _contender(who, make, leaves, upstream) for who, make in {**_functions(), **_liger(name, device)}.items()
        ]
        truth = lambda wide=wide: _both(_eager(*wide), wide, upstream.double())  # noqa: E731
        moved = 8.0 * elements * gate.element_size()
        bounds = dict.fromkeys(names, tolerance)
        found.append(Problem(name, title, shape, 20.0 * elements, moved, contenders, truth, bounds))
    return found


def _both(out: Tensor, leaves: list[Tensor], upstream: Tensor) -> Outputs:
    gradients = torch.autograd.grad(out, leaves, upstream)
    return {"out": out.detach(), **{f"d{i}": gradient for i, gradient in enumerate(gradients)}}


def _contender(
    name: str, make: Callable[[], Callable[..., Tensor]], leaves: list[Tensor], upstream: Tensor
) -> Contender:
    def prepare() -> Call:
        run = make()
        return lambda: _both(run(*leaves), leaves, upstream)

    return Contender(name, prepare, "ours" if name == "prism" else "peer", compiles=name == "torch.compile")


def _eager(gate_up: Tensor, up: Tensor | None = None) -> Tensor:
    gate, up = gate_up.chunk(2, -1) if up is None else (gate_up, up)
    return F.silu(gate) * up


def _functions() -> dict[str, Callable[[], Callable[..., Tensor]]]:
    return {
        "prism": lambda: lambda gate_up, up=None: prism_kernels.swiglu(gate_up, up=up),
        "torch eager": lambda: _eager,
        "torch.compile": lambda: torch.compile(_eager),
    }


def _liger(problem: str, device: torch.device) -> dict[str, Callable[[], Callable[..., Tensor]]]:
    module, package = LIGER

    def packed() -> Callable[..., Tensor]:
        return needed(module, "LigerFusedGateUpSiLUMulFunction", package, device).apply

    def apart() -> Callable[..., Tensor]:
        op = needed(module, "LigerSiLUMulFunction", package, device).apply
        return lambda gate, up: op(gate.clone(), up.clone())

    if problem == "packed":
        return {"Liger fused gate-up": packed}
    return {"Liger SwiGLU, on copies that it overwrites": apart}


_SIZES = {"T": 16384, "I": 9728, "dtype": "bf16"}
_TINY = {"T": 24, "I": 48}
BENCH = Op(
    op="swiglu",
    description=__doc__,
    problems=problems,
    names=("packed", "apart"),
    shapes={
        "published": [_SIZES],
        "cpu": [{**_SIZES, "T": 512, "dtype": "fp32"}],
        "tiny": [{**_SIZES, **_TINY, "dtype": "fp32"}],
    },
    tiny=_TINY,
    sweep=lambda shape: [{**shape, "T": max(1, int(shape["T"] * factor))} for factor in (0.25, 0.5, 1, 2)],
)
