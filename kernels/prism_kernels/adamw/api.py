"""Public function: contract, checks, dispatch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from prism_kernels.adamw.remainder import sizes
from prism_kernels.adamw.table import Factors, Operands, constants, factors, key
from prism_kernels.checks import check_device, check_tensor, describe, integer, is_tensor, number, shown, wrong
from prism_kernels.dispatch import Impl, Implementation, Op
from prism_kernels.native import need_cuda, need_native

ADAMW_STEP = Op(
    "adamw_step",
    [
        Implementation(Impl.CUDA, "prism_kernels.adamw.cuda:adamw_step", ("cuda",), need_cuda, fake=True),
        Implementation(Impl.NATIVE, "prism_kernels.adamw.native:adamw_step", ("cpu",), need_native),
        Implementation(Impl.REFERENCE, "prism_kernels.adamw.reference:adamw_step", ("cpu", "cuda")),
    ],
)
FLOATS = (torch.float32, torch.bfloat16)
LARGEST = 2**63 - 1
NAMES = ("parameters", "gradients", "remainders", "exp_avgs", "exp_avg_sqs")
_WEIGHTS = ((torch.float32, True), (torch.bfloat16, False))  # dtype, and whether there is no remainder


@torch.no_grad()
def adamw_step(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    remainders: Sequence[Tensor | None] | None,
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float | Sequence[float] = 0.01,
    step: int | Sequence[int],
    clip: Tensor | None = None,
    seed: int = 0,
    numbers: Sequence[int] | None = None,
    impl: str = "auto",
) -> None:
    """One step of AdamW on every tensor, in place: what ``torch.optim.AdamW`` does after ``gradient *= clip``.

    Five lists with one entry per tensor, all of one device, contiguous, the five of a tensor of one shape:
    ``parameters`` float32, or bfloat16 with an int16 remainder (`split_master`: both together are the exact fp32
    master, and the update is made to that); ``gradients`` float32 or bfloat16, which are only read; ``remainders`` None
    beside float32 parameters (or no list at all); moments ``exp_avgs`` and ``exp_avg_sqs`` both float32 or both
    bfloat16, rounded stochastically. ``weight_decay`` and ``step`` (from 1) are those of all tensors, or a list.

    ``clip``: a float32 scalar on the device, by which gradients are multiplied; where it is not finite, nothing is
    written, so that the host need not look at the norm of the gradients first.

    Stochastic rounding takes its bits from ``seed``, a tensor's ``step``, its number (``numbers``; by default its place
    in the lists) and an element's index, and from nothing else: a resumed run repeats them.

    Everything is computed in fp32 in the order of `prism_kernels.adamw.reference`, and every implementation gives the
    same bits. Each number is read once and written once: with float32 gradients and moments 28 bytes a parameter.
    Sources: Loshchilov and Hutter, "Decoupled weight decay regularization", 2019; Zamirai et al., "Revisiting BFloat16
    training", 2020 (rounding).

    >>> weight, remainder = split_master(master)
    >>> adamw_step([weight], [gradient], [remainder], [m], [v], lr=1e-5, step=1)

    Raises ValueError, naming the argument: lists of other lengths, a tensor of another shape, dtype or device or one
    that is not contiguous, a remainder that is missing or too many, numbers out of range.
    """
    operands = _operands(parameters, gradients, remainders, exp_avgs, exp_avg_sqs)
    count = len(operands.parameter)
    decays = _betas(betas)
    rate = number("lr", lr, at_least=0)
    shared = constants(decays, number("eps", eps, at_least=0))
    weights = _each("weight_decay", weight_decay, count, lambda value: number("weight_decay", value, at_least=0))
    steps = _each("step", step, count, lambda value: integer("step", value, 1, LARGEST))
    if numbers is not None and not isinstance(numbers, (list, tuple)):
        raise wrong("numbers", "a list of integers", shown(numbers))
    places = list(range(count)) if numbers is None else numbers
    own = _each("numbers", places, count, lambda value: integer("numbers", value, 0, LARGEST))
    seed = integer("seed", seed, 0, LARGEST)
    if clip is not None:
        check_tensor("clip", clip, {}, (torch.float32,))
    if count == 0:
        return
    first = operands.parameter[0]
    if clip is not None:
        check_device("clip", clip, "parameters[0]", first)
    _, run = ADAMW_STEP.select(impl, first.device)
    each: list[Factors] = []
    made: dict[tuple[float, int], Factors] = {}  # most tensors share them
    for exp_avg, weight, at, place in zip(operands.exp_avg, weights, steps, own):
        if (weight, at) not in made:
            made[weight, at] = factors(rate, decays, weight, at, 0)
        found = made[weight, at]
        if exp_avg.dtype == torch.bfloat16:
            found = found._replace(key=key(seed, at, place))
        each.append(found)
    run(operands, each, shared, clip)
    torch.autograd.graph.increment_version([*operands.parameter, *operands.exp_avg, *operands.exp_avg_sq])


def _operands(parameters: Any, gradients: Any, remainders: Any, exp_avgs: Any, exp_avg_sqs: Any) -> Operands:
    """The five lists, checked."""
    held = [_tensors("parameters", parameters)]
    count = len(held[0])
    remainders = [None] * count if remainders is None else remainders
    for name, values in zip(NAMES[1:], (gradients, remainders, exp_avgs, exp_avg_sqs)):
        held.append(_tensors(name, values))
        if len(held[-1]) != count:
            raise wrong(name, f"{count} entries, as parameters has", str(len(held[-1])))
    for i, five in enumerate(zip(*held)):
        if not _is_sound(held[0][0], *five):
            _check(i, held[0][0], five)
    return Operands(*held)


def _is_sound(first: Any, parameter: Any, gradient: Any, remainder: Any, exp_avg: Any, exp_avg_sq: Any) -> bool:
    """Whether `_check` has nothing to say: a step checks a thousand tensors, and this is ten times as quick."""
    tensors = [parameter, gradient, exp_avg, exp_avg_sq, *([] if remainder is None else [remainder])]
    if not all(isinstance(tensor, Tensor) and tensor.layout is torch.strided for tensor in tensors):
        return False
    moments = exp_avg.dtype
    if (parameter.dtype, remainder is None) not in _WEIGHTS or gradient.dtype not in FLOATS or moments not in FLOATS:
        return False
    if exp_avg_sq.dtype is not moments or (remainder is not None and remainder.dtype is not torch.int16):
        return False
    shape, device = parameter.shape, first.device
    return all(tensor.shape == shape and tensor.device == device and tensor.is_contiguous() for tensor in tensors)


def _check(i: int, first: Tensor, five: tuple[Any, ...]) -> None:
    """Raises for what is wrong with the tensors at place ``i`` of the lists."""
    parameter, _, remainder, exp_avg, _ = five
    if not is_tensor(parameter, FLOATS):
        raise wrong(f"parameters[{i}]", "float32 or bfloat16", describe(parameter))
    split = parameter.dtype == torch.bfloat16
    if (remainder is not None) != split:
        wanted = "a tensor beside bfloat16" if split else "None beside float32"
        got = "None" if remainder is None else describe(remainder)
        raise wrong(f"remainders[{i}]", wanted, got, "split_master(master) gives weight and remainder")
    shape = sizes(parameter)
    moments = (exp_avg.dtype,) if is_tensor(exp_avg, FLOATS) else FLOATS
    for name, value, dtypes in zip(NAMES, five, (FLOATS, FLOATS, (torch.int16,), FLOATS, moments)):
        if value is None:
            continue
        check_tensor(f"{name}[{i}]", value, shape, dtypes)
        check_device(f"{name}[{i}]", value, "parameters[0]", first)
        if not value.is_contiguous():
            raise wrong(f"{name}[{i}]", "a contiguous tensor", f"strides {value.stride()}", "contiguous() makes one")


def _tensors(name: str, values: Any) -> list[Any]:
    if not isinstance(values, (list, tuple)):
        raise wrong(name, "a list of tensors", describe(values) if isinstance(values, Tensor) else shown(values))
    return list(values)


def _each(name: str, value: Any, count: int, check: Callable[[Any], Any]) -> list[Any]:
    """One entry per tensor: of a list, or the same for all."""
    if not isinstance(value, (list, tuple)):
        return [check(value)] * count
    if len(value) != count:
        raise wrong(name, f"{count} entries, as parameters has", str(len(value)))
    return [check(entry) for entry in value]


def _betas(values: Any) -> tuple[float, float]:
    if not isinstance(values, (list, tuple)) or len(values) != 2:
        raise wrong("betas", "two numbers in [0, 1)", shown(values))
    first, second = (number(f"betas[{i}]", value, at_least=0) for i, value in enumerate(values))
    if max(first, second) >= 1:
        raise wrong("betas", "two numbers in [0, 1)", shown(values))
    return first, second
