"""Ops under torch.compile(fullgraph=True) on a CPU: forward and backward as without it. And what operators promise."""

from functools import partial

import pytest
import torch

from prism_kernels import (
    PolicyObjective,
    QueryRows,
    linear_cross_entropy,
    linear_logprob,
    linear_policy_loss,
    load_balancing_loss,
    moe_mlp,
    moe_route,
    qk_norm_rotate,
    rms_norm,
    segment_attention,
    swiglu,
    tree_attention,
)
from prism_kernels.moe import plan_routing
from prism_kernels.operators import Operator
from prism_kernels.tree_attention.layout import TreeLayout

LAYOUT = TreeLayout.build([3, 4, 5], [-1, 0, 0])
ROWS = torch.tensor([11, 0, 4, 4])
INDEX = torch.tensor([[0, 1], [1, 2], [3, 0], [2, 1], [1, 0]])
KIND = torch.tensor([0, 1, 0, 1, 1])
TARGETS, STARTS = torch.tensor([0, -100, 2, 3, 7]), torch.tensor([0, 2, 5])
EXPERTS = ((5, 8), (4, 6, 8), (4, 8, 3), (5, 2))


def routed(x, router, gate_up, down):
    routing = moe_route(x, router, 2)
    return moe_mlp(x, gate_up, down, routing) + load_balancing_loss([routing.stats] * 2, 2)


def stats_of_kinds(x, router):
    routing = moe_route(x, router, 2, renormalize=False, segment_kind=KIND, num_kinds=2, expert_index=INDEX)
    return torch.cat([routing.weight.flatten(), (routing.stats.prob_sum * routing.stats.counts).flatten()])


def attention_at(rows, impl="auto"):
    return lambda q, k, v: tree_attention(q, k, v, LAYOUT, query_row=rows, impl=impl)


def experts(layout, impl="auto"):
    def run(x, gate_up, down, weight):
        if layout == "v4":
            gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
        return moe_mlp(x, gate_up, down, plan_routing(INDEX, weight, 4), layout=layout, impl=impl)

    return run


