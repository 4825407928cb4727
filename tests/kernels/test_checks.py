"""The grammar of the ops' argument errors: NAME: expected WHAT, got WHAT; remedy."""

import re
from fractions import Fraction

import numpy as np
import pytest
import torch

from prism_kernels import checks

BF16, FP32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    "value,shape,dtype",
    [
        (torch.zeros(2, 3), {"T": None, "H": 3}, checks.FLOATING),
        (torch.zeros(2, 3, dtype=BF16), {"T": 2, "H": 3}, (FP32, BF16)),
        (torch.zeros(0, dtype=torch.uint8), {"T": None}, checks.INTEGER),
        (torch.zeros(()), {}, checks.FLOATING),
    ],
)
def test_tensors_that_pass(value, shape, dtype):
    checks.check_tensor("x", value, shape, dtype)


@pytest.mark.parametrize(
    "value,shape,dtype,said",
    [
        ([1.0], {"T": 1}, checks.FLOATING, "x: expected floating (T = 1,), got no tensor but list"),
        (torch.zeros(2), {"T": 3}, checks.FLOATING, "x: expected floating (T = 3,), got (2,) torch.float32 on cpu"),
        (torch.zeros(2), {"T": 2, "H": None}, checks.FLOATING, "x: expected floating (T = 2, H), got (2,) torch"),
        (torch.zeros(2), {"T": None}, checks.INTEGER, "x: expected integer (T,), got (2,) torch.float32"),
        (torch.zeros(2) > 0, {"T": None}, checks.INTEGER, "x: expected integer (T,), got (2,) torch.bool"),
        (torch.zeros(2), {"T": 2}, (torch.int32, torch.int64), "x: expected int32 or int64 (T = 2,), got (2,) torch"),
    ],
)
def test_tensors_that_do_not(value, shape, dtype, said):
    with pytest.raises(ValueError, match="^" + re.escape(said)):
        checks.check_tensor("x", value, shape, dtype)


def test_the_remedy_comes_last():
    with pytest.raises(ValueError, match=r"got \(2,\) torch.float32 on cpu; flatten it$"):
        checks.check_tensor("x", torch.zeros(2), {}, checks.FLOATING, "flatten it")


def test_places_and_constants():
    here, there = torch.zeros(2), torch.zeros(2, device="meta")
    checks.check_device("x", here, "y", here)
    checks.check_device("x", here, "y", there, host=True)
    with pytest.raises(ValueError, match=r"x: expected a tensor on meta, as y is, got \(2,\) torch.float32 on cpu"):
        checks.check_device("x", here, "y", there)
    checks.check_constant("x", here)
    with pytest.raises(ValueError, match=r"x: expected a constant, got .* requires grad; detach"):
        checks.check_constant("x", torch.zeros(2, requires_grad=True))


def test_values_are_read_where_the_host_can_see_them():
    checks.check_values("x", torch.tensor([0, 3]), "E", 4)
    checks.check_values("x", torch.tensor([], dtype=torch.int64), "E", 0)
    checks.check_values("x", torch.tensor([9], device="meta"), "E", 4)
    with pytest.raises(ValueError, match=r"x: expected values in \[0, E = 4\), got -1 to 4"):
        checks.check_values("x", torch.tensor([-1, 4]), "E", 4)


@pytest.mark.parametrize("value", [2, 2.0, np.float32(2), torch.tensor(2.0), torch.tensor(2), Fraction(2)])
def test_numbers_of_every_kind_become_floats(value):
    number = checks.number("x", value, above=0)
    assert number == 2 and type(number) is float


@pytest.mark.parametrize("value", ["2", None, [2.0], torch.ones(1), torch.tensor(2j), 2j, float("nan"), float("inf")])
def test_what_is_no_finite_number(value):
    with pytest.raises(ValueError, match="x: expected a finite number, got "):
        checks.number("x", value)


def test_bounds_of_numbers():
    assert checks.number("x", float("inf"), above=1, finite=False) == float("inf")
    assert checks.number("x", 0, at_least=0) == 0
    for bounds, said in (({"above": 0}, "finite number > 0"), ({"at_least": 1, "finite": False}, "number >= 1")):
        with pytest.raises(ValueError, match=f"x: expected a {said}, got 0"):
            checks.number("x", 0, **bounds)
    with pytest.raises(ValueError, match="x: expected a number >= 1, got nan"):
        checks.number("x", float("nan"), at_least=1, finite=False)


@pytest.mark.parametrize("value", [3, np.int32(3), torch.tensor(3)])
def test_integers_of_every_kind(value):
    assert checks.integer("x", value, at_least=1, at_most=3) == 3


@pytest.mark.parametrize(
    "value,bounds,said",
    [
        (3.0, (), "an integer, got 3.0"),
        (True, (), "an integer, got True"),
        ("3", (), "an integer, got '3'"),
        (0, (1,), "an integer >= 1, got 0"),
        (4, (1, 3), "an integer in [1, 3], got 4"),
    ],
)
def test_what_is_no_integer(value, bounds, said):
    with pytest.raises(ValueError, match=re.escape(f"x: expected {said}")):
        checks.integer("x", value, *bounds)


def test_choices():
    checks.one_of("x", "a", ("a", "b"))
    with pytest.raises(ValueError, match="x: expected 'a' or 'b', got 'c'"):
        checks.one_of("x", "c", ("a", "b"))
