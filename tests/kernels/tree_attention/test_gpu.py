"""flash on a GPU: every library that can run there, against float64; what only a GPU can show of it."""

from itertools import pairwise

import pytest
import torch

from prism_kernels import QueryRows, TreeLayout, segment_attention, tree_attention
from prism_kernels.tree_attention import flash_library
from prism_kernels.tree_attention.call_plan import call_plan
from prism_kernels.tree_attention.library import library_of
from prism_kernels.tree_attention.varlen_library import TorchVarlen
from tests.kernels.tree_attention.test_flash import APART
from tests.kernels.tree_attention.test_varlen import DEPTH_3, leaves
from tests.oracle import assert_as_exact, roundoff

pytestmark = pytest.mark.gpu

RAGGED = [(300, 171, 5, 0, 90, 140, 1, 33), (-1, 0, 0, 0, -1, 4, 4, 4)]
LAYOUTS = {"ragged": RAGGED, "depth 3": DEPTH_3, "apart": APART, "roots": [(129, 64), (-1, -1)]}


@pytest.fixture(params=flash_library.SOURCES)
def source(request, monkeypatch):
    """The name in library.LIBRARIES of a library that can run here."""
    monkeypatch.setenv("PRISM_FLASH", request.param)
    flash_library._found.cache_clear()
    if why_not := flash_library.unavailable():
        pytest.skip(why_not)
    yield flash_library.library("cuda")
    if request.param == "fa3":
        torch.nn.attention.restore_flash_attention_impl()
        flash_library._activate_fa3.cache_clear()
    flash_library._found.cache_clear()


@pytest.fixture
def no_waiting():
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def on_gpu(num_q, num_k, heads, dim, dtype):
    return [x.detach().cuda().requires_grad_() for x in leaves(num_q, num_k, heads, dim, dtype)]


def all_of(tensors, upstream, run):
    out = run(*tensors)
    return out, *torch.autograd.grad(out, tensors, upstream.to(out.dtype))


def dense(allowed, scale):
    def run(q, k, v):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        scores = (torch.einsum("qhd,khd->hqk", q, k) * scale).masked_fill(~allowed, float("-inf"))
        return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)

    return run


def assert_exact(given, allowed, scale, run):
    upstream = torch.randn_like(given[0])
    wide = [x.detach().double().requires_grad_() for x in given]
    ours, eager = all_of(given, upstream, run), all_of(given, upstream, dense(allowed, scale))
    truth = all_of(wide, upstream, dense(allowed, scale))
    for name, a, t, e in zip(("out", "q", "k", "v"), ours, truth, eager):
        assert a.dtype == given[0].dtype
        assert_as_exact(a, t, e, 2 * (given[0].shape[2] + len(given[1])), name)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("dim", [64, 128, 256, 72])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads, scale", [((8, 2), None), ((4, 4), -0.1)])
def test_equals_float64(source, name, dim, dtype, heads, scale):
    layout = TreeLayout.build(*LAYOUTS[name])
    total, factor = layout.num_tokens, dim**-0.5 if scale is None else scale
    run = lambda q, k, v: tree_attention(q, k, v, layout, scale=scale, impl="flash")  # noqa: E731
    assert_exact(on_gpu(total, total, heads, dim, dtype), layout.allowed().cuda(), factor, run)
    rows = torch.arange(2, total, 7)
    run = lambda q, k, v: tree_attention(  # noqa: E731
        q, k, v, layout, scale=scale, query_row=QueryRows.build(rows).to("cuda"), impl="flash"
    )
    assert_exact(on_gpu(len(rows), total, heads, dim, dtype), layout.allowed()[rows].cuda(), factor, run)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dim", [64, 72])
def test_segments_equal_float64(source, causal, dim):
    lengths = [64, 1, 0, 256, 100]
    allowed = TreeLayout.build(lengths, [-1] * 5).allowed().cuda()
    run = lambda q, k, v: segment_attention(q, k, v, lengths, causal=causal, impl="flash")  # noqa: E731
    given = on_gpu(421, 421, (4, 4), dim, torch.bfloat16)
    assert_exact(given, allowed if causal else allowed | allowed.T, dim**-0.5, run)


