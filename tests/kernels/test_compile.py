"""Ops under torch.compile(fullgraph=True) on a CPU: forward and backward as without it."""

import pytest
import torch

from prism_kernels import qk_norm_rotate, rms_norm, tree_attention
from prism_kernels.tree_attention.layout import TreeLayout

LAYOUT = TreeLayout.build([3, 4, 5], [-1, 0, 0])
CASES = {  # sizes of the leaves, and what is compiled
    "rms_norm": (((5, 8), (8,)), lambda x, w: rms_norm(x, w, 1e-6)),
    "rms_norm, residual": (((5, 8), (8,), (5, 8)), lambda x, w, r: torch.cat(rms_norm(x, w, 1e-6, residual=r))),
    "qk_norm_rotate": (
        ((6, 4, 8), (6, 2, 8), (8,), (8,)),
        lambda q, k, qw, kw: torch.cat(qk_norm_rotate(q, k, qw, kw, torch.ones(6, 8), torch.zeros(6, 8), 1e-6), 1),
    ),
    "tree_attention": (((12, 4, 8), (12, 2, 8), (12, 2, 8)), lambda q, k, v: tree_attention(q, k, v, LAYOUT)),
}


@pytest.mark.parametrize("name", CASES)
def test_one_graph_forward_and_backward(name):
    sizes, op = CASES[name]
    leaves = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes]
    out = op(*leaves)
    upstream = torch.randn_like(out)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")(*leaves)
    torch.testing.assert_close(compiled, out)
    for got, plain in zip(*(torch.autograd.grad(x, leaves, upstream) for x in (compiled, out))):
        torch.testing.assert_close(got, plain)
