"""moe_route, moe_mlp, load_balancing_loss: truth in float64, plans, ties, NaN, recompute, repeatability, bad input.

Runs the Triton kernels where there is a GPU; elsewhere test_triton.py runs this file in Triton's interpreter.
"""

import weakref
from collections import Counter
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from prism_kernels import Routing, RoutingStats, load_balancing_loss, moe_mlp, moe_route
from prism_kernels.moe import cpu, moe_route_through, plan_routing
from tests.kernels.linear_logprob.linear_cases import INTERPRETED, skip_interpreted
from tests.oracle import assert_as_exact, assert_same

IMPLS = (
    [("triton", "cpu")]
    if INTERPRETED
    else [("reference", "cpu"), ("cpu", "cpu"), pytest.param("triton", "cuda", marks=pytest.mark.gpu)]
)
HALF = torch.float16 if INTERPRETED else torch.bfloat16  # the interpreter's products of bf16 are wrong
EXAMPLES = 4 if INTERPRETED else 10 if torch.cuda.is_available() else 25  # a GPU compiles kernels for most of them
both = pytest.mark.parametrize(("impl", "device"), IMPLS)


@pytest.fixture(autouse=True)
def our_gemm(monkeypatch):
    """The interpreter tests our grouped GEMMs; elsewhere the choice is free."""
    if INTERPRETED:
        monkeypatch.setenv("PRISM_GROUPED_MM", "triton")


def normal(*shape, device="cpu", dtype=torch.float64, seed=0):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=random, dtype=torch.float64).to(device, dtype)


def route_truth(x, router, index, kind, num_kinds, renormalize):
    """(probability (T, E), weight (T, k), prob_sum (kinds, E)) in float64, token by token."""
    probability = torch.stack([row.exp() / row.exp().sum() for row in x @ router.T]) if len(x) else x @ router.T
    weight = torch.stack([p[i] for p, i in zip(probability, index)]) if len(x) else probability[:, : index.shape[1]]
    if renormalize:
        weight = weight / weight.sum(1, keepdim=True)
    prob_sum = [
        sum((p for p, c in zip(probability, kind) if c == i), x.new_zeros(len(router))) for i in range(num_kinds)
    ]
    return probability, weight, torch.stack([row.double() for row in prob_sum])


def mlp_truth(x, gate_up, down, index, weight):
    """Slot by slot, (E, 2I, H) and (E, H, I)."""
    rows = []
    for t, token in enumerate(x):
        total = torch.zeros_like(token)
        for j, e in enumerate(index[t].tolist()):
            gate, up = (gate_up[e] @ token).chunk(2)
            total = total + weight[t, j] * (down[e] @ (gate / (1 + (-gate).exp()) * up))
        rows.append(total)
    return torch.stack(rows)


@st.composite
def cases(draw):
    experts = draw(st.sampled_from([2, 3, 4, 8, 64]))
    top_k = draw(st.integers(1, min(8, experts)))
    kinds = draw(st.integers(0, 3))
    tokens = draw(st.sampled_from([0, 1, 5, 33, 70]))
    return tokens, experts, top_k, kinds, draw(st.booleans()), draw(st.integers(0, 1000))