@pytest.mark.parametrize("chosen", [None, "ends", "some"])
def test_a_library_keeps_its_contract(source, chosen):
    """Natural logs, nothing for queries without keys and keys without queries, one query in no sequence or in any."""
    layout = TreeLayout.build(*RAGGED)
    total = layout.num_tokens
    ends = torch.tensor([layout.rows(s).stop - 1 for s in range(layout.num_segments) if layout.lengths[s]])
    rows = {None: None, "ends": ends, "some": torch.arange(0, total, 9)}[chosen]
    q, k, v = (x.detach() for x in on_gpu(total if rows is None else len(rows), total, (8, 2), 64, torch.bfloat16))
    for call in call_plan(layout.to("cuda"), rows, True):
        queries = q if call.query is None else q[call.query]
        out, lse = library_of(source).forward(queries, k, v, call.sequences, 0.125)
        exact_out, exact = TorchVarlen().forward(*(x.double() for x in (queries, k, v)), call.sequences, 0.125)
        assert torch.equal(lse.isinf(), exact.isinf()) and (out[lse.isinf().T] == 0).all()
        there = exact.isfinite()
        error = (lse[there].double() - exact[there]).abs().max()
        assert float(error) <= 4 * roundoff(torch.float32) * 64**0.5 * float(exact[there].abs().max())
        upstream = torch.randn_like(queries)
        settled = lse.masked_fill(lse.isinf(), 0.0)
        gradients = library_of(source).backward(upstream, queries, k, v, out, settled, call.sequences, 0.125)
        truth = TorchVarlen().backward(
            *(x.double() for x in (upstream, queries, k, v, exact_out)), settled.double(), call.sequences, 0.125
        )
        unmet = torch.cat([torch.full((b[1] - a[1],), b[0] == a[0]) for a, b in pairwise(call.sequences.edges)])
        for got, want, nothing in zip(gradients, truth, (exact.isinf().all(0), unmet, unmet)):
            assert (got[nothing] == 0).all()
            assert float((got.double() - want).norm()) <= 4 * torch.finfo(torch.bfloat16).eps * float(want.norm())


def test_gradients_repeat_bit_for_bit(source, deterministic):
    layout = TreeLayout.build([500, *[130] * 12], [-1, *[0] * 12])
    given = on_gpu(layout.num_tokens, layout.num_tokens, (8, 2), 128, torch.bfloat16)
    upstream = torch.randn_like(given[0])
    first, *others = (all_of(given, upstream, lambda *x: tree_attention(*x, layout)) for _ in range(20))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_host_never_waits(source, no_waiting, dtype):
    """Not even to plan: a layout that nobody has seen before, its rows on the GPU, moved there as a pack is."""
    given = on_gpu(740, 740, (4, 2), 64, dtype)

    def step(extra):
        layout = TreeLayout.build([300, 200 + extra, 5, 90 - extra, 145], [-1, 0, 0, -1, 3])
        rows = QueryRows.build(torch.tensor([250 + extra, 739])).to("cuda", non_blocking=True)
        moved = layout.to("cuda", non_blocking=True)
        out = (
            tree_attention(*given, moved).sum() + tree_attention(given[0][:2], *given[1:], layout, query_row=rows).sum()
        )
        (out + segment_attention(*given, [700 - extra, 40 + extra]).sum()).backward()

    step(0)  # compiles
    no_waiting()
    step(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_scores_are_kept_of_tensors_that_no_library_takes(dtype):
    layout = TreeLayout.build([6000, 3000, 3000], [-1, 0, 0])
    given = on_gpu(12_000, 12_000, (4, 2), 64, dtype)
    inputs = sum(x.nbytes for x in given)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    tree_attention(*given, layout).sum().backward()
    scores = 4 * 12_000 * 12_000 * given[0].element_size()
    assert torch.cuda.max_memory_allocated() - before <= 16 * inputs < scores / 4


def test_what_runs_is_said():
    from prism_kernels import which_impl

    name, reason = which_impl("cuda")["tree_attention"]
    assert (name, reason.split("; ")[1]) == ("flash", flash_library.detail())
