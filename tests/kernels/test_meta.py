"""What a GPU would run of the fused elementwise ops, seen on tensors without storage: operators, what they keep, bytes.

Sizes are the 4B policy's: 16,384 tokens, H 2560, I 9728, 32 and 8 heads of 128, bf16.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from prism_kernels import qk_norm_rotate, rms_norm, swiglu
from prism_kernels.rms_norm import rms_norm_rotate
from tests.kernels.linear_logprob.linear_cases import skip_interpreted

pytestmark = skip_interpreted
T, H, I, HQ, HKV, D = 16384, 2560, 9728, 32, 8, 128
HIDDEN, INNER, Q, K = (2 * T * width for width in (H, I, HQ * D, HKV * D))  # bytes of such a tensor in bf16
ANGLES = 2 * 4 * T * D  # cos and sin in fp32
ROW = 4 * T  # one fp32 number a row


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, device="meta", dtype=dtype, requires_grad=dtype == torch.bfloat16)


TURN = (empty(T, D, dtype=torch.float32), empty(T, D, dtype=torch.float32))
X, WEIGHT, OF_HEAD = (T, H), (H,), (D,)
CASES = {  # shapes of the leaves, what runs, its operator, bytes forward, backward, and kept
    "rms_norm": ((X, WEIGHT), lambda x, w: rms_norm(x, w, 1e-6), "rms_norm",
                 2 * HIDDEN + ROW, 3 * HIDDEN + ROW, HIDDEN + ROW),
    "rms_norm, residual": ((X, WEIGHT, X), lambda x, w, r: rms_norm(x, w, 1e-6, residual=r), "rms_norm",
                           4 * HIDDEN + ROW, 4 * HIDDEN + ROW, HIDDEN + ROW),
    "swiglu": (((T, 2 * I),), swiglu, "swiglu", 3 * INNER, 5 * INNER, 2 * INNER),
    "swiglu, up": (((T, I), (T, I)), lambda gate, up: swiglu(gate, up=up), "swiglu", 3 * INNER, 5 * INNER, 2 * INNER),
    "qk_norm_rotate": (((T, HQ, D), (T, HKV, D), OF_HEAD, OF_HEAD), lambda *qk: qk_norm_rotate(*qk, *TURN, 1e-6),
                       "qk_norm_rotate", 2 * (Q + K) + ANGLES, 3 * (Q + K) + ANGLES, Q + K + ANGLES),
    "rms_norm_rotate": (((T, HQ, D), OF_HEAD), lambda q, w: rms_norm_rotate(q, w, *TURN, 1e-6), "qk_norm_rotate",
                        2 * Q + ANGLES, 3 * Q + ANGLES, Q + ANGLES),
}  # fmt: skip
SMALL = 1 << 16  # bytes: weights and their gradients


def num_bytes(values):
    return sum(x.numel() * x.element_size() for x in values if isinstance(x, torch.Tensor))


class Recorder(TorchDispatchMode):
    """{operator: bytes of its operands and results} of everything but views, in ``calls``."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.name() != "aten::detach":
            results = out if isinstance(out, tuple) else (out,)
            self.calls.append((function.name(), num_bytes((*args, *results))))
        return out


@pytest.mark.parametrize("name", CASES)
def test_one_operator_forward_and_one_backward_of_no_more_bytes_than_they_must_move(name):
    shapes, op, operator, forward, backward, kept = CASES[name]
    leaves, saved = [empty(*shape) for shape in shapes], []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x)
    with Recorder() as first, hooks:
        out = op(*leaves)
    outputs = out if isinstance(out, tuple) else (out,)
    upstream = [torch.empty_like(x) for x in outputs]
    with Recorder() as second:
        gradients = torch.autograd.grad(outputs, leaves, upstream)
    for got, leaf in zip(gradients, leaves, strict=True):
        assert (got.shape, got.dtype) == (leaf.shape, leaf.dtype)
    for calls, expected, name in ((first.calls, forward, operator), (second.calls, backward, f"{operator}_backward")):
        assert [name for name, _ in calls] == [f"prism_kernels::{name}"]
        assert expected <= calls[0][1] <= expected + SMALL
    assert kept <= num_bytes(saved) <= kept + SMALL


def test_a_sum_of_which_nobody_asks_the_gradient_costs_none():
    x, weight, residual = empty(*X), empty(*WEIGHT), empty(*X)
    y, total = rms_norm(x, weight, 1e-6, residual=residual)
    upstream = torch.empty_like(y)
    with Recorder() as alone:
        torch.autograd.grad(y, (x, weight, residual), upstream, retain_graph=True)
    assert [name for name, _ in alone.calls] == ["prism_kernels::rms_norm_backward"]
    assert alone.calls[0][1] <= 3 * HIDDEN + ROW + SMALL
    with Recorder() as other:
        d_x, d_residual = torch.autograd.grad(total, (x, residual), upstream)
    assert other.calls == [] and d_x.shape == d_residual.shape == x.shape


@pytest.mark.parametrize("name", CASES)
def test_compile_takes_it_whole_and_sees_the_operator_alone(name):
    shapes, op, operator, *_ = CASES[name]
    leaves, graphs = [empty(*shape) for shape in shapes], []

    def backend(graph, _):
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    torch.compile(op, fullgraph=True, backend=backend)(*leaves)
    (calls,) = graphs
    assert [call for call in calls if "getitem" not in call] == [f"prism_kernels.{operator}.default"]
    out = torch.compile(op, fullgraph=True, backend="aot_eager")(*leaves)
    outputs = out if isinstance(out, tuple) else (out,)
    gradients = torch.autograd.grad(outputs, leaves, [torch.empty_like(x) for x in outputs])
    assert [x.shape for x in gradients] == [x.shape for x in leaves]
