"""What the norm and rotation of attention heads takes: queries and keys, or one tensor alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Heads(NamedTuple):
    """One call, checked. Dimensions: T tokens, Hq and Hkv heads of D."""

    q: Tensor  # (T, Hq, D)
    k: Tensor | None  # (T, Hkv, D); None: q is all there is
    q_weight: Tensor  # (D,)
    k_weight: Tensor | None
    cos: Tensor  # (T, D)
    sin: Tensor
    eps: float


def one_by_one(rotate: Callable[..., Tensor], heads: Heads) -> tuple[Tensor, Tensor | None]:
    """(q, k) of an implementation that takes one tensor at a time: ``rotate(x, weight, cos, sin, eps)``."""
    q, k, q_weight, k_weight, *rest = heads
    return rotate(q, q_weight, *rest), None if k is None else rotate(k, k_weight, *rest)
