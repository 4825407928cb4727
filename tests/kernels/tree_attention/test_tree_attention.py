"""tree_attention equals attention of separate sequences, values and gradients, in every implementation."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel

from prism_kernels import QueryRows, TreeLayout, tree_attention
from prism_kernels.tree_attention import sdpa
from prism_kernels.tree_attention.layout import LARGE_AREA, PADDING_LIMIT
from tests.oracle import assert_as_exact, assert_same

TERMS = 8 + 8  # of a product of width 8, and the functions of a softmax; to which come the tokens that it is over
IMPLS = ["reference", "sdpa", "varlen"]


@st.composite
def forests(draw, depth_one=False):
    count = draw(st.integers(1, 9))
    lengths = draw(st.lists(st.integers(0, 7), min_size=count, max_size=count))
    prefix = []
    for i in range(count):
        parents = [j for j in range(i) if prefix[j] == -1] if depth_one else list(range(i))
        prefix.append(draw(st.sampled_from([-1, *parents])))
    return TreeLayout.build(lengths, prefix)


def separate(q, k, v, layout, scale):
    """Every path as its own plain causal sequence; each row is kept from its own segment's sequence."""
    out = torch.full_like(q, float("nan"))
    repeat = q.shape[1] // k.shape[1]
    for segment in range(layout.num_segments):
        rows = [r for s in [*layout.ancestors(segment), segment] for r in layout.rows(s)]
        own = len(layout.rows(segment))
        if not own:
            continue
        qs, ks, vs = q[rows], k[rows].repeat_interleave(repeat, 1), v[rows].repeat_interleave(repeat, 1)
        logits = torch.einsum("qhd,khd->hqk", qs, ks) * scale
        logits = logits + torch.full((len(rows), len(rows)), float("-inf"), dtype=q.dtype).triu(1)
        path_out = torch.einsum("hqk,khd->qhd", logits.softmax(-1), vs)
        out = out.index_copy(0, torch.tensor(rows[-own:]), path_out[-own:])
    return out


def assert_same_gradients(got, want, terms):
    """Of q, k and v: to the size of the largest, since a softmax over one token cancels all that q and k would get."""
    scale = max(float(b.abs().max()) for b in want)
    for a, b in zip(got, want):
        assert_same(a, b, terms, scale=scale)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("heads", [(4, 2), (2, 2)])
