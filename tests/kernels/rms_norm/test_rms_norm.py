"""The one-step RMSNorm and its rotation: values and gradients against float64 autograd over the plain lines."""

import pytest
import torch
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextRMSNorm, apply_rotary_pos_emb

from prism_fast.models.norm import rms_norm, rms_norm_rotate


def plain(x, weight, eps, cos=None, sin=None):
    y = weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    if cos is None:
        return y
    half = x.shape[-1] // 2
    turned = torch.cat([-y[..., half:], y[..., :half]], dim=-1)
    return y * cos[:, None] + turned * sin[:, None]


def case(dtype, rotate, tokens=13, heads=3, width=8):
    torch.manual_seed(0)
    x = torch.randn(tokens, heads, width, dtype=dtype)
    weight = torch.randn(width, dtype=dtype)
    angle = torch.randn(tokens, width // 2, dtype=dtype).repeat(1, 2)
    return x, weight, ((angle.cos(), angle.sin()) if rotate else ())


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("scale", [1.0, 1e-4])  # 1e-4: eps matters
def test_equals_the_plain_lines(rotate, scale):
    x, weight, turn = case(torch.float64, rotate)
    x = (x * scale).requires_grad_()
    weight.requires_grad_()
    function = rms_norm_rotate if rotate else rms_norm
    got, want = function(x, weight, 1e-6, *turn), plain(x, weight, 1e-6, *turn)
    torch.testing.assert_close(got, want, atol=1e-13, rtol=1e-12)
    upstream = torch.randn_like(got)
    for a, b in zip(torch.autograd.grad(got, (x, weight), upstream), torch.autograd.grad(want, (x, weight), upstream)):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_no_worse_than_transformers(dtype, rotate):
    x, weight, turn = case(dtype, rotate, tokens=257, heads=2, width=64)
    truth = plain(x.double(), weight.double(), 1e-6, *(t.double() for t in turn))
    module = Qwen3VLMoeTextRMSNorm(64).to(dtype)
    module.weight.data.copy_(weight)
    theirs = module(x)
    if rotate:
        theirs, _ = apply_rotary_pos_emb(theirs, theirs[:, :0], *turn, unsqueeze_dim=1)
    mine = (rms_norm_rotate if rotate else rms_norm)(x, weight, 1e-6, *turn)
    assert mine.dtype == dtype
    # Slack of a quarter: the norm is rounded once more, on its way through its root.
    assert (mine - truth).norm() <= (theirs - truth).norm() * 1.25


def test_strided_input_and_no_rows():
    x, weight, turn = case(torch.float32, True)
    strided = torch.stack([x, x], dim=-1)[..., 0].requires_grad_()
    out = rms_norm_rotate(strided, weight, 1e-6, *turn)
    torch.testing.assert_close(out, plain(x, weight, 1e-6, *turn), atol=1e-6, rtol=1e-6)
    out.sum().backward()
    assert strided.grad.isfinite().all()
    empty = x[:0].requires_grad_()
    rms_norm(empty, weight.requires_grad_(), 1e-6).sum().backward()
    assert (weight.grad == 0).all()