CASES = {  # sizes of the leaves, and what is compiled
    "rms_norm": (((5, 8), (8,)), lambda x, w: rms_norm(x, w, 1e-6)),
    "rms_norm, residual": (((5, 8), (8,), (5, 8)), lambda x, w, r: torch.cat(rms_norm(x, w, 1e-6, residual=r))),
    "swiglu": (((5, 8),), swiglu),
    "swiglu, up": (((5, 8), (5, 8)), lambda gate, up: swiglu(gate, up=up)),
    "qk_norm_rotate": (
        ((6, 4, 8), (6, 2, 8), (8,), (8,)),
        lambda q, k, qw, kw: torch.cat(qk_norm_rotate(q, k, qw, kw, torch.ones(6, 8), torch.zeros(6, 8), 1e-6), 1),
    ),
    "tree_attention": (((12, 4, 8), (12, 2, 8), (12, 2, 8)), lambda q, k, v: tree_attention(q, k, v, LAYOUT)),
    "tree_attention, query_row": (((4, 4, 8), (12, 2, 8), (12, 2, 8)), attention_at(ROWS)),
    "tree_attention, no query_row": (((0, 4, 8), (12, 2, 8), (12, 2, 8)), attention_at(ROWS[:0])),
    "tree_attention, varlen": (((12, 4, 8), (12, 2, 8), (12, 2, 8)), attention_at(None, "varlen")),
    "tree_attention, varlen, query_row": (((4, 4, 8), (12, 2, 8), (12, 2, 8)), attention_at(ROWS, "varlen")),
    "segment_attention": (((9, 4, 8), (9, 2, 8), (9, 2, 8)), lambda *qkv: segment_attention(*qkv, [4, 0, 5])),
    "segment_attention, varlen": (
        ((9, 4, 8), (9, 2, 8), (9, 2, 8)),
        lambda *qkv: segment_attention(*qkv, [4, 0, 5], impl="varlen"),
    ),
    "moe_route and moe_mlp": (((5, 8), (4, 8), *EXPERTS[1:3]), routed),
    "moe_route and moe_mlp, no tokens": (((0, 8), (4, 8), *EXPERTS[1:3]), routed),
    "moe_route, kinds": (((5, 8), (4, 8)), stats_of_kinds),
    "plan_routing and moe_mlp": (EXPERTS, experts("v5")),
    "plan_routing and moe_mlp, v4": (EXPERTS, experts("v4")),
    "moe_mlp, reference": (EXPERTS, experts("v5", "reference")),
    "linear_logprob": (((5, 4), (9, 4)), lambda h, w: linear_logprob(h, w, TARGETS).logprob),
    "linear_logprob, all of it": (
        ((5, 4), (9, 4)),
        lambda h, w: torch.stack(
            [
                rows.to(h.dtype)
                for rows in linear_logprob(
                    h,
                    w,
                    TARGETS,
                    with_entropy=True,
                    logit_scale=0.5,
                    also=("is_top1", "mean_logits", "log_sum_sq_probs"),
                )
            ]
        ),
    ),
    "linear_logprob, some words": (
        ((5, 4), (9, 4)),
        lambda h, w: torch.cat(linear_logprob(h, w, TARGETS, forbidden=[1, 4], vocab_size=8, with_entropy=True)),
    ),
    "linear_cross_entropy, some words": (
        ((5, 4), (9, 4)),
        lambda h, w: linear_cross_entropy(h, w, TARGETS, forbidden=torch.tensor([5]), vocab_size=9),
    ),
    "linear_cross_entropy": (((5, 4), (9, 4)), lambda h, w: linear_cross_entropy(h, w, TARGETS)),
    "linear_policy_loss": (
        ((5, 4), (9, 4)),
        lambda h, w: linear_policy_loss(h, w, TARGETS, torch.ones(2), STARTS, PolicyObjective.grpo()).loss,
    ),
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


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_experts_compile_in_every_mode(mode):
    tensors = [torch.randn(size) for size in CASES["moe_route and moe_mlp"][0]]
    with mode():
        torch.testing.assert_close(
            torch.compile(routed, fullgraph=True, backend="aot_eager")(*tensors), routed(*tensors)
        )


@pytest.mark.parametrize(
    "op,tensors,said",
    [
        (
            lambda i, w: plan_routing(i, w, 4).token_order,
            (INDEX + 2, torch.ones(5, 2)),
            "expert_index: expected values",
        ),
        (
            attention_at(ROWS + 1),
            (torch.ones(4, 2, 8), torch.ones(12, 2, 8), torch.ones(12, 2, 8)),
            "query_row: expected",
        ),
    ],
)
def test_compiled_code_checks_values_when_it_runs(op, tensors, said):
    with pytest.raises(ValueError, match=said):
        torch.compile(op, fullgraph=True, backend="aot_eager")(*tensors)


def test_one_graph_for_all_layouts_and_rows():
    """No guard on what they hold: a pack is compiled for once."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    @partial(torch.compile, fullgraph=True, backend=backend)
    def run(q, k, v, layout, flat, rows):
        out = tree_attention(q, k, v, layout, query_row=rows, impl="varlen")
        return out + segment_attention(k, k, v, flat, impl="varlen").mean()

    q, k, v = torch.randn(3, 4, 8), *torch.randn(2, 12, 2, 8)
    for lengths, chosen in (([3, 4, 5], [2, 4, 11]), ([6, 1, 5], [0, 6, 7]), ([1, 10, 1], [5, 5, 5])):
        layout, flat = (TreeLayout.build(lengths, prefix) for prefix in ([-1, 0, 0], [-1] * 3))
        rows = QueryRows.build(torch.tensor(chosen))
        want = tree_attention(q, k, v, layout, query_row=rows, impl="varlen")
        want = want + segment_attention(k, k, v, flat, impl="varlen").mean()
        assert torch.equal(run(q, k, v, layout, flat, rows), want)
    assert len(graphs) == 1


def test_nan_of_another_tree_stays_there():
    layout = TreeLayout.build([2, 2, 3], [-1, 0, -1])
    q, k, v = (torch.randn(n, 2, 8) for n in (2, 7, 7))
    k[4:], v[4:], rows = float("nan"), float("inf"), torch.tensor([3, 6])
    run = torch.compile(lambda *qkv: tree_attention(*qkv, layout, query_row=rows), fullgraph=True, backend="aot_eager")
    assert torch.equal(run(q, k, v).isnan().flatten(1).any(1), torch.tensor([False, True]))


def calls_of_operators(monkeypatch):
    """{operator: arguments of its first call} in a forward and backward of every case."""
    calls = {}

    def leaf(x, backward):
        if not torch.is_tensor(x):
            return x
        return x.detach().clone().requires_grad_(x.requires_grad or (backward and x.is_floating_point()))

    def recorded(self, *arguments):
        flat = [x for a in arguments for x in (a if isinstance(a, tuple) else (a,))]
        if self.overload not in calls:
            calls[self.overload] = [leaf(x, "backward" in self.name) for x in flat]
        return self.overload(*flat)

    monkeypatch.setattr(Operator, "__call__", recorded)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # which chooses the operators
    for sizes, op in CASES.values():
        leaves = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes]
        op(*leaves).sum().backward()
        with torch.no_grad():
            op(*leaves)
    monkeypatch.undo()
    return calls


def test_every_operator_keeps_its_promises(monkeypatch):
    """Schema, fake, autograd, dynamic shapes; also of the backward operators, with tensors that require grad."""
    calls = calls_of_operators(monkeypatch)
    assert {overload.name().split("::")[1] for overload in calls} >= {
        "plan_routing", "moe_route", "moe_route_backward", "moe_mlp", "moe_mlp_gate_up", "moe_mlp_down",
        "moe_mlp_backward", "tree_attention_rows", "tree_attention_rows_backward", "segments_attention",
        "segments_attention_backward",
        "linear_logprob", "linear_logprob_backward", "linear_cross_entropy",
        "linear_policy_loss",
    }  # fmt: skip
    for overload, arguments in calls.items():
        torch.library.opcheck(overload, tuple(arguments))
