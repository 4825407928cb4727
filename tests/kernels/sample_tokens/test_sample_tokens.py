"""sample_tokens: the definition's tokens bit for bit, log-probs against float64, the law of the draws."""

import math

import pytest
import torch
from scipy.stats import chi2

from prism_kernels import dispatch, sample_tokens
from prism_kernels.sample_tokens import noise
from tests.oracle import assert_as_exact

IMPLS = [str(name) for name, row in dispatch._OPS["sample_tokens"].table.items() if "cpu" in row.devices]
every = pytest.mark.parametrize("impl", IMPLS)
SIZES = [(1, 1), (3, 63), (5, 257), (2, 1003), (70, 2048), (4, 5001)]
SCALES = [1.0, 30.0]  # flat: any word can win; steep: few can


def options(rows, **changes):
    response = torch.arange(rows) * ((1 << 33) + 5) - 3
    return {"temperature": 1.0, "seed": (1 << 63) + 11, "response": response, "step": 4, **changes}


def bars(words):
    """(forbidden, vocab_size) that leave a word."""
    return sorted({0, words // 3, words - 1} - {1 if words > 1 else 0}) if words > 2 else [], max(1, words - words // 9)


@every
@pytest.mark.parametrize("rows,words", SIZES)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_tokens_are_the_definitions(impl, rows, words, scale, dtype):
    logits = (torch.randn(rows, words) * scale).to(dtype)
    forbidden, limit = bars(words)
    for changes in (
        {},
        {"temperature": 0.7, "forbidden": forbidden, "vocab_size": limit, "step": torch.arange(rows) * 1000},
        {"temperature": 0, "forbidden": tuple(forbidden), "vocab_size": limit},
        {"temperature": 40.0, "seed": torch.tensor(-5)},
    ):
        token, logprob = sample_tokens(logits, **options(rows, **changes), impl=impl)
        want, _ = sample_tokens(logits, **options(rows, **changes), impl="reference")
        assert token.dtype == torch.int64 and logprob.dtype == torch.float32
        assert torch.equal(token, want)
        # log-probs: of the distribution that is drawn from
        z, eager = (x / (changes.get("temperature", 1.0) or 1.0) for x in (logits.double(), logits.float()))
        if "forbidden" in changes:
            barred = torch.arange(words) >= limit
            barred[list(forbidden)] = True
            assert not barred[token].any()
            z, eager = (x.masked_fill(barred, -math.inf) for x in (z, eager))
        at = token[:, None]
        truth, eager = (x.log_softmax(-1).gather(1, at)[:, 0] for x in (z, eager))
        assert_as_exact(logprob, truth, eager, words + 8, "logprob")


@every
def test_a_row_draws_the_same_whatever_stands_beside_it(impl):
    rows, words = 23, 1003
    logits, given = torch.randn(rows, words) * 3, options(rows, step=torch.arange(rows) % 5)
    token, logprob = sample_tokens(logits, **given, impl=impl)
    for some in (torch.randperm(rows), torch.tensor([7]), torch.tensor([7, 7, 0]), torch.arange(1, rows, 2)):
        part = {**given, "response": given["response"][some], "step": given["step"][some]}
        found = sample_tokens(logits[some], **part, impl=impl)
        assert torch.equal(found[0], token[some]) and torch.equal(found[1], logprob[some])
    wide = torch.full((rows, 2 * words), math.nan)  # whatever lies behind a row
    wide[:, :words] = logits
    assert torch.equal(sample_tokens(wide[:, :words], **given, impl=impl)[0], token)
    longer = torch.cat([logits, torch.full((rows, 300), -math.inf)], 1)
    assert torch.equal(sample_tokens(longer, **given, impl=impl)[0], token)
    assert torch.equal(sample_tokens(logits.T.contiguous().T, **given, impl=impl)[0], token)


@every
@pytest.mark.parametrize("change", [{"seed": 12}, {"step": 5}, {"response": torch.arange(200)}])
def test_seed_step_and_response_each_change_the_draws(impl, change):
    logits = torch.zeros(200, 1003)
    one, other = (sample_tokens(logits, **options(200, **new), impl=impl)[0] for new in ({}, change))
    assert int((one == other).sum()) < 20  # chance: 0.2 of 200


def statistic(counts, probabilities, draws):
    """Pearson's, and its 1 - 1e-6 quantile; cells that expect less than 10 are one."""
    expected = probabilities * draws
    small = expected < 10
    if small.any():
        counts = torch.cat([counts[~small], counts[small].sum()[None]])
        expected = torch.cat([expected[~small], expected[small].sum()[None]])
    return float(((counts - expected) ** 2 / expected).sum()), chi2.ppf(1 - 1e-6, len(counts) - 1)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_draws_follow_the_softmax(temperature):
    """Of one implementation, as all draw the same."""
    draws, words = 40_000, 40
    logits = -1.3 * torch.arange(1.0, words + 1).log()[torch.randperm(words)]
    given = options(draws, response=torch.arange(draws), temperature=temperature)
    tokens = [sample_tokens(logits.expand(draws, -1), **{**given, "step": step})[0] for step in (0, 1)]
    p = (logits.double() / temperature).softmax(-1)
    for token in tokens:
        value, limit = statistic(token.bincount(minlength=words).double(), p, draws)
        assert value < limit
    # and one step knows nothing of the next
    pairs = (tokens[0] * words + tokens[1]).bincount(minlength=words * words).double()
    value, limit = statistic(pairs, (p[:, None] * p).flatten(), draws)
    assert value < limit


def test_rare_words_come_as_often_as_they_should():
    """A word of probability 2^-15 in 2^19 draws: 16 expected, Poisson; 0 or more than 45 has probability below 1e-6."""
    draws, rare = 1 << 19, 2.0**-15
    logits = torch.tensor([math.log(1 - rare), math.log(rare)]).expand(draws, 2)
    token, _ = sample_tokens(logits, **options(draws, response=torch.arange(draws)))
    assert 1 <= int(token.sum()) <= 45


@every
def test_logits_that_differ_by_rounding_part_near_ties_alone(impl):
    """Logits of one product in fp32 and in fp64: where tokens differ, the fp64 scores of both are nearer than what
    rounding can move: the errors of the logits, and one rounding of each fp32 score."""
    rows, words, width = 200, 2003, 64
    hidden, head = torch.randn(rows, width), torch.randn(words, width) / 4
    exact, rounded = hidden.double() @ head.double().T, hidden @ head.T
    given = options(rows)
    wide, narrow = (sample_tokens(x, **given, impl=impl)[0] for x in (exact, rounded))
    part = (wide != narrow).nonzero()[:, 0]
    response = given["response"][part, None]
    words_of = torch.stack([wide, narrow], 1)[part]
    seed = torch.tensor([given["seed"] - (1 << 64)])
    score = exact[part].gather(1, words_of) + noise.gumbel(noise.bits(seed, response, torch.tensor(4), words_of))
    size = (hidden.abs().double() @ head.abs().double().T).max()
    bound = 2 * (width * 2.0**-24 * float(size) + 2.0**-24 * float(size + noise.LARGEST))
    assert bool((score[:, 0] >= score[:, 1]).all()) and bool((score[:, 0] - score[:, 1] <= bound).all())
    # scores a distance apart are met with a density below 1 near the largest: a bound on how many part
    assert len(part) <= rows * bound + 6 * math.sqrt(rows * bound) + 1


@every
def test_minus_infinity_is_never_drawn_and_equals_go_to_the_first(impl):
    logits = torch.full((64, 700), -math.inf)
    logits[:, 300], logits[:, 650] = 0.0, -80.0
    token, logprob = sample_tokens(logits, **options(64), impl=impl)
    assert token.tolist() == [300] * 64 and not logprob.any()
    token, logprob = sample_tokens(torch.zeros(3, 700), **options(3, temperature=0, forbidden=[0, 1]), impl=impl)
    assert token.tolist() == [2] * 3
    assert torch.allclose(logprob, torch.tensor(-math.log(698)))


@every
@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_is_an_error_that_names_the_row(impl, temperature, value):
    logits = torch.zeros(3, 300)
    logits[1, 170] = value
    given = options(3, temperature=temperature)
    with pytest.raises(ValueError, match=r"logits: expected numbers or -inf, .* row 1"):
        sample_tokens(logits, **given, impl=impl)
    token, _ = sample_tokens(logits, **given, forbidden=[170], impl=impl)  # nobody reads it there
    assert 170 not in token.tolist()
    logits[1] = -math.inf
    with pytest.raises(ValueError, match=r"logits: .* row 1"):
        sample_tokens(logits, **given, impl=impl)


@every
def test_no_rows(impl):
    token, logprob = sample_tokens(torch.zeros(0, 9), **options(0), impl=impl)
    assert token.shape == logprob.shape == (0,) and token.dtype == torch.int64 and logprob.dtype == torch.float32


def test_arguments_are_checked():
    logits = torch.zeros(2, 5)
    for changes, said in (
        ({"forbidden": range(5)}, r"forbidden: expected ids that leave a word to draw, got all of \[0, 5\)"),
        ({"forbidden": [0, 1], "vocab_size": 2}, r"forbidden: .* got all of \[0, 2\)"),
        ({"forbidden": [5]}, r"forbidden: expected an integer in \[0, 4\], got 5"),
        ({"forbidden": 3}, "forbidden: expected a list of ids"),
        ({"vocab_size": 6}, r"vocab_size: expected an integer in \[1, 5\], got 6"),
        ({"temperature": -1}, "temperature: expected a finite number >= 0"),
        ({"temperature": 1e-9}, r"temperature: expected 0 \(the most probable token\) or a number >= 1e-06"),
        ({"seed": 1 << 64}, "seed: expected an integer in"),
        ({"seed": torch.zeros(2, dtype=torch.int64)}, "seed: expected an integer, or one int64"),
        ({"step": 1 << 32}, "step: expected an integer in"),
        ({"step": torch.tensor([0, 1 << 32])}, r"step: expected values in \[0, 2\^32"),
        ({"step": torch.tensor([0])}, r"step: expected int64 \(B = 2,\)"),
        ({"response": torch.zeros(2)}, r"response: expected int64 \(B = 2,\)"),
        ({"impl": "sdpa"}, "impl of sample_tokens"),
    ):
        with pytest.raises(ValueError, match=said):
            sample_tokens(logits, **options(2, **changes))
    with pytest.raises(ValueError, match="logits: expected V >= 1"):
        sample_tokens(torch.zeros(2, 0), **options(2))
