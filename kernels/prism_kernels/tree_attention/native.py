"""shared_prompt_decode in C++ (csrc/decode.cpp): a page's keys and values are read once for all rows that share it."""

from __future__ import annotations

import torch
from torch import Tensor

from prism_kernels.native import library, threads_for
from prism_kernels.tree_attention.decode_step import DecodeStep, check_tables

NUMBERS = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}  # of csrc/decode.h


def shared_prompt_decode(step: DecodeStep) -> Tensor:
    layout, dtype = step.layout, step.q.dtype
    q, k, v = (x.contiguous() for x in (step.q, step.k, step.v))
    out = torch.empty(q.shape, dtype=torch.promote_types(dtype, torch.float32))
    tables = layout.prompt_page, layout.prompt_length, layout.own_page, layout.own_length, layout.group, layout.tile_row
    done = library().shared_prompt_decode(
        (*q.shape[:2], k.shape[1], q.shape[2], len(step.k_pages)),
        tuple(x.data_ptr() for x in (q, k, v, step.k_pages, step.v_pages, *tables, out)),
        (*layout.prompt_page.shape, layout.own_page.shape[1], *layout.tile_row.shape),
        step.scale,
        NUMBERS[dtype],
        threads_for(q.numel() * layout.prompt_page.shape[1]),
    )
    if not done:
        check_tables(layout, len(step.k_pages))  # says which
        raise ValueError("layout: expected tables of pages, prompts and rows that there are, got others")
    return out.to(dtype)
