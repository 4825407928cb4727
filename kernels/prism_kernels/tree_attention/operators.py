"""Attention at a few chosen rows as an operator: its plan depends on values, which torch.compile cannot trace.

Outside torch.compile sdpa.py computes it. The operator follows the same plan, tree by tree; its backward makes the
weights of a tree's rows again from what the forward summed, as flash attention does.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from prism_kernels.checks import check_values
from prism_kernels.operators import check_first_derivative, operator
from prism_kernels.tree_attention.grouped_heads import as_rows, grouped, of_group
from prism_kernels.tree_attention.layout import TreeLayout, layout_of


class Rows(NamedTuple):
    """One call, checked. Dimensions: Q chosen rows, T tokens, S segments, Hq and Hkv heads of D."""

    q: Tensor  # (Q, Hq, D)
    k: Tensor  # (T, Hkv, D)
    v: Tensor
    query_row: Tensor  # (Q,) int64, on the host
    segments: Tensor  # TreeLayout.segments
    scale: float


def chosen_rows(q: Tensor, k: Tensor, v: Tensor, layout: TreeLayout, scale: float, query_row: Tensor) -> Tensor:
    return _attention(Rows(q, k, v, query_row, layout.segments, scale))[0]


def _trees(rows: Rows):
    """Of every tree: its chosen rows, its slice of the stream, and the masked scores (Hkv, rep, n, m), wide."""
    check_values("query_row", rows.query_row, "T", rows.k.shape[0])
    layout = layout_of(rows.segments, rows.q.device)
    wide = torch.promote_types(rows.q.dtype, torch.float32)
    for tree in layout.row_plan(rows.query_row).trees:
        keys = slice(tree.start, tree.stop)
        scores = grouped(rows.q[tree.query], rows.k).to(wide) @ of_group(rows.k[keys]).to(wide).mT
        yield tree.query, keys, (scores * rows.scale).masked_fill_(~tree.mask, float("-inf"))


@operator("tree_attention_rows")
def _attention(rows: Rows) -> tuple[Tensor, Tensor]:
    """(Q, Hq, D), and the log-sum-exp of a row's scores (Q, Hq), wide."""
    wide = torch.promote_types(rows.q.dtype, torch.float32)
    out, lse = rows.q.new_empty(rows.q.shape), rows.q.new_empty(rows.q.shape[:2], dtype=wide)
    for query, keys, scores in _trees(rows):
        total = scores.logsumexp(-1, keepdim=True)
        out[query] = as_rows((scores - total).exp() @ of_group(rows.v[keys]).to(wide)).to(out.dtype)
        lse[query] = as_rows(total)[..., 0]
    return out, lse


@_attention.fake
def _(rows: Rows) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(rows.q.dtype, torch.float32)
    return rows.q.new_empty(rows.q.shape), rows.q.new_empty(rows.q.shape[:2], dtype=wide)


@operator("tree_attention_rows_backward")
def _attention_backward(rows: Rows, out: Tensor, lse: Tensor, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    d_q = rows.q.new_empty(rows.q.shape)
    d_k, d_v = (torch.zeros(x.shape, dtype=lse.dtype, device=x.device) for x in (rows.k, rows.v))
    for query, keys, scores in _trees(rows):
        weight = (scores - grouped(lse[query][..., None], rows.k)).exp()  # (Hkv, rep, n, m)
        upstream = grouped(d_out[query], rows.k).to(lse.dtype)
        kept = (upstream * grouped(out[query], rows.k)).sum(-1, keepdim=True)
        d_scores = weight * (upstream @ of_group(rows.v[keys]).to(lse.dtype).mT - kept) * rows.scale
        d_q[query] = as_rows(d_scores @ of_group(rows.k[keys]).to(lse.dtype)).to(d_q.dtype)
        d_k[keys] = (d_scores.mT @ grouped(rows.q[query], rows.k).to(lse.dtype)).sum(1).transpose(0, 1)
        d_v[keys] = (weight.mT @ upstream).sum(1).transpose(0, 1)
    return d_q, d_k.to(rows.k.dtype), d_v.to(rows.v.dtype)


@_attention_backward.fake
def _(rows: Rows, out: Tensor, lse: Tensor, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    d_q, d_k, d_v = (x.new_empty(x.shape) for x in rows[:3])
    return d_q, d_k, d_v


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    (rows,) = _attention.records(*inputs)
    ctx.mark_non_differentiable(output[1])
    ctx.scale = rows.scale
    ctx.save_for_backward(*rows[:-1], *output)


def _backward(ctx: Any, d_out: Tensor, _lse: None) -> tuple[Tensor | None, ...]:
    check_first_derivative("tree_attention")
    *tensors, out, lse = ctx.saved_tensors
    gradients = _attention_backward(Rows(*tensors, scale=ctx.scale), out, lse, d_out)
    return (*gradients, *[None] * (len(Rows._fields) - 3))


_attention_backward.constant()
_attention.differentiate(_setup, _backward)
