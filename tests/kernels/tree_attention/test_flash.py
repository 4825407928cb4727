"""flash on a CPU, on a library with FlashAttention's contract: all that a GPU runs but the library's two calls.

In Triton's interpreter (test_triton.py) the parts are merged by Triton.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from prism_kernels import QueryRows, TreeLayout, segment_attention, tree_attention, which_impl
from prism_kernels.dispatch import Impl, interpreting
from prism_kernels.operators import Operator
from prism_kernels.tree_attention import api, flash, flash_library, reference
from tests.kernels.tree_attention.fake_flash import FakeFlash
from tests.kernels.tree_attention.test_varlen import DEPTH_3, HEADS, TWO_TREES, forests, leaves
from tests.oracle import assert_as_exact, rounded, roundoff

exact_merge = pytest.mark.skipif(interpreting(), reason="Triton merges in fp32")
BF16 = torch.bfloat16
APART = [(21, 9, 14, 8, 6), (-1, 0, -1, 2, 0)]  # a tree is interrupted: its queries are gathered


@pytest.fixture
def library(monkeypatch):
    return install(monkeypatch)


def install(patch, nothing=float("inf")):
    """A CPU's tensors go to flash, and its calls to a fake."""
    fake = FakeFlash(nothing)
    for op in (api._OP, api._SEGMENTS):
        row = replace(op.table[Impl.FLASH], devices=("cpu", "cuda"), unavailable=lambda: None)
        patch.setitem(op.table, Impl.FLASH, row)
    calls = SimpleNamespace(_flash_attention_forward=fake.forward, _flash_attention_backward=fake.backward)
    patch.setattr(flash_library, "_aten", lambda: calls)
    return fake


def both(tensors, layout, scale=0.3, query_row=None, causal=None):
    """Output and gradients of flash and of the definition, in the tensors' own dtype."""
    found, upstream = [], torch.randn(tensors[0].shape, dtype=tensors[0].dtype)
    for module in (flash, reference):
        if causal is None:
            out = module.tree_attention(*tensors, layout, scale, query_row)
        else:
            out = module.segment_attention(*tensors, layout, scale, causal)
        found.append((out, *torch.autograd.grad(out, tensors, upstream)))
    return found


def assert_exact(tensors, *arguments, **options):
    got, want = both(tensors, *arguments, **options)
    assert got[0].shape == want[0].shape and got[0].dtype == want[0].dtype
    assert float((got[0] - want[0]).detach().norm()) <= 1e-12 * float(want[0].detach().norm())
    unit = max(float(x.norm()) for x in want[1:])
    for name, a, b in zip("qkv", got[1:], want[1:]):
        assert float((a - b).norm()) <= 1e-12 * unit, name


@exact_merge
@pytest.mark.parametrize("nothing", [float("inf"), -float("inf")])
@pytest.mark.parametrize("heads", HEADS)
@given(layout=forests(), dim=st.sampled_from([8, 5, 72]), scale=st.sampled_from([0.3, -0.3, 0.0, 1e-60]))
@settings(max_examples=25, deadline=None)
def test_equals_the_definition(nothing, heads, layout, dim, scale):
    with pytest.MonkeyPatch.context() as patch:
        install(patch, nothing)
        assert_exact(leaves(layout.num_tokens, layout.num_tokens, heads, dim), layout, scale)


@exact_merge
@pytest.mark.parametrize("heads", HEADS)
@given(layout=forests(), data=st.data())
@settings(max_examples=25, deadline=None)
def test_chosen_rows_equal_the_definition(heads, layout, data):
    total = layout.num_tokens
    rows = data.draw(st.lists(st.integers(0, max(0, total - 1)), max_size=30 if total else 0))
    with pytest.MonkeyPatch.context() as patch:
        install(patch)
        assert_exact(
            leaves(len(rows), total, heads, 8), layout, query_row=torch.tensor(rows, dtype=torch.int64), scale=0.4
        )


@exact_merge
@pytest.mark.parametrize("causal", [False, True])
def test_segments_equal_the_definition(library, causal):
    assert_exact(leaves(14, 14, (4, 2), 72), TreeLayout.build([5, 0, 9], [-1] * 3), causal=causal)
    assert library.calls == [causal]


@exact_merge
def test_any_strides(library):
    """Heads before rows, rows of a larger tensor, numbers that do not lie together, and the same row everywhere."""
    layout = TreeLayout.build([5, 4, 3], [-1, 0, 0])
    plain = [x.detach() for x in leaves(12, 12, (4, 2), 8)]
    for spread in (
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: torch.cat([x, x, x[..., :3]], -1)[..., 8:16],
        lambda x: torch.stack([x, x], -1)[..., 1],
        lambda x: x[:1].expand(x.shape),
    ):
        assert_exact([spread(x).requires_grad_() for x in plain], layout)


