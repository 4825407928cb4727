"""Derivatives of every op in float64: against finite differences, of one output alone, a second time, transformed."""

import pytest
import torch

from prism_kernels import (
    PolicyObjective,
    RoutingStats,
    TreeLayout,
    group_normalize,
    linear_cross_entropy,
    linear_logprob,
    linear_objective,
    linear_policy_loss,
    load_balancing_loss,
    moe_mlp,
    moe_route,
    qk_norm_rotate,
    rms_norm,
    swiglu,
    tree_attention,
)
from prism_kernels.moe import plan_routing
from tests.kernels.linear_logprob.linear_cases import skip_interpreted

pytestmark = skip_interpreted
LAYOUT = TreeLayout.build([3, 2, 1], [-1, 0, 0])
INDEX, KIND, ROWS = torch.tensor([[0, 1], [1, 2], [2, 0]]), torch.tensor([0, 1, 0]), torch.tensor([5, 0, 4, 4])
TARGETS, STARTS, OLD = torch.tensor([0, -100, 2]), torch.tensor([0, 2, 3]), torch.full((3,), -2.0).double()
ANGLE = torch.linspace(0, 1, 4).double().repeat(3, 2)
ROTATION = (ANGLE.cos(), ANGLE.sin())
WIDE = PolicyObjective.grpo(clip_low=0.9, clip_high=9.0)
ADVANTAGES = torch.tensor([1.0, -1.0]).double()


def differentiable(routing):
    return routing.weight, routing.stats.prob_sum


def slope(logprob, entropy, rows):
    return logprob.sum(), torch.ones_like(logprob), None


HEAD = ((3, 4), (5, 4), (5,))
ATTENTION = ((6, 2, 2), (6, 1, 2), (6, 1, 2))
CASES = {  # sizes of the leaves, and a function of them and of impl
    "rms_norm": (((3, 4), (4,)), lambda x, w, i: rms_norm(x, w, 1e-6, impl=i)),
    "rms_norm, residual": (((3, 4), (4,), (3, 4)), lambda x, w, r, i: rms_norm(x, w, 1e-6, residual=r, impl=i)),
    "swiglu": (((3, 4),), lambda x, i: swiglu(x, impl=i)),
    "swiglu, up": (((3, 4), (3, 4)), lambda x, up, i: swiglu(x, up=up, impl=i)),
    "qk_norm_rotate": (
        ((3, 2, 8), (3, 1, 8), (8,), (8,)), lambda q, k, a, b, i: qk_norm_rotate(q, k, a, b, *ROTATION, 1e-6, impl=i)
    ),
    "tree_attention": (ATTENTION, lambda q, k, v, i: tree_attention(q, k, v, LAYOUT, impl=i)),
    "tree_attention, rows": (
        ((4, 2, 2), *ATTENTION[1:]), lambda q, k, v, i: tree_attention(q, k, v, LAYOUT, query_row=ROWS, impl=i)
    ),
    "moe_route": (((3, 4), (3, 4)), lambda x, w, i: differentiable(moe_route(x, w, 2, impl=i))),
    "moe_route, kinds": (
        ((3, 4), (3, 4)),
        lambda x, w, i: differentiable(
            moe_route(x, w, 2, renormalize=False, segment_kind=KIND, num_kinds=2, expert_index=INDEX, impl=i)
        ),
    ),
    "moe_mlp": (
        ((3, 4), (3, 6, 4), (3, 4, 3), (3, 2)),
        lambda x, a, b, w, i: moe_mlp(x, a, b, plan_routing(INDEX, w, 3, impl=i), impl=i),
    ),
    "load_balancing_loss": (
        ((2, 4), (1, 4)),
        lambda p, q, i: load_balancing_loss([RoutingStats(torch.ones_like(x).detach(), x) for x in (p, q)], 2),
    ),
    "linear_logprob": (
        HEAD, lambda h, w, b, i: tuple(linear_logprob(h, w, TARGETS, bias=b, with_entropy=True, softcap=3.0, impl=i))
    ),
    "linear_cross_entropy": (HEAD, lambda h, w, b, i: linear_cross_entropy(h, w, TARGETS, bias=b, impl=i)),
    "linear_policy_loss": (
        HEAD,
        lambda h, w, b, i: linear_policy_loss(
            h, w, TARGETS, ADVANTAGES, STARTS, WIDE, bias=b, old_logprob=OLD, impl=i
        ).loss,
    ),
    "linear_objective": (HEAD, lambda h, w, b, i: linear_objective(h, w, TARGETS, slope, bias=b, impl=i)),
}  # fmt: skip
TWICE = ("load_balancing_loss",)  # plain torch


