"""The definition: plain torch and autograd, at least fp32 inside, rounded once.

Dimensions: T tokens, H hidden, D size of a head. The operations are transformers', in its order and on its layout: in
fp32 the values and the gradients have the bits of Qwen3-VL's own modules.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prism_kernels.rms_norm.heads import Heads, one_by_one


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    if residual is None:
        return _normalised(x, weight, eps).to(x.dtype)
    total = x + residual
    return _normalised(total, weight, eps).to(x.dtype), total


def rms_norm_rotate(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    # As (1, heads, T, D): what the weight's gradient adds up lies in memory heads before tokens, as transformers' does.
    y = _normalised(x, weight, eps).transpose(0, 1)[None]
    first, second = y.chunk(2, dim=-1)
    rotated = (y * cos[None, None]) + (torch.cat((-second, first), dim=-1) * sin[None, None])
    return rotated[0].transpose(0, 1).to(x.dtype)


def norm_rotate(heads: Heads) -> tuple[Tensor, Tensor | None]:
    return one_by_one(rms_norm_rotate, heads)


def _normalised(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As x, at least fp32."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps))
