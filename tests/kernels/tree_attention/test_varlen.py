"""varlen equals the definition to 1e-12 in float64, visits every allowed pair once and no other, and rounds once."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_kernels import TreeLayout, tree_attention, which_impl
from prism_kernels.tree_attention import call_plan, calls, merge, varlen_library
from prism_kernels.tree_attention.call_plan import Sequences
from prism_kernels.tree_attention.varlen_library import TorchVarlen
from tests.oracle import assert_as_exact, relative_error

EXACT = 1e-12
HEADS = [(4, 2), (6, 1), (3, 3)]


@st.composite
def forests(draw, levels=4):
    """Trees up to depth 3 below their roots, in any order of segments, some of them empty."""
    lengths = draw(st.lists(st.integers(0, 9), min_size=1, max_size=10))
    prefix, depth = [], []
    for i in range(len(lengths)):
        prefix.append(draw(st.sampled_from([-1, *(j for j in range(i) if depth[j] + 1 < levels)])))
        depth.append(0 if prefix[-1] < 0 else depth[prefix[-1]] + 1)
    return TreeLayout.build(lengths, prefix)


def leaves(num_q, num_k, heads, dim, dtype=torch.float64):
    return [
        torch.randn(n, h, dim, dtype=dtype).requires_grad_()
        for n, h in zip((num_q, num_k, num_k), (heads[0], *heads[1:] * 2))
    ]


def assert_exact(tensors, layout, **options):
    """Outputs, and gradients to the size of the largest: a softmax over one token has none in q and k."""
    got, want = (tree_attention(*tensors, layout, impl=impl, **options) for impl in ("varlen", "reference"))
    assert got.shape == want.shape and got.dtype == want.dtype
    assert float((got - want).detach().norm()) <= EXACT * float(want.detach().norm())
    upstream = torch.randn_like(want)
    ours, theirs = (torch.autograd.grad(out, tensors, upstream) for out in (got, want))
    unit = max(float(x.norm()) for x in theirs)
    for name, a, b in zip("qkv", ours, theirs):
        assert float((a - b).norm()) <= EXACT * unit, name


class Visits(TorchVarlen):
    """Counts, per query and key, how often a call meets them; queries are known by what q holds."""

    def __init__(self, num_q, num_k):
        self.seen, self.calls, self.gathered = torch.zeros(num_q, num_k, dtype=torch.int64), 0, 0

    def forward(self, q, k, v, sequences, scale):
        cu_q, cu_k = sequences.cu_q.tolist(), sequences.cu_k.tolist()
        assert (cu_q[0], cu_k[0], cu_q[-1], cu_k[-1]) == (0, 0, len(q), len(k))
        assert sequences.cu_q.dtype == sequences.cu_k.dtype == torch.int32
        assert sequences.edges == list(zip(cu_q, cu_k))
        assert sequences.max_q == max(b - a for a, b in pairwise(cu_q))
        assert sequences.max_k == max(b - a for a, b in pairwise(cu_k))
        number = q[:, 0, 0].long().tolist()
        for start, stop, first, last in zip(cu_q, cu_q[1:], cu_k, cu_k[1:]):
            assert stop >= start and last >= first and (stop > start or last > first)  # none for nothing
            for i in range(start, stop):
                seen = max(first, last - (stop - 1 - i)) if sequences.causal else last
                self.seen[number[i], first:seen] += 1
        self.calls += 1
        self.gathered += len(q) != len(self.seen) or number != list(range(len(q)))
        return super().forward(q, k, v, sequences, scale)


def visits(layout, query_row=None):
    num_q = layout.num_tokens if query_row is None else len(query_row)
    library = Visits(num_q, layout.num_tokens)
    q = torch.arange(num_q).double()[:, None, None]
    k = torch.zeros(layout.num_tokens, 1, 1, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calls, "library_of", lambda name: library)
        tree_attention(q, k, k, layout, query_row=query_row, impl="varlen")
    return library


@pytest.mark.parametrize("heads", HEADS)
@given(layout=forests(), block=st.sampled_from([1, 40, varlen_library.BLOCK]))
@settings(max_examples=25, deadline=None)
def test_equals_the_definition(heads, layout, block):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(varlen_library, "BLOCK", block)
        assert_exact(leaves(layout.num_tokens, layout.num_tokens, heads, 8), layout)


@pytest.mark.parametrize("heads", HEADS)
@given(layout=forests(), data=st.data())
@settings(max_examples=25, deadline=None)
def test_chosen_rows_equal_the_definition(heads, layout, data):
    total = layout.num_tokens
    chosen = data.draw(st.lists(st.integers(0, total - 1), max_size=30)) if total else []
    rows = torch.tensor(chosen, dtype=torch.int64)
    assert_exact(leaves(len(rows), total, heads, 8), layout, query_row=rows, scale=-0.7)


@given(layout=forests(), data=st.data())
@settings(max_examples=60, deadline=None)
def test_every_allowed_pair_is_visited_once_and_no_other(layout, data):
    total, allowed = layout.num_tokens, layout.allowed().long()
    assert torch.equal(visits(layout).seen, allowed)
    rows = torch.tensor(
        data.draw(st.lists(st.integers(0, max(0, total - 1)), max_size=30 if total else 0)), dtype=torch.int64
    )
    assert torch.equal(visits(layout, rows).seen, allowed[rows])


TWO_TREES = [(50, 17, 40, 3, 31, 22, 9), (-1, 0, 0, 0, -1, 4, 4)]
DEPTH_3 = [(20, 7, 5, 4, 6, 8, 3, 9), (-1, 0, 1, 2, 2, 0, 5, -1)]


@pytest.mark.parametrize("layout, calls", [(TWO_TREES, 2), (DEPTH_3, 4), ([(5, 4), (-1, -1)], 1)])
def test_trees_in_stream_order_take_a_call_per_level_and_no_gather(layout, calls):
    found = visits(TreeLayout.build(*layout))
    assert (found.calls, found.gathered) == (calls, 0)


@pytest.mark.parametrize("prefix", [(-1, 0, -1, 2, 0), (-1, -1, 1, 1, 0)], ids=str)
def test_trees_that_interrupt_each_other_are_gathered_at_that_level_alone(prefix):
    found = visits(TreeLayout.build([3, 2, 4, 2, 2], prefix))
    assert (found.calls, found.gathered) == (2, 1)


def test_one_read_out_row_per_branch_takes_as_many_calls_as_all_rows():
    layout = TreeLayout.build(*TWO_TREES)
    last = torch.tensor([layout.rows(segment).stop - 1 for segment in (1, 2, 3, 5, 6)])
    found = visits(layout, last)
    assert (found.calls, found.gathered) == (2, 0)
    every_third = torch.arange(0, 50, 3)  # 17 runs of one segment
    assert visits(layout, every_third).calls == 1 + math.ceil(math.log2(17))


def test_a_branch_costs_its_own_pairs_and_its_root():
    """What the trees save: pairs against those of separate sequences, computed by hand."""
    root, branch, count = 30, 10, 4
    layout = TreeLayout.build([root, *[branch] * count], [-1, *[0] * count])
    own = root * (root + 1) // 2 + count * branch * (branch + 1) // 2
    assert int(visits(layout).seen.sum()) == own + count * branch * root == 1885
    assert count * (root + branch) * (root + branch + 1) // 2 == 3280  # separate sequences


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("chosen", [False, True])
def test_is_as_exact_as_torch(dim, dtype, chosen):
    layout = TreeLayout.build(*TWO_TREES)
    total = layout.num_tokens
    rows = torch.tensor([3, 60, 60, 61, total - 1, 0]) if chosen else None
    given = leaves(total if rows is None else len(rows), total, (4, 2), dim, dtype)
    upstream = torch.randn(given[0].shape, dtype=dtype)

    def all_of(tensors, run):
        out = run(*tensors)
        return out, *torch.autograd.grad(out, tensors, upstream.to(out.dtype))

    def eager(q, k, v):
        k, v = (x.repeat_interleave(2, 1) for x in (k, v))
        allowed = layout.allowed() if rows is None else layout.allowed()[rows]
        scores = (torch.einsum("qhd,khd->hqk", q, k) * dim**-0.5).masked_fill(~allowed, float("-inf"))
        return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)

    ours = all_of(given, lambda *qkv: tree_attention(*qkv, layout, query_row=rows, impl="varlen"))
    theirs = all_of(given, eager)
    truth = all_of([x.detach().double().requires_grad_() for x in given], eager)
    for name, a, t, e in zip(("out", "q", "k", "v"), ours, truth, theirs):
        assert a.dtype == dtype
        assert_as_exact(a, t, e, 2 * (dim + total), name)


def test_a_roots_gradient_is_rounded_once():
    """In bf16, of v: rounded by parts it would be off by 1.4 times as much where one of them is nearly all of it."""
    layout = TreeLayout.build([64, *[8] * 4], [-1, *[0] * 4])
    given = leaves(layout.num_tokens, layout.num_tokens, (4, 2), 64, torch.bfloat16)
    wide = [x.detach().double().requires_grad_() for x in given]
    upstream = torch.randn(given[0].shape, dtype=torch.bfloat16)
    upstream[64:] /= 8
    (ours,) = torch.autograd.grad(tree_attention(*given, layout, impl="varlen"), given[2:], upstream)
    (truth,) = torch.autograd.grad(tree_attention(*wide, layout, impl="reference"), wide[2:], upstream.double())
    assert relative_error(ours[:64], truth[:64]) <= 1.1 * relative_error(truth[:64].bfloat16(), truth[:64])


@pytest.mark.parametrize("causal", [False, True])
def test_a_query_without_keys_gives_nothing(causal):
    """Also a causal one before all of its keys: sequences end together."""
    edges = [(0, 0), (3, 0), (3, 4), (8, 6)]
    sequences = Sequences(edges, *torch.tensor(edges, dtype=torch.int32).T, causal)
    q, k, v = leaves(8, 6, (4, 2), 8)
    out, lse = TorchVarlen().forward(q.detach(), k.detach(), v.detach(), sequences, 0.5)
    empty = 6 if causal else 3
    assert (out[:empty] == 0).all() and (lse[:, :empty] == float("-inf")).all()
    assert (out[empty:] != 0).all() and lse[:, empty:].isfinite().all()
    d_q, d_k, d_v = TorchVarlen().backward(
        torch.ones_like(out), q.detach(), k.detach(), v.detach(), out, lse.nan_to_num(neginf=0.0), sequences, 0.5
    )
    assert (d_q[:empty] == 0).all() and (d_k[:4] == 0).all() and (d_v[:4] == 0).all()
    assert (d_v[4:] != 0).all()


def test_nothing_merges_with_nothing():
    out, nothing = torch.zeros(2, 3, 4), torch.full((3, 2), float("-inf"))
    merged, lse = merge.merge(out, nothing, out, nothing)
    assert (merged == 0).all() and torch.equal(lse, nothing)
    part, part_lse = torch.randn(2, 3, 4), torch.randn(3, 2)
    for pair in ((out, nothing, part, part_lse), (part, part_lse, out, nothing)):
        merged, lse = merge.merge(*pair)
        assert torch.equal(merged, part) and torch.equal(lse, part_lse)


def test_scores_that_are_all_minus_infinity_are_no_softmax():
    """-inf at the root alone leaves the branch as it is; at all of a row's keys it is NaN, as in the definition."""
    layout = TreeLayout.build([2, 2], [-1, 0])
    q, k, v = torch.ones(4, 1, 8), torch.ones(4, 1, 8), torch.randn(4, 1, 8)
    k[:2] = float("-inf")
    got, exact = (tree_attention(q, k, v, layout, impl=impl) for impl in ("varlen", "reference"))
    assert torch.equal(got.isnan().flatten(1).all(1), torch.tensor([True, True, False, False]))
    torch.testing.assert_close(got, exact, equal_nan=True)


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
def test_no_tokens(lengths):
    layout = TreeLayout.build(lengths, [-1, 0][: len(lengths)])
    assert_exact(leaves(0, 0, (4, 2), 8), layout)


