"""RMSNorm and its rotation: values and gradients against float64 autograd over the plain lines.

Runs the Triton kernels where there is a GPU; elsewhere test_triton.py runs this file in Triton's interpreter.
"""

import pytest
import torch
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRMSNorm, apply_rotary_pos_emb

from prism_kernels import qk_norm_rotate, rms_norm
from prism_kernels.rms_norm import operators, rms_norm_rotate
from tests.kernels.linear_logprob.linear_cases import INTERPRETED, skip_interpreted
from tests.oracle import assert_as_exact, assert_same, double

IMPLS = (
    [("triton", "cpu")]
    if INTERPRETED
    else [("torch", "cpu"), ("reference", "cpu"), pytest.param("triton", "cuda", marks=pytest.mark.gpu)]
)
HALF = torch.float16 if INTERPRETED else torch.bfloat16  # the interpreter truncates where a GPU rounds to bf16
ROWS = 33 if INTERPRETED else 257
every = pytest.mark.parametrize(("impl", "device"), IMPLS)
kernels = pytest.mark.parametrize(("impl", "device"), [row for row in IMPLS if "triton" in str(row)])


def terms(width, rows=None):
    """Roundings on the way to a value: mean square, root, products. To a gradient over rows: twice, and these."""
    return width + 8 if rows is None else 2 * (width + 8) + rows


def plain(x, weight, eps, cos=None, sin=None):
    y = weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    if cos is None:
        return y
    half = x.shape[-1] // 2
    turned = torch.cat([-y[..., half:], y[..., :half]], dim=-1)
    return y * cos[:, None] + turned * sin[:, None]