def case(name, impl="auto"):
    sizes, op = CASES[name]
    random = torch.Generator().manual_seed(3)
    leaves = [torch.randn(size, dtype=torch.float64, generator=random).requires_grad_() for size in sizes]
    return leaves, lambda *x: op(*x, impl)


def outputs(result):
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("name", CASES)
def test_gradcheck_of_all_outputs_and_of_each_alone(name):
    leaves, op = case(name)
    assert torch.autograd.gradcheck(op, leaves)
    for i in range(len(outputs(op(*leaves)))):
        assert torch.autograd.gradcheck(lambda *x, i=i: outputs(op(*x))[i], leaves)


@pytest.mark.parametrize("name", [name for name in CASES if name not in TWICE])
def test_a_second_derivative_is_refused_in_one_line(name):
    leaves, op = case(name)
    first = outputs(op(*leaves))
    with pytest.raises(RuntimeError, match=r"no second derivative \(create_graph=True\); use impl='reference'[^\n]*$"):
        torch.autograd.grad(first[0].sum(), leaves[0], create_graph=True)
    leaves, op = case(name, "reference")
    first = outputs(op(*leaves))
    gradient = torch.autograd.grad(sum(x.square().sum() for x in first), leaves[0], create_graph=True)[0]
    assert torch.autograd.grad(gradient.square().sum(), leaves[0])[0].isfinite().all()


@pytest.mark.parametrize("name", [name for name in CASES if name not in TWICE])
def test_a_transform_of_something_else_leaves_an_op_alone(name):
    leaves, op = case(name)
    constants = [x.detach() for x in leaves]

    def total(scale):
        return scale * scale * sum(x.sum() for x in outputs(op(*constants))) / 2

    two = torch.tensor(2.0).double()
    expected = total(torch.tensor(2.0).double().sqrt())
    torch.testing.assert_close(torch.func.grad(total)(two) / 2, expected)
    torch.testing.assert_close(torch.func.vmap(total)(two.sqrt()[None])[0], expected)
    torch.testing.assert_close(torch.func.jvp(total, (two,), (two / 4,))[1], expected)
    torch.testing.assert_close(torch.func.grad(torch.func.grad(total))(two), expected)


@pytest.mark.parametrize("name", ["tree_attention", "tree_attention, rows"])
def test_torch_func_names_the_way_out_of_a_second_derivative(name):
    leaves, op = case(name)
    first = torch.func.grad(lambda q: op(q, *leaves[1:]).square().sum())
    with pytest.raises(NotImplementedError, match=r"no second derivative .*; use impl='reference'"):
        torch.func.grad(lambda q: first(q).sum())(leaves[0].detach())


def test_a_batch_of_gradients():
    for name in ("moe_route", "rms_norm", "swiglu", "swiglu, up", "linear_cross_entropy"):
        leaves, op = case(name)
        out = outputs(op(*leaves))[0]
        batch = torch.stack([torch.ones_like(out), 2 * torch.ones_like(out)])
        one, two = torch.autograd.grad(out, leaves[0], batch, is_grads_batched=True)[0]
        torch.testing.assert_close(two, 2 * one)
    leaves, op = case("moe_mlp")
    out = op(*leaves)
    with pytest.raises(NotImplementedError, match="moe_mlp: no batch of gradients"):
        torch.autograd.grad(out, leaves[0], torch.stack([out, out]), is_grads_batched=True)


def test_a_transform_of_scores_is_named():
    ids = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(NotImplementedError, match=r"group_normalize: implementation 'cpu' has no torch.func.grad"):
        torch.func.grad(lambda s: group_normalize(s, ids).sum())(torch.ones(3))
