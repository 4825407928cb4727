"""The kernels of losses where the host sees less than on a CPU: skipped rows are computed, offsets are not checked.

In the interpreter, where test_triton.py runs this file; on a GPU the other tests show it.
"""

import pytest
import torch

from prism_kernels import linear_cross_entropy
from prism_kernels.linear_logprob import autograd, plan
from tests import oracle
from tests.kernels.linear_logprob.linear_cases import INTERPRETED, gradients, make
from tests.kernels.linear_logprob.test_linear_policy_loss import OBJECTIVES, ROWS, Inputs, assert_exact, check_stats

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="runs in the interpreter alone")


@pytest.fixture(params=[ROWS, 17], ids=["one chunk", "chunks"])
def unseen(request, monkeypatch):
    """The plan of what lies on a GPU; programs of few rows, so that there are several."""
    from prism_kernels.linear_logprob import triton_glue

    def make_plan(head, targets, **_):
        rows, size = len(targets), request.param
        chunks = [(start, min(start + size, rows)) for start in range(0, rows, size)]
        return plan.Plan(rows, None, targets, chunks, len(chunks) <= 1, True)

    monkeypatch.setattr(autograd, "make_plan", make_plan)
    monkeypatch.setattr(triton_glue, "ROWS", 8)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_value_gradients_and_statistics(name, unseen):
    objective, inputs = OBJECTIVES[name], Inputs()
    loss, seen, *_, truth = inputs.truth(objective)
    out = inputs(objective, "triton")
    assert_exact(out.loss, gradients(out.loss, inputs.case.leaves), loss, truth, inputs)
    check_stats(out.stats, seen, set(out.stats), inputs.terms)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("normalizer", [None, 7.5])
def test_cross_entropy(weighted, normalizer, unseen):
    case = make(ROWS, 90, dtype=torch.float64)
    row_weight = torch.rand(ROWS).masked_fill_(case.targets == -100, float("nan")) if weighted else None
    loss = linear_cross_entropy(
        case.hidden, case.weight, case.targets, row_weight=row_weight, normalizer=normalizer, impl="triton"
    )
    exact = oracle.double(*case.leaves)
    nll = -oracle.log_probs(*exact, case.targets)[0] * (1.0 if row_weight is None else row_weight.double())
    kept = case.targets != -100
    truth = nll[kept].sum() / (kept.sum() if normalizer is None else normalizer)
    oracle.assert_same(loss.detach(), truth.detach(), case.terms)
    for a, t in zip(gradients(loss, case.leaves), gradients(truth, exact)):
        oracle.assert_same(a, t, case.terms)


def test_nothing_unmasked(unseen):
    inputs = Inputs()
    inputs.case.targets.fill_(-100)
    out = inputs(OBJECTIVES["everything"], "triton")
    assert out.loss == 0 and all((g == 0).all() for g in gradients(out.loss, inputs.case.leaves))


@pytest.mark.parametrize("starts", [[3, 5, 5, 12, 20, 31, 40], [0, 5, 5, 12, 20, 31, 38], [0, 5, 5, 12, 20, 31, 400]])
def test_rows_of_no_sequence_are_nan(starts, unseen, monkeypatch):
    """Offsets that no host has checked: nothing is read outside, and rows that they leave out are not passed over."""
    monkeypatch.setattr(autograd, "check_sequence_start", lambda *_: None)
    inputs = Inputs()
    inputs.case.targets.clamp_(min=0)
    inputs.old = torch.zeros(ROWS)
    inputs.starts = torch.tensor(starts, dtype=torch.int32)
    loss = inputs(OBJECTIVES["dapo"], "triton", ref=False, rollout=False).loss
    assert loss.isnan() == (starts[-1] <= ROWS)


@pytest.mark.parametrize("dtype,out", [("float32", "bfloat16"), ("float32", "float32"), ("float64", "float64")])
@pytest.mark.parametrize("factor", [1.0, 0.0, -2.5])
@pytest.mark.parametrize("size", [0, 1, 63, 1003])
def test_the_gradient_of_the_loss(dtype, out, factor, size, monkeypatch):
    from prism_kernels.linear_logprob import triton_scale

    monkeypatch.setattr(triton_scale, "BLOCK", 32)
    monkeypatch.setattr(triton_scale, "PROGRAMS", 3)
    gradient = torch.randint(-8, 9, (size,)).to(getattr(torch, dtype))  # exact in bf16, too, times the factor
    expected = (gradient * factor).to(getattr(torch, out))
    found = triton_scale.scaled(gradient, torch.tensor(factor, dtype=gradient.dtype), expected.dtype)
    assert torch.equal(found, expected) and (found is gradient) == (dtype == out)
