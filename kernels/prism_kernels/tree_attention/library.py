"""What calls.py asks of an attention library: FlashAttention's contract.

Its variable-length calls take these arguments, and its backward serves a part of a softmax when given the log-sum-exp
and the output of the whole.

Dimensions: N queries, T keys, Hq and Hkv heads of D.
"""

from __future__ import annotations

import importlib
from functools import lru_cache
from typing import Protocol

from torch import Tensor

from prism_kernels.tree_attention.call_plan import Sequences

LIBRARIES = {  # imported on first use
    "torch": "prism_kernels.tree_attention.varlen_library:TorchVarlen",
    "aten": "prism_kernels.tree_attention.flash_library:Aten",
    "flash_attn": "prism_kernels.tree_attention.flash_library:Package",
}


class VarlenAttention(Protocol):
    """A library's two calls. q (N, Hq, D); k, v (T, Hkv, D)."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, scale: float) -> tuple[Tensor, Tensor]:
        """out (N, Hq, D), any precision; natural log-sum-exp of the scores (Hq, N), at least fp32.

        Both are the caller's to write to. A query that meets no key: 0, and -inf or +inf.
        """
        ...

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        sequences: Sequences,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv of this part, any precision, the caller's to write to; 0 where nothing is met.

        dout, out (N, Hq, D), lse (Hq, N): of the whole softmax, of which these sequences are a part.
        """
        ...


@lru_cache
def library_of(name: str) -> VarlenAttention:
    module, attribute = LIBRARIES[name].split(":")
    return getattr(importlib.import_module(module), attribute)()