@both
@given(cases())
@settings(max_examples=EXAMPLES, deadline=None)
def test_route_values_plan_and_gradients(impl, device, case):
    tokens, experts, top_k, kinds, renormalize, seed = case
    x = normal(tokens, 12, seed=seed).requires_grad_()
    router = normal(experts, 12, seed=seed + 1).requires_grad_()
    kind = torch.randint(0, max(kinds, 1), (tokens,), generator=torch.Generator().manual_seed(seed))
    leaves = [t.detach().to(device).requires_grad_() for t in (x, router)]
    options = {"segment_kind": kind.to(device), "num_kinds": kinds} if kinds else {}
    got = moe_route(*leaves, top_k, renormalize=renormalize, impl=impl, **options)

    expected_index = (x @ router.T).topk(top_k).indices  # no ties here
    assert torch.equal(got.expert_index.cpu().long(), expected_index)
    _, weight, prob_sum = route_truth(x, router, expected_index, kind.tolist(), max(kinds, 1), renormalize)
    terms = 12 + experts + tokens
    assert_same(got.weight.cpu(), weight, terms, "weight")
    assert_same(got.stats.prob_sum.cpu(), prob_sum, terms, "prob_sum")
    assert_plan(got, experts)
    count = torch.zeros(max(kinds, 1), experts)
    for c, row in zip(kind.tolist(), expected_index.tolist()):
        count[c, row] += 1
    assert got.stats.counts.dtype == torch.float32 and torch.equal(got.stats.counts.cpu(), count)

    d_weight, d_prob_sum = normal(*weight.shape, seed=3), normal(*prob_sum.shape, seed=4)
    expected = torch.autograd.grad((weight * d_weight).sum() + (prob_sum * d_prob_sum).sum(), (x, router))
    loss = (got.weight * d_weight.to(device)).sum() + (got.stats.prob_sum * d_prob_sum.to(device)).sum()
    # The gradient of a softmax is a difference: it may leave nothing of what comes in times what stands in the product.
    scale = largest(d_weight, d_prob_sum) * largest(x, router)
    for name, ours, theirs in zip(("x", "router"), torch.autograd.grad(loss, leaves), expected):
        assert_same(ours.cpu(), theirs, terms + 2 * experts + tokens, name, scale)


def largest(*tensors):
    return max(float(t.detach().abs().max()) for t in tensors if t.numel())


def assert_plan(routing, experts):
    """token_order sorts the slots by expert and keeps their order within one."""
    flat = routing.expert_index.flatten().tolist()
    order = sorted(range(len(flat)), key=lambda slot: (flat[slot], slot))
    assert routing.token_order.tolist() == order
    assert routing.expert_offset.tolist() == [sum(e < i for e in flat) for i in range(experts + 1)]
    assert {routing.expert_index.dtype, routing.token_order.dtype, routing.expert_offset.dtype} == {torch.int32}


@both
@pytest.mark.parametrize(("experts", "top_k"), [(4, 2), (64, 8), (7, 7)])
def test_plan_of_foreign_routers(impl, device, experts, top_k):
    index = torch.stack([torch.randperm(experts)[:top_k] for _ in range(50)]).to(device)
    weight = torch.rand(50, top_k, device=device)
    routing = plan_routing(index, weight, experts, impl=impl)
    assert_plan(routing, experts)
    assert routing.weight is weight and routing.stats is None
    index[:] = experts - 1
    assert_plan(plan_routing(index, weight, experts, impl=impl), experts)


@both
def test_ties_go_to_the_lowest_index(impl, device):
    router = torch.eye(4, 8, device=device)
    router[2] = router[3] = router[0]
    x = torch.stack([router[0], router[1], torch.zeros(8, device=device)])
    assert moe_route(x, router, 2, impl=impl).expert_index.tolist() == [[0, 2], [1, 0], [0, 1]]


@both
def test_recompute_takes_the_saved_experts(impl, device):
    """A near tie that falls otherwise must not change the experts; the weights stay differentiable."""
    x, router = (normal(*shape, device=device, dtype=torch.float32) for shape in ((20, 8), (5, 8)))
    router.requires_grad_()
    first = moe_route(x, router, 2, impl=impl)
    again = moe_route(x, router, 2, expert_index=first.expert_index, impl=impl)
    for a, b in zip((*first[:4], *first.stats), (*again[:4], *again.stats)):
        assert torch.equal(a, b)
    other = (first.expert_index.long() + 1) % 5
    forced = moe_route(x, router, 2, expert_index=other, impl=impl)
    assert torch.equal(forced.expert_index.long(), other)
    expected = (x @ router.T).softmax(-1).gather(1, other)
    expected = expected / expected.sum(-1, keepdim=True)
    assert_same(forced.weight, expected, 8 + 5 + 2)
    d = torch.rand_like(expected)
    ours, theirs = (torch.autograd.grad((w * d).sum(), router)[0] for w in (forced.weight, expected))
    assert_same(ours, theirs, 2 * (8 + 5 + 2) + 20)


