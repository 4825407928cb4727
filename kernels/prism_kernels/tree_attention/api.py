"""tree_attention: shapes, checks and dispatch."""

from __future__ import annotations

import torch
from torch import Tensor

from prism_kernels.dispatch import Impl, Implementation, Op
from prism_kernels.tree_attention.layout import TreeLayout

_OP = Op(
    "tree_attention",
    [
        Implementation(Impl.SDPA, "prism_kernels.tree_attention.sdpa:tree_attention", ("cpu", "cuda")),
        Implementation(Impl.REFERENCE, "prism_kernels.tree_attention.reference:tree_attention", ("cpu", "cuda")),
    ],
)


def tree_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: TreeLayout,
    *,
    scale: float | None = None,
    query_row: Tensor | None = None,
    impl: str | Impl = "auto",
) -> Tensor:
    """Attention of a packed tree: a token attends to the segments above its own and, causally, to its own segment.

    Equals, for every path from a root, ``softmax(q k^T * scale + causal mask) v`` of the concatenated path.

    q (T, Hq, D); k, v (T, Hkv, D) with Hq a multiple of Hkv (grouped queries); same dtype and device; layout of T
    tokens, any depth. scale: default D ** -0.5. query_row (Q,) int64: only these rows are computed, and q is
    (Q, Hq, D); the read-out of a last layer. Returns q's shape and dtype, differentiable in q, k and v.
    Raises ValueError naming the argument; RuntimeError where an explicit ``impl`` cannot run.
    """
    if q.dim() != 3 or k.dim() != 3 or v.shape != k.shape:
        raise ValueError(
            f"q, k, v: expected (T, Hq, D), (T, Hkv, D), (T, Hkv, D), "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if query_row is not None and (query_row.dtype != torch.int64 or query_row.shape != q.shape[:1]):
        raise ValueError(
            f"query_row: expected ({q.shape[0]},) int64, one row per query, "
            f"got {tuple(query_row.shape)} {query_row.dtype}"
        )
    if (query_row is None and k.shape[0] != q.shape[0]) or k.shape[2] != q.shape[2]:
        raise ValueError(f"k: expected {q.shape[0]} tokens and head dim {q.shape[2]} as q has, got {tuple(k.shape)}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"q: {q.shape[1]} heads are not a multiple of the {k.shape[1]} key-value heads")
    if not isinstance(layout, TreeLayout):
        raise ValueError(
            f"layout: expected a TreeLayout (TreeLayout.build(lengths, prefix)), got {type(layout).__name__}"
        )
    if layout.num_tokens != k.shape[0]:
        raise ValueError(f"layout: has {layout.num_tokens} tokens, k has {k.shape[0]}; expected the same")
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != q.dtype or tensor.device != q.device:
            raise ValueError(f"{name}: expected {q.dtype} on {q.device} as q is, got {tensor.dtype} on {tensor.device}")
    if not q.dtype.is_floating_point:
        raise ValueError(f"q: expected a floating-point dtype, got {q.dtype}")
    _, function = _OP.select(impl, q.device)
    scale = q.shape[2] ** -0.5 if scale is None else float(scale)
    return function(q, k, v, layout.to(q.device), scale, query_row)
