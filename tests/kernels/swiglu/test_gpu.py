"""What only a GPU can show of SwiGLU: no waiting, launches, and offsets past 2^31 elements."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from prism_kernels import swiglu

pytestmark = pytest.mark.gpu


def step(gate_up, up=None):
    out = swiglu(gate_up, up=up, impl="triton")
    return [out, *torch.autograd.grad(out, [gate_up] if up is None else [gate_up, up], torch.ones_like(out))]


def random(*shape):
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16).requires_grad_()


def test_the_host_never_waits():
    gate_up = random(300, 2 * 9728)
    step(gate_up)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(gate_up)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_one_launch_forward_and_one_backward():
    gate_up, gate, up = random(300, 2 * 9728), random(300, 9728), random(300, 9728)
    step(gate_up), step(gate, up)
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        step(gate_up), step(gate, up)
    ours = [event.key for event in seen.key_averages() for _ in range(event.count) if "swiglu" in event.key]
    assert sorted(ours) == ["swiglu_bwd_kernel"] * 2 + ["swiglu_fwd_kernel"] * 2


def test_a_gradient_leaves_its_inputs_alone():
    gate, up = random(64, 6144), random(64, 6144)
    before = gate.detach().clone(), up.detach().clone()
    first, second = step(gate, up), step(gate, up)
    assert torch.equal(gate, before[0]) and torch.equal(up, before[1])
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_more_than_2_31_elements():
    width = 9728
    tokens = (1 << 31) // (2 * width) + 100
    gate_up = torch.zeros(tokens, 2 * width, device="cuda", dtype=torch.bfloat16)
    gate_up[-3:] = torch.randn(3, 2 * width, device="cuda")
    small, large = (step(x.requires_grad_()) for x in (gate_up[-3:].clone(), gate_up))
    assert all(torch.equal(a, b[-3:]) for a, b in zip(small, large))
