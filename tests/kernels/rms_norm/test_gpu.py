"""What only a GPU can show of the norms: no waiting, launches, accuracy and repeatability at the model's shapes."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from prism_kernels import qk_norm_rotate, rms_norm
from tests import oracle
from tests.kernels.rms_norm.test_rms_norm import plain, terms, transformers_lines, with_gradients

pytestmark = pytest.mark.gpu
BF16 = torch.bfloat16


def leaves(*shapes):
    return [torch.randn(shape, device="cuda", dtype=BF16).requires_grad_() for shape in shapes]


def turn(tokens, width=128):
    angle = torch.rand(tokens, width // 2, device="cuda").mul_(6).repeat(1, 2)
    return angle.cos(), angle.sin()


def norm(tokens, width=2560):
    x, weight, residual = leaves((tokens, width), (width,), (tokens, width))
    return (x, weight, residual), lambda: rms_norm(x, weight, 1e-6, residual=residual, impl="triton")


def rotate(tokens, q_heads=32, k_heads=8, width=128):
    packed, q_weight, k_weight = leaves((tokens, (q_heads + 2 * k_heads) * width), (width,), (width,))
    q, k, _ = (x.unflatten(1, (-1, width)) for x in packed.split([n * width for n in (q_heads, k_heads, k_heads)], 1))
    angles = turn(tokens, width)
    return (q, k, q_weight, k_weight), lambda: qk_norm_rotate(q, k, q_weight, k_weight, *angles, 1e-6, impl="triton")


def step(case):
    given, op = case
    outputs = op()
    return [*outputs, *torch.autograd.grad(outputs, given, [torch.ones_like(x) for x in outputs])]


@pytest.mark.parametrize("make", [norm, rotate])
def test_the_host_never_waits(make):
    case = make(300)
    step(case)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(case)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("make,name", [(norm, "rms_norm"), (rotate, "qk_norm_rotate")])
def test_one_launch_forward_and_one_backward(make, name):
    case = make(300)
    step(case)
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        step(case)
    ours = [event.key for event in seen.key_averages() for _ in range(event.count) if name in event.key]
    assert sorted(ours) == [f"{name}_bwd_kernel", f"{name}_fwd_kernel"]


@pytest.mark.parametrize("make", [norm, rotate])
def test_the_same_bits_again_and_again(make):
    case = make(16_384)
    first = step(case)
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(first, step(case)))


@pytest.mark.parametrize("width", [2048, 2560, 4096, 9001, 16_384])
def test_accuracy_at_the_widths_of_models(width):
    (x, weight, residual), op = norm(1000, width)
    upstream = (torch.randn_like(x), torch.randn_like(x))
    mine = with_gradients(op(), (x, residual, weight), upstream)
    theirs, their_weight = transformers_lines(x + residual, weight)
    eager = with_gradients((theirs, x + residual), (x, residual, their_weight), upstream)
    wide = oracle.double(x, residual, weight)
    total = wide[0] + wide[1]
    truth = with_gradients((plain(total, wide[2], 1e-6), total), wide, tuple(u.double() for u in upstream))
    for a, t, e in zip(mine, truth, eager, strict=True):
        oracle.assert_as_exact(a, t, e, terms(width, rows=1000))


@pytest.mark.parametrize("q_heads,k_heads,width", [(16, 8, 128), (32, 8, 128), (64, 8, 128), (32, 8, 64), (16, 4, 256)])
def test_accuracy_at_the_heads_of_models(q_heads, k_heads, width):
    (q, k, q_weight, k_weight), _ = rotate(500, q_heads, k_heads, width)
    given, angles = [x.detach().requires_grad_() for x in (q, k, q_weight, k_weight)], turn(500, width)
    upstream = tuple(torch.randn_like(x) for x in (q, k))
    mine = with_gradients(qk_norm_rotate(*given, *angles, 1e-6, impl="triton"), given, upstream)
    theirs = [transformers_lines(x, weight, angles) for x, weight in zip(given[:2], given[2:])]
    leaves = (*given[:2], *(weight for _, weight in theirs))
    eager = with_gradients(tuple(y for y, _ in theirs), leaves, upstream)
    wide = oracle.double(*given)
    exact = tuple(plain(x, weight, 1e-6, *(part.double() for part in angles)) for x, weight in zip(wide[:2], wide[2:]))
    truth = with_gradients(exact, wide, tuple(u.double() for u in upstream))
    for a, t, e in zip(mine, truth, eager, strict=True):
        oracle.assert_as_exact(a, t, e, terms(width, rows=500 * q_heads))


def test_more_than_2_31_elements():
    width, tokens = 4096, (1 << 31) // 4096 + 100
    x = torch.zeros(tokens, width, device="cuda", dtype=BF16)
    x[-3:] = torch.randn(3, width, device="cuda")
    weight = torch.ones(width, device="cuda", dtype=BF16)
    small = rms_norm(x[-3:].clone(), weight, 1e-6, impl="triton")
    assert torch.equal(rms_norm(x, weight, 1e-6, impl="triton")[-3:], small)
