"""RLVR's prompt samplers and penalties."""

import pytest
import torch

from prism_fast import ranks
from prism_fast.config import DynamicSamplingConfig, ObjectiveConfig, OverlongConfig, RewardConfig, Sampling
from prism_fast.records import DataError, Experience, Prompt, Rollout, Sample
from prism_fast.steps import experience as experience_module
from prism_fast.steps.advantage import reward_advantage
from prism_fast.steps.experience import (
    answer_accuracy,
    experience,
    groups_with_mixed_accuracy,
    judged,
    mixed_groups,
    overlong_penalty,
    uniform_prompts,
)
from prism_kernels import PolicyObjective
from tests.oracle import assert_same

DYNAMIC = DynamicSamplingConfig(generation_factor=2, max_tries=3)


def source(outcomes):
    """draw() whose prompt number i has the two accuracies outcomes[i]; a response's id names its prompt."""
    drawn = []

    def draw(start, number, attempt):
        drawn.append((start, number, attempt))
        numbers = range(start, start + number)
        accuracy = torch.tensor([float(a) for i in numbers for a in outcomes[i % len(outcomes)]])
        rollout = Rollout(
            prompts=[Prompt(torch.tensor([i]), None, None, bytes([i])) for i in numbers],
            group=torch.arange(number).repeat_interleave(2),
            response_ids=[torch.tensor([i, j]) for i in numbers for j in range(2)],
            logprob=[torch.zeros(2)] * (2 * number),
            text=[str(i) for i in numbers for _ in range(2)],
            finished=torch.ones(2 * number, dtype=torch.bool),
        )
        return Experience(rollout, accuracy * 0.8 + 0.2, accuracy, torch.ones(2 * number, dtype=torch.bool))

    return draw, drawn


def test_uniform_prompts_take_the_next_ones():
    draw, drawn = source([(0, 1)])
    batch, position, metrics = uniform_prompts(draw, 6, 2)
    assert drawn == [(6, 2, 0)] and position == 8 and metrics == {"sampled_tokens": 8}
    assert [int(p.input_ids) for p in batch.rollout.prompts] == [6, 7]


def test_mixed_groups_replace_equal_ones_and_count_them():
    draw, drawn = source([(0, 0), (0, 1), (1, 1), (0, 0), (1, 0), (1, 1), (0, 1), (0, 1)])
    batch, position, metrics = mixed_groups(draw, 0, 2, DYNAMIC)
    assert drawn == [(0, 4, 0), (4, 4, 1)] and position == 8
    assert [int(p.input_ids) for p in batch.rollout.prompts] == [1, 4]  # four were mixed, two are wanted
    assert batch.rollout.text == ["1", "1", "4", "4"]
    assert batch.rollout.group.tolist() == [0, 0, 1, 1]
    assert batch.accuracy.tolist() == [0, 1, 1, 0]
    assert metrics["dropped_groups"] == 4 and metrics["generation_batches"] == 2 and metrics["missing_groups"] == 0


def test_mixed_groups_go_on_with_what_there_is_after_the_last_try():
    draw, drawn = source([(0, 0), (1, 1), (0, 0), (0, 0), (0, 1), *[(1, 1)] * 20])
    batch, position, metrics = mixed_groups(draw, 0, 2, DYNAMIC)
    assert len(drawn) == 3 and position == 12
    assert len(batch.rollout.prompts) == 1 and metrics["missing_groups"] == 1
    draw, _ = source([(1, 1)])
    batch, _, metrics = mixed_groups(draw, 0, 2, DYNAMIC)
    assert batch is None and metrics["missing_groups"] == 2


def test_groups_with_mixed_accuracy():
    draw, _ = source([(0, 0), (0, 1), (1, 1)])
    assert groups_with_mixed_accuracy(draw(0, 3, 0)) == [1]


RIGHT = "<caption>3</caption><think>3</think><answer>7</answer>"
SAMPLES = [Sample("a:1", (), gold="7"), Sample("a:2", (), gold="8")]


