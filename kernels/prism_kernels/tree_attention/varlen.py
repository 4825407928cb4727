"""Tree attention by calls of a variable-length attention, merged by log-sum-exp: plain torch for now, on any device.

Any depth. varlen_plan.py says which queries meet which keys; the keys of a tree are read where they lie, and so are its
queries if its branches stand behind it. Another library plugs in at :func:`library_of` and nowhere else.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from prism_kernels.checks import check_values
from prism_kernels.operators import check_first_derivative, operator
from prism_kernels.tree_attention.layout import TreeLayout, layout_of
from prism_kernels.tree_attention.varlen_library import TorchVarlen, VarlenAttention
from prism_kernels.tree_attention.varlen_plan import VarlenCall, varlen_plan

NOTHING = float("-inf")  # the log of a sum of no terms


class Attention(NamedTuple):
    """One call, checked. Dimensions: N queries, T tokens, Hq and Hkv heads of D."""

    q: Tensor  # (N, Hq, D)
    k: Tensor  # (T, Hkv, D)
    v: Tensor
    query_row: Tensor | None  # (N,) int64, on the host; None: N = T
    segments: Tensor  # TreeLayout.segments
    scale: float


def tree_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: TreeLayout, scale: float, query_row: Tensor | None = None
) -> Tensor:
    """q (T or Q, Hq, D), k and v (T, Hkv, D) -> as q."""
    return _attention(Attention(q, k, v, query_row, layout.segments, scale))[0]


def library_of(q: Tensor) -> VarlenAttention:
    """Whose calls take such tensors."""
    return TorchVarlen()


def _plan(a: Attention) -> tuple[VarlenCall, ...]:
    if a.query_row is not None:
        check_values("query_row", a.query_row, "T", a.k.shape[0])
    return varlen_plan(layout_of(a.segments, a.q.device), a.query_row)


@operator("tree_attention_varlen")
def _attention(a: Attention) -> tuple[Tensor, Tensor]:
    """(N, Hq, D), and the log-sum-exp of all scores of a row (Hq, N), at least fp32."""
    wide = torch.promote_types(a.q.dtype, torch.float32)
    num_q, heads, _ = a.q.shape
    out = torch.zeros(a.q.shape, dtype=wide, device=a.q.device)
    lse = torch.full((heads, num_q), NOTHING, dtype=wide, device=a.q.device)
    library = library_of(a.q)
    for call in _plan(a):
        rows = call.query
        part = library.forward(_at(a.q, rows), a.k, a.v, call.sequences, a.scale)
        if rows is None:
            out, lse = merge(out, lse, *part)
        else:
            out[rows], lse[:, rows] = merge(out[rows], lse[:, rows], *part)
    # Every token sees itself: a sum of nothing is one of scores that are all -inf, whose softmax is NaN.
    return out.masked_fill_((lse == NOTHING).T[..., None], float("nan")).to(a.q.dtype), lse


def merge(out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax averages (n, Hq, D) over disjoint keys, with the logs of their sums (Hq, n), as one over all of them."""
    total = torch.logaddexp(lse, part_lse)
    # Nothing weighs 0, also beside nothing: -inf less -inf is NaN.
    mine, theirs = (torch.where(x == NOTHING, 0, (x - total).exp()).T[..., None] for x in (lse, part_lse))
    return out * mine + part_out * theirs, total


@operator("tree_attention_varlen_backward")
def _attention_backward(a: Attention, out: Tensor, lse: Tensor, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Every part with the output and the log-sum-exp of the whole; summed in at least fp32, rounded once."""
    d_q, d_k, d_v = (torch.zeros(x.shape, dtype=lse.dtype, device=x.device) for x in a[:3])
    library = library_of(a.q)
    for call in _plan(a):
        rows = call.query
        whole = _at(out, rows), lse if rows is None else lse[:, rows]
        part_q, part_k, part_v = library.backward(
            _at(d_out, rows), _at(a.q, rows), a.k, a.v, *whole, call.sequences, a.scale
        )
        if rows is None:
            d_q += part_q
        else:
            d_q[rows] += part_q  # each row once
        d_k += part_k
        d_v += part_v
    return d_q.to(a.q.dtype), d_k.to(a.k.dtype), d_v.to(a.v.dtype)


def _at(x: Tensor, rows: Tensor | None) -> Tensor:
    return x if rows is None else x.index_select(0, rows)


@_attention.fake
def _(a: Attention) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(a.q.dtype, torch.float32)
    return a.q.new_empty(a.q.shape), a.q.new_empty((a.q.shape[1], a.q.shape[0]), dtype=wide)


@_attention_backward.fake
def _(a: Attention, out: Tensor, lse: Tensor, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    d_q, d_k, d_v = (x.new_empty(x.shape) for x in a[:3])
    return d_q, d_k, d_v


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    (a,) = _attention.records(*inputs)
    ctx.mark_non_differentiable(output[1])
    ctx.scale = a.scale
    ctx.save_for_backward(*a[:-1], *output)


def _backward(ctx: Any, d_out: Tensor, _lse: None) -> tuple[Tensor | None, ...]:
    check_first_derivative("tree_attention")
    *tensors, out, lse = ctx.saved_tensors
    gradients = _attention_backward(Attention(*tensors, ctx.scale), out, lse, d_out)
    return (*gradients, *[None] * (len(Attention._fields) - 3))


_attention_backward.constant()
_attention.differentiate(_setup, _backward)
