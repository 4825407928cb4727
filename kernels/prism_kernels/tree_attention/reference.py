"""The definitions: dense masked softmax attention, over the whole stream, or of one new token per row."""

from __future__ import annotations

import torch
from torch import Tensor

from prism_kernels.tree_attention.decode_layout import DecodeLayout
from prism_kernels.tree_attention.layout import TreeLayout


def tree_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: TreeLayout, scale: float, query_row: Tensor | None = None
) -> Tensor:
    """q (T or Q, Hq, D), k and v (T, Hkv, D) -> as q; at least fp32 inside."""
    allowed = layout.allowed()
    return _attention(q, k, v, allowed if query_row is None else allowed[query_row], scale)


def segment_attention(q: Tensor, k: Tensor, v: Tensor, layout: TreeLayout, scale: float, causal: bool) -> Tensor:
    """q (T, Hq, D), k and v (T, Hkv, D) -> as q; at least fp32 inside."""
    allowed = layout.allowed()
    return _attention(q, k, v, allowed if causal else allowed | allowed.T, scale)


def _attention(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    repeat = q.shape[1] // k.shape[1]
    queries = q.to(wide).transpose(0, 1)  # (Hq, T, D)
    keys = k.to(wide).repeat_interleave(repeat, dim=1).transpose(0, 1)
    values = v.to(wide).repeat_interleave(repeat, dim=1).transpose(0, 1)
    logits = (queries @ keys.transpose(1, 2)) * scale  # (Hq, T or Q, T)
    logits = logits.masked_fill(~allowed, float("-inf"))
    return (torch.softmax(logits, dim=-1) @ values).transpose(0, 1).to(q.dtype)


def shared_prompt_decode(
    q: Tensor, prompt_k: Tensor, prompt_v: Tensor, own_k: Tensor, own_v: Tensor, layout: DecodeLayout, scale: float
) -> Tensor:
    """Every row with its own copy of its group's prompt; at least fp32 inside."""
    wide = torch.promote_types(q.dtype, torch.float32)
    repeat = q.shape[1] // own_k.shape[1]
    keys, values = (
        torch.cat([prompt[layout.group], own], dim=2).to(wide).repeat_interleave(repeat, dim=1)
        for prompt, own in ((prompt_k, own_k), (prompt_v, own_v))
    )  # (B, Hq, P + L, D)
    logits = (keys @ q.to(wide)[..., None])[..., 0] * scale  # (B, Hq, P + L)
    hidden = torch.nn.functional.pad(~layout.prompt_mask[layout.group], (0, own_k.shape[2]))  # own tokens are all there
    weight = logits.masked_fill(hidden[:, None], float("-inf")).softmax(-1)
    return (weight[:, :, None] @ values)[:, :, 0].to(q.dtype)