@given(layout=forests())
@settings(max_examples=25, deadline=None)
def test_equals_separate_sequences(impl, heads, layout):
    total = layout.num_tokens
    q = torch.randn(total, heads[0], 8, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(total, heads[1], 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    out = tree_attention(q, k, v, layout, impl=impl)
    expected = separate(q, k, v, layout, 8**-0.5)
    assert_same(out, expected, TERMS + total)
    if not total:
        return
    weight = torch.randn_like(out)
    got = torch.autograd.grad((out * weight).sum(), (q, k, v))
    want = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    assert_same_gradients(got, want, 2 * (TERMS + total))


@pytest.mark.parametrize("impl", IMPLS)
def test_production_like_shape_in_fp32(impl):
    layout = TreeLayout.build([150, 40, 73, 1, 60, 33], [-1, 0, 0, 0, -1, 4])
    q, k, v = (torch.randn(layout.num_tokens, h, 64) for h in (4, 2, 2))
    truth, eager = (separate(*(x.to(dtype) for x in (q, k, v)), layout, 0.2) for dtype in (torch.float64, q.dtype))
    out = tree_attention(q, k, v, layout, scale=0.2, impl=impl)
    assert_as_exact(out, truth, eager, 64 + layout.num_tokens)


@pytest.mark.parametrize("impl", IMPLS)
@given(layout=forests(), data=st.data())
@settings(max_examples=25, deadline=None)
def test_chosen_rows_equal_the_full_computation(impl, layout, data):
    total = layout.num_tokens
    if not total:
        return
    rows = torch.tensor(data.draw(st.lists(st.integers(0, total - 1), min_size=1, max_size=6)))
    q, k, v = (torch.randn(total, h, 8, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2))
    full = tree_attention(q, k, v, layout, impl="reference")[rows]
    some = tree_attention(q[rows], k, v, layout, query_row=rows, impl=impl)
    assert_same(some, full, TERMS + total)
    got, want = (torch.autograd.grad(x.sum(), (q, k, v)) for x in (some, full))
    assert_same_gradients(got, want, 2 * (TERMS + total))


def test_chosen_rows_that_the_host_knows_are_planned_there():
    """On a device without values any look at them raises."""
    layout, chosen = TreeLayout.build([4, 3, 2], [-1, 0, 0]), QueryRows.build(torch.tensor([6, 8]))
    tensors = [torch.randn(n, heads, 8, requires_grad=True) for n, heads in ((2, 4), (9, 2), (9, 2))]
    rows = chosen.to("meta")
    for impl in IMPLS:
        expected = tree_attention(*tensors, layout, query_row=chosen.row, impl=impl)
        assert torch.equal(tree_attention(*tensors, layout, query_row=rows, impl=impl), expected)
    away = [x.detach().to("meta").requires_grad_() for x in tensors]
    for known in (rows, chosen, chosen.row):
        out = tree_attention(*away, layout.to("meta"), query_row=known, impl="varlen")
        for grad, x in zip(torch.autograd.grad(out.sum(), away), away):
            assert (grad.device, grad.shape, grad.dtype) == (x.device, x.shape, x.dtype)
    with pytest.raises(ValueError, match=r"query_row: expected rows that the host knows, .*; give QueryRows"):
        tree_attention(*away, layout, query_row=rows.row, impl="varlen")
    with pytest.raises(ValueError, match="row: expected a tensor on the host"):
        QueryRows.build(rows.row)


@pytest.mark.parametrize("impl", ["sdpa", "varlen"])
def test_nan_stays_in_its_tree(impl):
    """Trees whose segments are padded together: padding must not read another tree's rows."""
    layout = TreeLayout.build([6, 4, 5, 3], [-1, 0, -1, 2])
    q, k, v = (torch.randn(layout.num_tokens, h, 8) for h in (4, 2, 2))
    for x in (q, k, v):
        x[:10] = float("nan")
        x.requires_grad_()
    out = tree_attention(q, k, v, layout, impl=impl)
    assert out[:10].isnan().all()
    assert out[10:].isfinite().all()
    for grad in torch.autograd.grad(out[10:].sum(), (q, k, v)):
        assert grad[10:].isfinite().all()


LAYOUTS = {
    "aligned": ([96, *[64] * 4], [-1, *[0] * 4]),
    "ragged": ([97, 40, 61, 3, 55, 50, 30], [-1, 0, 0, 0, -1, 4, 4]),
    "large and small": ([130, 100, 140, 40, 35, 90], [-1, 0, 0, 0, 0, 2]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_a_gpu_calls_equals_separate_sequences(monkeypatch, name):
    monkeypatch.setattr(sdpa, "_on_gpu", lambda tensor: True)
    layout = TreeLayout.build(*LAYOUTS[name])
    assert all(group.aligned for group in layout.groups()) == (name == "aligned")
    q, k, v = (torch.randn(layout.num_tokens, h, 8, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2))
    out, expected = tree_attention(q, k, v, layout), separate(q, k, v, layout, 8**-0.5)
    terms = TERMS + layout.num_tokens
    assert_same(out, expected, terms)
    weight = torch.randn_like(out)
    got, want = (torch.autograd.grad((x * weight).sum(), (q, k, v)) for x in (out, expected))
    assert_same_gradients(got, want, 2 * terms)


@given(layout=st.builds(
    lambda lengths, data: TreeLayout.build(lengths, [-1, *[data % (i + 1) for i in range(len(lengths) - 1)]]),
    st.lists(st.integers(0, 400), min_size=1, max_size=30), st.integers(0, 99)))  # fmt: skip
@settings(max_examples=50, deadline=None)
def test_large_segments_are_not_padded_and_small_ones_to_little(layout):
    groups = layout.groups()
    members = sorted(s for group in groups for s in group.members)
    assert members == [s for s in range(layout.num_segments) if layout.lengths[s]]
    for group in groups:
        n, num_q, num_k = group.size
        exact = [
            layout.lengths[s] * sum(layout.lengths[a] for a in path) for s, path in zip(group.members, group.paths)
        ]
        assert n == len(group.members) and (n == 1 or max(exact) < LARGE_AREA)
        assert n * num_q * num_k <= max(PADDING_LIMIT * sum(exact), LARGE_AREA) or n == 1
        assert group.aligned == (n * num_q * num_k == sum(exact))
        assert (group.mask is None) == all(
            len(path) == 1 or not sum(layout.lengths[a] for a in path[:-1]) for path in group.paths
        )


@pytest.mark.gpu
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("width", [64, 128])
def test_a_gpu_builds_no_score_matrix(name, width):
    """With torch's fused kernels alone, in bf16 with grouped heads; also for chosen rows."""
    layout = TreeLayout.build(*LAYOUTS[name])
    tensors = [torch.randn(layout.num_tokens, h, width, dtype=torch.bfloat16) for h in (8, 2, 2)]
    q, k, v = (x.cuda().requires_grad_() for x in tensors)
    rows = torch.tensor([5, 100, layout.num_tokens - 1], device="cuda")
    fused = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]
    with sdpa_kernel(fused):
        out = tree_attention(q, k, v, layout.to("cuda"))
        some = tree_attention(q[rows], k, v, layout.to("cuda"), query_row=rows)
        grads = torch.autograd.grad(out.float().square().sum(), (q, k, v))

    def plain(leaves):
        result = separate(*leaves, layout, width**-0.5)
        wide = torch.promote_types(result.dtype, torch.float32)
        return result, result[rows.cpu()], *torch.autograd.grad(result.to(wide).square().sum(), leaves)

    truth, eager = plain([x.double().requires_grad_() for x in tensors]), plain([x.requires_grad_() for x in tensors])
    for a, t, e in zip((out, some, *grads), truth, eager):
        assert_as_exact(a, t, e, 2 * (width + layout.num_tokens))


@pytest.mark.parametrize("impl", ["sdpa", "varlen"])
def test_gradients_are_repeatable(impl):
    layout = TreeLayout.build([40, *[30] * 12], [-1, *[0] * 12])
    q, k, v = (torch.randn(layout.num_tokens, h, 32, requires_grad=True) for h in (4, 2, 2))
    grads = [
        torch.autograd.grad(tree_attention(q, k, v, layout, impl=impl).square().sum(), (q, k, v)) for _ in range(3)
    ]
    assert all(torch.equal(a, b) for other in grads[1:] for a, b in zip(grads[0], other))


@pytest.mark.parametrize(
    ("lengths", "prefix", "says"),
    [
        ([3, -1], [-1, 0], r"lengths\[1\]"),
        ([3, 2], [-1, 1], r"prefix\[1\]"),
        ([3, 2], [-1], "prefix"),
        ([1.5], [-1], "lengths"),
    ],
)
def test_layout_refuses(lengths, prefix, says):
    with pytest.raises(ValueError, match=says):
        TreeLayout.build(lengths, prefix)


def test_arguments_are_checked():
    layout = TreeLayout.build([3], [-1])
    q, k = torch.randn(3, 4, 8), torch.randn(3, 2, 8)
    with pytest.raises(ValueError, match=r"q: expected floating \(T = 3, Hq, D\), got \(4, 4, 8\)"):
        tree_attention(torch.randn(4, 4, 8), torch.randn(4, 2, 8), torch.randn(4, 2, 8), layout)
    with pytest.raises(ValueError, match="q: expected a multiple of the Hkv = 2 heads of k and v, got 3 heads"):
        tree_attention(torch.randn(3, 3, 8), k, k, layout)
    with pytest.raises(ValueError, match=r"v: expected float32 \(T = 3, Hkv = 2, D = 8\), got .*float64"):
        tree_attention(q, k, k.double(), layout)
    with pytest.raises(ValueError, match="expected auto or one of"):
        tree_attention(q, k, k, layout, impl="nope")
    with pytest.raises(ValueError, match="expected auto or one of"):
        tree_attention(q, k, k, layout, impl="triton")


@pytest.mark.parametrize("impl", ["sdpa", "varlen"])
@pytest.mark.parametrize("which, value", [(0, float("nan")), (0, float("inf")), (1, float("nan"))], ids=str)
@pytest.mark.parametrize("layout", [([4], [-1]), ([3, 4, 5], [-1, 0, 0])], ids=str)
def test_what_is_not_finite_shows_where_the_definition_shows_it(layout, which, value, impl):
    """Torch's causal attention on a CPU gives 0 where all scores are NaN, and NaN weights a finite loss."""
    layout = TreeLayout.build(*layout)
    for row in range(layout.num_tokens):
        tensors = [torch.randn(layout.num_tokens, heads, 8) for heads in (4, 2, 2)]
        tensors[which][row, 0, 0] = value
        got, exact = (tree_attention(*tensors, layout, impl=impl) for impl in (impl, "reference"))
        assert exact[row].isnan().any() and got[exact.isnan()].isnan().all()
        assert not got[: row - 5 if row > 6 else 0].isnan().any()  # no segment before its own
