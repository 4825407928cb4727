"""SwiGLU as a single differentiable step, in plain torch.

Autograd over the separate operations also keeps silu(gate), and in half precision wide copies of all. Here gate and up
are kept as they came; the operations are the reference's, so that fp32 has its bits.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from prism_kernels.operators import first_derivative


def swiglu(gate_up: Tensor, up: Tensor | None) -> Tensor:
    return _Swiglu.apply(gate_up, up)


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up, up):
        ctx.save_for_backward(gate_up, up)
        gate, up = _wide(gate_up, up)
        return F.silu(gate).mul_(up).to(gate_up.dtype)

    @staticmethod
    @first_derivative("swiglu")
    def backward(ctx, grad):
        gate_up, given_up = ctx.saved_tensors
        gate, up = _wide(gate_up, given_up)
        grad, dtype = grad.to(gate.dtype), gate_up.dtype

        def of_gate() -> Tensor:
            return torch.ops.aten.silu_backward(grad * up, gate).to(dtype)

        def of_up() -> Tensor:
            return (grad * F.silu(gate)).to(dtype)

        if given_up is None:
            return torch.cat((of_gate(), of_up()), dim=-1), None
        want_gate, want_up = ctx.needs_input_grad
        return of_gate() if want_gate else None, of_up() if want_up else None


def _wide(gate_up: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    """(gate, up), at least fp32."""
    gate, up = gate_up.chunk(2, dim=-1) if up is None else (gate_up, up)
    wide = torch.promote_types(gate.dtype, torch.float32)
    return gate.to(wide), up.to(wide)
