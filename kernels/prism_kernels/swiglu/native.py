"""SwiGLU in C++ (csrc/elementwise.cpp): one pass, forward alone, for decoding."""

from __future__ import annotations

import torch
from torch import Tensor

from prism_kernels.native import forward_alone, library


def swiglu(gate_up: Tensor, up: Tensor | None) -> Tensor:
    forward_alone("swiglu", gate_up, up)
    gate, up = gate_up.chunk(2, 1) if up is None else (gate_up, up)
    if gate.stride(1) != 1 or up.stride() != gate.stride():
        gate, up = gate.contiguous(), up.contiguous()
    y = torch.empty(gate.shape, dtype=gate.dtype)
    tensors = tuple(tensor.data_ptr() for tensor in (gate, up, y))
    library().swiglu(gate.dtype == torch.float64, tensors, (gate.stride(0), *gate.shape))
    return y
