"""The library's GEMMs of the LM head, fp32 out for low-precision operands.

R rows of a chunk, V vocab size, H hidden. A GPU writes fp32 from bf16 operands by itself (``out_dtype``); a CPU cannot,
and casts the weight block by block, so that no fp32 copy of the whole weight exists.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from prism_kernels.linear_logprob.records import accumulator_dtype

CAST_BLOCK_BYTES = 8 << 20  # a CPU's fp32 copy of a block of the weight


def _mixed_gemm(x: Tensor) -> bool:
    return x.device.type != "cpu"


def _vocab_blocks(weight: Tensor) -> Iterator[slice]:
    step = max(1, CAST_BLOCK_BYTES // (4 * max(1, weight.shape[1])))
    for start in range(0, weight.shape[0], step):
        yield slice(start, min(start + step, weight.shape[0]))


def logits_into(z: Tensor, x: Tensor, weight: Tensor) -> None:
    """z (R, V) = x (R, H) @ weight (V, H).T, in z's dtype."""
    if z.dtype == x.dtype:
        torch.mm(x, weight.T, out=z)
    elif _mixed_gemm(x):
        torch.mm(x, weight.T, out_dtype=z.dtype, out=z)
    else:
        x = x.to(z.dtype)
        for block in _vocab_blocks(weight):
            torch.mm(x, weight[block].to(z.dtype).T, out=z[:, block])


def hidden_gradient_into(out: Tensor, dz: Tensor, weight: Tensor) -> None:
    """out (R, H) = dz (R, V) @ weight (V, H), in the accumulator's dtype."""
    if weight.dtype == out.dtype:
        torch.mm(dz, weight, out=out)
    elif _mixed_gemm(dz):
        torch.mm(dz, weight, out_dtype=out.dtype, out=out)
    else:
        out.zero_()
        for block in _vocab_blocks(weight):
            out.addmm_(dz[:, block].to(out.dtype), weight[block].to(out.dtype))


def weight_gradient(dz: Tensor, x: Tensor) -> Tensor:
    """(V, H) = dz (R, V).T @ x (R, H) in x's dtype, summed in fp32 inside; for a gradient of one chunk."""
    if dz.dtype == x.dtype and (_mixed_gemm(x) or x.dtype == accumulator_dtype(x.dtype)):
        return torch.mm(dz.T, x)
    out = torch.empty(dz.shape[1], x.shape[1], dtype=x.dtype, device=x.device)
    wide = accumulator_dtype(x.dtype)
    x = x.to(wide)
    for block in _vocab_blocks(out):
        out[block] = torch.mm(dz[:, block].to(wide).T, x)
    return out


def accumulate_weight_gradient(total: Tensor, dz: Tensor, x: Tensor, scale: float, first: bool) -> None:
    """total (V, H) fp32 = [total +] scale * dz (R, V).T @ x (R, H); ``first`` does not read what total holds."""
    beta = 0.0 if first else 1.0
    if dz.dtype == x.dtype == total.dtype:
        torch.addmm(total, dz.T, x, beta=beta, alpha=scale, out=total)
    elif _mixed_gemm(x):
        torch.addmm(total, dz.T, x, out_dtype=total.dtype, beta=beta, alpha=scale, out=total)
    else:
        x = x.to(total.dtype)
        for block in _vocab_blocks(total):
            part = total[block]
            torch.addmm(part, dz[:, block].to(total.dtype).T, x, beta=beta, alpha=scale, out=part)