@both
def test_nan_stays_in_its_token(impl, device):
    x, router = (normal(*shape, device=device, dtype=torch.float32) for shape in ((40, 8), (5, 8)))
    gate_up, down = (normal(*shape, device=device, dtype=torch.float32) for shape in ((5, 12, 8), (5, 8, 6)))
    clean = moe_mlp(x, gate_up, down, moe_route(x, router, 2, impl=impl), impl=impl)
    x[7, 3] = float("nan")
    kind = (torch.arange(40, device=device) == 7).int()
    routing = moe_route(x, router, 2, segment_kind=kind, num_kinds=2, impl=impl)
    assert_plan(routing, 5)
    got = moe_mlp(x, gate_up, down, routing, impl=impl)
    assert got[7].isnan().all()
    others = torch.arange(40, device=device) != 7
    assert_same(got[others], clean[others], 8 + 5 + 8 + 6 + 2)
    assert routing.weight[others].isfinite().all() and routing.stats.prob_sum[0].isfinite().all()


def weights(experts, width, intermediate, layout, device, dtype):
    """(leaf as the checkpoint holds it, the same as (E, 2I, H)) for gate_up and down."""
    leaves = []
    for i, shape in enumerate(((experts, 2 * intermediate, width), (experts, width, intermediate))):
        weight = normal(*shape, device=device, dtype=dtype, seed=i) / shape[2] ** 0.5
        leaves.append((weight.transpose(1, 2).contiguous() if layout == "v4" else weight).requires_grad_())
    return leaves


def fixed_routing(index, weight, experts):
    """The Routing of given experts, planned by hand."""
    flat = index.flatten()
    offset = F.pad(torch.bincount(flat.cpu(), minlength=experts).cumsum(0), (1, 0)).int().to(index.device)
    return Routing(index.int(), weight, flat.argsort(stable=True).int(), offset, None)


# Both layouts and both loads; every pair of them where a case is not a second long.
ARRANGEMENTS = [("v5", "even"), ("v4", "one")] if INTERPRETED else list(product(("v5", "v4"), ("even", "one")))
arranged = pytest.mark.parametrize(("layout", "load"), ARRANGEMENTS)
LOADS = {
    "even": lambda t, k, e: torch.stack([torch.randperm(e)[:k] for _ in range(t)]),
    "one": lambda t, k, e: torch.arange(k).expand(t, k) + (e - k),  # k experts take all, the others are empty
}


@both
@arranged
@pytest.mark.parametrize(("experts", "top_k", "tokens"), [(2, 1, 33), (4, 2, 40), (5, 3, 1), (64, 8, 9)])
def test_mlp_values_and_gradients(impl, device, layout, experts, top_k, tokens, load):
    if INTERPRETED and experts == 64 and (layout, load) != ("v5", "even"):
        pytest.skip("takes the interpreter long")
    index = LOADS[load](tokens, top_k, experts).to(device)
    x = normal(tokens, 10, device=device, seed=5).requires_grad_()
    weight = normal(tokens, top_k, device=device, seed=6).requires_grad_()
    gate_up, down = weights(experts, 10, 6, layout, device, torch.float64)
    leaves = (x, gate_up, down, weight)
    d_out = normal(tokens, 10, device=device, seed=7)
    plain = [w.transpose(1, 2) if layout == "v4" else w for w in (gate_up, down)]
    expected = mlp_truth(x, *plain, index, weight)
    got = moe_mlp(x, gate_up, down, fixed_routing(index, weight, experts), layout=layout, impl=impl)
    terms = 10 + 6 + top_k
    assert_same(got, expected, terms)
    for ours, theirs in zip(torch.autograd.grad(got, leaves, d_out), torch.autograd.grad(expected, leaves, d_out)):
        assert_same(ours, theirs, 2 * terms + tokens)


