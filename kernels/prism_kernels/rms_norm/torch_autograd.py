"""Norm and rotation as single differentiable steps, in plain torch.

Autograd over the separate operations keeps five to ten tensors of the size of the hidden states per call and walks
over each of them again in the backward. Here the input and one number per row are kept; everything is at least fp32
inside and rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prism_kernels.operators import first_derivative
from prism_kernels.rms_norm.heads import Heads, one_by_one


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    if residual is None:
        return _Norm.apply(x, weight, eps, None, None)
    total = x + residual
    return _Norm.apply(total, weight, eps, None, None), total


def rms_norm_rotate(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    return _Norm.apply(x, weight, eps, cos, sin)


def norm_rotate(heads: Heads) -> tuple[Tensor, Tensor | None]:
    return one_by_one(rms_norm_rotate, heads)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, cos, sin):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean_square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        scale = mean_square.add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale, cos, sin)
        y = (wide * scale).mul_(weight)
        return (y if cos is None else _rotate(y, cos, sin)).to(x.dtype)

    @staticmethod
    @first_derivative("rms_norm, qk_norm_rotate")
    def backward(ctx, grad):
        x, weight, scale, cos, sin = ctx.saved_tensors
        width = x.shape[-1]
        wide, grad = x.to(scale.dtype), grad.to(scale.dtype)
        if cos is not None:
            grad = _rotate(grad, cos, -sin)
        product = (grad * wide).reshape(-1, width)  # rows in the order of scale, whatever the strides
        weight_grad = (scale.reshape(1, -1) @ product)[0].to(weight.dtype)
        # d/dx of x * scale(x): the second term is the change of scale, along x.
        along = (product @ weight.to(scale.dtype)).view_as(scale).mul_(scale.pow(3)).div_(-width)
        x_grad = (grad * weight).mul_(scale).addcmul_(wide, along)
        return x_grad.to(x.dtype), weight_grad, None, None, None


def _rotate(y: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """y (T, heads, D), cos and sin (T, D) -> new (T, heads, D)."""
    half = y.shape[-1] // 2
    cos, sin = cos[:, None], sin[:, None, :half]
    out = y * cos
    out[..., :half].addcmul_(y[..., half:], sin, value=-1)
    out[..., half:].addcmul_(y[..., :half], sin)
    return out
