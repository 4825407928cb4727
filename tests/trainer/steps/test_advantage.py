"""Advantages of a step: what the configuration passes to the kernel, and that it knows every rule of the kernel's."""

import re

import pytest
import torch
from pydantic import ValidationError

from prism_fast.config import AdvantageConfig, CompatConfig, DiscriminatorStep
from prism_fast.records import Scores
from prism_fast.steps.advantage import advantage_metrics, alignment_advantage, reward_advantage
from prism_kernels.group_advantage.rules import RULES
from tests.kernels.group_advantage.formulas import FUNCTIONS, advantage, condition, documented, normalised, random_case
from tests.kernels.group_advantage.test_group_advantage import NEW_RULES
from tests.oracle import assert_same

GROUP = [5, 5, 0, 0, 0, 2] * 5


def follows(rule, formula, seed=0):
    valid, accuracy, coefficients = random_case(len(GROUP), seed)
    scores = 4 * torch.randn(2, len(GROUP), generator=torch.Generator().manual_seed(seed))
    config = AdvantageConfig(rule=rule, **coefficients)
    teacher = torch.tensor([[2.0, -1.0, 0.5, 9.0, 9.0, -2.0], [0.0, -3.0, 1.5, 9.0, 9.0, 4.0]])
    students, group = Scores(*scores, *teacher, format_valid=valid), torch.tensor(GROUP)
    for around_zero, middle in ((True, 0.0), (False, teacher[:, group])):
        step = DiscriminatorStep(score_clamp=3.0, compat=CompatConfig(clamp_around_zero=around_zero))
        got = alignment_advantage(students, group, config, step, accuracy)
        bounded = (middle + (scores - middle).clamp(-3, 3)).double()
        expected = advantage(formula, bounded, GROUP, valid, accuracy, coefficients)
        # The definition is float64 inside, of fp32 scores.
        assert_same(got, expected, len(GROUP) + FUNCTIONS, scale=max(1.0, expected.abs().max()))


@pytest.mark.parametrize("rule", list(RULES))
def test_every_rule_of_the_kernel_is_a_setting(rule):
    follows(rule, documented()[rule])


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("name", NEW_RULES)
def test_a_new_rule_needs_nothing_in_the_trainer(name, impl, monkeypatch):
    monkeypatch.setenv("PRISM_IMPL", f"multi_reward_advantage={impl}")
    with pytest.raises(ValidationError):
        AdvantageConfig(rule=name)
    rule, formula = NEW_RULES[name]
    monkeypatch.setitem(RULES, name, rule)
    follows(name, formula)


def test_an_unknown_rule_is_an_error_that_lists_the_known_ones():
    with pytest.raises(ValidationError, match=re.escape(f"expected one of {', '.join(RULES)}, got 'best'")):
        AdvantageConfig(rule="best")


def after_a_good_warmup():
    """All scores below -10, as no loss says where 0 is; the second response of the second group is invalid."""
    student = torch.tensor([-13.0, -13.5, -14.0, -40.0, 0.0, -12.0])
    valid = torch.tensor([True, True, True, True, False, True])
    return Scores(student, student, torch.tensor([-11.0, -12.0]), torch.tensor([-11.0, -12.0]), valid)


def test_scores_that_all_lie_below_the_published_clamp_still_give_advantages():
    scores, group, rule = after_a_good_warmup(), torch.tensor([0, 0, 0, 1, 1, 1]), AdvantageConfig()
    compat = DiscriminatorStep(compat=CompatConfig(clamp_around_zero=True))
    assert alignment_advantage(scores, group, rule, compat)[:3].eq(0).all()
    got = alignment_advantage(scores, group, rule, DiscriminatorStep())
    assert got[:3].sort(descending=True).indices.tolist() == [0, 1, 2]
    metrics = advantage_metrics(scores, group, compat, got)
    assert metrics["clamped/perception"] == 1.0 and metrics["score_spread/perception"] == 0.0
    metrics = advantage_metrics(scores, group, DiscriminatorStep(), got)
    assert metrics["clamped/reasoning"] == pytest.approx(1 / 5)  # -40, of five valid ones
    spreads = [0.5, 10 / 2**0.5]  # -22 and -12 in the second group
    assert metrics["score_spread/reasoning"] == pytest.approx(sum(spreads) / 2)


def test_nothing_is_said_of_scores_that_are_not_there():
    scores, group = after_a_good_warmup(), torch.arange(6) % 2
    alone = Scores(*vars(scores).values())
    alone.format_valid[:] = False
    assert set(advantage_metrics(alone, group, DiscriminatorStep(), torch.zeros(6))) == {"advantage/std"}
    alone.format_valid[0] = True  # one valid response in its group has no spread
    names = set(advantage_metrics(alone, group, DiscriminatorStep(), torch.zeros(6)))
    assert names == {"advantage/std", "clamped/perception", "clamped/reasoning"}


@pytest.mark.parametrize("objective", ["grpo", "dr_grpo"])
def test_rewards_are_normalised_in_their_group(objective):
    reward = torch.rand(len(GROUP), generator=torch.Generator().manual_seed(0))
    got = reward_advantage(reward, torch.tensor(GROUP), objective)
    if objective == "grpo":
        expected = normalised(reward.tolist(), GROUP)
    else:
        expected = torch.empty(len(GROUP), dtype=torch.float64)
        for i, group in enumerate(GROUP):
            same = [float(r) for r, g in zip(reward, GROUP) if g == group]
            expected[i] = float(reward[i]) - sum(same) / len(same)
    size = condition([reward.tolist()], GROUP) * max(1.0, expected.abs().max())
    assert_same(got, expected, len(GROUP) + FUNCTIONS, scale=size)
