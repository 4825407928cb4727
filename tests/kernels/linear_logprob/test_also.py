"""What ``also`` asks of linear_logprob: guesses, mean logits and sums of squared probabilities, in the same pass."""

import pytest
import torch

from prism_kernels import linear_logprob
from prism_kernels.dispatch import implementation
from prism_kernels.linear_logprob import LinearLogprob, LinearLogprobAlso, engine
from prism_kernels.linear_logprob.records import Also, Head
from tests import oracle
from tests.kernels.linear_logprob.linear_cases import ENGINES, IMPLS, INTERPRETED, gradients, make, skip_interpreted
from tests.kernels.linear_logprob.test_forbidden import CASES, LIKE, barred_case

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
ALL = Also._fields
ROWS = 9 if INTERPRETED else 40
VARIANTS = {"plain": {}, "all": {"temperature": 1.3, "softcap": 5.0, "logit_scale": 0.6, "bias": True}}
TRITON = [impl for impl in ENGINES if impl != ("cpu", "cpu")]


def by_row(z, targets):
    """(is_top1, mean_logits, log_sum_sq_probs) of logits (T, V), one row at a time."""
    found = []
    for row, target in zip(z.detach(), targets.tolist()):
        if target == -100:
            found.append((False, 0.0, 0.0))
            continue
        words = row[~row.isneginf()]
        first = not (row[:target] >= row[target]).any() and not (row[target + 1 :] > row[target]).any()
        p = row.softmax(0)
        found.append((first, float(words.sum() / len(words)), float((p * p).sum().log())))
    return [torch.tensor(column) for column in zip(*found)]


def guess_right(case, z):
    """Every second row's target becomes the word of the largest logit."""
    right = z.detach().argmax(-1).to(case.targets.device)
    odd = torch.arange(len(right), device=right.device) % 2 == 1
    case.targets = torch.where(odd & (case.targets != -100), right, case.targets)


