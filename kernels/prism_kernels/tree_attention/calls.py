"""Attention of segments by calls of a variable-length attention, merged by log-sum-exp: varlen.py and flash.py.

call_plan.py says which queries meet which keys in which call; keys are read where they lie, and so are queries if the
branches of a tree stand behind it. library.py says what a call is.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from prism_kernels.checks import check_values
from prism_kernels.dispatch import interpreting
from prism_kernels.operators import check_first_derivative, operator
from prism_kernels.tree_attention import merge
from prism_kernels.tree_attention.call_plan import VarlenCall, call_plan
from prism_kernels.tree_attention.layout import layout_of
from prism_kernels.tree_attention.library import library_of


class Attention(NamedTuple):
    """One call, checked. Dimensions: N queries, T tokens, Hq and Hkv heads of D."""

    q: Tensor  # (N, Hq, D)
    k: Tensor  # (T, Hkv, D)
    v: Tensor
    query_row: Tensor | None  # (N,) int64, on the host; None: N = T
    segments: Tensor  # TreeLayout.segments
    scale: float
    causal: bool  # or every token sees all of its own segment; no segment continues another then
    library: str  # of library.LIBRARIES


def attend(a: Attention) -> Tensor:
    """(N, Hq, D), in the dtype of q."""
    return _attention(a)[0]


def _plan(a: Attention) -> tuple[VarlenCall, ...]:
    if a.query_row is not None:
        check_values("query_row", a.query_row, "T", a.k.shape[0])
    return call_plan(layout_of(a.segments, a.q.device), a.query_row, a.causal)


@operator("segments_attention")
def _attention(a: Attention) -> tuple[Tensor, Tensor]:
    """(N, Hq, D), and the log-sum-exp of all scores of a row (Hq, N), at least fp32."""
    wide = torch.promote_types(a.q.dtype, torch.float32)
    library, calls, merging = library_of(a.library), _plan(a), _merging(a)
    whole, settled = None, False
    for number, call in enumerate(calls, 1):
        rows = call.query
        part = library.forward(_at(a.q, rows), a.k, a.v, call.sequences, a.scale)
        if whole is None and rows is None:
            # Merged once, the result may lie in the library's dtype: one rounding. A second one is for wider sums.
            whole = (part[0].to(wide) if len(calls) > 2 else part[0]), part[1]
            continue
        if whole is None:
            whole = _nothing(a, wide)
        settled = rows is None and number == len(calls)
        merging.merge_(*whole, *part, rows, last=settled)
    out, lse = _nothing(a, wide) if whole is None else whole
    if not settled:
        merging.settle_(out, lse)
    return out.to(a.q.dtype), lse


def _merging(a: Attention) -> Any:
    """merge.py, or the same in Triton beside a library on a GPU."""
    if a.library == "torch" or not (a.q.is_cuda or interpreting()):
        return merge
    from prism_kernels.tree_attention import triton_merge

    return triton_merge


def _nothing(a: Attention, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    num_q, heads, _ = a.q.shape
    lse = torch.full((heads, num_q), merge.NOTHING, dtype=wide, device=a.q.device)
    return torch.zeros(a.q.shape, dtype=wide, device=a.q.device), lse


@operator("segments_attention_backward")
def _attention_backward(a: Attention, out: Tensor, lse: Tensor, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Every part with the output and the log-sum-exp of the whole; summed in at least fp32, rounded once."""
    library, calls, merging = library_of(a.library), _plan(a), _merging(a)
    sums = None
    for call in calls:
        rows = call.query
        whole = _at(out, rows), lse if rows is None else lse.index_select(1, rows)
        part = library.backward(_at(d_out, rows), _at(a.q, rows), a.k, a.v, *whole, call.sequences, a.scale)
        if sums is None and rows is None:
            sums = tuple(x.to(lse.dtype) for x in part) if len(calls) > 2 else part
            continue
        if sums is None:
            sums = tuple(torch.zeros(x.shape, dtype=lse.dtype, device=x.device) for x in a[:3])
        merging.add_(sums, part, rows)
    d_q, d_k, d_v = (torch.zeros_like(x) for x in a[:3]) if sums is None else sums
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
    ctx.set_materialize_grads(False)  # no zeros for the log-sum-exp's
    ctx.constants = a[5:]
    ctx.save_for_backward(*a[:5], *output)


def _backward(ctx: Any, d_out: Tensor | None, _lse: None) -> tuple[Tensor | None, ...]:
    check_first_derivative("tree_attention" if ctx.constants[1] else "segment_attention")
    if d_out is None:
        return (None,) * len(Attention._fields)
    *tensors, out, lse = ctx.saved_tensors
    gradients = _attention_backward(Attention(*tensors, *ctx.constants), out, lse, d_out)
    return (*gradients, *[None] * (len(Attention._fields) - 3))


_attention_backward.constant()
_attention.differentiate(_setup, _backward)
