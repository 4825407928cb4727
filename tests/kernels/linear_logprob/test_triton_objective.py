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


@pytest.fixture
def two_passes(monkeypatch):
    """Rows in one launch, by two programs; how often."""
    from prism_kernels.linear_logprob import triton_kernel, triton_two_pass

    launches, kernel = [], triton_kernel.lm_head_objective_fwd_rows_kernel

    class Counted:
        def __getitem__(_, grid):
            launches.append(grid)
            return kernel[grid]

    monkeypatch.setattr(triton_two_pass, "_gpu", lambda _: (2, 1 << 30))
    monkeypatch.setattr(triton_two_pass, "BLOCKS", {4: (64, 4), 8: (64, 4)})
    monkeypatch.setattr(triton_kernel, "lm_head_objective_fwd_rows_kernel", Counted())
    return launches


@pytest.mark.parametrize("name", ["dapo", "k3", "importance"])
@pytest.mark.parametrize("on_policy", [False, True])
def test_two_passes(name, on_policy, unseen, two_passes):
    objective, inputs = OBJECTIVES[name], Inputs()
    loss, seen, logprob, entropy, truth = inputs.truth(objective, on_policy, temperature=1.1, softcap=9.0)
    out = inputs(objective, "triton", on_policy, with_entropy=True, temperature=1.1, softcap=9.0)
    assert_exact(out.loss, gradients(out.loss, inputs.case.leaves), loss, truth, inputs)
    oracle.assert_same(out.logprob, logprob, inputs.terms)
    oracle.assert_same(out.entropy, entropy, inputs.terms)
    check_stats(out.stats, seen, set(out.stats), inputs.terms)
    assert set(two_passes) == {(2,)}


def test_two_passes_of_a_ratio_per_sequence(unseen, two_passes):
    """On-policy it couples no rows."""
    objective, inputs = OBJECTIVES["everything"], Inputs()
    for on_policy in (True, False):
        loss, *_, truth = inputs.truth(objective, on_policy)
        out = inputs(objective, "triton", on_policy)
        assert_exact(out.loss, gradients(out.loss, inputs.case.leaves), loss, truth, inputs)
        assert bool(two_passes) == on_policy
        two_passes.clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows,words", [(0, 100), (1, 100), (13, 1003)])
@pytest.mark.parametrize("forbidden", [(), (3, 64, 90)])
def test_two_passes_of_cross_entropy(dtype, rows, words, forbidden, two_passes):
    """Rows that the host sees; words not a multiple of the block; ids of probability 0, and from a limit on."""
    case = make(rows, words, dtype=dtype, bias=True)
    limit = words - 2 if forbidden else words
    kept = torch.tensor([i for i in range(limit) if i not in forbidden])
    case.targets = torch.where(case.targets == -100, -100, kept[case.targets % len(kept)])
    loss = linear_cross_entropy(
        case.hidden, case.weight, case.targets, bias=case.bias, forbidden=forbidden, vocab_size=limit, impl="triton"
    )

    def plain(leaves):
        z = leaves[0] @ leaves[1].T + leaves[2]
        nll = torch.nn.functional.cross_entropy(z[:, kept], torch.searchsorted(kept, case.targets), reduction="none")
        nll = nll.to(torch.promote_types(z.dtype, torch.float32))[case.targets != -100]
        return nll.sum() / max(1, len(nll))

    leaves_of_truth = oracle.double(*case.leaves)
    truth, eager = plain(leaves_of_truth), plain(case.leaves)
    oracle.assert_as_exact(loss, truth, eager, case.terms)
    # The interpreter truncates bf16, which errs twice as much as eager's rounding; dZ is rounded besides the result.
    factor = oracle.FACTOR * (2 if dtype is torch.bfloat16 else 1)
    found = [gradients(each, case.leaves) for each in (loss, eager)]
    exact = torch.autograd.grad(truth, leaves_of_truth)
    for a, e, t in zip(*found, exact):
        oracle.assert_as_exact(a, t, e, case.terms, factor=factor)
    count = int((case.targets != -100).sum())
    assert two_passes == ([(min(2, count),)] if count else [])


@pytest.mark.parametrize("target", [90, -1, 1 << 40])
def test_two_passes_of_targets_outside(target, unseen, two_passes, monkeypatch):
    """NaN in their row and in all of dW; a skipped row may hold NaN, and is 0."""
    monkeypatch.setattr(autograd, "check_targets", lambda *_: None)
    case = make(ROWS, 90)
    case.targets[:3] = torch.tensor([5, target, -100])
    with torch.no_grad():
        case.hidden[2] = float("nan")
    d_hidden, d_weight = gradients(
        linear_cross_entropy(case.hidden, case.weight, case.targets, normalizer=3.0, impl="triton"), case.leaves
    )
    assert d_hidden.isnan().all(1).tolist() == [i == 1 for i in range(ROWS)] and d_weight.isnan().all()
    assert (d_hidden[case.targets == -100] == 0).all() and two_passes
