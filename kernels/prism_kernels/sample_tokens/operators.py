"""sample_tokens as an operator: what torch.compile, which cannot look into it, puts into its graph."""

from __future__ import annotations

import torch
from torch import Tensor

from prism_kernels.dispatch import implementation
from prism_kernels.operators import operator
from prism_kernels.sample_tokens.records import Draw


@operator("sample_tokens")
def sample(draw: Draw, impl: str) -> tuple[Tensor, Tensor]:
    return implementation("sample_tokens", impl)(draw)


@sample.fake
def _(draw: Draw, impl: str) -> tuple[Tensor, Tensor]:
    rows = draw.logits.shape[0]
    return draw.logits.new_empty(rows, dtype=torch.int64), draw.logits.new_empty(rows, dtype=torch.float32)


sample.constant()