@both
def test_half_precision_errs_no_more_than_eager(impl, device):
    """Tolerance law: the same experts, the error against float64 at most eager's plus a slack; router gradient too."""
    tokens, width, intermediate, experts = 70, 32, 24, 4
    index = LOADS["even"](tokens, 2, experts).to(device)
    x = normal(tokens, width, device=device, dtype=HALF, seed=5).requires_grad_()
    weight = torch.rand(tokens, 2, device=device).requires_grad_()
    gate_up, down = weights(experts, width, intermediate, "v5", device, HALF)
    leaves = (x, gate_up, down, weight)
    d_out = normal(tokens, width, device=device, dtype=HALF, seed=7)

    def eager(x, gate_up, down, weight):
        out = torch.zeros_like(x)
        for e in range(experts):
            token, slot = (index == e).nonzero(as_tuple=True)
            gate, up = F.linear(x[token], gate_up[e]).chunk(2, dim=-1)
            y = F.linear(F.silu(gate) * up, down[e]) * weight[token, slot, None].to(x.dtype)
            out = out.index_add(0, token, y)
        return out

    exact = [t.detach().double().requires_grad_() for t in leaves]
    truth = mlp_truth(*exact[:3], index, exact[3])
    theirs = eager(*leaves)
    ours = moe_mlp(*leaves[:3], fixed_routing(index, weight, experts), impl=impl)
    assert ours.dtype == HALF
    columns = zip(
        ("output", "x", "gate_up", "down", "weight"),
        [ours, *torch.autograd.grad(ours, leaves, d_out)],
        [truth, *torch.autograd.grad(truth, exact, d_out.double())],
        [theirs, *torch.autograd.grad(theirs, leaves, d_out)],
    )
    for what, mine, true, other in columns:
        assert_as_exact(mine, true, other, 2 * (width + intermediate) + tokens, what)


@both
@pytest.mark.parametrize("through", [False, True])
def test_routed_layer_end_to_end(impl, device, through):
    """Router and experts together, fp32: gradients reach the router through the weights."""
    x = normal(45, 16, device=device, dtype=torch.float32, seed=5).requires_grad_()
    router = normal(4, 16, device=device, dtype=torch.float32, seed=6).requires_grad_()
    gate_up, down = weights(4, 16, 12, "v5", device, torch.float32)
    leaves = (x, router, gate_up, down)
    routing, hidden = moe_route_through(x, router, 2, impl=impl) if through else (moe_route(x, router, 2, impl=impl), x)
    assert torch.equal(hidden, x)
    out = moe_mlp(hidden, gate_up, down, routing, impl=impl)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    index = (exact[0] @ exact[1].T).topk(2).indices
    d_out = normal(45, 16, device=device, dtype=torch.float32, seed=7)

    def plain(x, router, *experts):
        _, weight, _ = route_truth(x, router, index, [0] * 45, 1, True)
        result = mlp_truth(x, *experts, index, weight)
        return result, *torch.autograd.grad(result, (x, router, *experts), d_out.to(result.dtype))

    ours = (out, *torch.autograd.grad(out, leaves, d_out))
    for mine, true, eager in zip(ours, plain(*exact), plain(*leaves)):
        assert_as_exact(mine, true, eager, 2 * (16 + 4 + 16 + 12) + 45)


@both
def test_any_part_of_a_routers_gradient_may_be_absent(impl, device):
    x = normal(45, 16, device=device, dtype=torch.float32, seed=5).requires_grad_()
    router = normal(4, 16, device=device, dtype=torch.float32, seed=6).requires_grad_()
    routing, hidden = moe_route_through(x, router, 2, impl=impl)
    parts = routing.weight[:, 0].sum(), routing.stats.prob_sum.square().sum(), (hidden * 3).sum()
    whole = torch.autograd.grad(sum(parts), (x, router), retain_graph=True)
    alone = [torch.autograd.grad(part, (x, router), retain_graph=True, allow_unused=True) for part in parts]
    assert torch.equal(alone[2][0], torch.full_like(x, 3))
    for i in range(2):
        each = [found[i] for found in alone if found[i] is not None]
        assert_same(sum(each), whole[i], 45 + 16, scale=max(float(part.abs().max()) for part in each))
    x.requires_grad_(False)
    routing, hidden = moe_route_through(x, router, 2, impl=impl)
    assert torch.equal(torch.autograd.grad(routing.weight[:, 0].sum(), router)[0], alone[0][1])


@both
def test_no_tokens(impl, device):
    x = torch.empty(0, 8, device=device, requires_grad=True)
    router = torch.ones(4, 8, device=device, requires_grad=True)
    gate_up, down = weights(4, 8, 6, "v5", device, torch.float32)
    routing = moe_route(x, router, 2, impl=impl)
    out = moe_mlp(x, gate_up, down, routing, impl=impl)
    assert out.shape == (0, 8) and routing.expert_index.shape == (0, 2) and not routing.expert_offset.any()
    loss = out.sum() + load_balancing_loss([routing.stats], 2)
    assert loss == 0
    for gradient in torch.autograd.grad(loss, (x, router, gate_up, down), allow_unused=True):
        assert gradient is None or not gradient.any()