def test_no_chosen_rows():
    assert_exact(
        leaves(0, 5, (4, 2), 8), TreeLayout.build([3, 2], [-1, 0]), query_row=torch.empty(0, dtype=torch.int64)
    )


def test_all_layers_of_a_step_share_a_plan(monkeypatch):
    made = []
    plan = call_plan._plan
    monkeypatch.setattr(call_plan, "_plan", lambda *given: made.append(given[1]) or plan(*given))
    lengths = [11, 3, 4]  # of no other test
    for _ in range(2):
        layout = TreeLayout.build(lengths, [-1, 0, 0])
        q, k, v = leaves(18, 18, (2, 1), 8)
        tree_attention(q, k, v, layout, impl="varlen").sum().backward()
        tree_attention(q[:2], k, v, layout, query_row=torch.tensor([4, 17]), impl="varlen").sum().backward()
    assert made == [None, (4, 17)]


def test_who_asks_gets_it_and_nobody_else(monkeypatch):
    assert which_impl("cpu")["tree_attention"][0] == "sdpa"
    monkeypatch.setenv("PRISM_IMPL", "tree_attention=varlen")
    assert which_impl("cpu")["tree_attention"] == ("varlen", "asked for by PRISM_IMPL")
    monkeypatch.delenv("PRISM_IMPL")
    x = torch.randn(3, 2, 8)
    with pytest.raises(NotImplementedError, match=r"'varlen' has no torch\.func\.vmap; use impl='reference'"):
        torch.func.vmap(lambda q: tree_attention(q, x, x, TreeLayout.build([3], [-1]), impl="varlen"))(x[None])