@pytest.mark.parametrize("layout, calls", [(TWO_TREES, 2), (DEPTH_3, 4), ([(9, 4), (-1, -1)], 1), (APART, 2)])
@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize("chosen", [False, True])
def test_is_as_exact_as_torch(library, layout, calls, dtype, chosen):
    layout = TreeLayout.build(*layout)
    total = layout.num_tokens
    rows = torch.arange(1, total, 5) if chosen else None
    given = leaves(total if rows is None else len(rows), total, (4, 2), 64, dtype)
    upstream = torch.randn(given[0].shape, dtype=dtype)

    def all_of(tensors, run):
        out = run(*tensors)
        return out, *torch.autograd.grad(out, tensors, upstream.to(out.dtype))

    def eager(q, k, v):
        k, v = (x.repeat_interleave(2, 1) for x in (k, v))
        allowed = layout.allowed() if rows is None else layout.allowed()[rows]
        scores = (torch.einsum("qhd,khd->hqk", q, k) * 64**-0.5).masked_fill(~allowed, float("-inf"))
        return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)

    ours = all_of(given, lambda *qkv: tree_attention(*qkv, layout, query_row=rows))
    theirs, truth = all_of(given, eager), all_of([x.detach().double().requires_grad_() for x in given], eager)
    assert library.calls[0] and (chosen or library.calls == [True] + [False] * (calls - 1))
    for name, a, t, e in zip(("out", "q", "k", "v"), ours, truth, theirs):
        assert a.dtype == dtype
        assert_as_exact(a, t, e, 2 * (64 + total), name)


def test_the_sign_of_a_scale_rounds_nothing(library):
    layout, (q, k, v) = TreeLayout.build(*TWO_TREES), leaves(172, 172, (4, 2), 64, BF16)
    want = tree_attention(-q, k, v, layout, scale=0.1)
    assert torch.equal(tree_attention(q, k, v, layout, scale=-0.1), want)


def test_a_root_takes_its_gradient_in_fp32_and_rounds_it_once_beside_the_parts(library):
    """The bound of flash.py, with the parts as float64 gives them: of its own segment, and of all branches."""
    layout = TreeLayout.build([64, *[8] * 4], [-1, *[0] * 4])
    given = leaves(96, 96, (4, 2), 64, BF16)
    upstream = torch.randn(given[0].shape, dtype=BF16)
    (ours,) = torch.autograd.grad(tree_attention(*given, layout), given[2:], upstream)
    wide = [x.detach().double().requires_grad_() for x in (given[0], *(y.repeat_interleave(2, 1) for y in given[1:]))]
    whole = tree_attention(*wide, layout, impl="reference")
    parts = []
    for rows in (slice(0, 64), slice(64, None)):
        masked = torch.zeros_like(whole)
        masked[rows] = upstream[rows].double()
        (part,) = torch.autograd.grad(whole, wide[2:], masked, retain_graph=True)
        parts.append(part[:64].unflatten(1, (2, 2)))
    truth = sum(part.sum(2) for part in parts)
    rounding = [truth, *(part.sum(2) for part in parts), *parts]  # each once: the sum, the parts, their query heads
    size = sum(float(x.square().sum()) for x in rounding) ** 0.5
    # The forward's output, rounded, is in every gradient: once more the whole.
    limit = rounded(BF16, 1) * (size + float(truth.norm())) + roundoff(torch.float32) * 96**0.5 * float(truth.norm())
    assert float((ours[:64].double() - truth).norm()) <= limit
    assert float((ours[:64].double() - truth).norm()) >= rounded(BF16, 1) * float(truth.norm()) / 2  # it is bf16's


@pytest.mark.parametrize("which, value", [(0, float("nan")), (0, float("inf")), (1, float("nan")), (2, float("nan"))])
def test_what_is_not_finite_shows_where_it_is_seen(library, which, value):
    """And nowhere else; a value weighs 0 where it is masked, and NaN * 0 is NaN, but no call meets another tree."""
    layout = TreeLayout.build([3, 4, 5, 2], [-1, 0, 0, -1])
    for row in range(layout.num_tokens):
        tensors = [torch.randn(14, heads, 8, dtype=BF16) for heads in (4, 2, 2)]
        tensors[which][row, 0, 0] = value
        seen = layout.allowed()[:, row] if which else torch.arange(14) == row
        found = tree_attention(*tensors, layout).isnan().flatten(1).any(1)
        other = torch.arange(14) < 12 if row >= 12 else torch.arange(14) >= 12
        assert found[seen].all() and not found[other].any() and (which == 2 or torch.equal(found, seen))


