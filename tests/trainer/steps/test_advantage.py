"""Advantages of a step: what the configuration passes to the kernel, and that it knows every rule of the kernel's."""

import re

import pytest
import torch
from pydantic import ValidationError

from prism_fast.config import AdvantageConfig
from prism_fast.records import Scores
from prism_fast.steps.advantage import alignment_advantage, reward_advantage
from prism_kernels.group_advantage.rules import RULES
from tests.kernels.group_advantage.formulas import FUNCTIONS, advantage, condition, documented, normalised, random_case
from tests.kernels.group_advantage.test_group_advantage import NEW_RULES
from tests.oracle import assert_same

GROUP = [5, 5, 0, 0, 0, 2] * 5


def follows(rule, formula, seed=0):
    valid, accuracy, coefficients = random_case(len(GROUP), seed)
    scores = 4 * torch.randn(2, len(GROUP), generator=torch.Generator().manual_seed(seed))
    config = AdvantageConfig(rule=rule, **coefficients)
    students = Scores(*scores, teacher_perception=torch.zeros(3), teacher_reasoning=torch.zeros(3), format_valid=valid)
    got = alignment_advantage(students, torch.tensor(GROUP), config, 3.0, accuracy)
    expected = advantage(formula, scores.double().clamp(-3, 3), GROUP, valid, accuracy, coefficients)
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
