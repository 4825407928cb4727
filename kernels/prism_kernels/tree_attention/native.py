"""shared_prompt_decode in C++ (csrc/decode.cpp): exact lengths, no copy of a page; in one thread."""

from __future__ import annotations

import torch
from torch import Tensor

from prism_kernels.checks import check_values
from prism_kernels.native import library
from prism_kernels.tree_attention.decode_step import DecodeStep, check_tables


def shared_prompt_decode(step: DecodeStep) -> Tensor:
    layout, (rows, heads, dim) = step.layout, step.q.shape
    q, k, v = (x.contiguous() for x in (step.q, step.k, step.v))
    out = torch.empty_like(q)
    names = (layout.prompt_page, layout.prompt_length, layout.own_page, layout.own_length, layout.group)
    inside = library().shared_prompt_decode(
        str(q.dtype).removeprefix("torch."),
        (rows, heads, k.shape[1], dim, len(layout.prompt_length), len(step.k_pages)),
        tuple(table.data_ptr() for table in names),
        (layout.prompt_page.shape[1], layout.own_page.shape[1]),
        tuple(x.data_ptr() for x in (q, k, v, step.k_pages, step.v_pages, out)),
        step.scale,
    )
    if not inside:
        check_values("layout.group", layout.group, "G", len(layout.prompt_length))
        check_tables(layout, len(step.k_pages))
    return out
