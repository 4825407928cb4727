"""SwiGLU: values and gradients against float64 autograd over the plain lines.

Runs the Triton kernels where there is a GPU; elsewhere test_triton.py runs this file in Triton's interpreter.
"""

import pytest
import torch
from transformers.activations import ACT2FN

from prism_kernels import swiglu
from prism_kernels.swiglu import operators
from tests.kernels.linear_logprob.linear_cases import INTERPRETED, skip_interpreted
from tests.oracle import assert_as_exact, assert_same, double

IMPLS = (
    [("triton", "cpu")]
    if INTERPRETED
    else [("torch", "cpu"), ("reference", "cpu"), pytest.param("triton", "cuda", marks=pytest.mark.gpu)]
)
every = pytest.mark.parametrize(("impl", "device"), IMPLS)
kernels = pytest.mark.parametrize(("impl", "device"), [row for row in IMPLS if "triton" in str(row)])
packed = pytest.mark.parametrize("packed", [True, False])
ROWS = 33 if INTERPRETED else 257
TERMS = 8  # the exponential, the quotient and the products of a gradient; nothing is summed over rows


def case(dtype, packed, device="cpu", tokens=13, width=63):
    """The leaves of one call."""
    leaves = [torch.randn(tokens, width, dtype=dtype, device=device).mul_(3) for _ in range(2)]
    return [x.requires_grad_() for x in ([torch.cat(leaves, 1)] if packed else leaves)]


def run(leaves, impl="auto"):
    return swiglu(leaves[0], up=leaves[1] if len(leaves) == 2 else None, impl=impl)


def plain(leaves):
    gate, up = leaves if len(leaves) == 2 else leaves[0].chunk(2, -1)
    return gate * torch.sigmoid(gate) * up


def eager(leaves):
    gate, up = leaves if len(leaves) == 2 else leaves[0].chunk(2, -1)
    return ACT2FN["silu"](gate) * up


def with_gradients(out, leaves, upstream):
    return [out, *torch.autograd.grad(out, leaves, upstream)]


