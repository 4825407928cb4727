"""The norms and SwiGLU in C++ are the definitions' in float64 and as exact as torch in fp32; they have no gradient."""

import copy

import pytest
import torch

from prism_kernels import qk_norm_rotate, rms_norm, swiglu
from tests.oracle import assert_as_exact, assert_same

WIDTHS = [1, 7, 8, 33, 160]


def numbers(*shape):
    return torch.randn(shape) * 3


def calls(width):
    """name -> (call, its tensors, terms of its sums)"""
    half = width + width % 2
    heads, turn = numbers(5, 8, half), [x.repeat(1, 2) for x in (numbers(5, half // 2), numbers(5, half // 2))]
    gate_up = numbers(5, 2 * width) * 10
    gate_up[0, 0], gate_up[0, width], gate_up[1, 0] = 300.0, 2.0, -300.0
    return {
        "norm": (lambda x, w, impl: rms_norm(x, w, 1e-6, impl=impl), [numbers(5, width), numbers(width)], width),
        "residual": (
            lambda x, w, r, impl: torch.stack(rms_norm(x, w, 1e-6, residual=r, impl=impl)),
            [numbers(5, width), numbers(width), numbers(5, width)],
            width,
        ),
        "heads in place": (
            lambda x, w, v, cos, sin, impl: torch.cat(
                qk_norm_rotate(x[:, 1:5], x[:, 5:7], w, v, cos, sin, 1e-6, impl=impl), 1
            ),
            [heads, numbers(half), numbers(half), *turn],
            half,
        ),
        "swiglu": (lambda x, impl: swiglu(x, impl=impl), [gate_up], 4),
        "swiglu, apart": (lambda g, u, impl: swiglu(g, up=u, impl=impl), [numbers(5, width), numbers(5, width)], 4),
    }


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", calls(2))
def test_as_exact_as_the_definition(name, width):
    call, tensors, terms = calls(width)[name]
    wide = [x.double() for x in tensors]
    truth, eager = call(*wide, "reference"), call(*tensors, "reference")
    assert_as_exact(call(*tensors, "native"), truth, eager, terms + 8)
    assert_same(call(*wide, "native"), truth, terms + 8)


@pytest.mark.parametrize("name", calls(2))
def test_what_it_does_not_take_is_refused_with_an_alternative(name):
    call, tensors, _ = calls(8)[name]
    with pytest.raises(
        RuntimeError, match=r"implementation 'native' takes fp32 and fp64, got torch\.bfloat16; use impl"
    ):
        call(*[x.bfloat16() for x in tensors], "native")
    leaves = [copy.deepcopy(x).requires_grad_(i == 0) for i, x in enumerate(tensors)]
    with pytest.raises(RuntimeError, match="implementation 'native' has no gradient; use impl='torch'"):
        call(*leaves, "native")
    with torch.no_grad():
        call(*leaves, "native")
