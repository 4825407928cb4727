"""What api.py hands to the implementations of shared_prompt_decode, and where a new token goes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from prism_kernels.checks import FLOATING, check_device, check_tensor, check_values, number, shown, wrong
from prism_kernels.tree_attention.decode_layout import PAGE, DecodeLayout


class HeadNorm(NamedTuple):
    """What queries and keys become before they meet: `qk_norm_rotate` of them and these. B rows, heads of D."""

    q_weight: Tensor  # (D,)
    k_weight: Tensor
    cos: Tensor  # (B, D), both halves equal
    sin: Tensor
    eps: float


class DecodeStep(NamedTuple):
    """One call, checked. B rows, Hq and Hkv heads of D, N pages."""

    q: Tensor  # (B, Hq, D)
    k: Tensor  # (B, Hkv, D), of the new tokens
    v: Tensor
    k_pages: Tensor  # (N, Hkv, PAGE, D), contiguous; written
    v_pages: Tensor
    layout: DecodeLayout
    scale: float
    norm: HeadNorm | None = None


def check_norm(norm: HeadNorm, q: Tensor) -> HeadNorm:
    """Without gradients. Raises ValueError naming ``norm``'s part that does not fit ``q`` (B, Hq, D)."""
    rows, _, dim = q.shape
    if not isinstance(norm, tuple) or len(norm) != 5:
        raise wrong("norm", "(q_weight, k_weight, cos, sin, eps)", shown(norm))
    norm = HeadNorm(*norm)
    if dim % 2:
        raise wrong("q", "an even D, where there is a norm", f"D = {dim}")
    for name in ("q_weight", "k_weight"):
        check_tensor(f"norm.{name}", getattr(norm, name), {"D": dim}, FLOATING)
    for name in ("cos", "sin"):
        check_tensor(f"norm.{name}", getattr(norm, name), {"B": rows, "D": dim}, FLOATING)
    for name in HeadNorm._fields[:4]:
        check_device(f"norm.{name}", getattr(norm, name), "q", q)
    q_weight, k_weight, cos, sin = (x.detach() for x in norm[:4])
    return HeadNorm(q_weight, k_weight, cos, sin, number("norm.eps", norm.eps, above=0))


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