def test_scores_that_are_all_minus_infinity_are_no_softmax(library):
    layout = TreeLayout.build([2, 2], [-1, 0])
    q, k, v = torch.ones(4, 1, 8), torch.ones(4, 1, 8), torch.randn(4, 1, 8)
    k[:2] = float("-inf")
    for either in (layout, TreeLayout.build([2, 2], [-1, -1])):  # merged, and a single call
        out = tree_attention(*(x.to(BF16) for x in (q, k, v)), either)
        assert torch.equal(out.isnan().flatten(1).all(1), torch.tensor([True, True, False, False]))
        assert not out[2:].isnan().any()


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_where_a_gpu_is_only_thought_of(dtype):
    """Tensors without storage go to what a GPU would run, and nothing of them is read; others to varlen."""
    layout, rows = TreeLayout.build(*DEPTH_3), QueryRows.build(torch.tensor([3, 9])).to("meta")
    for kind, found in ((dtype, Impl.FLASH), (torch.float32, Impl.VARLEN), (torch.float64, Impl.VARLEN)):
        q, k, v = (x.detach().to("meta").requires_grad_() for x in leaves(62, 62, (4, 2), 72, kind))
        assert api._OP.select("auto", "meta", q)[0] == api._SEGMENTS.select("auto", "meta", q)[0] == found
        few = q[:2]
        for out in (
            tree_attention(q, k, v, layout),
            tree_attention(few, k, v, layout, query_row=rows),
            segment_attention(q, k, v, [60, 2]),
        ):
            inputs = [few if len(out) == 2 else q, k, v]
            assert out.dtype == kind and out.shape == inputs[0].shape and out.is_contiguous()
            for grad, x in zip(torch.autograd.grad(out.sum(), inputs), inputs):
                assert (grad.device, grad.shape, grad.dtype) == (x.device, x.shape, x.dtype)


@pytest.mark.skipif(interpreting(), reason="torch.compile is looked at where Triton compiles")
@pytest.mark.parametrize("rows", [None, torch.tensor([11, 0, 4, 4])])
def test_compiles_without_a_break_and_its_operators_keep_their_promises(library, monkeypatch, rows):
    layout = TreeLayout.build([3, 4, 5], [-1, 0, 0])
    tensors = leaves(12 if rows is None else 4, 12, (4, 2), 8, BF16)

    def op(q, k, v):
        out = tree_attention(q * 2, k, v, layout, query_row=rows)
        return out + segment_attention(k, k, v, [7, 5]).mean()

    seen = {}
    call = Operator.__call__
    monkeypatch.setattr(
        Operator, "__call__", lambda self, *given: seen.setdefault(self.overload, given) and call(self, *given)
    )
    out = op(*tensors)
    upstream = torch.randn_like(out)
    plain = out, *torch.autograd.grad(out, tensors, upstream)
    monkeypatch.setattr(Operator, "__call__", call)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")(*tensors)
    for a, b in zip((compiled, *torch.autograd.grad(compiled, tensors, upstream)), plain):
        assert torch.equal(a, b)
    assert len(seen) == 2
    for overload, arguments in seen.items():
        flat = [x for part in arguments for x in (part if isinstance(part, tuple) else (part,))]
        flat = [x.detach().clone() if torch.is_tensor(x) else x for x in flat]
        torch.library.opcheck(overload, tuple(flat))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_recompute_gives_the_same_bits(library, use_reentrant):
    layout, rows = TreeLayout.build(*TWO_TREES), QueryRows.build(torch.tensor([66, 171]))
    tensors = leaves(172, 172, (4, 2), 64, BF16)

    def run(q, k, v):
        out = tree_attention(q, k, v, layout)
        return out + tree_attention(q[:2], k, v, layout, query_row=rows).sum(0)

    upstream = torch.randn(172, 4, 64, dtype=BF16)
    plain = torch.autograd.grad(run(*tensors), tensors, upstream)
    seen = len(library.calls)
    recomputed = [x.detach().requires_grad_() for x in tensors]
    checkpoint(run, *recomputed, use_reentrant=use_reentrant).backward(upstream)
    assert len(library.calls) == 3 * seen  # the first time, and twice more
    assert all(torch.equal(a, b.grad) for a, b in zip(plain, recomputed))


