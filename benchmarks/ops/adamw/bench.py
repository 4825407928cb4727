"""One AdamW step over many tensors: ours beside torch's fused and foreach forms.

"float32": fp32 weights, gradients and moments. "bfloat16": a bf16 model, whose masters torch keeps as fp32 tensors
beside the weights and rounds into them after the step; ours are the weights with 16 bits more. Every row steps from the
same weights, moments and gradients; what a call leaves behind is what the next one begins with. The limit is a copy
that reads and writes as many bytes as one step must.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.harness.op import Call, Contender, Op, Outputs, Problem, Shape, Tolerance
from prism_kernels import adamw_step, join_master, split_master

LR, BETAS, EPS, DECAY, STEP = 1e-3, (0.9, 0.99), 1e-8, 0.01, 10  # STEP: the number of the first step that is made
OPERATIONS = 15  # of one parameter: decay 1, m 3, v 4, the step from them 7
BYTES = 28  # of one parameter: weight, m and v read and written in 4 bytes each, the gradient read
COPY = "a copy of as many bytes"
NAMES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class State:
    """Flat tensors of N parameters, fp32, from which every row makes its own."""

    shape: Shape
    weight: Tensor
    gradient: Tensor
    average: Tensor
    square: Tensor

    @classmethod
    def random(cls, shape: Shape, device: torch.device) -> State:
        count, random = shape["tensors"] * shape["size"], torch.Generator(device).manual_seed(0)

        def normal(scale: float) -> Tensor:
            return torch.randn(count, generator=random, device=device).mul_(scale)

        # Moments that bf16 holds: rounding them once more is no error of the step.
        average, square = (x.bfloat16().float() for x in (normal(1e-3), normal(1e-3).square_()))
        return cls(shape, normal(0.02), normal(1e-3), average, square)

    def cut(self, flat: Tensor) -> list[Tensor]:
        return list(flat.view(self.shape["tensors"], self.shape["size"]).unbind())


def problems(shape: Shape, device: torch.device) -> list[Problem]:
    state = State.random(shape, device)
    return [_problem(name, state) for name in NAMES]


def _problem(name: str, state: State) -> Problem:
    split, count = NAMES[name] == torch.bfloat16, state.weight.numel()
    rows = [Contender("prism", lambda: _ours(state, split, torch.float32), "ours", compared=_master)]
    if split:
        small = Contender("prism, bf16 moments", lambda: _ours(state, True, torch.bfloat16), "ours", compared=_weight)
        rows.append(small)
    for form in ("fused", "foreach"):
        masters = " on fp32 masters" if split else ""
        rows.append(Contender(f"torch {form}{masters}", lambda form=form: _torch(state, form, split)))
    rows.append(Contender(COPY, lambda: _copy(state), "limit"))
    # A result in fp32 is rounded once; what goes into it a few times more.
    tolerance = Tolerance("relative", 1e-6, 1e-6)
    tolerances = dict.fromkeys(("weight", "average", "square"), tolerance)
    title = f"AdamW, {'bf16 weights exact to fp32' if split else 'fp32 weights'}"
    return Problem(
        name, title, state.shape, float(OPERATIONS * count), float(BYTES * count), rows, lambda: truth(state),
        tolerances, limit=(COPY, 1),
    )  # fmt: skip


def truth(state: State) -> Outputs:
    """Loshchilov and Hutter's lines in float64."""
    w, g, m, v = (x.double() for x in (state.weight, state.gradient, state.average, state.square))
    m = BETAS[0] * m + (1 - BETAS[0]) * g
    v = BETAS[1] * v + (1 - BETAS[1]) * g.square()
    root = (v / (1 - BETAS[1] ** STEP)).sqrt() + EPS
    w = w * (1 - LR * DECAY) - LR / (1 - BETAS[0] ** STEP) * m / root
    return {"weight": w, "average": m, "square": v}


def _master(outputs: Outputs) -> Outputs:
    remainder = outputs.get("remainder")
    return outputs if remainder is None else {**outputs, "weight": join_master(outputs["weight"], remainder)}


def _weight(outputs: Outputs) -> Outputs:
    """Moments in bf16 are rounded at random: the weight is what is exact."""
    return {"weight": _master(outputs)["weight"]}


def _ours(state: State, split: bool, moments: torch.dtype) -> Call:
    weight, remainder = split_master(state.weight) if split else (state.weight.clone(), None)
    average, square = state.average.to(moments, copy=True), state.square.to(moments, copy=True)
    held = [state.cut(x) for x in (weight, state.gradient, average, square)]
    extra = None if remainder is None else state.cut(remainder)

    def call() -> Outputs:
        adamw_step(
            held[0], held[1], extra, held[2], held[3], lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, step=STEP
        )
        found = {"weight": weight, "average": average, "square": square}
        return found if remainder is None else {**found, "remainder": remainder}

    return call


def _torch(state: State, form: str, split: bool) -> Call:
    """torch.optim.AdamW; ``split``: its weights are masters, which are rounded into bf16 weights after the step."""
    weight, average, square = (x.clone() for x in (state.weight, state.average, state.square))
    parameters = [torch.nn.Parameter(x) for x in state.cut(weight)]
    optimizer = torch.optim.AdamW(parameters, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, **{form: True})
    for parameter, gradient, m, v in zip(parameters, *map(state.cut, (state.gradient, average, square))):
        parameter.grad = gradient
        done = torch.tensor(float(STEP - 1), device=weight.device if form == "fused" else "cpu")
        optimizer.state[parameter] = {"step": done, "exp_avg": m, "exp_avg_sq": v}
    rounded = state.cut(weight.bfloat16()) if split else []
    masters = [parameter.detach() for parameter in parameters]

    def call() -> Outputs:
        optimizer.step()
        if split:
            torch._foreach_copy_(rounded, masters)
        return {"weight": weight, "average": average, "square": square}

    return call


def _copy(state: State) -> Call:
    source = torch.empty(state.weight.numel() * BYTES // 2, dtype=torch.int8, device=state.weight.device)
    target = torch.empty_like(source)

    def call() -> Outputs:
        target.copy_(source)
        return {}

    return call


def _sweep(shape: Shape) -> list[Shape]:
    return [{**shape, "size": int(shape["size"] * factor)} for factor in (0.25, 0.5, 1, 2)]


_LARGE = {"tensors": 16, "size": 1 << 20}
_MIDDLE = {"tensors": 64, "size": 1 << 16}
_SMALL = {"tensors": 256, "size": 1 << 12}
_TINY = {"tensors": 3, "size": 1 << 10}
BENCH = Op(
    op="update",
    description=__doc__,
    problems=problems,
    names=tuple(NAMES),
    shapes={
        "published": [{"tensors": 64, "size": 1 << 22}, {"tensors": 512, "size": 1 << 17}, _SMALL],
        "cpu": [_LARGE, _MIDDLE, _SMALL],
        "tiny": [_TINY],
    },
    tiny=_TINY,
    sweep=_sweep,
)
