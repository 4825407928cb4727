"""The GPU's SwiGLU as an operator: the one way to the kernels, with torch.compile or without, and on device "meta"."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from torch import Tensor

from prism_kernels.operators import first_derivative, operator


def swiglu(gate_up: Tensor, up: Tensor | None) -> Tensor:
    return _swiglu(gate_up, up)


def _kernels() -> Any:
    """Imported when they run: shapes are known without triton."""
    return import_module("prism_kernels.swiglu.triton_kernel")


@operator("swiglu")
def _swiglu(gate_up: Tensor, up: Tensor | None) -> Tensor:
    return _kernels().forward(gate_up, up)


@_swiglu.fake
def _(gate_up: Tensor, up: Tensor | None) -> Tensor:
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // (2 if up is None else 1))


@operator("swiglu_backward")
def _swiglu_backward(d_out: Tensor, gate_up: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients of both arguments; of a packed one, and nothing."""
    return _kernels().backward(d_out, gate_up, up)


@_swiglu_backward.fake
def _(d_out: Tensor, gate_up: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    return gate_up.new_empty(gate_up.shape), gate_up.new_empty(0 if up is None else up.shape)


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


@first_derivative("swiglu", batches=False)
def _backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    gradients = _swiglu_backward(d_out, *ctx.saved_tensors)
    return tuple(gradient if wanted else None for gradient, wanted in zip(gradients, ctx.needs_input_grad))


_swiglu_backward.constant()
_swiglu.differentiate(_setup, _backward)
