"""The definition: plain torch and autograd, at least fp32 inside, rounded once.

Dimensions: T tokens, I intermediate. The operations are those of transformers' MLPs, ``act_fn(gate) * up``: in fp32
the values and the gradients have their bits.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def swiglu(gate_up: Tensor, up: Tensor | None) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1) if up is None else (gate_up, up)
    wide = torch.promote_types(gate.dtype, torch.float32)
    return (F.silu(gate.to(wide)) * up.to(wide)).to(gate.dtype)
