"""Words of probability 0: the head is that of the other words alone, whose rows of the weight are all there is."""

import pytest
import torch

from prism_kernels import PolicyObjective, linear_cross_entropy, linear_logprob, linear_objective, linear_policy_loss
from prism_kernels.dispatch import implementation
from prism_kernels.linear_logprob.records import Head
from tests import oracle
from tests.kernels.linear_logprob.linear_cases import ENGINES, IMPLS, gradients, make, skip_interpreted

FP32, FP64 = torch.float32, torch.float64
ROWS = 6
# Forbidden ids and the words there are, of how many columns: neighbours, the first word, both sides of the border of a
# step of a GPU's program (4,096 columns), one beyond the last word, and none.
CASES = {
    "list and limit": ([0, 5, 6, 900, 990], 980, 1003),
    "limit": ([], 700, 1003),
    "list": ([2, 1002], None, 1003),
    "several steps": ([4095, 4096, 9000, 9001, 12_000], 12_500, 12_600),
    "limit before a step": ([3], 4096, 8500),
    "few words": ([0, 2], 4, 1003),
}
LIKE = {"temperature": 1.3, "softcap": 5.0}


def barred_case(name, device, dtype=FP64, bias=False):
    forbidden, words, columns = CASES[name]
    given = {"forbidden": forbidden} | ({} if words is None else {"vocab_size": words})
    allowed = torch.tensor(sorted(set(range(words or columns)) - set(forbidden)))
    case = make(ROWS, columns, device, dtype, width=8, bias=bias)
    place = torch.arange(ROWS) * 7919 % len(allowed)  # of a row's target among the allowed
    case.targets = torch.where(case.targets.cpu() == -100, -100, allowed[place]).to(device)
    among = torch.where(case.targets.cpu() == -100, -100, place).to(device)
    with torch.no_grad():  # what is barred would win, and must not be read
        barred = torch.ones(columns, dtype=torch.bool).index_fill_(0, allowed, False)
        case.weight[barred.to(device)] *= 100
    return case, given, allowed.to(device), among


def among_allowed(leaves, allowed):
    hidden, *by_word = leaves
    return hidden, *(t.index_select(0, allowed) for t in by_word)


@pytest.mark.parametrize("impl,device", IMPLS)
@pytest.mark.parametrize("dtype", [FP32, FP64])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("plain", [True, False])
def test_as_if_there_were_no_such_rows(impl, device, dtype, name, plain):
    case, given, allowed, among = barred_case(name, device, dtype, bias=not plain)
    like = {} if plain else LIKE
    out = linear_logprob(
        case.hidden, case.weight, case.targets, bias=case.bias, with_entropy=True, impl=impl, **like, **given
    )
    upstream = torch.randn(3, ROWS, dtype=dtype).to(device)
    ours = gradients((torch.stack(list(out)) * upstream).sum(), case.leaves)
    leaves = oracle.double(*case.leaves)
    hidden, weight, *bias = among_allowed(leaves, allowed)
    truth = oracle.log_probs(hidden, weight, among, *bias, **like)
    true_gradients = gradients((torch.stack(list(truth)) * upstream.double()).sum(), leaves)
    hidden, weight, *bias = among_allowed(case.leaves, allowed)
    eager = oracle.log_probs(hidden, weight, among, *bias, **like)
    eager_gradients = gradients((torch.stack(list(eager)) * upstream).sum(), case.leaves)
    for field, a, t, e in zip(out._fields, out, truth, eager):
        oracle.assert_as_exact(a, t, e, case.terms, field)
    for field, a, t, e in zip(("dX", "dW", "db"), ours, true_gradients, eager_gradients):
        oracle.assert_as_exact(a, t, e, case.terms, field)
    rest = torch.ones(len(case.weight), dtype=torch.bool, device=device).index_fill_(0, allowed, False)
    assert rest.any() and all((gradient[rest] == 0).all() for gradient in ours[1:])