@pytest.fixture
def poisoned():
    """Memory that nobody wrote holds NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@every
@packed
@pytest.mark.parametrize("tokens,width", [(0, 5), (1, 1), (13, 63), (3, 4100)])  # 4,100: three programs a row
def test_equals_the_plain_lines(tokens, width, packed, impl, device, poisoned):
    leaves = case(torch.float64, packed, device, tokens, width)
    upstream = torch.randn(tokens, width, dtype=torch.float64, device=device)
    got = with_gradients(run(leaves, impl), leaves, upstream)
    assert got[0].shape == (tokens, width)
    for a, b in zip(got, with_gradients(plain(leaves), leaves, upstream), strict=True):
        assert_same(a, b, TERMS)


@every
@packed
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_is_no_worse_than_transformers(dtype, packed, impl, device):
    leaves = case(dtype, packed, device, ROWS)
    upstream = torch.randn(ROWS, 63, dtype=dtype, device=device)
    mine = with_gradients(run(leaves, impl), leaves, upstream)
    assert all(x.dtype == dtype for x in mine)
    wide = double(*leaves)
    truth = with_gradients(plain(wide), wide, upstream.double())
    theirs = with_gradients(eager(leaves), leaves, upstream)
    for a, t, e, what in zip(mine, truth, theirs, ("out", "gradient", "gradient of up")):
        assert_as_exact(a, t, e, TERMS, what)


@skip_interpreted
@pytest.mark.parametrize("impl", ["reference", "torch"])
@packed
def test_has_the_bits_of_transformers_in_fp32(packed, impl):
    leaves = case(torch.float32, packed, tokens=97)
    upstream = torch.randn(97, 63)
    mine = with_gradients(run(leaves, impl), leaves, upstream)
    theirs = with_gradients(eager(leaves), leaves, upstream)
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


@every
def test_large_gates_stay_finite(impl, device):
    gate = torch.tensor([[-1e4, -200.0, 0.0, 200.0, 1e4]], device=device, requires_grad=True)
    out = swiglu(gate, up=torch.ones_like(gate), impl=impl)
    assert out.tolist() == [[0.0, 0.0, 0.0, 200.0, 1e4]]
    (slope,) = torch.autograd.grad(out.sum(), gate)
    assert slope.tolist() == [[0.0, 0.0, 0.5, 1.0, 1.0]]


@every
@packed
def test_strided_input_and_gradient(packed, impl, device):
    leaves = case(torch.float64, packed, device)
    strided = [torch.stack([x, x], -1)[..., 0].detach().requires_grad_() for x in leaves]
    upstream = torch.randn(63, 13, dtype=torch.float64, device=device).T
    got = with_gradients(run(strided, impl), strided, upstream)
    for a, b in zip(got, with_gradients(plain(leaves), leaves, upstream), strict=True):
        assert_same(a, b, TERMS)
    got = torch.autograd.grad(run(leaves, impl).sum(), leaves)  # a gradient of strides 0
    for a, b in zip(got, torch.autograd.grad(plain(leaves).sum(), leaves), strict=True):
        assert_same(a, b, TERMS)


@every
def test_halves_of_one_product_apart(impl, device):
    (product,) = case(torch.float64, True, device)
    halves = product.chunk(2, -1)
    upstream = torch.randn_like(halves[0])
    got = with_gradients(swiglu(halves[0], up=halves[1], impl=impl), [product], upstream)
    for a, b in zip(got, with_gradients(swiglu(product, impl=impl), [product], upstream), strict=True):
        assert torch.equal(a, b)


@every
def test_a_gradient_of_one_of_both(impl, device):
    gate, up = case(torch.float64, False, device)
    both = torch.autograd.grad(run((gate, up), impl).sum(), (gate, up))
    (d_gate,) = torch.autograd.grad(run((gate, up.detach()), impl).sum(), gate)
    (d_up,) = torch.autograd.grad(run((gate.detach(), up), impl).sum(), up)
    assert torch.equal(d_gate, both[0]) and torch.equal(d_up, both[1])


@skip_interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@packed
def test_the_backward_keeps_gate_and_up_alone(packed, dtype):
    leaves, saved = case(dtype, packed), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.data_ptr()) or x, lambda x: x):
        run(leaves, "torch")
    assert saved == [x.data_ptr() for x in leaves]


@kernels
@packed
def test_a_batch_of_gradients_and_a_second_derivative_are_refused(packed, impl, device):
    leaves = case(torch.float64, packed, device)
    out = run(leaves, impl)
    with pytest.raises(NotImplementedError, match="swiglu: no batch of gradients"):
        torch.autograd.grad(out, leaves[0], torch.stack([out, out]), is_grads_batched=True, retain_graph=True)
    with pytest.raises(RuntimeError, match="swiglu: no second derivative"):
        torch.autograd.grad(out.sum(), leaves[0], create_graph=True)


@kernels
@packed
def test_operators_keep_their_promises(packed, impl, device):
    """Schema, fake, autograd, dynamic shapes; also of the backward operator."""
    leaves = case(torch.float32, packed, device, tokens=3, width=5)
    given = leaves if len(leaves) == 2 else [*leaves, None]
    torch.library.opcheck(operators._swiglu.overload, (*given,))
    torch.library.opcheck(operators._swiglu_backward.overload, (torch.randn(3, 5, device=device), *given))


@skip_interpreted
def test_arguments_are_checked():
    gate = torch.randn(5, 6)
    with pytest.raises(ValueError, match=r"gate_up: expected floating \(T, 2I\), got \(5,\)"):
        swiglu(gate[:, 0])
    with pytest.raises(ValueError, match=r"gate_up: expected floating \(T, I\), got \(5, 6\) torch.int64"):
        swiglu(gate.long(), up=gate)
    with pytest.raises(ValueError, match=r"gate_up: expected an even 2I, at least 2; a gate .* got \(5, 5\)"):
        swiglu(gate[:, :5])
    with pytest.raises(ValueError, match=r"gate_up: expected I >= 1, got \(5, 0\)"):
        swiglu(gate[:, :0], up=gate[:, :0])
    with pytest.raises(ValueError, match=r"up: expected \(5, 6\) torch.float32 on cpu, as the gate is, got \(5, 3\)"):
        swiglu(gate, up=gate[:, :3])
    with pytest.raises(ValueError, match="impl of swiglu: expected auto or one of triton, torch, native, "):
        swiglu(gate, impl="cpu")
