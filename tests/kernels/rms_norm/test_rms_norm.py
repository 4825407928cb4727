"""RMSNorm and its rotation: values and gradients against float64 autograd over the plain lines."""

import pytest
import torch
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRMSNorm, apply_rotary_pos_emb

from prism_kernels import dispatch, qk_norm_rotate, rms_norm
from prism_kernels.rms_norm import rms_norm_rotate
from tests.oracle import assert_as_exact, assert_same, double

IMPLS = [str(name) for name in dispatch._OPS["rms_norm"].table]
every = pytest.mark.parametrize("impl", IMPLS)


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


def case(dtype, rotate, tokens=13, heads=3, width=8):
    x = torch.randn(tokens, heads, width, dtype=dtype)
    weight = torch.randn(width, dtype=dtype)
    angle = torch.randn(tokens, width // 2, dtype=dtype).repeat(1, 2)
    return x, weight, ((angle.cos(), angle.sin()) if rotate else ())


def run(x, weight, turn, impl, eps=1e-6):
    return rms_norm_rotate(x, weight, *turn, eps, impl=impl) if turn else rms_norm(x, weight, eps, impl=impl)


@every
@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("scale", [1.0, 1e-4])  # 1e-4: eps matters
def test_equals_the_plain_lines(rotate, scale, impl):
    x, weight, turn = case(torch.float64, rotate)
    x = (x * scale).requires_grad_()
    weight.requires_grad_()
    got, want = run(x, weight, turn, impl), plain(x, weight, 1e-6, *turn)
    assert_same(got, want, terms(8))
    upstream = torch.randn_like(got)
    for a, b in zip(torch.autograd.grad(got, (x, weight), upstream), torch.autograd.grad(want, (x, weight), upstream)):
        assert_same(a, b, terms(8, rows=13 * 3))


def transformers_lines(x, weight, turn=()):
    module = Qwen3VLTextRMSNorm(len(weight))
    module.weight = torch.nn.Parameter(weight)
    y = module(x)
    if not turn:
        return y, module.weight
    heads = y[None].transpose(1, 2)
    return apply_rotary_pos_emb(heads, heads, *(part[None] for part in turn))[0].transpose(1, 2)[0], module.weight


@every
@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_no_worse_than_transformers(dtype, rotate, impl):
    x, weight, turn = case(dtype, rotate, tokens=257, heads=2, width=64)
    upstream = torch.randn_like(x)
    x.requires_grad_()
    theirs, their_weight = transformers_lines(x, weight, turn)
    eager = [theirs, *torch.autograd.grad(theirs, (x, their_weight), upstream)]
    weight.requires_grad_()
    mine = run(x, weight, turn, impl)
    assert mine.dtype == dtype
    mine = [mine, *torch.autograd.grad(mine, (x, weight), upstream)]
    wide_x, wide_weight = double(x, weight)
    truth = plain(wide_x, wide_weight, 1e-6, *(part.double() for part in turn))
    truth = [truth, *torch.autograd.grad(truth, (wide_x, wide_weight), upstream.double())]
    for a, t, e, what in zip(mine, truth, eager, ("y", "gradient of x", "gradient of weight")):
        assert_as_exact(a, t, e, terms(64, rows=257 * 2), what)


@pytest.mark.parametrize("rotate", [False, True])
def test_the_reference_has_the_bits_of_transformers(rotate):
    x, weight, turn = case(torch.float32, rotate, tokens=97, heads=4, width=32)
    x.requires_grad_()
    upstream = torch.randn_like(x)
    rows = torch.arange(97)  # behind a gather, as in attention, whose gradient is contiguous
    theirs, their_weight = transformers_lines(x, weight, turn)
    weight = weight.clone().requires_grad_()
    mine = run(x, weight, turn, "reference")
    assert torch.equal(mine, theirs)
    got = torch.autograd.grad(mine.index_select(0, rows), (x, weight), upstream)
    want = torch.autograd.grad(theirs.index_select(0, rows), (x, their_weight), upstream)
    assert all(torch.equal(a, b) for a, b in zip(got, want))


@every
def test_a_residual_is_added_first_and_returned(impl):
    x, residual = (torch.randn(5, 7, 24, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.randn(24, dtype=torch.float64, requires_grad=True)
    got = rms_norm(x, weight, 1e-5, residual=residual, impl=impl)
    want = plain(x + residual, weight, 1e-5), x + residual
    upstream = [torch.randn_like(part) for part in want]
    for a, b in zip(got, want, strict=True):
        assert_same(a, b, terms(24))
    leaves = (x, residual, weight)
    for a, b in zip(torch.autograd.grad(got, leaves, upstream), torch.autograd.grad(want, leaves, upstream)):
        assert_same(a, b, terms(24, rows=5 * 7))


@every
def test_queries_and_keys_are_normalised_and_rotated_each(impl):
    q, q_weight, turn = case(torch.float64, True, heads=4)
    k, k_weight, _ = case(torch.float64, True, heads=2)
    leaves = [tensor.requires_grad_() for tensor in (q, k, q_weight, k_weight)]
    turn = tuple(part.requires_grad_() for part in turn)
    got = qk_norm_rotate(*leaves, *turn, 1e-6, impl=impl)
    want = plain(q, q_weight, 1e-6, *turn), plain(k, k_weight, 1e-6, *turn)
    upstream = [torch.randn_like(part) for part in want]
    for a, b in zip(got, want, strict=True):
        assert_same(a, b, terms(8))
    assert all(grad is None for grad in torch.autograd.grad(got, turn, upstream, allow_unused=True, retain_graph=True))
    for a, b in zip(torch.autograd.grad(got, leaves, upstream), torch.autograd.grad(want, leaves, upstream)):
        assert_same(a, b, terms(8, rows=13 * 4))


@every
@pytest.mark.parametrize("rotate", [False, True])
def test_strided_input_strided_gradient_and_no_rows(rotate, impl):
    x, weight, turn = case(torch.float64, rotate)
    strided = torch.stack([x, x], dim=-1)[..., 0].requires_grad_()
    upstream = torch.randn(3, 8, 13, dtype=torch.float64).permute(2, 0, 1)
    leaf = x.clone().requires_grad_()
    (got,) = torch.autograd.grad(run(strided, weight, turn, impl), strided, upstream)
    (want,) = torch.autograd.grad(plain(leaf, weight, 1e-6, *turn), leaf, upstream)
    assert_same(got, want, terms(8, rows=13 * 3))
    empty = x[:0].requires_grad_()
    run(empty, weight.requires_grad_(), tuple(part[:0] for part in turn), impl).sum().backward()
    assert (weight.grad == 0).all()


def test_arguments_are_checked():
    x, weight, (cos, sin) = case(torch.float32, True)
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
    with pytest.raises(ValueError, match="impl of rms_norm: expected auto or one of torch, reference, got 'cpu'"):
        rms_norm(x, weight, 1e-6, impl="cpu")
