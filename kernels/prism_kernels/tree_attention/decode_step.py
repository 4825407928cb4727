"""What api.py hands to the implementations of shared_prompt_decode, and where a new token goes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from prism_kernels.checks import check_values
from prism_kernels.tree_attention.decode_layout import PAGE, DecodeLayout


class DecodeStep(NamedTuple):
    """One call, checked. B rows, Hq and Hkv heads of D, N pages."""

    q: Tensor  # (B, Hq, D)
    k: Tensor  # (B, Hkv, D), of the new tokens
    v: Tensor
    k_pages: Tensor  # (N, Hkv, PAGE, D), contiguous; written
    v_pages: Tensor
    layout: DecodeLayout
    scale: float


def append(step: DecodeStep) -> None:
    """The new tokens' keys and values to their places; what idle rows would write goes to page 0."""
    layout = step.layout
    check_tables(layout, len(step.k_pages))
    last = layout.own_length.long() - 1
    page = layout.own_page.gather(1, (last.clamp(min=0) // PAGE)[:, None])[:, 0].long()
    page = torch.where(last >= 0, page, 0)
    at = torch.where(last >= 0, last % PAGE, 0)
    step.k_pages[page, :, at] = step.k
    step.v_pages[page, :, at] = step.v


def check_tables(layout: DecodeLayout, pages: int) -> None:
    """Raises ValueError for what leads out of the pages, where the host sees it."""
    for kind in ("prompt", "own"):
        table, length = getattr(layout, f"{kind}_page"), getattr(layout, f"{kind}_length")
        check_values(f"layout.{kind}_page", table, "N", pages)
        check_values(f"layout.{kind}_length", length, "1 + capacity", table.shape[1] * PAGE + 1)