@both
def test_strided_input_and_expanded_gradient(impl, device):
    x = normal(16, 30, device=device, dtype=torch.float32).T[::2].requires_grad_()  # (15, 16), strides (2, 30)
    router = normal(16, 6, device=device, dtype=torch.float32).T[::2]
    gate_up, down = weights(3, 16, 4, "v4", device, torch.float32)
    args = (gate_up, down)
    outs = []
    for copy in (x, x.detach().contiguous().requires_grad_()):
        out = moe_mlp(copy, *args, moe_route(copy, router, 2, impl=impl), layout="v4", impl=impl)
        outs.append((out, *torch.autograd.grad(out.sum(), (copy, *args))))
    for a, b in zip(*outs):
        assert_same(a, b, 2 * (16 + 3 + 16 + 4) + 15)


@both
def test_the_same_input_gives_the_same_bits(impl, device):
    x = normal(40, 16, device=device, dtype=torch.float32, seed=5).requires_grad_()
    router = normal(4, 16, device=device, dtype=torch.float32, seed=6).requires_grad_()
    gate_up, down = weights(4, 16, 12, "v5", device, torch.float32)
    kind = torch.arange(40, device=device) % 3
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        runs = []
        for _ in range(2):
            routing = moe_route(x, router, 2, segment_kind=kind, num_kinds=3, impl=impl)
            out = moe_mlp(x, gate_up, down, routing, impl=impl)
            loss = out.square().sum() + load_balancing_loss([routing.stats], 2)
            runs.append([out, loss, *torch.autograd.grad(loss, (x, router, gate_up, down))])
    finally:
        torch.use_deterministic_algorithms(before)
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@both
def test_frozen_experts_cost_and_get_nothing(impl, device):
    x = normal(20, 8, device=device, dtype=torch.float32).requires_grad_()
    gate_up, down = (w.detach() for w in weights(3, 8, 4, "v5", device, torch.float32))
    router = normal(3, 8, device=device, dtype=torch.float32)
    moe_mlp(x, gate_up, down, moe_route(x, router, 2, impl=impl), impl=impl).sum().backward()
    assert x.grad.any() and gate_up.grad is None and down.grad is None


@pytest.mark.parametrize(("impl", "device"), [row for row in IMPLS if row[0] != "reference"])
def test_little_is_saved_for_backward(impl, device):
    """Inputs, the (S, 2I) product, and a few numbers per slot: neither activations nor down products."""
    tokens, width, intermediate, experts, k = 60, 32, 48, 4, 2
    x = normal(tokens, width, device=device, dtype=torch.float32).requires_grad_()
    gate_up, down = weights(experts, width, intermediate, "v5", device, torch.float32)
    routing = moe_route(x.detach(), normal(experts, width, device=device, dtype=torch.float32), k, impl=impl)
    kept = {}

    def keep(tensor):
        kept[tensor.data_ptr()] = tensor.numel() * tensor.itemsize
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        moe_mlp(x, gate_up, down, routing, impl=impl)
    inputs = sum(t.numel() * t.itemsize for t in (x, gate_up, down))
    assert sum(kept.values()) <= inputs + tokens * k * (2 * intermediate * 4 + 8 * 4) + (experts + 1) * 4


def recomputed_layer(device, impl):
    """(the leaves, a layer of them, the same under activation checkpointing, multiply-adds of one product of I)."""
    tokens, width, intermediate, experts, k = 24, 16, 8, 3, 2
    x = normal(tokens, width, device=device, dtype=torch.float32).requires_grad_()
    gate_up, down = weights(experts, width, intermediate, "v5", device, torch.float32)
    routing = moe_route(x.detach(), normal(experts, width, device=device, dtype=torch.float32), k, impl=impl)

    def layer(x, gate_up, down):
        return x + moe_mlp(x, gate_up, down, routing, impl=impl)

    def recomputed(*leaves):
        return checkpoint(layer, *leaves, use_reentrant=False, preserve_rng_state=False)

    return (x, gate_up, down), layer, recomputed, tokens * k * width * intermediate


