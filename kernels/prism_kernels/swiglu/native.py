"""SwiGLU in C++ (csrc/elementwise.cpp): one pass, forward alone, for decoding."""

from __future__ import annotations

import torch
from torch import Tensor

from prism_kernels.native import Call, forward_alone, library


def swiglu(gate_up: Tensor, up: Tensor | None) -> Tensor:
    forward_alone("swiglu", gate_up, up)
    gate, up = gate_up.chunk(2, 1) if up is None else (gate_up, up)
    if gate.stride(1) != 1 or up.stride() != gate.stride():
        gate, up = gate.contiguous(), up.contiguous()
    y = torch.empty(gate.shape, dtype=gate.dtype)
    prepared(gate, up, y)()
    return y


def prepared(gate: Tensor, up: Tensor, y: Tensor) -> Call:
    """``gate`` and ``up`` (T, I), rows of one stride, into contiguous ``y``."""
    tensors = gate, up, y
    addresses = tuple(tensor.data_ptr() for tensor in tensors)
    return Call(library().swiglu, (gate.dtype == torch.float64, addresses, (gate.stride(0), *gate.shape)), tensors)
