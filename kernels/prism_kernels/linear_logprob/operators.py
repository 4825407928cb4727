"""What every LM-head operator needs around it: its registration, its device and dtypes, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.autograd import forward_ad

from prism_kernels.dispatch import on_device_of


def operator(name: str, schema: str) -> Callable:
    """Define prism_kernels::<name>; the decorated function, whose first argument is hidden, runs it on any device.

    Not torch.library.custom_op, which imports torch._dynamo: two seconds of every process that calls an op.
    """
    name = f"prism_kernels::{name}"
    torch.library.define(name, schema, tags=(torch.Tag.pt2_compliant_tag,))

    def register(run: Callable) -> OpOverload:
        def run_as_given(hidden, *rest):
            with on_device_of(hidden), as_given(hidden):
                return run(hidden, *rest)

        torch.library.impl(name, "CompositeExplicitAutograd", run_as_given)
        return getattr(torch.ops.prism_kernels, name.partition("::")[2]).default

    return register


def as_given(hidden: Tensor) -> torch.autocast:
    """Products in the dtypes chosen here: under autocast, those of the gradients would be bf16, for fp32 inputs too."""
    return torch.autocast(hidden.device.type, enabled=False)


def check_once_differentiated() -> None:
    """For a backward that autograd could not differentiate again: with create_graph=True it runs with grad enabled."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "the LM-head ops have no second derivative (create_graph=True); use impl='reference' for one"
        )


def check_reverse_mode(*tensors: Tensor | None) -> None:
    """Torch would take the tangent of an operator without a forward-mode rule for 0, and say nothing."""
    if forward_ad._current_level < 0:
        return
    if any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise NotImplementedError(
            "the LM-head ops have no forward-mode derivative (torch.func.jvp); use impl='reference' for one"
        )