@pytest.mark.parametrize(("impl", "device"), [row for row in IMPLS if row[0] != "reference"])
def test_a_recompute_does_not_repeat_the_down_product(impl, device, monkeypatch):
    """Of the forward's three units of work gate and up alone; gradients are the same to the bit."""
    monkeypatch.setenv("PRISM_GROUPED_MM", "loop")  # products that are counted
    leaves, layer, recomputed, unit = recomputed_layer(device, impl)
    found, counts = [], []
    for run in (layer, recomputed):
        with FlopCounterMode(display=False) as count:
            found.append(torch.autograd.grad(run(*leaves).square().sum(), leaves))
        counts.append(count.get_total_flops() / (2 * unit))
    assert counts[1] - counts[0] == 2
    assert all(torch.equal(a, b) for a, b in zip(*found))


@skip_interpreted
def test_a_compiled_recompute_does_not_repeat_the_down_product(monkeypatch):
    calls = Counter()
    for name in ("gate_up_forward", "down_forward", "experts_backward"):
        real = getattr(cpu, name)
        monkeypatch.setattr(cpu, name, lambda *args, _name=name, _real=real: calls.update([_name]) or _real(*args))
    leaves, layer, recomputed, _ = recomputed_layer("cpu", "cpu")
    compiled = torch.compile(recomputed, fullgraph=True, backend="aot_eager_decomp_partition")
    ours = torch.autograd.grad(compiled(*leaves).square().sum(), leaves)
    assert calls == {"gate_up_forward": 2, "down_forward": 1, "experts_backward": 1}
    assert all(torch.equal(a, b) for a, b in zip(ours, torch.autograd.grad(layer(*leaves).square().sum(), leaves)))


@both
def test_autocast(impl, device):
    """The router stays fp32, in the backward too; experts multiply in autocast's dtype; results keep theirs."""
    x = normal(30, 16, device=device, dtype=torch.float32, seed=5).requires_grad_()
    router = normal(4, 16, device=device, dtype=torch.float32, seed=6).requires_grad_()
    gate_up, down = weights(4, 16, 12, "v5", device, torch.float32)
    leaves = (x, router, gate_up, down)
    found = []
    for how in ("exact", "autocast", "by hand"):
        copies = [leaf.to(HALF) if i != 1 and how == "by hand" else leaf for i, leaf in enumerate(leaves)]
        with torch.autocast(device, dtype=HALF, enabled=how == "autocast"):
            routing = moe_route(x, router, 2, impl=impl)
            out = moe_mlp(copies[0], *copies[2:], routing, impl=impl)
            if impl != "reference":  # plain autograd, whose backward belongs outside (torch.amp)
                gradient = torch.autograd.grad(out.float().square().sum(), leaves, retain_graph=True)
                router_gradient = torch.autograd.grad(routing.weight[:, 0].sum(), (x, router), retain_graph=True)
        if impl == "reference":
            gradient = torch.autograd.grad(out.float().square().sum(), leaves, retain_graph=True)
            router_gradient = torch.autograd.grad(routing.weight[:, 0].sum(), (x, router))
        found.append([out, *gradient, *routing.weight[None], *router_gradient])
    exact, auto, by_hand = found
    assert [t.dtype for t in auto] == [torch.float32] * len(auto)
    for a, b, c in zip(auto[:5], exact, by_hand):
        assert_as_exact(a, b, c, 2 * (16 + 4 + 16 + 12) + 30)
    assert all(torch.equal(a, b) for a, b in zip(auto[5:], exact[5:]))


@pytest.mark.parametrize(("impl", "device"), [row for row in IMPLS if row[0] != "reference"])
def test_nothing_is_kept_without_gradients(impl, device, monkeypatch):
    """Under no_grad the products of one expert are gone before those of the next are made."""
    from importlib import import_module

    module = import_module("prism_kernels.moe.cpu" if impl == "cpu" else "prism_kernels.moe.triton_mlp")
    alive, made, swiglu = [], [], module._swiglu

    def spy(product):
        alive.append(sum(reference() is not None for reference in made))
        made.append(weakref.ref(product))
        return swiglu(product)

    monkeypatch.setattr(module, "_swiglu", spy)
    x = normal(40, 8, device=device, dtype=torch.float32)
    gate_up, down = weights(4, 8, 6, "v5", device, torch.float32)
    routing = moe_route(x, normal(4, 8, device=device, dtype=torch.float32), 2, impl=impl)
    with torch.no_grad():
        moe_mlp(x, gate_up, down, routing, impl=impl)
    assert made and not any(alive) and not any(reference() is not None for reference in made)


