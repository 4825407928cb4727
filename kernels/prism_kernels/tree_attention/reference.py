"""The definitions: dense masked softmax attention, over the whole stream, or of one new token per row."""

from __future__ import annotations

import torch
from torch import Tensor

from prism_kernels.tree_attention.decode_layout import PAGE
from prism_kernels.tree_attention.decode_step import DecodeStep, append
from prism_kernels.tree_attention.layout import TreeLayout


def tree_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: TreeLayout, scale: float, query_row: Tensor | None = None
) -> Tensor:
    """q (T or Q, Hq, D), k and v (T, Hkv, D) -> as q; at least fp32 inside."""
    wide = torch.promote_types(q.dtype, torch.float32)
    repeat = q.shape[1] // k.shape[1]
    queries = q.to(wide).transpose(0, 1)  # (Hq, T, D)
    keys = k.to(wide).repeat_interleave(repeat, dim=1).transpose(0, 1)
    values = v.to(wide).repeat_interleave(repeat, dim=1).transpose(0, 1)
    allowed = layout.allowed() if query_row is None else layout.allowed()[query_row]
    logits = (queries @ keys.transpose(1, 2)) * scale  # (Hq, T or Q, T)
    logits = logits.masked_fill(~allowed, float("-inf"))
    return (torch.softmax(logits, dim=-1) @ values).transpose(0, 1).to(q.dtype)


def shared_prompt_decode(step: DecodeStep) -> Tensor:
    """Every row with its own copy of its group's prompt; at least fp32 inside."""
    append(step)
    layout, wide = step.layout, torch.promote_types(step.q.dtype, torch.float32)
    group = layout.group.long()
    pages = torch.cat([layout.prompt_page[group], layout.own_page], 1).long()  # (B, pages)
    ends = ((layout.prompt_page, layout.prompt_length[group]), (layout.own_page, layout.own_length))
    beyond = torch.cat(
        [torch.arange(table.shape[1] * PAGE, device=length.device) >= length[:, None] for table, length in ends], 1
    )  # (B, n)
    repeat = step.q.shape[1] // step.k.shape[1]
    keys, values = (
        x[pages].transpose(1, 2).flatten(2, 3).to(wide).masked_fill(beyond[:, None, :, None], 0.0)
        for x in (step.k_pages, step.v_pages)
    )  # (B, Hkv, n, D)
    keys, values = (x.repeat_interleave(repeat, dim=1) for x in (keys, values))
    logits = (keys @ step.q.to(wide)[..., None])[..., 0] * step.scale  # (B, Hq, n)
    weight = logits.masked_fill(beyond[:, None], float("-inf")).softmax(-1)
    out = (weight[:, :, None] @ values)[:, :, 0]
    return out.masked_fill((layout.own_length == 0)[:, None, None], 0.0).to(step.q.dtype)
