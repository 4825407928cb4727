"""shared_prompt_decode as an operator: what torch.compile puts into its graph, and shapes where there is no storage."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from prism_kernels.dispatch import implementation
from prism_kernels.operators import Written, operator
from prism_kernels.tree_attention.decode_layout import DecodeLayout
from prism_kernels.tree_attention.decode_step import DecodeStep


class Tables(NamedTuple):
    """A DecodeLayout's tensors, in its order."""

    prompt_page: Tensor
    prompt_length: Tensor
    own_page: Tensor
    own_length: Tensor
    group: Tensor
    tile_row: Tensor
    slot: Tensor


def decode(step: DecodeStep, impl: str) -> Tensor:
    layout = step.layout
    tables = Tables(*(getattr(layout, name) for name in Tables._fields))
    return _decode(*step[:5], tables, step.scale, impl)


@operator("shared_prompt_decode")
def _decode(
    q: Tensor, k: Tensor, v: Tensor, k_pages: Written, v_pages: Written, tables: Tables, scale: float, impl: str
) -> Tensor:
    run = implementation("shared_prompt_decode", impl)
    return run(DecodeStep(q, k, v, k_pages, v_pages, DecodeLayout(*tables), scale))


@_decode.fake
def _(
    q: Tensor, k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, tables: Tables, scale: float, impl: str
) -> Tensor:
    return q.new_empty(q.shape)