@both
@pytest.mark.parametrize("kinds", [1, 3])
def test_load_balancing_loss(impl, device, kinds):
    """Layers are joined before the product of means (Switch Transformer, equations 4 to 6)."""
    layers, kind = [], torch.arange(30, device=device) % kinds
    leaves, probabilities, chosen = [], [], []
    for layer in range(3):
        x = normal(30, 8, device=device, seed=layer).requires_grad_()
        router = normal(4, 8, device=device, seed=9).requires_grad_()
        leaves += [x, router]
        layers.append(moe_route(x, router, 2, segment_kind=kind, num_kinds=kinds, impl=impl).stats)
        probability = (x @ router.T).softmax(-1)
        probabilities.append(probability)
        chosen.append(F.one_hot(probability.topk(2).indices, 4).sum(1))
    share = torch.cat(chosen).double().mean(0)
    expected = 4 * (share * torch.cat(probabilities).mean(0)).sum()
    got = load_balancing_loss(layers, 2)
    terms = 8 + 4 + 3 * 30
    assert_same(got, expected, terms)
    for a, b in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(expected, leaves)):
        assert_same(a, b, 2 * terms)
    even = RoutingStats(torch.full((1, 4), 10.0), torch.full((1, 4), 5.0))
    assert_same(load_balancing_loss([even], 2), torch.tensor(2.0), 4)


X, R = torch.zeros(6, 8), torch.zeros(4, 8)
GU, D = torch.zeros(4, 20, 8), torch.zeros(4, 8, 10)


def routed(**changes):
    return moe_route(X, R, 2)._replace(**changes)


