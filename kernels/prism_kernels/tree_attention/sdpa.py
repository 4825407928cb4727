"""torch's scaled_dot_product_attention by segment, small ones in groups: the CPU's default, any depth, any device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from prism_kernels.tree_attention.layout import TreeLayout


def tree_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: TreeLayout, scale: float, query_row: Tensor | None = None
) -> Tensor:
    """q (T or Q, Hq, D), k and v (T, Hkv, D) -> as q.

    Tensors are cut at the segments and joined again: no rows are gathered, whose backward would add them one by one.
    """
    if q.shape[0] == 0:
        return q + (k[:0].sum() + v[:0].sum())  # nothing, whose gradients are zeros
    if scale <= 0:  # torch multiplies its mask by it: inf * 0 is NaN
        q, scale = q * scale, 1.0
    if query_row is not None:
        return _chosen_rows(q, k, v, layout, scale, query_row)
    queries, keys, values = (x.split(layout.lengths) for x in (q, k, v))
    found: dict[int, Tensor] = {}
    for group in layout.groups():
        _, num_q, num_k = group.size
        mine = _padded(queries, [(s,) for s in group.members], num_q)
        key, value = _padded(keys, group.paths, num_k), _padded(values, group.paths, num_k)
        out = _attend(mine, key, value, group.mask, scale, group.aligned).transpose(1, 2)
        for segment, rows in zip(group.members, out.unbind()):
            length = layout.lengths[segment]
            found[segment] = rows if length == num_q else rows[:length]
    return torch.cat([found[segment] for segment in sorted(found)])


def _padded(parts: Sequence[Tensor], paths: Sequence[Sequence[int]], length: int) -> Tensor:
    """The parts (L, heads, D) of every path, one after the other, then zeros -> (n, heads, length, D).

    Zeros, as a NaN of another tree must not come in as 0 * NaN.
    """
    pieces = []
    for path in paths:
        pieces += [parts[segment] for segment in path]
        missing = length - sum(len(parts[segment]) for segment in path)
        pieces += [parts[0].new_zeros(missing, *parts[0].shape[1:])] if missing else []
    joined = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
    return joined.unflatten(0, (len(paths), length)).transpose(1, 2)


def segment_attention(q: Tensor, k: Tensor, v: Tensor, layout: TreeLayout, scale: float, causal: bool) -> Tensor:
    """q (T, Hq, D), k and v (T, Hkv, D) -> as q; segment by segment, with the bits of a call for each."""
    if q.shape[0] == 0:
        return q + (k[:0].sum() + v[:0].sum())
    if scale <= 0:
        q, scale = q * scale, 1.0
    outputs = []
    split = [x.transpose(0, 1)[None].split(layout.lengths, dim=2) for x in (q, k, v)]
    for queries, keys, values in zip(*split):
        if queries.shape[2]:
            out = _attend(queries, keys, values, None, scale) if causal else _see_all(queries, keys, values, scale)
            outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


def _attend(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float, aligned: bool = False
) -> Tensor:
    """(n, Hq, Lq, D), (n, Hkv, Lk, D) -> (n, Hq, Lq, D). No mask: causal. ``aligned``: it is SegmentGroup's."""
    if mask is not None and _on_gpu(queries):
        # Without care torch would build all scores there: flash attention takes no mask of bools, but causal ones that
        # end together; the other fused kernel takes a mask, but no grouped heads.
        if aligned:
            from torch.nn.attention.bias import causal_lower_right  # loads torch._dynamo: a second, where it is needed

            mask = causal_lower_right(queries.shape[2], keys.shape[2])
        else:
            groups = queries.shape[1] // keys.shape[1]
            keys, values = (x[:, :, None].expand(-1, -1, groups, -1, -1).flatten(1, 2) for x in (keys, values))
    out = F.scaled_dot_product_attention(
        queries,
        keys,
        values,
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=queries.shape[1] != keys.shape[1],
    )
    if _on_gpu(queries):
        return out
    return out + (_not_finite(queries, keys) if mask is None else (queries * 0).sum(-1))[..., None]


def _see_all(queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """(1, Hq, L, D), (1, Hkv, L, D) -> (1, Hq, L, D)."""
    groups = queries.shape[1] // keys.shape[1]
    out = F.scaled_dot_product_attention(queries, keys, values, scale=scale, enable_gqa=groups > 1)
    if _on_gpu(queries):
        return out
    # Torch gives 0 on a CPU where all scores of a query are NaN: it, or all of its keys.
    unclear = (~keys.isfinite()).any(-1).all(-1).repeat_interleave(groups, 1)[..., None]
    return out.masked_fill((unclear | ~queries.isfinite().all(-1))[..., None], float("nan"))


def _not_finite(queries: Tensor, keys: Tensor) -> Tensor:
    """(n, Hq, L): NaN where a query is not finite, sees a key with NaN or only keys that are not finite; else 0.

    Torch's causal attention on a CPU gives 0 there (seen in 2.13), and so a model of NaN weights a finite loss. Its
    masked one does for an infinite query alone.
    """
    unclear = keys.isnan().any(-1).cumsum(-1) + (~keys.isfinite()).any(-1).long().cumprod(-1)
    seen = torch.where(unclear > 0, float("nan"), 0.0).to(queries.dtype)
    return (queries * 0).sum(-1) + seen.repeat_interleave(queries.shape[1] // keys.shape[1], 1)


def _on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda


def _chosen_rows(q: Tensor, k: Tensor, v: Tensor, layout: TreeLayout, scale: float, query_row: Tensor) -> Tensor:
    """A few queries against many keys: one masked call per tree, whose keys are a slice of the stream."""
    plan = layout.row_plan(query_row)
    outputs = []
    for tree in plan.trees:
        queries = q.index_select(0, tree.query).transpose(0, 1)[None]
        keys, values = (x[tree.start : tree.stop].transpose(0, 1)[None] for x in (k, v))
        out = _attend(queries, keys, values, tree.mask, scale)
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs).index_select(0, plan.output_row)
