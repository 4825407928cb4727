"""SwiGLU on a GPU: one launch forward, one backward, which keeps gate and up and makes the activation again.

Legend: T rows, I intermediate. Gate and up have row strides of their own, so that both halves of one product are read
in place; the backward of a packed one writes both halves of one gradient.

Ours and not liger-kernel's, which rounds silu(gate) before the product, overwrites gate and up with their gradients,
and takes no strided rows: dev/LOG.md.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from prism_kernels.tuned_options import tuned

BLOCK = 2048  # columns of a program


def block_options(direction: str) -> dict[str, Any]:
    return tuned("swiglu", direction, {"BLOCK": BLOCK, "num_warps": 8})


@triton.jit
def swiglu_fwd_kernel(
    gate_ptr,  # (T, I), last stride 1
    up_ptr,  # (T, I), last stride 1
    out_ptr,  # (T, I) contiguous, out
    width,
    gate_stride,
    up_stride,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(gate_ptr + i_row * gate_stride + column, mask=inside, other=0.0).to(WIDE)
    up = tl.load(up_ptr + i_row * up_stride + column, mask=inside, other=0.0).to(WIDE)
    out = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + i_row * width + column, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_bwd_kernel(
    d_out_ptr,  # (T, I), last stride 1
    gate_ptr,  # (T, I), last stride 1
    up_ptr,  # (T, I), last stride 1
    d_gate_ptr,  # (T, I), last stride 1, out
    d_up_ptr,  # (T, I), last stride 1, out
    width,
    d_out_stride,
    gate_stride,
    up_stride,
    d_stride,  # of both gradients
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(gate_ptr + i_row * gate_stride + column, mask=inside, other=0.0).to(WIDE)
    up = tl.load(up_ptr + i_row * up_stride + column, mask=inside, other=0.0).to(WIDE)
    d_out = tl.load(d_out_ptr + i_row * d_out_stride + column, mask=inside, other=0.0).to(WIDE)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    silu = gate * sigmoid
    d_gate = d_out * up * (sigmoid + silu * (1.0 - sigmoid))
    p_out = i_row * d_stride + column
    tl.store(d_gate_ptr + p_out, d_gate.to(d_gate_ptr.dtype.element_ty), mask=inside)
    tl.store(d_up_ptr + p_out, (d_out * silu).to(d_up_ptr.dtype.element_ty), mask=inside)


def forward(gate_up: Tensor, up: Tensor | None) -> Tensor:
    gate, up = _apart(gate_up, up)
    out = gate.new_empty(gate.shape)
    options = block_options("forward")
    if gate.shape[0]:
        swiglu_fwd_kernel[_grid(gate, options)](
            gate, up, out, gate.shape[1], gate.stride(0), up.stride(0), WIDE=_wide(gate), **options
        )
    return out


def backward(d_out: Tensor, gate_up: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    """The gradients of both arguments; of a packed one, and an empty tensor."""
    d_first, d_second = gate_up.new_empty(gate_up.shape), gate_up.new_empty(0 if up is None else up.shape)
    d_gate, d_up = d_first.chunk(2, dim=-1) if up is None else (d_first, d_second)
    gate, up = _apart(gate_up, up)
    d_out = _contiguous_last(d_out)
    options = block_options("backward")
    if gate.shape[0]:
        swiglu_bwd_kernel[_grid(gate, options)](
            d_out,
            gate,
            up,
            d_gate,
            d_up,
            gate.shape[1],
            d_out.stride(0),
            gate.stride(0),
            up.stride(0),
            d_gate.stride(0),
            WIDE=_wide(gate),
            **options,
        )
    return d_first, d_second


def _grid(gate: Tensor, options: dict[str, Any]) -> tuple[int, int]:
    return gate.shape[0], triton.cdiv(gate.shape[1], options["BLOCK"])


def _wide(x: Tensor) -> tl.dtype:
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def _apart(gate_up: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gate and up, in place where their last stride is 1."""
    gate, up = _contiguous_last(gate_up).chunk(2, dim=-1) if up is None else (_contiguous_last(gate_up), up)
    return gate, _contiguous_last(up)


def _contiguous_last(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
