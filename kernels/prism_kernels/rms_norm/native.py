"""Norm and rotation in C++ (csrc/elementwise.cpp), one pass over what is in the cache: forward alone, for decoding."""

from __future__ import annotations

import torch
from torch import Tensor

from prism_kernels.native import Call, forward_alone, library
from prism_kernels.rms_norm.heads import Heads, one_by_one


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    forward_alone("rms_norm", x, weight, residual)
    x, y = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    total = None if residual is None else torch.empty_like(y)
    prepared_norm(x, weight, eps, y, residual, total)()
    return y if total is None else (y, total)


def prepared_norm(
    x: Tensor, weight: Tensor, eps: float, y: Tensor, residual: Tensor | None = None, total: Tensor | None = None
) -> Call:
    """The norm of contiguous ``x`` into ``y``; of its sum with ``residual``, which goes into ``total``, another."""
    weight = weight.to(x.dtype).contiguous()
    residual = residual if residual is None else residual.contiguous()
    tensors = (x, residual, weight, y, total)
    addresses = tuple(0 if tensor is None else tensor.data_ptr() for tensor in tensors)
    arguments = x.dtype == torch.float64, addresses, x.numel() // x.shape[-1], x.shape[-1], eps
    return Call(library().rms_norm, arguments, tensors)


def norm_rotate(heads: Heads) -> tuple[Tensor, Tensor | None]:
    return one_by_one(_norm_rotate, heads)


def _norm_rotate(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    forward_alone("qk_norm_rotate", x, weight)
    rows, count, dim = x.shape
    if x.stride()[1:] != (dim, 1):
        x = x.contiguous()
    weight, cos, sin = (each.to(x.dtype).contiguous() for each in (weight, cos, sin))
    y = torch.empty(x.shape, dtype=x.dtype)
    tensors = tuple(tensor.data_ptr() for tensor in (x, weight, cos, sin, y))
    library().norm_rotate(x.dtype == torch.float64, tensors, (x.stride(0), rows, count, dim), eps)
    return y
