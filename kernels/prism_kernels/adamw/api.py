"""Public function: contract, checks, dispatch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from prism_kernels.adamw.remainder import sizes
from prism_kernels.adamw.table import Operands, constants, factors, key
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
_FLOATS = set(FLOATS)
_WEIGHTS = {(torch.float32, True), (torch.bfloat16, False)}  # dtype, and whether there is no remainder


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
    own = range(count)
    if numbers is not None:
        own = _each("numbers", numbers, count, lambda value: integer("numbers", value, 0, LARGEST))
    seed = integer("seed", seed, 0, LARGEST)
    if clip is not None:
        check_tensor("clip", clip, {}, (torch.float32,))
    if count == 0:
        return
    first = operands.parameter[0]
    if clip is not None:
        check_device("clip", clip, "parameters[0]", first)
    _, run = ADAMW_STEP.select(impl, first.device)
    made = {pair: factors(rate, decays, *pair, 0) for pair in set(zip(weights, steps))}  # most tensors share them
    each = [made[pair] for pair in zip(weights, steps)]
    for i, exp_avg in enumerate(operands.exp_avg):
        if exp_avg.dtype == torch.bfloat16:
            each[i] = each[i]._replace(key=key(seed, steps[i], own[i]))
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
    if not _are_sound(*held):
        for i, five in enumerate(zip(*held)):
            _check(i, held[0][0], five)
    return Operands(*held)


def _are_sound(parameters: Any, gradients: Any, remainders: Any, exp_avgs: Any, exp_avg_sqs: Any) -> bool:
    """Whether `_check` has nothing to say of any. List by list, since a step checks a thousand tensors: of many small
    ones the checks would take longer than the step."""
    split = [tensor for tensor in remainders if tensor is not None]
    every = [*parameters, *gradients, *split, *exp_avgs, *exp_avg_sqs]
    if not all(issubclass(kind, Tensor) for kind in set(map(type, every))):
        return False
    if {tensor.layout for tensor in every} - {torch.strided} or len({tensor.device for tensor in every}) > 1:
        return False
    weights, moments = [tensor.dtype for tensor in parameters], [tensor.dtype for tensor in exp_avgs]
    if set(zip(weights, (tensor is None for tensor in remainders))) - _WEIGHTS:
        return False
    if {tensor.dtype for tensor in gradients} - _FLOATS or set(moments) - _FLOATS:
        return False
    if moments != [tensor.dtype for tensor in exp_avg_sqs] or {tensor.dtype for tensor in split} - {torch.int16}:
        return False
    shapes = [tensor.shape for tensor in parameters]
    halves = [shape for shape, tensor in zip(shapes, remainders) if tensor is not None]
    if [tensor.shape for tensor in every] != [*shapes, *shapes, *halves, *shapes, *shapes]:
        return False
    return all(map(Tensor.is_contiguous, every))


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
