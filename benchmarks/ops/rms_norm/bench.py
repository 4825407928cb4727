"""Norms of a decoder layer, forward + backward: RMSNorm behind the residual sum, and of heads with their rotation.

Both move bytes and compute little: GB/s over those that must move is what counts. Liger has no norm with a rotation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import prism_kernels
from benchmarks.harness.measure import DTYPES
from benchmarks.harness.op import Call, Contender, Op, Outputs, Problem, Shape, Tolerance
from benchmarks.harness.peers import needed

EPS = 1e-6
ERRORS = {"bf16": (5e-3, 5e-2), "fp16": (1e-3, 1e-2), "fp32": (1e-5, 1e-2)}  # of ours, of peers
Function = Callable[..., Sequence[Tensor]]
Functions = dict[str, Callable[[], Function]]  # by name, made where they are prepared


def problems(shape: Shape, device: torch.device) -> list[Problem]:
    tokens, width, head = shape["T"], shape["H"], shape["D"]
    random = torch.Generator(device).manual_seed(0)
    dtype = DTYPES[shape["dtype"]]

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=random, device=device).to(dtype).requires_grad_()

    angle = (torch.rand(tokens, head // 2, generator=random, device=device) * 6).repeat(1, 2)
    turn = angle.cos(), angle.sin()
    hidden = [normal(tokens, width), normal(tokens, width), normal(width)]
    heads = [*(normal(tokens, shape[name], head) for name in ("Hq", "Hkv")), normal(head), normal(head)]
    item, rows = hidden[0].element_size(), tokens * (shape["Hq"] + shape["Hkv"])
    tolerance = Tolerance("relative", *ERRORS[shape["dtype"]])

    def problem(name: str, title: str, leaves: list[Tensor], functions: Functions, moved: float) -> Problem:
        upstream = [normal(*x.shape).detach() for x in leaves[:2]]
        wide = [x.detach().double().requires_grad_() for x in leaves]
        exact = [x.double() for x in upstream]
        names = ("y0", "y1", "d0", "d1", "d2", "d3")[: 2 + len(leaves)]
        eager = functions["torch eager"]()
        every = {**functions, "torch.compile": lambda: torch.compile(eager)}
        contenders = [_contender(name, make, leaves, upstream) for name, make in every.items()]
        truth = lambda: _both(eager(*wide), wide, exact)  # noqa: E731
        operations = 20.0 * sum(x.numel() for x in upstream)
        return Problem(name, title, shape, operations, moved, contenders, truth, dict.fromkeys(names, tolerance))

    return [
        problem("residual", "norm behind a residual sum", hidden, _norms(device), 8.0 * tokens * width * item),
        problem("rotate", "norm and rotation of q and k", heads, _rotations(turn), 5.0 * rows * head * item),
    ]


def _both(outputs: Sequence[Tensor], leaves: list[Tensor], upstream: list[Tensor]) -> Outputs:
    gradients = torch.autograd.grad(outputs, leaves, upstream)
    named = {f"d{i}": gradient for i, gradient in enumerate(gradients)}
    return {"y0": outputs[0].detach(), "y1": outputs[1].detach(), **named}


def _contender(name: str, make: Callable[[], Function], leaves: list[Tensor], upstream: list[Tensor]) -> Contender:
    def prepare() -> Call:
        run = make()
        return lambda: _both(run(*leaves), leaves, upstream)

    return Contender(name, prepare, "ours" if name == "prism" else "peer", compiles=name == "torch.compile")


def _normalised(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(x.dtype)


def _norms(device: torch.device) -> Functions:
    def eager(x: Tensor, residual: Tensor, weight: Tensor) -> Sequence[Tensor]:
        total = x + residual
        return _normalised(total, weight), total

    def liger() -> Function:
        op = needed("liger_kernel.ops", "LigerFusedAddRMSNormFunction", "liger-kernel", device).apply
        return lambda x, residual, weight: op(x, residual, weight, EPS, 0.0, "gemma", False)

    def ours(x: Tensor, residual: Tensor, weight: Tensor) -> Sequence[Tensor]:
        return prism_kernels.rms_norm(x, weight, EPS, residual=residual)

    return {"prism": lambda: ours, "torch eager": lambda: eager, "Liger fused add and RMSNorm": liger}


def _rotations(turn: tuple[Tensor, Tensor]) -> Functions:
    def eager(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor) -> Sequence[Tensor]:
        return _turned(_normalised(q, q_weight)), _turned(_normalised(k, k_weight))

    def _turned(y: Tensor) -> Tensor:
        cos, sin = (part[:, None].to(y.dtype) for part in turn)
        first, second = y.chunk(2, -1)
        return y * cos + torch.cat([-second, first], -1) * sin

    def ours(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor) -> Sequence[Tensor]:
        return prism_kernels.qk_norm_rotate(q, k, q_weight, k_weight, *turn, EPS)

    return {"prism": lambda: ours, "torch eager": lambda: eager}


_SIZES = {"T": 16384, "H": 2560, "Hq": 32, "Hkv": 8, "D": 128, "dtype": "bf16"}
_TINY = {"T": 24, "H": 48, "Hq": 4, "Hkv": 2, "D": 8}
BENCH = Op(
    op="rms_norm",
    description=__doc__,
    problems=problems,
    names=("residual", "rotate"),
    shapes={
        "published": [_SIZES, {**_SIZES, "H": 4096}],
        "cpu": [{**_SIZES, "T": 1024, "dtype": "fp32"}],
        "tiny": [{**_SIZES, **_TINY, "dtype": "fp32"}],
    },
    tiny=_TINY,
    sweep=lambda shape: [{**shape, "T": max(1, int(shape["T"] * factor))} for factor in (0.25, 0.5, 1, 2)],
)