def case(dtype, rotate, device="cpu", tokens=13, heads=3, width=8):
    """x, weight and the rotation: leaves."""
    x = torch.randn(tokens, heads, width, dtype=dtype)
    weight = torch.randn(width, dtype=dtype)
    angle = torch.randn(tokens, width // 2, dtype=torch.promote_types(dtype, torch.float32)).repeat(1, 2)
    turn = (angle.cos().to(device), angle.sin().to(device)) if rotate else ()
    return x.to(device).requires_grad_(), weight.to(device).requires_grad_(), turn


def run(x, weight, turn, impl, eps=1e-6):
    return rms_norm_rotate(x, weight, *turn, eps, impl=impl) if turn else rms_norm(x, weight, eps, impl=impl)


def with_gradients(outputs, leaves, upstream):
    outputs, upstream = (x if isinstance(x, tuple) else (x,) for x in (outputs, upstream))
    return [*outputs, *torch.autograd.grad(outputs, leaves, upstream)]


@pytest.fixture
def poisoned():
    """Memory that nobody wrote holds NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@every
@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("scale", [1.0, 1e-4])  # 1e-4: eps matters
@pytest.mark.parametrize("tokens,heads,width", [(13, 3, 8), (1, 1, 2), (9, 5, 254), (2, 40, 96)])
def test_equals_the_plain_lines(tokens, heads, width, rotate, scale, impl, device, poisoned):
    x, weight, turn = case(torch.float64, rotate, device, tokens, heads, width)
    x = (x * scale).detach().requires_grad_()
    upstream = torch.randn_like(x)
    got = with_gradients(run(x, weight, turn, impl), (x, weight), upstream)
    want = with_gradients(plain(x, weight, 1e-6, *turn), (x, weight), upstream)
    for a, b in zip(got, want, strict=True):
        assert_same(a, b, terms(width, rows=tokens * heads))


@every
@pytest.mark.parametrize("tokens,width", [(3, 1), (70, 63), (5, 1003), (3, 9001)])  # 9,001: more than a program holds
@pytest.mark.parametrize("residual", [False, True])
def test_rows_of_any_width(tokens, width, residual, impl, device, poisoned):
    leaves = [torch.randn(tokens, width, dtype=torch.float64, device=device) for _ in range(2 + residual)]
    x, weight, *added = [x.requires_grad_() for x in [leaves[0], torch.randn_like(leaves[0][0]), *leaves[2:]]]
    got = rms_norm(x, weight, 1e-5, residual=added[0] if residual else None, impl=impl)
    total = x + added[0] if residual else x
    want = (plain(total, weight, 1e-5), total) if residual else plain(total, weight, 1e-5)
    upstream = tuple(torch.randn_like(x) for _ in range(1 + residual))
    summed = (upstream[0] * weight * total.square().mean(-1, keepdim=True).rsqrt()).abs().max()  # may cancel
    for a, b in zip(*(with_gradients(out, (x, weight, *added), upstream) for out in (got, want)), strict=True):
        assert_same(a, b, terms(width, rows=tokens), scale=torch.maximum(b.abs().max(), summed))


def transformers_lines(x, weight, turn=()):
    module = Qwen3VLTextRMSNorm(len(weight)).to(x.device)
    module.weight = torch.nn.Parameter(weight.detach())
    y = module(x)
    if not turn:
        return y, module.weight
    heads = y[None].transpose(1, 2)
    turn = [part.to(x.dtype)[None] for part in turn]
    return apply_rotary_pos_emb(heads, heads, *turn)[0].transpose(1, 2)[0], module.weight


@every
@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_is_no_worse_than_transformers(dtype, rotate, impl, device):
    x, weight, turn = case(dtype, rotate, device, tokens=ROWS, heads=2, width=64)
    upstream = torch.randn_like(x)
    theirs, their_weight = transformers_lines(x, weight, turn)
    eager = with_gradients(theirs, (x, their_weight), upstream)
    mine = with_gradients(run(x, weight, turn, impl), (x, weight), upstream)
    assert all(out.dtype == dtype for out in mine)
    wide_x, wide_weight = double(x, weight)
    truth = plain(wide_x, wide_weight, 1e-6, *(part.double() for part in turn))
    truth = with_gradients(truth, (wide_x, wide_weight), upstream.double())
    for a, t, e, what in zip(mine, truth, eager, ("y", "gradient of x", "gradient of weight")):
        assert_as_exact(a, t, e, terms(64, rows=ROWS * 2), what)


@every
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_a_residual_is_no_worse_than_transformers(dtype, impl, device):
    x, weight, _ = case(dtype, False, device, tokens=ROWS, heads=1, width=64)
    residual, upstream = torch.randn_like(x).requires_grad_(), (torch.randn_like(x), torch.randn_like(x))
    theirs, their_weight = transformers_lines(x + residual, weight)
    eager = with_gradients((theirs, x + residual), (x, residual, their_weight), upstream)
    leaves = (x, residual, weight)
    mine = with_gradients(rms_norm(x, weight, 1e-6, residual=residual, impl=impl), leaves, upstream)
    assert torch.equal(mine[1], x + residual) and all(out.dtype == dtype for out in mine)
    wide = double(*leaves)
    total = wide[0] + wide[1]
    truth = with_gradients((plain(total, wide[2], 1e-6), total), wide, tuple(x.double() for x in upstream))
    for a, t, e in zip(mine, truth, eager, strict=True):
        assert_as_exact(a, t, e, terms(64, rows=ROWS))


@skip_interpreted
@pytest.mark.parametrize("rotate", [False, True])
def test_the_reference_has_the_bits_of_transformers(rotate):
    x, weight, turn = case(torch.float32, rotate, tokens=97, heads=4, width=32)
    upstream = torch.randn_like(x)
    rows = torch.arange(97)  # behind a gather, as in attention, whose gradient is contiguous
    theirs, their_weight = transformers_lines(x, weight, turn)
    mine = run(x, weight, turn, "reference")
    assert torch.equal(mine, theirs)
    got = torch.autograd.grad(mine.index_select(0, rows), (x, weight), upstream)
    want = torch.autograd.grad(theirs.index_select(0, rows), (x, their_weight), upstream)
    assert all(torch.equal(a, b) for a, b in zip(got, want))


@every
@pytest.mark.parametrize("used", [(0, 1), (0,), (1,)])  # of (y, sum): whose gradient there is
def test_a_residual_is_added_first_and_returned(used, impl, device):
    x, residual = (torch.randn(5, 7, 24, dtype=torch.float64, device=device, requires_grad=True) for _ in range(2))
    weight = torch.randn(24, dtype=torch.float64, device=device, requires_grad=True)
    got = rms_norm(x, weight, 1e-5, residual=residual, impl=impl)
    want = plain(x + residual, weight, 1e-5), x + residual
    for a, b in zip(got, want, strict=True):
        assert_same(a, b, terms(24))
    leaves = (x, residual, weight) if 0 in used else (x, residual)
    upstream = tuple(torch.randn_like(want[i]) for i in used)
    gradients = [torch.autograd.grad([out[i] for i in used], leaves, upstream) for out in (got, want)]
    for a, b in zip(*gradients, strict=True):
        assert_same(a, b, terms(24, rows=5 * 7))


@every
def test_gradients_of_x_and_of_the_residual_are_not_one_tensor_in_memory(impl, device):
    x, weight, _ = case(torch.float64, False, device)
    residual = torch.randn_like(x).requires_grad_()
    for out in rms_norm(x, weight, 1e-6, residual=residual, impl=impl):
        out.sum().backward(retain_graph=True)
    before = residual.grad.clone()
    x.grad.zero_()
    assert torch.equal(residual.grad, before)


@every
def test_gradients_of_some_alone(impl, device):
    x, weight, _ = case(torch.float64, False, device)
    y = rms_norm(x, weight, 1e-6, impl=impl)
    upstream = torch.randn_like(y)
    both = torch.autograd.grad(y, (x, weight), upstream)
    (d_x,) = torch.autograd.grad(rms_norm(x, weight.detach(), 1e-6, impl=impl), x, upstream)
    (d_weight,) = torch.autograd.grad(rms_norm(x.detach(), weight, 1e-6, impl=impl), weight, upstream)
    assert torch.equal(d_x, both[0]) and torch.equal(d_weight, both[1])


@every
@pytest.mark.parametrize("q_heads,k_heads,width", [(4, 2, 8), (1, 1, 2), (32, 8, 128), (3, 7, 30)])
def test_queries_and_keys_are_normalised_and_rotated_each(q_heads, k_heads, width, impl, device, poisoned):
    q, q_weight, turn = case(torch.float64, True, device, heads=q_heads, width=width)
    k, k_weight, _ = case(torch.float64, True, device, heads=k_heads, width=width)
    leaves, turn = (q, k, q_weight, k_weight), tuple(part.requires_grad_() for part in turn)
    got = qk_norm_rotate(*leaves, *turn, 1e-6, impl=impl)
    want = plain(q, q_weight, 1e-6, *turn), plain(k, k_weight, 1e-6, *turn)
    upstream = tuple(torch.randn_like(part) for part in want)
    assert all(grad is None for grad in torch.autograd.grad(got, turn, upstream, allow_unused=True, retain_graph=True))
    for a, b in zip(*(with_gradients(out, leaves, upstream) for out in (got, want)), strict=True):
        assert_same(a, b, terms(width, rows=13 * max(q_heads, k_heads)))
    (alone,) = torch.autograd.grad(qk_norm_rotate(*leaves, *turn, 1e-6, impl=impl)[0], q, upstream[0])
    (one,) = torch.autograd.grad(rms_norm_rotate(q, q_weight, *turn, 1e-6, impl=impl), q, upstream[0])
    assert_same(alone, one, terms(width))


@every
@pytest.mark.parametrize("rotate", [False, True])
def test_the_same_input_gives_the_same_bits(rotate, impl, device):
    x, weight, turn = case(torch.bfloat16, rotate, device, tokens=ROWS)
    upstream = torch.randn_like(x)
    first, second = (with_gradients(run(x, weight, turn, impl), (x, weight), upstream) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@every
@pytest.mark.parametrize("rotate", [False, True])
def test_strided_input_strided_gradient_and_no_rows(rotate, impl, device):
    x, weight, turn = case(torch.float64, rotate, device)
    strided = torch.stack([x, x], dim=-1)[..., 0].detach().requires_grad_()
    upstream = torch.randn(3, 8, 13, dtype=torch.float64, device=device).permute(2, 0, 1)
    (got,) = torch.autograd.grad(run(strided, weight, turn, impl), strided, upstream)
    (want,) = torch.autograd.grad(plain(x, weight, 1e-6, *turn), x, upstream)
    assert_same(got, want, terms(8, rows=13 * 3))
    (got,) = torch.autograd.grad(run(x, weight, turn, impl).sum(), x)  # a gradient of strides 0
    (want,) = torch.autograd.grad(plain(x, weight, 1e-6, *turn).sum(), x)
    assert_same(got, want, terms(8, rows=13 * 3))
    empty = x[:0].detach().requires_grad_()
    run(empty, weight, tuple(part[:0] for part in turn), impl).sum().backward()
    assert (weight.grad == 0).all()


@every
def test_views_of_a_packed_projection(impl, device):
    packed = torch.randn(13, 8 * 16, dtype=torch.float64, device=device, requires_grad=True)
    _, weight, turn = case(torch.float64, True, device, width=16)

    def heads(x):
        return x[:, : 4 * 16].view(13, 4, 16), x[:, 4 * 16 : 6 * 16].view(13, 2, 16)

    def attended(rotate):
        q, k = rotate(*heads(packed))
        return torch.cat((q, k), 1).square().sum()

    got = attended(lambda q, k: qk_norm_rotate(q, k, weight, weight, *turn, 1e-6, impl=impl))
    want = attended(lambda q, k: [plain(x, weight, 1e-6, *turn) for x in (q, k)])
    for a, b in zip(*(torch.autograd.grad(loss, (packed, weight)) for loss in (got, want))):
        assert_same(a, b, terms(16, rows=13 * 6))


@every
def test_one_row_without_a_batch(impl, device):
    x, weight, _ = case(torch.float64, False, device, tokens=1, heads=1)
    alone, row = rms_norm(x[0, 0], weight, 1e-6, impl=impl), rms_norm(x[0], weight, 1e-6, impl=impl)
    assert alone.shape == (8,) and torch.equal(alone, row[0])


def test_what_has_its_last_dimension_together_is_read_where_it_lies():
    pytest.importorskip("triton")
    from prism_kernels.rms_norm.triton_launch import contiguous_last, rows_of

    packed = torch.randn(6, 5 * 8)
    heads = packed[:, 8:32].view(6, 3, 8)
    for x, given in ((contiguous_last(heads), heads), (rows_of(packed[::2, 8:]), packed[::2, 8:])):
        assert x.data_ptr() == given.data_ptr() and x.stride() == given.stride()
    assert rows_of(heads.transpose(0, 1)).shape == (18, 8) and contiguous_last(packed.T).is_contiguous()


@kernels
@pytest.mark.parametrize("rotate", [False, True])
def test_a_batch_of_gradients_and_a_second_derivative_are_refused(rotate, impl, device):
    x, weight, turn = case(torch.float64, rotate, device)
    out = run(x, weight, turn, impl)
    with pytest.raises(NotImplementedError, match=r"(rms_norm|qk_norm_rotate): no batch of gradients"):
        torch.autograd.grad(out, x, torch.stack([out, out]), is_grads_batched=True, retain_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(out.sum(), x, create_graph=True)


@kernels
def test_operators_keep_their_promises(impl, device):
    """Schema, fake, autograd, dynamic shapes; also of the backward operators."""
    x, weight, (cos, sin) = case(torch.float32, True, device, tokens=3)
    k, eps, opcheck = x[:, :1].detach().requires_grad_(), 1e-6, torch.library.opcheck
    scale = torch.ones(9, device=device)
    for residual in (None, x.detach().requires_grad_()):
        opcheck(operators._norm.overload, (x, residual, weight, eps))
        for with_weight in (False, True):
            opcheck(operators._norm_backward.overload, (x, residual, x, weight, scale, with_weight))
    for keys in ((k, weight), (None, None)):
        heads = (x, keys[0], weight, keys[1], cos, sin, eps)
        opcheck(operators._rotate.overload, heads)
        opcheck(operators._rotate_backward.overload, (x, keys[0], *heads))


@skip_interpreted
def test_arguments_are_checked():
    x, weight, (cos, sin) = case(torch.float32, True)
    x = x.detach()
    with pytest.raises(ValueError, match=r"x: expected floating \(..., H\), H >= 1, got \(3,\) torch.int64"):
        rms_norm(torch.arange(3), weight, 1e-6)
    with pytest.raises(ValueError, match=r"weight: expected floating \(H = 8,\), got \(7,\)"):
        rms_norm(x, weight[:7], 1e-6)
    with pytest.raises(ValueError, match=r"residual: expected \(13, 3, 8\) torch.float32 on cpu, as x is"):
        rms_norm(x, weight, 1e-6, residual=x.double())
    with pytest.raises(ValueError, match=r"k: expected float32 \(T = 13, Hkv, D = 8\), got \(5, 3, 8\)"):
        qk_norm_rotate(x, x[:5], weight, weight, cos, sin, 1e-6)
    with pytest.raises(ValueError, match=r"k_weight: expected floating \(D = 8,\)"):
        qk_norm_rotate(x, x, weight, weight[:4], cos, sin, 1e-6)
    with pytest.raises(ValueError, match=r"q: expected an even D, at least 2, got \(13, 3, 7\)"):
        qk_norm_rotate(x[..., :7], x, weight, weight, cos, sin, 1e-6)
    with pytest.raises(ValueError, match=r"sin: expected floating \(T = 13, D = 8\), got \(4, 8\)"):
        rms_norm_rotate(x, weight, cos, sin[:4], 1e-6)
    with pytest.raises(ValueError, match="impl of rms_norm: expected auto or one of triton, torch, native, "):
        rms_norm(x, weight, 1e-6, impl="cpu")
