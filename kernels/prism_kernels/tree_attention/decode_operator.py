"""shared_prompt_decode as an operator: what torch.compile puts into its graph, and shapes where there is no storage."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from prism_kernels.dispatch import implementation
from prism_kernels.operators import Written, operator
from prism_kernels.tree_attention.decode_layout import DecodeLayout
from prism_kernels.tree_attention.decode_step import DecodeStep, HeadNorm


class Tables(NamedTuple):
    """A DecodeLayout's tensors, in its order."""

    prompt_page: Tensor
    prompt_length: Tensor
    own_page: Tensor
    own_length: Tensor
    group: Tensor
    tile_row: Tensor
    slot: Tensor
    arrived: Tensor  # as it was, afterwards: to torch.compile it is not written


class Factors(NamedTuple):
    """A HeadNorm, or nothing; what scores are scaled by."""

    q_weight: Tensor | None
    k_weight: Tensor | None
    cos: Tensor | None
    sin: Tensor | None
    eps: float
    scale: float


def decode(step: DecodeStep, impl: str) -> Tensor:
    layout = step.layout
    tables = Tables(*(getattr(layout, name) for name in Tables._fields))
    norm = (None, None, None, None, 1.0) if step.norm is None else step.norm
    return _decode(*step[:5], tables, Factors(*norm, step.scale), impl)


@operator("shared_prompt_decode")
def _decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pages: Written,
    v_pages: Written,
    tables: Tables,
    factors: Factors,
    impl: str,
) -> Tensor:
    run = implementation("shared_prompt_decode", impl)
    *norm, scale = factors
    given = None if factors.q_weight is None else HeadNorm(*norm)  # pyright: ignore[reportArgumentType]  # all or none
    return run(DecodeStep(q, k, v, k_pages, v_pages, DecodeLayout(*tables), scale, given))


@_decode.fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    tables: Tables,
    factors: Factors,
    impl: str,
) -> Tensor:
    return q.new_empty(q.shape)
