"""Decoding in plain torch: a group's queries against its prompt in one product, each row against its own pages, and
both merged by log-sum-exp. Products are taken in at least fp32: scores of fp16 heads can overflow fp16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prism_kernels.checks import host_sees
from prism_kernels.tree_attention.decode_layout import PAGE
from prism_kernels.tree_attention.decode_step import DecodeStep, append


def shared_prompt_decode(step: DecodeStep) -> Tensor:
    append(step)
    layout, (rows, heads, dim) = step.layout, step.q.shape
    kv_heads = step.k.shape[1]
    wide = torch.promote_types(step.q.dtype, torch.float32)
    queries = (step.q.to(wide) * step.scale).view(rows, kv_heads, heads // kv_heads, dim)
    tiles = layout.tile_row.clamp(min=0).long()
    of_tile = layout.group[tiles[:, 0]].long()
    grid = queries[tiles].transpose(1, 2).flatten(2, 3)  # (tiles, Hkv, width * rep, D)
    out, total = _attend(grid, step, layout.prompt_page[of_tile], layout.prompt_length[of_tile])
    out, total = (_of_rows(x, step) for x in (out, total))
    own, own_total = _attend(queries, step, layout.own_page, layout.own_length)
    both = torch.logaddexp(total, own_total)
    merged = out * (total - both).exp() + own * (own_total - both).exp()
    idle = (layout.own_length == 0)[:, None, None, None]
    return merged.masked_fill(idle, 0.0).view(rows, heads, dim).to(step.q.dtype)


def _attend(queries: Tensor, step: DecodeStep, pages: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
    """queries (n, Hkv, m, D) against the tokens of n tables (n, pages) -> as queries, and log-sum-exps (n, Hkv, m, 1).

    Without a token: 0 and -inf.
    """
    if host_sees(length):
        pages = pages[:, : -(-int(length.max()) // PAGE)]
    beyond = torch.arange(pages.shape[1] * PAGE, device=length.device) >= length[:, None]
    keys, values = (
        x[pages.long()].transpose(1, 2).flatten(2, 3).to(queries.dtype).masked_fill(beyond[:, None, :, None], 0.0)
        for x in (step.k_pages, step.v_pages)
    )  # (n, Hkv, tokens, D)
    scores = (queries @ keys.mT).masked_fill(beyond[:, None, None], float("-inf"))
    total = scores.logsumexp(-1, keepdim=True)
    return (scores - total).exp().nan_to_num(nan=0.0) @ values, total


def _of_rows(grid: Tensor, step: DecodeStep) -> Tensor:
    """(tiles, Hkv, width * rep, n) -> (B, Hkv, rep, n)."""
    tiles, kv_heads, both, n = grid.shape
    width = step.layout.tile_row.shape[1]
    rows = grid.view(tiles, kv_heads, width, both // width, n).transpose(1, 2)
    return rows.reshape(tiles * width, kv_heads, both // width, n)[step.layout.slot.long()]
