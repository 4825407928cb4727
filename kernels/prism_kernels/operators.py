"""Operators of torch, which torch.compile does not look into: their schema, their registration, their device."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor

from prism_kernels.checks import is_batched
from prism_kernels.dispatch import on_device_of


class Written(Tensor):
    """In a signature: a tensor that the operator writes into. Such an operator has no derivative."""


_TYPES: dict[Any, str] = {  # of a schema, by annotation
    Tensor: "Tensor",
    Written: "Tensor({}!)",
    Tensor | None: "Tensor?",
    float: "float",
    float | None: "float?",
    bool: "bool",
    int: "SymInt",
    str: "str",
    list[int]: "SymInt[]",
}


class Operator:
    """``torch.ops.prism_kernels.<name>``, on any device: a function of records, which operators do not know.

    Its schema is the function's signature with the fields of every record in the record's place, so that no list of
    them is written again. Calls, the function and its fake take records; autograd's functions see the flat arguments,
    of which :meth:`records` makes records. The first argument starts with a
    tensor, on whose device it runs.

    Not torch.library.custom_op, which imports torch._dynamo: two seconds of every process that calls an op.
    """

    def __init__(self, name: str, run: Callable[..., Any]):
        hints = get_type_hints(run)
        returns = hints.pop("return")
        self.kinds = list(hints.values())
        self.name, self.run = f"prism_kernels::{name}", run
        fields: dict[str, Any] = {}
        for parameter, kind in hints.items():
            fields.update(get_type_hints(kind) if _is_record(kind) else {parameter: kind})
        torch.library.define(self.name, _schema(fields, returns), tags=(torch.Tag.pt2_compliant_tag,))

        def run_as_given(first: Tensor, *rest: Any) -> Any:
            with on_device_of(first), as_given(first):
                return run(*self.records(first, *rest))

        torch.library.impl(self.name, "CompositeExplicitAutograd", run_as_given)
        self.overload = getattr(torch.ops.prism_kernels, name).default

    def __call__(self, *arguments: Any) -> Any:
        flat = []
        for argument in arguments:
            flat.extend(argument if isinstance(argument, tuple) else (argument,))
        return self.overload(*flat)

    def records(self, *flat: Any) -> list[Any]:
        """The function's arguments out of the operator's."""
        arguments, rest = [], list(flat)
        for kind in self.kinds:
            count = len(kind._fields) if _is_record(kind) else 1
            taken, rest = rest[:count], rest[count:]
            arguments.append(kind(*taken) if _is_record(kind) else taken[0])
        return arguments

    def fake(self, run: Callable[..., Any]) -> None:
        """Decorates the function that makes outputs of the right shapes, dtypes and strides, without values."""
        torch.library.register_fake(self.name, lambda *flat: run(*self.records(*flat)))

    def differentiate(self, setup: Callable[..., None], backward: Callable[..., Any]) -> None:
        torch.library.register_autograd(self.name, backward, setup_context=setup)

    def constant(self) -> None:
        """Nobody differentiates it: it is a backward, or its outputs carry no gradient."""

        def setup(ctx: Any, inputs: tuple, output: Any) -> None:
            ctx.num_inputs = len(inputs)
            ctx.mark_non_differentiable(*(output if isinstance(output, tuple) else (output,)))

        self.differentiate(setup, lambda ctx, *_: (None,) * ctx.num_inputs)


def operator(name: str) -> Callable[[Callable[..., Any]], Operator]:
    """Decorates the function that the operator runs."""
    return lambda run: Operator(name, run)


def _is_record(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, tuple)


_ALIASES = [f"a{i}" for i in range(100)]


def _schema(fields: dict[str, Any], returns: Any) -> str:
    arguments = [f"{_TYPES[kind].format(alias)} {name}" for alias, (name, kind) in zip(_ALIASES, fields.items())]
    return f"({', '.join(arguments)}) -> ({', '.join([_TYPES[kind] for kind in get_args(returns) or (returns,)])})"


def check_first_derivative(what: str) -> None:
    """For a backward that autograd could not differentiate again: with create_graph=True it runs with grad enabled.

    While torch.compile traces a backward, grad is enabled for other reasons; compiled code refuses such a call itself.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(f"{what}: no second derivative (create_graph=True); use impl='reference' for one")


def first_derivative(op: str, batches: bool = True) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates the backward of a Function. Unlike torch's ``once_differentiable``, which gives a constant where the
    upstream gradient is one, so that a penalty on a gradient would change nothing in silence. ``batches``: whether it
    takes a batch of upstream gradients (is_grads_batched=True)."""

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(backward)
        def run(ctx: Any, *gradients: Any) -> Any:
            check_first_derivative(op)
            if not batches and any(map(is_batched, gradients)):
                raise NotImplementedError(f"{op}: no batch of gradients (is_grads_batched=True); one call for each")
            return backward(ctx, *gradients)

        return run

    return decorate


def as_given(hidden: Tensor) -> torch.autocast:
    """GEMMs in the dtypes chosen here: under autocast, those of the gradients would be bf16, for fp32 inputs too."""
    return torch.autocast(hidden.device.type, enabled=False)
