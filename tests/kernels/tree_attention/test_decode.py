"""shared_prompt_decode equals attention of every row on its own, in float64; rows come, share prompts and leave."""

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_kernels import DecodeLayout, HeadNorm, dispatch, qk_norm_rotate, shared_prompt_decode
from tests.oracle import assert_as_exact, assert_same

TABLE = dispatch._OPS["shared_prompt_decode"].table
IMPLS = ["triton"] if dispatch.interpreting() else [str(name) for name, row in TABLE.items() if "cpu" in row.devices]
every = pytest.mark.parametrize("impl", IMPLS)
PAGE = 64


def terms(layout, dim):
    """A product, the sums over prompt and own tokens, the functions of a softmax: at most."""
    return dim + int(layout.prompt_length.max()) + int(layout.own_length.max()) + 8


class Case:
    """Random tokens in shuffled pages, everything else poisoned with NaN."""

    def __init__(self, dtype, group=(2, 0, 2, 2, 0), lengths=(3, 1, 65), own=(4, 1, 64, 65, 130), heads=(4, 2), dim=8,
                 width=2, scale=1.0):  # fmt: skip
        self.group, self.lengths, self.own = list(group), list(lengths), list(own)
        self.layout = DecodeLayout.build(
            rows=len(group), prompts=len(lengths), prompt_tokens=max(lengths), own_tokens=max(max(own), 1),
            rows_per_tile=width,
        )  # fmt: skip
        self.layout.place(self.group)
        self.layout.prompt_length.copy_(torch.tensor(self.lengths))
        self.layout.own_length.copy_(torch.tensor(self.own))
        tables = (self.layout.prompt_page, self.layout.own_page)
        needed = [-(-n // PAGE) for n in (*self.lengths, *self.own)]
        free = (torch.randperm(sum(needed)) + 1).tolist()
        for table, counts in zip(tables, (needed[: len(lengths)], needed[len(lengths) :])):
            for row, count in enumerate(counts):
                for i in range(count):
                    table[row, i] = free.pop()
        shape = 1 + sum(needed), heads[1], PAGE, dim
        self.pages = [torch.full(shape, float("nan"), dtype=dtype) for _ in range(2)]
        draw = lambda n: [torch.randn(n, heads[1], dim, dtype=torch.float64).mul(scale).to(dtype) for _ in range(2)]  # noqa: E731
        self.prompts, self.tokens = [draw(n) for n in self.lengths], [draw(n) for n in self.own]
        for table, kept, new in ((tables[0], self.prompts, 0), (tables[1], self.tokens, 1)):
            for row, pair in enumerate(kept):
                for pages, x in zip(self.pages, pair):
                    for i in range(max(len(x) - new, 0)):
                        pages[table[row, i // PAGE], :, i % PAGE] = x[i]
        self.q = torch.randn(len(group), heads[0], dim, dtype=torch.float64).mul(scale).to(dtype)
        last = [[x[-1] if len(x) else x.new_zeros(heads[1], dim) for x in pair] for pair in self.tokens]
        self.new = [torch.stack(x) for x in zip(*last)]

    def run(self, impl, **options):
        return shared_prompt_decode(self.q, *self.new, *self.pages, self.layout, impl=impl, **options)

    def with_norm(self, dtype=None):
        """What norms queries and keys; weights and angles as large as a model's."""
        rows, _, dim = self.q.shape
        angle = torch.rand(rows, dim // 2, dtype=torch.float64).mul(6).repeat(1, 2)
        weights = [1 + 0.3 * torch.randn(dim, dtype=torch.float64) for _ in range(2)]
        return HeadNorm(*(x.to(dtype or self.q.dtype) for x in (*weights, angle.cos(), angle.sin())), 1e-6)

    def normed(self, norm):
        """The case that has queries and new keys as they are after the norm; in pages of its own."""
        other = copy.copy(self)
        q, k = qk_norm_rotate(self.q, self.new[0], *norm, impl="reference")
        other.q, other.new, other.pages = q, [k, self.new[1]], [x.clone() for x in self.pages]
        other.tokens = [[torch.cat([x[:-1], k[b : b + 1]]) if len(x) else x, y] for b, (x, y) in enumerate(self.tokens)]
        return other

    def truth(self, scale, dtype=torch.float64):
        """Row by row."""
        out = torch.zeros_like(self.q, dtype=dtype)
        for b, g in enumerate(self.group):
            if not self.own[b]:
                continue
            k, v = (torch.cat(pair).to(dtype).transpose(0, 1) for pair in zip(self.prompts[g], self.tokens[b]))
            k, v = (x.repeat_interleave(self.q.shape[1] // len(k), dim=0) for x in (k, v))
            scores = torch.einsum("hd,hnd->hn", self.q[b].to(dtype), k) * scale
            out[b] = torch.einsum("hn,hnd->hd", scores.softmax(-1), v)
        return out


SHAPES = [
    {},
    {"group": (0,), "lengths": (1,), "own": (1,)},
    {"group": (1, 1, 1), "lengths": (7, 63), "own": (70, 0, 128)},  # a group without a row, a row without a token
    {"heads": (3, 3), "group": tuple(range(9)), "lengths": tuple(range(1, 10)), "own": (2,) * 9},
    {"heads": (8, 1), "group": (0,) * 17, "lengths": (200,), "own": tuple(range(1, 18)), "dim": 3, "width": 5},
    {"heads": (6, 2), "group": (1, 0, 1), "lengths": (129, 64), "own": (0, 0, 0), "dim": 32},
    {"heads": (4, 4), "group": (0, 1), "lengths": (64, 128), "own": (64, 128), "dim": 33, "width": 1},
]


@every
@pytest.mark.parametrize("changes", SHAPES)
def test_equals_every_row_on_its_own(impl, changes):
    case = Case(torch.float64, **changes)
    assert_same(case.run(impl, scale=0.3), case.truth(0.3), terms(case.layout, case.q.shape[2]))


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [64, 20])
def test_is_as_exact_as_torch(impl, dtype, dim):
    if dispatch.interpreting() and dtype == torch.bfloat16:
        pytest.skip("tl.dot on bf16 is wrong in the interpreter")
    case = Case(dtype, dim=dim)
    got = case.run(impl)
    assert got.dtype == dtype and not case.layout.arrived.any()
    scale = dim**-0.5
    assert_as_exact(got, case.truth(scale), case.truth(scale, dtype), terms(case.layout, dim), "out")


@every
@pytest.mark.parametrize("changes", [c for c in SHAPES if c.get("dim", 8) % 2 == 0])
def test_norms_and_rotates_first(impl, changes):
    case = Case(torch.float64, **changes)
    norm = case.with_norm()
    after = case.normed(norm)
    assert_same(case.run(impl, norm=norm, scale=0.3), after.truth(0.3), terms(case.layout, 2 * case.q.shape[2]))
    for b, n in enumerate(case.own):
        if n:
            at = case.layout.own_page[b, (n - 1) // PAGE], slice(None), (n - 1) % PAGE
            assert_same(case.pages[0][at], after.new[0][b], 2 * case.q.shape[2])
            assert torch.equal(case.pages[1][at], case.new[1][b])


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_norms_as_exactly_as_torch(impl, dtype):
    case = Case(dtype, dim=64)
    norm = case.with_norm()
    exact = copy.copy(case)
    exact.q, exact.new = case.q.double(), [x.double() for x in case.new]
    exact.pages, exact.tokens = case.pages, [[x.double() for x in pair] for pair in case.tokens]
    truth = exact.normed(HeadNorm(*(x.double() for x in norm[:4]), norm.eps)).truth(0.125)
    eager = case.normed(norm).truth(0.125, dtype)
    assert_as_exact(case.run(impl, norm=norm), truth, eager, terms(case.layout, 128), "out")


@every
def test_scores_beyond_fp16_are_finite(impl):
    """Heads of size 60 have scores of up to 3e5 before the softmax; fp16 ends at 65,504."""
    case = Case(torch.float16, dim=64, scale=60.0)
    got, scale = case.run(impl), 64**-0.5
    assert bool(got.isfinite().all())
    assert_as_exact(got, case.truth(scale), case.truth(scale, torch.float32).half(), terms(case.layout, 64), "out")


@every
def test_new_tokens_are_written_and_nothing_else(impl):
    case = Case(torch.float32, own=(4, 0, 64, 65, 130))
    before = [x.clone() for x in case.pages]
    case.run(impl)
    for new, pages, old in zip(case.new, case.pages, before):
        for b, n in enumerate(case.own):
            if n:
                at = case.layout.own_page[b, (n - 1) // PAGE], slice(None), (n - 1) % PAGE
                assert torch.equal(pages[at], new[b])
                pages[at] = old[at]
        assert torch.equal(pages[1:].isnan(), old[1:].isnan())  # page 0 is nobody's
        assert torch.equal(pages[1:].nan_to_num(), old[1:].nan_to_num())


@every
def test_a_row_equals_itself_in_any_company(impl):
    """Bit for bit: whoever else is there, in which order, and however its group is cut into tiles."""
    case = Case(torch.float32, group=(0, 1, 0, 0, 1), lengths=(70, 9))
    whole = case.run(impl)
    for order, width in (([4, 2, 0, 1, 3], 3), ([2], 2), ([1, 3], 1)):
        layout = DecodeLayout.build(rows=len(order), prompts=2, prompt_tokens=128, own_tokens=192, rows_per_tile=width)
        layout.prompt_page.copy_(case.layout.prompt_page)
        layout.prompt_length.copy_(case.layout.prompt_length)
        layout.own_page.copy_(case.layout.own_page[order])
        layout.own_length.copy_(case.layout.own_length[order])
        layout.place([case.group[i] for i in order])
        new = (x[order] for x in case.new)
        some = shared_prompt_decode(case.q[order], *new, *case.pages, layout, impl=impl)
        assert_same(some, whole[order], terms(case.layout, 8))


@every
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_tables(impl, data):
    number = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    prompts, rows, kv_heads = number(1, 4), number(1, 6), number(1, 3)
    case = Case(
        torch.float64, group=[number(0, prompts - 1) for _ in range(rows)], own=[number(0, 140) for _ in range(rows)],
        lengths=[number(1, 140) for _ in range(prompts)], heads=(kv_heads * number(1, 4), kv_heads), dim=number(1, 9),
        width=number(1, 5),
    )  # fmt: skip
    # A mean of values of both signs may be as near to 0 as it likes.
    largest = max(float(values.nan_to_num().abs().max()) for values in (case.new[1], case.pages[1]))
    assert_same(case.run(impl, scale=0.4), case.truth(0.4), terms(case.layout, case.q.shape[2]), scale=largest)


def test_a_layout_keeps_its_places():
    layout = DecodeLayout.build(rows=5, prompts=3, prompt_tokens=65, own_tokens=64, rows_per_tile=2)
    assert layout.shape == (5, 3) and layout.prompt_page.shape == (3, 2) and layout.own_page.shape == (5, 1)
    addresses = [x.data_ptr() for x in vars(layout).values()]
    layout.place([2, 0, 2, 2, 0])
    assert layout.tile_row.tolist() == [[0, 2], [1, 4], [3, -1], [-1, -1], [-1, -1]]
    assert layout.slot.tolist() == [0, 2, 1, 4, 3]
    assert layout.tile_row.flatten()[layout.slot.long()].tolist() == list(range(5))
    for group in ([0, 1, 2, 0, 1], [1] * 5):  # whatever the groups, there are tiles enough
        layout.place(group)
        assert layout.tile_row.flatten()[layout.slot.long()].tolist() == list(range(5))
        for tile in layout.tile_row.tolist():
            assert len({group[row] for row in tile if row >= 0}) <= 1
    assert [x.data_ptr() for x in vars(layout).values()] == addresses


def test_arguments_are_checked():
    case = Case(torch.float32)
    q, (k, v), pages, layout = case.q, case.new, case.pages, case.layout
    with pytest.raises(ValueError, match=r"group: expected an integer in \[0, 2\], got 3"):
        layout.place([0, 3, 0, 0, 0])
    with pytest.raises(ValueError, match=r"group: expected B = 5 numbers of prompts, got 1"):
        layout.place([0])
    with pytest.raises(ValueError, match=r"prompt_tokens: expected an integer in \[1, 16777216\], got 0"):
        DecodeLayout.build(rows=1, prompts=1, prompt_tokens=0, own_tokens=1)
    with pytest.raises(ValueError, match="layout: expected a DecodeLayout"):
        shared_prompt_decode(q, k, v, *pages, case.lengths)
    with pytest.raises(ValueError, match=r"q: expected floating \(B = 5, Hq, D\), got \(2, 4, 8\)"):
        shared_prompt_decode(q[:2], k, v, *pages, layout)
    with pytest.raises(ValueError, match=r"k: expected Hkv a divisor of Hq = 4"):
        shared_prompt_decode(q, *(x.repeat(1, 2, 1)[:, :3] for x in (k, v)), *pages, layout)
    with pytest.raises(ValueError, match=r"v: expected float32 \(B = 5, Hkv = 2, D = 8\), got .*float64"):
        shared_prompt_decode(q, k, v.double(), *pages, layout)
    with pytest.raises(ValueError, match=r"k_pages: expected float32 \(N, Hkv = 2, 64 = 64, D = 8\), got"):
        shared_prompt_decode(q, k, v, pages[0][:, :, :32], pages[1], layout)
    with pytest.raises(ValueError, match=r"v_pages: expected contiguous pages"):
        shared_prompt_decode(q, k, v, pages[0], pages[1].transpose(2, 3).contiguous().transpose(2, 3), layout)
    with pytest.raises(ValueError, match=r"layout: expected .*heads=4.* or more, got room for 1 query heads"):
        shared_prompt_decode(q, k, v, *pages, replace(layout, arrived=layout.arrived[:5]))
    norm = case.with_norm()
    with pytest.raises(ValueError, match=r"norm: expected \(q_weight, k_weight, cos, sin, eps\), got"):
        case.run("auto", norm=norm[:3])
    with pytest.raises(ValueError, match=r"norm.cos: expected floating \(B = 5, D = 8\), got"):
        case.run("auto", norm=norm._replace(cos=norm.cos[:2]))
    with pytest.raises(ValueError, match=r"norm.eps: "):
        case.run("auto", norm=norm._replace(eps=0))
    with pytest.raises(ValueError, match="impl of shared_prompt_decode"):
        shared_prompt_decode(q, k, v, *pages, layout, impl="sdpa")


@every
@pytest.mark.parametrize("name,value", [("own_page", 99), ("own_page", -1), ("prompt_page", 99), ("own_length", 193),
                                        ("own_length", -1), ("prompt_length", 129)])  # fmt: skip
def test_tables_that_leave_the_pages_are_an_error(impl, name, value):
    case = Case(torch.float32)
    getattr(case.layout, name)[0] = value
    with pytest.raises(ValueError, match=f"layout.{name}: "):
        case.run(impl)


@pytest.mark.skipif(dispatch.interpreting(), reason="about the host's side")
def test_is_an_operator_that_says_what_it_writes():
    case = Case(torch.float32)
    before = [x.clone() for x in case.pages]
    plain = case.run("auto", scale=0.3)
    run = torch.compile(
        lambda *x: shared_prompt_decode(*x, case.layout, scale=0.3), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(run(case.q, *case.new, *before), plain)
    assert all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(before, case.pages))
    pages = [x.nan_to_num() for x in case.pages]
    arguments = (case.q, *case.new, *pages, *vars(case.layout).values(), None, None, None, None, 1.0, 0.3, "native")
    torch.library.opcheck(torch.ops.prism_kernels.shared_prompt_decode.default, arguments)


@pytest.mark.skipif(dispatch.interpreting(), reason="about the host's side")
def test_what_a_gpu_would_run_has_shapes_without_storage():
    layout = DecodeLayout.build(rows=3, prompts=2, prompt_tokens=70, own_tokens=64, device="meta")
    q, k, v = (torch.empty(3, heads, 16, dtype=torch.bfloat16, device="meta") for heads in (4, 2, 2))
    pages = [torch.empty(9, 2, PAGE, 16, dtype=torch.bfloat16, device="meta") for _ in range(2)]
    for impl in ("auto", "triton"):
        out = shared_prompt_decode(q, k, v, *pages, layout, impl=impl)
        assert out.shape == q.shape and out.dtype == q.dtype and out.is_meta


def on_gpu(case):
    layout = DecodeLayout(**{name: x.cuda() for name, x in vars(case.layout).items()})
    return case.q.cuda(), *(x.cuda() for x in (*case.new, *case.pages)), layout


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim,heads", [(64, (4, 2)), (128, (16, 2)), (20, (3, 3))])
def test_on_a_gpu(dtype, dim, heads):
    case = Case(dtype, dim=dim, heads=heads, width=16)
    scale = dim**-0.5
    got = shared_prompt_decode(*on_gpu(case)).cpu()
    assert_as_exact(got, case.truth(scale), case.truth(scale, dtype), terms(case.layout, dim), "out", factor=3.0)


@pytest.mark.gpu
def test_a_captured_graph_reads_lengths_anew():
    case = Case(torch.float32, own=(4, 1, 64, 60, 130))
    *tensors, layout = on_gpu(case)
    shared_prompt_decode(*tensors, layout)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = shared_prompt_decode(*tensors, layout)
    for change in (0, -1, 1):
        layout.own_length.add_(change).clamp_(min=0)
        graph.replay()
        assert torch.equal(out, shared_prompt_decode(*tensors, layout))