def answers():
    """Two prompts, two responses each: right, no format; wrong, right but long."""
    long = RIGHT.replace("7", "8")
    return Rollout(
        prompts=[Prompt(torch.tensor([i]), None, None, bytes([i])) for i in range(2)],
        group=torch.tensor([0, 0, 1, 1]),
        response_ids=[torch.zeros(n, dtype=torch.int64) for n in (3, 4, 5, 10)],
        logprob=[torch.zeros(n) for n in (3, 4, 5, 10)],
        text=[RIGHT, "7", RIGHT, long],
        finished=torch.ones(4, dtype=torch.bool),
    )


class Asked:
    """As much of a sampler as an experience needs."""

    def __init__(self):
        self.calls = []

    def generate(self, prompts, sampling, *, seed):
        self.calls.append((prompts, sampling, seed))
        return answers()


def test_experience_rewards_every_response_by_its_own_gold():
    """An experience needs what it reads: no paths, no optimizer."""
    sampling = Sampling(samples=2, max_response_tokens=10)
    config = RewardConfig(accuracy_weight=0.6, format_weight=0.4, overlong=OverlongConfig(buffer=4, factor=0.5))
    questions, sampler = list(zip(SAMPLES, answers().prompts)), Asked()
    batch = experience(sampler, questions, sampling, config, seed=5)
    assert sampler.calls == [([prompt for _, prompt in questions], sampling, 5)]
    assert batch.accuracy.tolist() == [1, 0, 0, 1] and batch.format_valid.tolist() == [True, False, True, True]
    assert_same(batch.reward, torch.tensor([1.0, 0.0, 0.4, 0.5]), 4)


def test_answer_accuracy_needs_every_gold_answer():
    accuracy, metrics = answer_accuracy(answers(), SAMPLES)
    assert accuracy.tolist() == [1, 0, 0, 1] and metrics == {"judge/late": 0, "judge/too_costly": 0}
    assert answer_accuracy(answers(), [SAMPLES[0], Sample("a:3", ())]) == (None, {})


def test_overlong_penalty_is_linear_over_the_buffer():
    lengths = torch.tensor([1, 60, 61, 80, 100])
    got = overlong_penalty(lengths, 100, OverlongConfig(buffer=40, factor=0.5))
    assert_same(got, torch.tensor([0.0, 0.0, -0.0125, -0.25, -0.5]), 4)


def test_dr_grpo_subtracts_the_mean_only():
    reward, group = torch.tensor([1.0, 0.0, 0.2, 0.2]), torch.tensor([0, 0, 1, 1])
    assert_same(reward_advantage(reward, group, "dr_grpo"), torch.tensor([0.5, -0.5, 0.0, 0.0]), 4)
    assert_same(reward_advantage(reward, group, "grpo")[0], torch.tensor(0.5 / (0.5**0.5 + 1e-6)), 8)


def test_objectives_by_name():
    assert ObjectiveConfig(name="grpo").build(9) == PolicyObjective(kl_estimator="k3")
    dapo = ObjectiveConfig(name="dapo").build(9)
    assert (dapo.clip_low, dapo.clip_high, dapo.dual_clip) == (0.2, 0.28, 10.0)
    gspo = ObjectiveConfig(name="gspo", clip_high=5e-4).build(9)
    assert (gspo.ratio, gspo.clip_low, gspo.clip_high, gspo.aggregate) == ("sequence", 3e-4, 5e-4, "sequence_mean")
    assert ObjectiveConfig(name="dr_grpo").build(9).max_length == 9


@pytest.mark.parametrize("mine", [0, 1])
def test_a_reward_that_one_process_refuses_ends_all_with_the_first_one_s_line(mine, monkeypatch):
    """Otherwise the others would wait for it, and end with an error of the network's."""
    told = [{"0": {}, "2": "c: bad"}, {"1": "b: bad"}]

    def refuse(text, *_, **__):
        raise DataError(f"{text}: bad")

    monkeypatch.setattr(experience_module, "reward_of", refuse)
    monkeypatch.setattr(ranks, "world", lambda: 2)
    monkeypatch.setattr(ranks, "rank", lambda: mine)
    monkeypatch.setattr(ranks, "gather", lambda value: [told[0], value] if mine else [{"0": {}, **value}, told[1]])
    with pytest.raises(DataError, match="^b: bad$" if mine else "^a: bad$"):
        judged(["a", "b", "c"], [Sample("a:1", ())] * 3)
