"""The yardsticks of the other tests: what they let pass, and that they fail."""

import math
import time

import pytest
import torch

from tests import oracle, timing

TERMS = 4096


def sums(dtype=torch.float32):
    """(in one order, in another, in float64) of rows of random terms."""
    terms = torch.randn(50, TERMS, dtype=torch.float64).to(dtype)
    backwards = terms.flip(1).view(50, 64, 64).sum(1).sum(1)
    one_by_one = torch.zeros(50, dtype=dtype)
    for column in terms.T:
        one_by_one += column
    return one_by_one, backwards, terms.double().sum(1)


def test_any_order_of_a_sum_passes():
    ours, theirs, truth = sums()
    oracle.assert_as_exact(ours, truth, theirs, TERMS)
    oracle.assert_as_exact(theirs, truth, truth, TERMS)  # eager exact by luck
    oracle.assert_same(ours, theirs, TERMS)
    ours, theirs, truth = sums(torch.float64)
    oracle.assert_as_exact(ours, truth, theirs, TERMS)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda t: t * (1 + 1e-4),
        lambda t: t.bfloat16().float(),
        lambda t: t.index_fill(0, torch.tensor([7]), 0.0),
        lambda t: t.index_fill(0, torch.tensor([7]), math.nan),
        lambda t: t + 1e-3 * t.abs().max() * (torch.arange(50) == 7),  # one element, which a norm would hide
    ],
)
def test_what_is_wrong_fails(spoil):
    ours, theirs, truth = sums()
    with pytest.raises(AssertionError, match=r"name: .*worst at"):
        oracle.assert_as_exact(spoil(ours), truth, theirs, TERMS, "name")
    with pytest.raises(AssertionError, match=r"name: .*worst at"):
        oracle.assert_same(spoil(ours), theirs, 100, "name")


def test_shapes_and_counts_are_checked():
    ours, theirs, truth = sums()
    with pytest.raises(AssertionError, match="shape"):
        oracle.assert_same(ours, theirs[:3], TERMS)
    with pytest.raises(AssertionError, match="terms: expected the number of roundings, got 1e-05"):
        oracle.assert_as_exact(ours, truth, theirs, 1e-5)


def test_a_rounding_is_within_its_bound_and_two_are_not():
    x = torch.randn(100_000, dtype=torch.float64)
    assert oracle.relative_error(x.bfloat16(), x) < oracle.rounded(torch.bfloat16) < 2**-8
    assert oracle.relative_error(x.bfloat16() * (1 + 2**-8), x) > oracle.rounded(torch.bfloat16)


def spin(seconds):
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


@pytest.mark.slow
def test_growth_and_ratios_are_told_apart():
    timing.assert_linear(lambda size: lambda: spin(size * 2e-4), 8)
    with pytest.raises(AssertionError, match="8 times the size took"):
        timing.assert_linear(lambda size: lambda: spin(size**2 * 5e-6), 16, tries=1)
    timing.assert_faster(lambda: spin(2e-3), lambda: spin(2e-2), 4)
    with pytest.raises(AssertionError, match="faster by"):
        timing.assert_faster(lambda: spin(2e-2), lambda: spin(2e-3), 4, tries=1)
