"""triton_merge.py against merge.py in float64: on a GPU, or in Triton's interpreter (test_triton.py)."""

import pytest
import torch

from prism_kernels.dispatch import interpreting
from prism_kernels.tree_attention import merge
from tests.oracle import rounded, roundoff

pytestmark = pytest.mark.skipif(
    not interpreting() and not torch.cuda.is_available(), reason="needs a GPU or TRITON_INTERPRET=1"
)
DEVICE = "cpu" if interpreting() else "cuda"
INF, NAN = float("inf"), float("nan")
# The interpreter truncates bf16 where it stores it.
HALF = torch.float16 if interpreting() else torch.bfloat16
DTYPES = [(HALF, HALF), (torch.float16, torch.float16), (torch.float32, torch.bfloat16)]
SHAPES = [(1, 1, 8), (63, 3, 72), (130, 4, 64), (40, 2, 128), (33, 1, 256)]  # N, Hq, D


def parts(rows, heads, dim, dtype):
    out = torch.randn(rows, heads, dim, device=DEVICE).to(dtype)
    return out, torch.randn(heads, rows, device=DEVICE) * 5


def as_wide(*tensors):
    return [x.double() for x in tensors]


def assert_rounded_once(got, truth, dtype, terms=32):
    """Weights are fp32, sums too."""
    limit = (rounded(dtype, 3) if dtype != torch.float32 else 0) + roundoff(torch.float32) * terms**0.5
    assert torch.equal(got.isnan(), truth.isnan())
    difference = (got.double() - truth).nan_to_num()
    # No element further off than half a unit in the last place of what it is rounded to, and the roundings of fp32.
    unit = torch.finfo(dtype).eps / 2 + 4 * roundoff(torch.float32) * terms**0.5
    assert float(difference.abs().max()) <= unit * float(truth.nan_to_num().abs().max())
    assert float(difference.norm()) <= limit * float(truth.nan_to_num().norm())


@pytest.mark.parametrize("rows, heads, dim", SHAPES)
@pytest.mark.parametrize("dtype, part_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scatter", [False, True])
def test_two_parts_are_one(rows, heads, dim, dtype, part_dtype, scatter):
    from prism_kernels.tree_attention import triton_merge

    out, lse = parts(rows, heads, dim, dtype)
    count = (rows + 1) // 2 if scatter else rows
    part, part_lse = parts(count, heads, dim, part_dtype)
    at = torch.randperm(rows, device=DEVICE)[:count].int() if scatter else None
    truth, total = as_wide(out, lse)
    merge.merge_(truth, total, *as_wide(part, part_lse), at)
    triton_merge.merge_(out, lse, part, part_lse, at)
    assert_rounded_once(out, truth, dtype)
    assert_rounded_once(lse, total, torch.float32)


@pytest.mark.parametrize("last", [False, True])
def test_nothing_infinity_and_nan(last):
    """Every pair of log-sum-exps, with outputs of 0 where there was nothing to sum."""
    from prism_kernels.tree_attention import triton_merge

    values = torch.tensor([-INF, INF, 0.0, 3.0, -90.0, 80.0, NAN], device=DEVICE)
    pairs = torch.cartesian_prod(values, values)
    out, part = (torch.randn(len(pairs), 2, 16, device=DEVICE).to(HALF) for _ in range(2))
    lse, part_lse = (pairs[:, i].expand(2, -1).clone() for i in (0, 1))
    for x, one in ((out, lse), (part, part_lse)):
        x.masked_fill_(one.isinf().T[..., None], 0)
    out[0, 0, 3] = NAN  # of a row of NaN a library too says that there was nothing
    part[2, 1, 5] = NAN
    truth, total = as_wide(out, lse)
    merge.merge_(truth, total, *as_wide(part, part_lse), None, last)
    triton_merge.merge_(out, lse, part, part_lse, None, last)
    assert_rounded_once(out, truth, HALF)
    empty = pairs.isinf().all(1)
    assert (lse[:, empty] == -INF).all() and torch.equal(lse[:, ~empty].isnan(), total[:, ~empty].isnan())
    torch.testing.assert_close(lse[:, ~empty].double(), total[:, ~empty], equal_nan=True, rtol=1e-6, atol=1e-6)
    assert (out[empty].isnan().all() and empty.sum() == 4) if last else (out[empty][1:] == 0).all()


@pytest.mark.parametrize("rows, heads, dim", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_one_part_is_settled(rows, heads, dim, dtype):
    from prism_kernels.tree_attention import triton_merge

    out, lse = parts(rows, heads, dim, dtype)
    lse[:, ::5], lse[0, 1::7] = INF, -INF
    truth, total = out.clone(), lse.clone()
    merge.settle_(truth, total)
    triton_merge.settle_(out, lse)
    assert torch.equal(lse, total) and total.isneginf().any() and not total.isposinf().any()
    torch.testing.assert_close(out, truth, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("rows, heads, dim", SHAPES)
@pytest.mark.parametrize("dtype, part_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scatter", [False, True])
def test_gradients_are_summed_and_rounded_once(rows, heads, dim, dtype, part_dtype, scatter):
    from prism_kernels.tree_attention import triton_merge

    count = (rows + 1) // 2 if scatter else rows
    at = torch.randperm(rows, device=DEVICE)[:count].int() if scatter else None
    sums = [parts(n, h, dim, dtype)[0] for n, h in ((rows, heads), (rows + 5, 1), (rows + 5, 1))]
    added = [parts(n, h, dim, part_dtype)[0] for n, h in ((count, heads), (rows + 5, 1), (rows + 5, 1))]
    truth = as_wide(*sums)
    merge.add_(truth, as_wide(*added), at)
    triton_merge.add_(sums, added, at)
    for got, exact in zip(sums, truth):
        assert torch.equal(got, exact.float().to(dtype))  # two numbers of 16 bits, or 24, sum in fp32 to one rounding


def test_no_queries_and_no_tokens():
    from prism_kernels.tree_attention import triton_merge

    for rows in (0, 3):
        out, lse = parts(rows, 2, 16, torch.bfloat16)
        none = parts(0, 2, 16, torch.bfloat16)
        at = torch.zeros(0, dtype=torch.int32, device=DEVICE)
        before = out.clone(), lse.clone()
        triton_merge.merge_(out, lse, *none, at)
        triton_merge.settle_(out, lse)
        assert torch.equal(out, before[0]) and torch.equal(lse, before[1])
        k = torch.zeros(rows, 1, 16, device=DEVICE).bfloat16()
        triton_merge.add_((out, k, k.clone()), (none[0], k.clone(), k.clone()), at)
        assert torch.equal(out, before[0])