def test_what_it_does_not_take_is_refused_with_the_way_out(library):
    layout = TreeLayout.build([3], [-1])
    with pytest.raises(RuntimeError, match=r"flash' .* it takes bfloat16 or float16 tensors; use impl='sdpa' instead"):
        tree_attention(*leaves(3, 3, (2, 2), 8, torch.float32), layout, impl="flash")
    with pytest.raises(RuntimeError, match=r"flash' takes heads of at most 256 numbers, got D = 264; use impl='sdpa'"):
        tree_attention(*leaves(3, 3, (2, 2), 264, BF16), layout, impl="flash")
    assert api._OP.select("auto", "cpu", torch.zeros(1, dtype=torch.float32))[0] == Impl.SDPA


SAID = {"fa3": "FlashAttention 3 by torch", "torch": "torch's FlashAttention 2", "package": "the package flash-attn"}


@pytest.mark.parametrize("there", [("fa3", "torch", "package"), ("torch", "package"), ("package",), ()])
@pytest.mark.parametrize("asked", ["", "torch", "package"])
def test_the_first_library_that_can_run_does_and_is_named(monkeypatch, there, asked):
    activated = []
    for name, (which, said, _) in flash_library.SOURCES.items():
        why_not = None if name in there else f"no {name}"
        monkeypatch.setitem(flash_library.SOURCES, name, (which, said, lambda why_not=why_not: why_not))
    monkeypatch.setattr(flash_library, "_activate_fa3", lambda: activated.append(True))
    monkeypatch.setattr(api, "need_triton", lambda: None)
    monkeypatch.setenv("PRISM_FLASH", asked)
    flash_library._found.cache_clear()
    possible = [name for name in there if asked in ("", name)]
    name, reason = which_impl("cuda")["tree_attention"]
    assert name == ("flash" if possible else "sdpa")
    if possible:
        assert reason == f"default on cuda; {SAID[possible[0]]}; float32 and float64: varlen"
        assert flash_library.library("cuda") == ("flash_attn" if possible[0] == "package" else "aten")
    else:
        assert all(f"no {each}" in reason for each in ([asked] if asked else SAID))
        with pytest.raises(RuntimeError, match=r"'flash' .*no .*; use impl='sdpa' instead"):
            api._OP.select("flash", "cuda", torch.zeros(1, dtype=BF16))
    for dtype, taken in ((BF16, name), (torch.float32, "varlen"), (torch.float64, "varlen")):
        assert api._OP.select("auto", "cuda", torch.zeros(1, dtype=dtype))[0] == taken
    assert bool(activated) == (possible[:1] == ["fa3"])
    flash_library._found.cache_clear()


def test_a_library_that_does_not_exist_is_named(monkeypatch):
    monkeypatch.setenv("PRISM_FLASH", "fa9")
    with pytest.raises(ValueError, match=r"PRISM_FLASH: expected one of .*'package', 'torch'.*, got 'fa9'"):
        which_impl("cuda")


PACKAGE = {  # flash-attn's parameters, by position
    "forward": "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dropout_p softmax_scale causal",
    "backward": "dout q k v out softmax_lse dq dk dv cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dropout_p "
    "softmax_scale causal window_size_left window_size_right softcap alibi_slopes deterministic",
}


@exact_merge
def test_the_package_is_called_by_its_own_names(monkeypatch, library):
    seen = []

    def bound(name, given, named):
        names = PACKAGE[name].split()
        assert list(named) == names[len(given) :]  # all that have no default
        return {**dict(zip(names, given)), **named}

    def forward(*given, **named):
        by_name = bound("forward", given, named)
        out, lse, rng, *_ = library.forward(*given, 0.0, named["causal"], False, scale=by_name["softmax_scale"])
        return out, lse, None, rng

    def backward(*given, **named):
        by_name = bound("backward", given, named)
        seen.append(by_name["deterministic"])
        assert [named[f"window_size_{side}"] for side in ("left", "right")] == [-1, -1] and not named["softcap"]
        random = torch.empty(2), torch.empty(0)
        scale, causal = named["softmax_scale"], named["causal"]
        gradients = library.backward(*given[:6], *given[9:], 0.0, causal, *random, scale=scale)
        for x, gradient in zip(given[6:9], gradients):
            x.copy_(gradient)

    package = SimpleNamespace(_flash_attn_varlen_forward=forward, _flash_attn_varlen_backward=backward)
    monkeypatch.setattr(flash_library, "_package", lambda: package)
    monkeypatch.setattr(flash_library, "library", lambda device: "flash_attn")
    layout = TreeLayout.build(*DEPTH_3)
    assert_exact(leaves(62, 62, (4, 2), 8), layout)
    torch.use_deterministic_algorithms(True)
    try:
        assert_exact(leaves(62, 62, (4, 2), 8), layout)
    finally:
        torch.use_deterministic_algorithms(False)
    assert seen == [False] * 4 + [True] * 4
