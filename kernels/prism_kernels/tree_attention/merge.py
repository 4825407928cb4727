"""Parts of a softmax as one, and the gradients of its parts as their sum: plain torch, any device.

Dimensions: N queries, n of them in a part, Hq heads of D.
"""

from __future__ import annotations

import torch
from torch import Tensor

NOTHING = float("-inf")  # the log of a sum of no terms


def merge(out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax averages (n, Hq, D) over disjoint keys, with the logs of their sums (Hq, n), as one over all of them.

    At least fp32. Of nothing the log is -inf here; a library may say +inf.
    """
    lse, part_lse = (_masked(x) for x in (lse, part_lse))
    total = torch.logaddexp(lse, part_lse)
    # Nothing weighs 0, also beside nothing: -inf less -inf is NaN.
    mine, theirs = (torch.where(x == NOTHING, 0, (x - total).exp()).T[..., None] for x in (lse, part_lse))
    return out * mine + part_out * theirs, total


def _masked(lse: Tensor) -> Tensor:
    return lse.masked_fill(lse == -NOTHING, NOTHING)


def merge_(
    out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor, rows: Tensor | None, last: bool = False
) -> None:
    """Into ``out`` (N, Hq, D) and ``lse`` (Hq, N); ``rows`` (n,): those that the part is of, each once; None: all.

    ``last``: what these rows hold is then settled.
    """
    if rows is None:
        merged, total = merge(out, lse, part_out, part_lse)
        out.copy_(merged)
        lse.copy_(total)
        if last:
            settle_(out, lse)
    else:
        merged, total = merge(out[rows], lse[:, rows], part_out, part_lse)
        out[rows], lse[:, rows] = merged.to(out.dtype), total


def settle_(out: Tensor, lse: Tensor) -> None:
    """Of nothing: -inf and NaN. Every query sees itself, so that only scores that are all -inf leave nothing."""
    lse.copy_(_masked(lse))
    out.masked_fill_((lse == NOTHING).T[..., None], float("nan"))


def add_(sums: tuple[Tensor, ...], parts: tuple[Tensor, ...], rows: Tensor | None) -> None:
    """Gradients of q, k and v into their sums, each rounded once; ``rows``: of q, those that the part is of."""
    (d_q, *others), (part_q, *other_parts) = sums, parts
    if rows is None:
        d_q += part_q
    else:
        d_q[rows] = (d_q[rows] + part_q).to(d_q.dtype)  # each row once
    for total, part in zip(others, other_parts):
        total += part
