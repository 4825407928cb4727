"""shared_prompt_decode in C++ (csrc/decode.cpp): a page's keys and values are read once for all rows that share it."""

from __future__ import annotations

import torch
from torch import Tensor

from prism_kernels.native import Call, library, threads_for
from prism_kernels.tree_attention.decode_step import DecodeStep, check_tables

NUMBERS = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}  # of csrc/decode.h


def shared_prompt_decode(step: DecodeStep) -> Tensor:
    dtype = step.q.dtype
    out = torch.empty(step.q.shape, dtype=torch.promote_types(dtype, torch.float32))
    prepared(step, out)()
    return out.to(dtype)


def prepared(step: DecodeStep, out: Tensor) -> Call:
    """The call into ``out`` (B, Hq, D), in at least fp32: again and again, of what tensors hold that keep their places.

    It raises ValueError where a table leads out of the pages. With ``step.norm`` fp32 and fp64 alone.
    """
    layout, dtype = step.layout, step.q.dtype
    q, k, v = (x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous() for x in step[:3])
    tables = layout.prompt_page, layout.prompt_length, layout.own_page, layout.own_length, layout.group, layout.tile_row
    turn = () if step.norm is None else tuple(x.to(dtype).contiguous() for x in step.norm[:4])
    tensors = q, k, v, step.k_pages, step.v_pages, *tables, out, *turn
    addresses = [x.data_ptr() for x in tensors] + [0] * (4 - len(turn))
    sizes = *q.shape[:2], k.shape[1], q.shape[2], len(step.k_pages), q.stride(0), k.stride(0), v.stride(0)
    prompts, prompt_pages = layout.prompt_page.shape
    run, threads = library().shared_prompt_decode, threads_for(q.numel() * prompt_pages)
    table_sizes = prompts, prompt_pages, layout.own_page.shape[1], *layout.tile_row.shape
    factors = step.scale, 0.0 if step.norm is None else step.norm.eps

    def decode(*arguments: object) -> None:
        if not run(*arguments):
            check_tables(layout, len(step.k_pages))  # says which
            raise ValueError("layout: expected tables of pages, prompts and rows that there are, got others")

    return Call(decode, (sizes, tuple(addresses), table_sizes, factors, NUMBERS[dtype], threads), tensors)
