"""The experts for autograd, cut in two where a recompute stops.

:class:`_GateUp` (permute, gate and up product) keeps what the backward reads and computes all gradients;
:class:`_Down` (SwiGLU, down product, combine) keeps nothing and passes its gradient on. Activation checkpointing runs a
forward again until the last tensor that it kept has come back: the down product, of which no backward reads anything,
is then not repeated. Cut behind SwiGLU, the second half would have to keep the activation, a half of what is kept now.

T tokens, H hidden, S slots, I intermediate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prism_kernels.moe.routing import Experts
from prism_kernels.operators import as_given, first_derivative


class Parts(NamedTuple):
    """What an implementation brings.

    gate_up(inputs) -> (the (S, 2I) products, chunk by chunk, which the backward reads; what only ``down`` reads).
    down(inputs, products, passed) -> (T, H).
    backward(inputs, products, d_out, want_hidden, want_gate_up, want_down) -> gradients of Experts' first four.
    both(inputs) -> (T, H), of which nothing is kept. passes: how many tensors only ``down`` reads.
    """

    gate_up: Callable[[Experts], tuple[list[Tensor], list[Tensor]]]
    down: Callable[[Experts, list[Tensor], list[Tensor]], Tensor]
    backward: Callable[..., tuple[Tensor | None, Tensor | None, Tensor | None, Tensor]]
    both: Callable[[Experts], Tensor]
    passes: int


def wants_gradient(inputs: Experts) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in inputs[:4])


def run_experts(parts: Parts, inputs: Experts) -> Tensor:
    """(T, H), differentiable in hidden, gate_up, down and weight."""
    if not wants_gradient(inputs):
        return parts.both(inputs)
    handle, *made = _GateUp.apply(parts, *inputs)
    return _Down.apply(handle, parts, inputs, made)


def new_handle(hidden: Tensor) -> Tensor:
    """(T, H) of one number, whose gradient is the output's: what ties the halves together in autograd's graph."""
    return hidden.new_zeros(1, 1).expand(hidden.shape)


class _GateUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parts: Parts, *tensors: Tensor) -> tuple[Tensor, ...]:
        inputs = Experts(*tensors)
        products, passed = parts.gate_up(inputs)
        ctx.parts = parts
        ctx.save_for_backward(*inputs, *products)
        ctx.mark_non_differentiable(*products, *passed)
        ctx.set_materialize_grads(False)  # else autograd would make zeros of the products' size
        return new_handle(inputs.hidden), *products, *passed

    @staticmethod
    @first_derivative("moe_mlp", batches=False)
    def backward(ctx: Any, d_out: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if d_out is None:
            return (None,) * (1 + len(Experts._fields))
        saved = ctx.saved_tensors
        inputs, products = Experts(*saved[: len(Experts._fields)]), saved[len(Experts._fields) :]
        with as_given(inputs.hidden):
            gradients = ctx.parts.backward(inputs, products, d_out, *ctx.needs_input_grad[1:4])
        return None, *gradients, None, None


class _Down(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, handle: Tensor, parts: Parts, inputs: Experts, made: list[Tensor]) -> Tensor:
        count = len(made) - parts.passes
        return parts.down(inputs, made[:count], made[count:])

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        return d_out, None, None, None