@pytest.mark.parametrize("impl,device", IMPLS)
@pytest.mark.parametrize("dtype", [FP64, FP32, BF16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_against_float64(impl, device, dtype, variant):
    given = dict(VARIANTS[variant])
    case = make(ROWS, 1000, device, dtype, bias=given.pop("bias", False))
    true, eager = (oracle.logits(*t[:2], *t[2:], **given) for t in (oracle.double(*case.leaves), case.leaves))
    guess_right(case, true)
    out = linear_logprob(case.hidden, case.weight, case.targets, bias=case.bias, impl=impl, also=ALL, **given)
    assert isinstance(out, LinearLogprobAlso) and out.entropy is None
    truth, plain = by_row(true, case.targets), by_row(eager.float() if dtype is BF16 else eager, case.targets)
    assert out.is_top1.dtype is torch.bool and out.is_top1.cpu().tolist() == truth[0].tolist()
    assert 0 < int(out.is_top1.sum()) < len(case.targets)
    for name, ours, t, e in zip(ALL[1:], out[4:], truth[1:], plain[1:]):
        assert ours.dtype is torch.promote_types(dtype, FP32) and not ours.requires_grad
        if name == "mean_logits":  # a sum that cancels: its error is that of what is summed
            oracle.assert_same(ours, t, case.terms, name, scale=true.abs().max() * (1 + true.shape[1] ** 0.5))
        else:
            oracle.assert_as_exact(ours, t, e, case.terms, name)


@pytest.mark.parametrize("impl,device", IMPLS)
def test_of_equal_logits_the_first_is_the_largest(impl, device):
    """Logits that fp32 holds exactly: 3 in columns 4 and 9 on both sides of a step's border, 1 elsewhere."""
    weight = torch.ones(9000, 1, device=device)
    weight[[4, 8999]] = 3
    targets = torch.tensor([4, 8999, 0, 8998], device=device)
    out = linear_logprob(torch.ones(4, 1, device=device), weight, targets, impl=impl, also=["is_top1"])
    assert out.is_top1.tolist() == [True, False, False, False]
    even = linear_logprob(torch.zeros(4, 1, device=device), weight, targets, impl=impl, also=["is_top1"])
    assert even.is_top1.tolist() == [False, False, True, False]


@pytest.mark.parametrize("impl,device", IMPLS)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("like", [{}, LIKE])
def test_barred_words_are_neither_guessed_nor_in_the_mean(impl, device, name, like):
    case, given, allowed, among = barred_case(name, device)
    true = oracle.logits(*oracle.double(case.hidden, case.weight), **like)[:, allowed]
    guess_right(case, true)  # a place among the allowed
    place = torch.where(case.targets == -100, -100, torch.where(torch.arange(6, device=device) % 2 == 1,
                        true.argmax(-1), among))  # fmt: skip
    targets = torch.where(place == -100, -100, allowed[place.clamp(min=0)])
    out = linear_logprob(case.hidden, case.weight, targets, impl=impl, also=ALL, **like, **given)
    top1, *rest = by_row(true, place)
    assert out.is_top1.tolist() == top1.tolist() and out.is_top1.any()
    for field, ours, truth in zip(ALL[1:], out[4:], rest):
        oracle.assert_same(ours, truth, case.terms, field, scale=true.abs().max())


@pytest.mark.parametrize("impl,device", ENGINES)
@pytest.mark.parametrize("asked", [(), ("is_top1",), ("mean_logits",), ("log_sum_sq_probs",), ALL])
def test_each_alone_in_any_chunk_beside_the_same_log_probs_and_gradients(impl, device, asked):
    case = make(ROWS, 1000, device, bias=True)
    options = {"bias": case.bias, "with_entropy": True, "chunk_bytes": 4 * 1000 * 4, "impl": impl}
    plain = linear_logprob(case.hidden, case.weight, case.targets, **options)
    whole = linear_logprob(case.hidden, case.weight, case.targets, also=ALL, **{**options, "chunk_bytes": None})
    out = linear_logprob(case.hidden, case.weight, case.targets, also=asked, **options)
    for name in ALL:
        ours = getattr(out, name)
        assert (ours is None) == (name not in asked)
        assert ours is None or not ours[case.targets == -100].any()
        if ours is not None and name == "is_top1":
            assert torch.equal(ours, whole.is_top1)
        elif ours is not None:
            oracle.assert_same(ours, getattr(whole, name), case.terms, name)
    assert all(torch.equal(*pair) for pair in zip(out[:3], plain))
    for a, b in zip(*(gradients(rows.logprob.sum() + rows.entropy.sum(), case.leaves) for rows in (out, plain))):
        assert torch.equal(a, b)


@pytest.mark.parametrize("impl,device", IMPLS)
@pytest.mark.parametrize("rows", [0, 5])
def test_nothing_unmasked(impl, device, rows):
    case = make(rows, 100, device)
    case.targets.fill_(-100)
    out = linear_logprob(case.hidden, case.weight, case.targets, impl=impl, also=ALL)
    assert all(values.shape == (rows,) and not values.any() for values in out[3:])


@pytest.mark.parametrize("impl,device", IMPLS)
def test_peaked_and_even_rows(impl, device):
    """A word of probability 1 (as far as fp32 goes), and 1000 of the same: log sums of squares 0 and -log 1000."""
    weight = torch.zeros(1000, 1, device=device)
    weight[7] = 1
    hidden, targets = torch.tensor([[200.0], [0.0]], device=device), torch.tensor([7, 7], device=device)
    out = linear_logprob(hidden, weight, targets, impl=impl, also=ALL)
    truth = torch.tensor([0.0, -torch.tensor(1000.0).log()])
    oracle.assert_same(out.log_sum_sq_probs, truth, 1000, scale=1.0)
    oracle.assert_same(out.mean_logits, torch.tensor([0.2, 0.0]), 1000)
    assert out.is_top1.tolist() == [True, False]


@pytest.mark.parametrize("impl,device", TRITON)
def test_a_target_that_the_host_cannot_see_is_nan_and_no_guess(impl, device):
    case = make(4, 50, device, skipped=0)
    case.targets[:] = torch.tensor([1, 50, -100, 3])
    head = Head(case.hidden.detach(), case.weight.detach(), None, 1.0, None, [], 50)
    further = engine.Further.empty(Also(True, True, True), 4, head.hidden, FP32)
    implementation("linear_logprob", impl).statistics(head.hidden @ head.weight.T, case.targets, head, True, further)
    assert not further.is_top1[1:3].any()
    for values in further[1:]:
        assert values.isnan().tolist() == [False, True, False, False] and values[2] == 0


@pytest.mark.parametrize("impl,device", TRITON)
@pytest.mark.parametrize("asked", [(), ALL])
def test_one_launch_a_chunk_whatever_is_asked(impl, device, asked, monkeypatch):
    from prism_kernels.linear_logprob import triton_kernel

    launches, kernel = [], triton_kernel.lm_head_stats_kernel

    class Counted:
        def __getitem__(self, grid):
            launches.append(grid)
            return kernel[grid]

    monkeypatch.setattr(triton_kernel, "lm_head_stats_kernel", Counted())
    case = make(6, 100, device, skipped=0)
    linear_logprob(case.hidden, case.weight, case.targets, impl=impl, also=asked, chunk_bytes=2 * 112 * 4)
    assert launches == [(2,)] * 3


@skip_interpreted
def test_unasked_there_are_three_as_ever():
    case = make(4, 50)
    out = linear_logprob(case.hidden, case.weight, case.targets)
    logprob, _, entropy = out
    assert type(out) is LinearLogprob and logprob is out.logprob and entropy is None
    assert out.is_top1 is out.mean_logits is out.log_sum_sq_probs is None


@skip_interpreted
@pytest.mark.parametrize(
    "also,said",
    [
        (["top1"], "also: expected 'is_top1' or 'mean_logits' or 'log_sum_sq_probs', got 'top1'"),
        ("is_top1", "also: expected a list of is_top1, mean_logits, log_sum_sq_probs, got 'is_top1'"),
        (3, "also: expected a list of is_top1, mean_logits, log_sum_sq_probs, got 3"),
    ],
)
def test_what_it_does_not_know_is_refused(also, said):
    case = make(4, 50)
    with pytest.raises(ValueError, match=f"^{said}$"):
        linear_logprob(case.hidden, case.weight, case.targets, also=also)