@skip_interpreted
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: moe_route(X[0], R, 2), r"hidden: expected floating \(T, H\), got \(8,\)"),
        (lambda: moe_route(X.long(), R, 2), "hidden: .*int64"),
        (lambda: moe_route(X, R[:, :7], 2), r"router_weight: expected floating \(E, H = 8\), got \(4, 7\)"),
        (lambda: moe_route(X, R.to("meta"), 2), "router_weight: .* on meta"),
        (lambda: moe_route(X, R, 5), r"top_k: expected an integer in \[1, 4\], got 5"),
        (lambda: moe_route(X, R, 0), "top_k: "),
        (lambda: moe_route(X, R, 2, num_kinds=3), "num_kinds: .* segment_kind None"),
        (lambda: moe_route(X, R, 2, num_kinds=-1), "num_kinds: "),
        (lambda: moe_route(X, R, 2, segment_kind=X[:, 0], num_kinds=3), "segment_kind: expected integer"),
        (
            lambda: moe_route(X, R, 2, segment_kind=torch.arange(5), num_kinds=9),
            r"segment_kind: .*T = 6,\), got \(5,\)",
        ),
        (
            lambda: moe_route(X, R, 2, segment_kind=torch.arange(6), num_kinds=3),
            r"segment_kind: .*\[0, num_kinds = 3\)",
        ),
        (lambda: moe_route(X, R, 2, expert_index=torch.zeros(6, 3).int()), r"expert_index: .*T = 6, top_k = 2\)"),
        (lambda: moe_route(X, R, 2, expert_index=torch.full((6, 2), 4)), r"expert_index: .*\[0, E = 4\), got 4 to 4"),
        (lambda: plan_routing(torch.zeros(3, 2).int(), torch.zeros(3, 1), 4), r"expert_index: .*\(T = 3, k = 1\)"),
        (lambda: plan_routing(torch.zeros(3, 2).int(), torch.zeros(3, 2), 0), "num_experts: "),
        (lambda: moe_mlp(X, GU, D, routed(), layout="v6"), "layout: .*'v6'"),
        (lambda: moe_mlp(X, GU[0], D, routed()), r"gate_up: expected float32 \(E, 2I, H\), got \(20, 8\)"),
        (lambda: moe_mlp(X, GU.double(), D, routed()), r"gate_up: expected float32 .*float64"),
        (lambda: moe_mlp(X, GU, D.half(), routed()), r"down: expected float32 .*float16"),
        (lambda: moe_mlp(X, GU, D, routed(), layout="v4"), r"gate_up, down: expected .*other layout"),
        (lambda: moe_mlp(X, GU, D[:, :, :9], routed()), r"gate_up, down: .*\(4, 8, 9\)"),
        (lambda: moe_mlp(X, GU[:3], D[:3], routed()), r"routing.expert_offset: expected integer \(E \+ 1 = 4,\)"),
        (lambda: moe_mlp(X[:5], GU, D, routed()), r"routing.expert_index: expected integer \(T = 5, k\)"),
        (
            lambda: moe_mlp(X, GU, D, routed(token_order=torch.arange(3).int())),
            r"routing.token_order: .*\(T\*k = 12,\)",
        ),
        (lambda: moe_mlp(X, GU, D, (1, 2)), "routing: expected the Routing of moe_route, got tuple"),
        (lambda: moe_route([[1.0]], R, 1), r"hidden: expected floating \(T, H\), got no tensor but list"),
        (lambda: moe_route(X, None, 1), "router_weight: .*NoneType"),
        (lambda: moe_route(X, R, "2"), r"top_k: expected an integer in .*, got '2'"),
        (lambda: moe_route(X, R, 2.0), r"top_k: expected an integer in .*, got 2.0"),
        (
            lambda: moe_route(X, R, 2, segment_kind=[0] * 6, num_kinds=1),
            r"segment_kind: .*\(T = 6,\), got no tensor but list",
        ),
        (lambda: moe_route(X, R, 2, num_kinds=None), "num_kinds: expected an integer in .*, got None"),
        (lambda: moe_mlp(X, None, D, routed()), r"gate_up: expected float32 \(E, 2I, H\).*NoneType"),
        (lambda: moe_mlp(X, GU, [1], routed()), r"down: expected float32 \(E, H, I\).*list"),
        (lambda: moe_mlp(X, GU, D, routed(weight=torch.ones(6, 2).long())), "routing.weight: .*floating .*int64"),
        (lambda: moe_mlp(X, GU, D, routed(weight=torch.ones(6, 2, device="meta"))), "routing.weight: .*on meta"),
        (
            lambda: moe_mlp(X, GU, D, routed(token_order=torch.ones(12))),
            "routing.token_order: expected integer .*float32",
        ),
        (
            lambda: moe_mlp(X, GU, D, routed(token_order=torch.full((12,), 12).int())),
            r"routing.token_order: expected values in \[0, T\*k = 12\), got 12 to 12",
        ),
        (
            lambda: moe_mlp(X, GU, D, routed(token_order=torch.zeros(12).int())),
            r"routing.token_order: expected every one of T\*k = 12 slots once, got a slot twice",
        ),
        (
            lambda: moe_mlp(X, GU, D, routed(expert_offset=torch.tensor([0, 3, 2, 9, 12]).int())),
            r"routing.expert_offset: expected to rise from 0 to T\*k = 12, got \[0, 3, 2, 9, 12\]",
        ),
        (lambda: moe_mlp(X, GU, D, routed(expert_index=None)), "routing.expert_index: .*NoneType"),
        (lambda: load_balancing_loss(None, 2), "stats_of_all_layers: .*got NoneType"),
        (lambda: load_balancing_loss(routed().stats, 2), "stats_of_all_layers: .*got RoutingStats; is it a list"),
        (lambda: load_balancing_loss([routed()], 2), r"stats_of_all_layers\[0\]: .*got Routing$"),
        (lambda: load_balancing_loss([routed().stats], 1.5), "top_k: expected an integer in .*, got 1.5"),
        (lambda: load_balancing_loss([], 2), "stats_of_all_layers: .*got none"),
        (lambda: load_balancing_loss([routed().stats], 9), "top_k: "),
        (
            lambda: load_balancing_loss([routed().stats, RoutingStats(R, R)], 2),
            r"stats_of_all_layers\[1\]\.counts: .*E = 4",
        ),
    ],
)
def test_bad_input_names_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@skip_interpreted
def test_bad_input_names_the_argument_under_autocast():
    with torch.autocast("cpu"), pytest.raises(ValueError, match=r"gate_up: expected bfloat16 .*NoneType"):
        moe_mlp(X, None, D, routed())
