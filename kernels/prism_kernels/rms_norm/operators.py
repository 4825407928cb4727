"""The GPU's norms as operators: the one way to the kernels, with torch.compile or without, and on device "meta".

A norm keeps what was normalised (the sum, where there is a residual) and one number per row, heads their inputs alone.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from prism_kernels.operators import first_derivative, operator
from prism_kernels.rms_norm.heads import Heads


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    y, total, _ = _norm(x, residual, weight, eps)
    return y if residual is None else (y, total)


def norm_rotate(heads: Heads) -> tuple[Tensor, Tensor]:
    return _rotate(heads)


def _kernels(name: str) -> Any:
    """Imported when they run: shapes are known without triton."""
    return import_module(f"prism_kernels.rms_norm.{name}")


@operator("rms_norm")
def _norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """y; the sum, or nothing; 1 / root of every row's mean square, wide."""
    return _kernels("triton_norm").forward(x, residual, weight, eps)


@_norm.fake
def _(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    scale = x.new_empty(x.numel() // x.shape[-1], dtype=torch.promote_types(x.dtype, torch.float32))
    return x.new_empty(x.shape), x.new_empty(0 if residual is None else x.shape), scale


@operator("rms_norm_backward")
def _norm_backward(
    d_y: Tensor, d_total: Tensor | None, x: Tensor, weight: Tensor, scale: Tensor, with_weight: bool
) -> tuple[Tensor, Tensor]:
    """The gradient of x, which is the residual's too, and that of the weight, or nothing."""
    return _kernels("triton_norm").backward(d_y, d_total, x, weight, scale, with_weight)


@_norm_backward.fake
def _(
    d_y: Tensor, d_total: Tensor | None, x: Tensor, weight: Tensor, scale: Tensor, with_weight: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape if with_weight else 0)


def _setup_norm(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, residual, weight, _ = inputs
    _, total, scale = output
    ctx.set_materialize_grads(False)  # no zeros for an output that nobody differentiates
    ctx.mark_non_differentiable(scale, *([total] if residual is None else []))
    ctx.save_for_backward(x if residual is None else total, weight, scale)


@first_derivative("rms_norm", batches=False)
def _backward_norm(ctx: Any, d_y: Tensor | None, d_total: Tensor | None, _scale: None) -> tuple[Tensor | None, ...]:
    want_x, want_residual, want_weight, _ = ctx.needs_input_grad
    d_x, d_weight = d_total, None
    if d_y is not None:
        d_x, d_weight = _norm_backward(d_y, d_total, *ctx.saved_tensors, want_weight)
    return d_x if want_x else None, d_x if want_residual else None, d_weight if want_weight else None, None


_norm_backward.constant()
_norm.differentiate(_setup_norm, _backward_norm)


@operator("qk_norm_rotate")
def _rotate(heads: Heads) -> tuple[Tensor, Tensor]:
    """q and k, or nothing."""
    return _kernels("triton_rotate").forward(heads)


@_rotate.fake
def _(heads: Heads) -> tuple[Tensor, Tensor]:
    q, k = heads.q, heads.k
    return q.new_empty(q.shape), q.new_empty(0 if k is None else k.shape)


@operator("qk_norm_rotate_backward")
def _rotate_backward(d_q_out: Tensor, d_k_out: Tensor | None, heads: Heads) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k and their weights, or nothing."""
    return _kernels("triton_rotate").backward(d_q_out, d_k_out, heads)


@_rotate_backward.fake
def _(d_q_out: Tensor, d_k_out: Tensor | None, heads: Heads) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, q_weight, k_weight = heads[:4]
    d_k = q.new_empty(0 if k is None else k.shape)
    d_k_weight = q_weight.new_empty(0) if k_weight is None else k_weight.new_empty(k_weight.shape)
    return q.new_empty(q.shape), d_k, q_weight.new_empty(q_weight.shape), d_k_weight


def _setup_rotate(ctx: Any, inputs: tuple, output: tuple) -> None:
    (heads,) = _rotate.records(*inputs)
    if heads.k is None:
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
    ctx.eps = heads.eps
    ctx.save_for_backward(*heads[:6])


@first_derivative("qk_norm_rotate", batches=False)
def _backward_rotate(ctx: Any, d_q_out: Tensor, d_k_out: Tensor | None) -> tuple[Tensor | None, ...]:
    heads = Heads._make((*ctx.saved_tensors, ctx.eps))
    gradients = _rotate_backward(d_q_out, d_k_out, heads)
    wanted = ctx.needs_input_grad[:4]
    return (*(g if want else None for g, want in zip(gradients, wanted)), None, None, None)


_rotate_backward.constant()
_rotate.differentiate(_setup_rotate, _backward_rotate)