@pytest.mark.parametrize("impl,device", IMPLS)
def test_losses(impl, device):
    case, given, allowed, among = barred_case("list and limit", device)
    given["impl"] = impl
    hidden, weight = among_allowed(case.leaves, allowed)
    logprob, _, entropy = oracle.log_probs(hidden, weight, among)
    kept, advantages = case.targets != -100, torch.tensor([0.7, -0.2], dtype=FP64, device=device)
    starts = torch.tensor([0, 4, ROWS], dtype=torch.int32, device=device)
    objective = PolicyObjective(entropy_coef=0.01)
    weights = advantages.repeat_interleave(starts.diff())

    def glue(logprob, entropy, rows):
        return logprob.sum(), torch.ones_like(logprob), None

    head = case.hidden, case.weight, case.targets
    losses = {
        "cross-entropy": (linear_cross_entropy(*head, **given), -logprob.sum() / kept.sum()),
        "objective": (linear_objective(*head, glue, **given), logprob.sum()),
        "policy": (
            linear_policy_loss(*head, advantages, starts, objective, **given).loss,
            -torch.where(kept, weights + 0.01 * entropy + weights * (logprob - logprob.detach()), 0.0).sum()
            / kept.sum(),
        ),
    }
    for name, (ours, truth) in losses.items():
        oracle.assert_same(ours, truth, case.terms, scale=truth.detach().abs() + 1, what=name)
        for a, t in zip(gradients(ours, case.leaves), gradients(truth, case.leaves)):
            oracle.assert_same(a, t, case.terms, what=name)


@pytest.mark.parametrize("impl,device", ENGINES)
def test_any_chunk_gives_the_same(impl, device):
    case, given, *_ = barred_case("list and limit", device)
    whole, chunked = (
        linear_logprob(case.hidden, case.weight, case.targets, chunk_bytes=size, impl=impl, **given).logprob
        for size in (None, 2 * 1003 * 8)
    )
    oracle.assert_same(whole, chunked, case.terms)


@pytest.mark.parametrize("impl,device", ENGINES)
def test_narrow_gradients(impl, device):
    """In 16 bits, over the fp32 logits."""
    case, given, allowed, among = barred_case("several steps", device, torch.float16)
    ours = gradients(linear_cross_entropy(case.hidden, case.weight, case.targets, impl=impl, **given), case.leaves)

    def plain(leaves):
        logprob, *_ = oracle.log_probs(*among_allowed(leaves, allowed), among)
        return gradients(-logprob.sum() / (case.targets != -100).sum(), leaves)

    for a, t, e in zip(ours, plain(oracle.double(*case.leaves)), plain(case.leaves)):
        oracle.assert_as_exact(a, t, e, case.terms)


@skip_interpreted
@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("target", [5, 980])
def test_a_target_of_probability_0_is_refused(impl, target):
    case, given, *_ = barred_case("list and limit", "cpu")
    case.targets[3] = target
    said = f"targets: expected -100 or an id that forbidden and vocab_size = 980 allow, got {target} in row 3"
    with pytest.raises(ValueError, match=said):
        linear_logprob(case.hidden, case.weight, case.targets, impl=impl, **given)


@pytest.mark.parametrize("impl,device", [row for row in ENGINES if row != ("cpu", "cpu")])
@pytest.mark.parametrize("target", [5, 980])
def test_a_target_that_the_host_cannot_see_is_nan(impl, device, target):
    case, *_ = barred_case("list and limit", device)
    case.targets[:] = torch.tensor([1, target, 2, -100, 3, 4])
    head = Head(case.hidden.detach(), case.weight.detach(), None, 1.0, None, [0, 5, 6, 900], 980)
    z = head.hidden @ head.weight.T
    out = implementation("linear_logprob", impl).statistics(z, case.targets, head, True)
    for values in out:
        assert values.isnan().tolist() == [False, True, False, False, False, False]
        assert values[3] == 0


@skip_interpreted
@pytest.mark.parametrize(
    "given,said",
    [
        ({"forbidden": [9]}, r"forbidden: expected an integer in \[0, 8\], got 9"),
        ({"forbidden": 3}, "forbidden: expected a list of ids, got 3"),
        ({"forbidden": range(9)}, r"forbidden: expected ids that leave a word to draw, got all of \[0, 9\)"),
        ({"vocab_size": 10}, r"vocab_size: expected an integer in \[1, 9\], got 10"),
    ],
)
def test_what_is_no_list_of_words_is_refused(given, said):
    head = torch.zeros(2, 4), torch.zeros(9, 4), torch.tensor([1, 2])
    for op in (linear_logprob, linear_cross_entropy):
        with pytest.raises(ValueError, match=said):
            op(*head, **given)
