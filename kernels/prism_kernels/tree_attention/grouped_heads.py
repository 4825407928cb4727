"""Rows of heads as products take them, query heads beside the key-value head that they share.

Dimensions: n queries, m keys, Hq = Hkv * rep heads of D.
"""

from __future__ import annotations

from torch import Tensor


def grouped(queries: Tensor, k: Tensor) -> Tensor:
    """(n, Hq, D) -> (Hkv, rep, n, D), with the Hkv of k (m, Hkv, D)."""
    n, heads, dim = queries.shape
    return queries.reshape(n, k.shape[1], heads // k.shape[1], dim).permute(1, 2, 0, 3)


def as_rows(heads: Tensor) -> Tensor:
    """(Hkv, rep, n, D) -> (n, Hq, D)."""
    return heads.permute(2, 0, 1, 3).flatten(1, 2)


def of_group(keys: Tensor) -> Tensor:
    """(m, Hkv, D) -> (Hkv, 1, m, D)."""
    return keys.transpose(0, 1)[:, None]
