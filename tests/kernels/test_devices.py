"""A GPU that is not the current one: kernels must run where their arguments lie, and leave the current device alone."""

from contextlib import contextmanager

import pytest
import torch

import prism_kernels
from prism_kernels.group_advantage import api as advantage_api
from prism_kernels.moe import api as moe_api
from prism_kernels.moe import plan_routing
from tests.oracle import assert_same

T, H, E, I, V, B = 70, 32, 6, 24, 300, 24


def random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def route(device, impl="auto"):
    x, router = (random(*shape, seed=i).to(device).requires_grad_() for i, shape in enumerate(((T, H), (E, H))))
    kind = (torch.arange(T) % 3).to(device)
    routing = prism_kernels.moe_route(x, router, 2, segment_kind=kind, num_kinds=3, impl=impl)
    gradients = torch.autograd.grad(routing.weight.square().sum() + routing.stats.prob_sum[0].sum(), (x, router))
    return [*routing[:4], *routing.stats, *gradients]


def plan(device, impl="auto"):
    index = (torch.arange(T * 2).view(T, 2) * 5 % E).to(device)
    return list(plan_routing(index, torch.ones(T, 2, device=device), E, impl=impl)[2:4])


def experts(device, impl="auto"):
    shapes = ((T, H), (E, 2 * I, H), (E, H, I), (T, 2))
    x, gate_up, down, weight = (random(*shape, seed=i).to(device).requires_grad_() for i, shape in enumerate(shapes))
    routing = plan_routing((torch.arange(T * 2).view(T, 2) * 5 % E).to(device), weight, E, impl=impl)
    out = prism_kernels.moe_mlp(x, gate_up, down, routing, impl=impl)
    return [out, *torch.autograd.grad(out.square().sum(), (x, gate_up, down, weight))]


def normalize(device, impl="auto"):
    scores, groups = random(2, B, seed=0).to(device), (torch.arange(B) % 5).to(device)
    return [prism_kernels.group_normalize(scores, groups, impl=impl)]


def advantage(device, impl="auto"):
    scores, groups = random(2, B, seed=0).to(device), (torch.arange(B) % 5).to(device)
    flags = (torch.arange(B) % 3 > 0).to(device)
    options = {"format_valid": flags, "accuracy": flags.float(), "rule": "verified", "impl": impl}
    return [prism_kernels.multi_reward_advantage(*scores, groups, **options)]


def head(device):
    hidden, weight = (random(*shape, seed=i).to(device).requires_grad_() for i, shape in enumerate(((T, H), (V, H))))
    return hidden, weight, (torch.arange(T) * 7 % V).to(device)


def logprob(device, impl="auto"):
    hidden, weight, targets = head(device)
    out = prism_kernels.linear_logprob(hidden, weight, targets, with_entropy=True, impl=impl)
    return [*out, *torch.autograd.grad(out.logprob.sum() + out.entropy.sum(), (hidden, weight))]


def cross_entropy(device, impl="auto"):
    hidden, weight, targets = head(device)
    loss = prism_kernels.linear_cross_entropy(hidden, weight, targets, impl=impl)
    return [loss, *torch.autograd.grad(loss, (hidden, weight))]


def policy_loss(device, impl="auto"):
    hidden, weight, targets = head(device)
    starts, advantages = torch.tensor([0, 30, T], dtype=torch.int32), torch.tensor([1.0, -0.5])
    rows = (advantages.to(device), starts.to(device))
    objective = prism_kernels.PolicyObjective.grpo()
    out = prism_kernels.linear_policy_loss(hidden, weight, targets, *rows, objective, impl=impl)
    return [out.loss, out.logprob, *torch.autograd.grad(out.loss, (hidden, weight))]


def objective(device, impl="auto"):
    hidden, weight, targets = head(device)

    def glue(logprob, entropy, rows):
        return -logprob.sum(), -torch.ones_like(logprob), None

    loss = prism_kernels.linear_objective(hidden, weight, targets, glue, impl=impl)
    return [loss, *torch.autograd.grad(loss, (hidden, weight))]


def norms(device, impl="auto"):
    x, residual = (random(T, H, seed=i).to(device).requires_grad_() for i in range(2))
    weight = random(H, seed=2).to(device).requires_grad_()
    out = prism_kernels.rms_norm(x, weight, 1e-6, residual=residual, impl=impl)
    return [*out, *torch.autograd.grad(out[0].square().sum() + out[1].sum(), (x, residual, weight))]


def rotated(device, impl="auto"):
    q, k = (random(T, heads, 8, seed=heads).to(device).requires_grad_() for heads in (4, 2))
    weight, angle = random(8, seed=1).to(device).requires_grad_(), random(T, 4, seed=2).to(device).repeat(1, 2)
    out = prism_kernels.qk_norm_rotate(q, k, weight, weight, angle.cos(), angle.sin(), 1e-6, impl=impl)
    return [*out, *torch.autograd.grad(out[0].square().sum() + out[1].square().sum(), (q, k, weight))]


def activation(device, impl="auto"):
    gate_up = random(T, 2 * I, seed=0).to(device).requires_grad_()
    out = prism_kernels.swiglu(gate_up, impl=impl)
    return [out, *torch.autograd.grad(out.square().sum(), gate_up)]


MOE = [(route, moe_api.ROUTE), (plan, moe_api.PLAN), (experts, moe_api.MLP)]
ADVANTAGE = [(normalize, advantage_api.NORMALIZE), (advantage, advantage_api.ADVANTAGE)]
HEAD = [logprob, cross_entropy, policy_loss, objective]
ELEMENTWISE = [norms, rotated, activation]
GUARDED = [(moe_api, *row) for row in MOE] + [(advantage_api, *row) for row in ADVANTAGE]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("op", [op for op, _ in MOE + ADVANTAGE] + HEAD + ELEMENTWISE)
def test_on_a_gpu_that_is_not_the_current_one(op):
    torch.cuda.set_device(0)
    expected, got = op("cpu", "reference"), op("cuda:1")
    assert torch.cuda.current_device() == 0
    for ours, true in zip(got, expected):
        assert ours.device == torch.device("cuda:1")
        assert_same(ours.cpu(), true, 2 * (H + V) + T)


@pytest.mark.parametrize(("api", "op", "table"), GUARDED, ids=lambda item: getattr(item, "__name__", ""))
def test_implementations_run_inside_the_device_guard(api, op, table, monkeypatch):
    """What can be seen without a second GPU: the guard is of an argument, and still on where kernels are launched."""
    inside, seen = [], []

    @contextmanager
    def guard(tensor):
        inside.append(tensor.device)
        yield
        inside.pop()

    select = table.select

    def spy(impl, device, *tensors):
        name, run = select(impl, device, *tensors)

        def spied(*arguments, **options):
            seen.append(list(inside))
            return run(*arguments, **options)

        return name, spied

    monkeypatch.setattr(api, "on_device_of", guard)
    monkeypatch.setattr(table, "select", spy)
    op("cpu")
    assert seen == [[torch.device("cpu")]] and not inside
