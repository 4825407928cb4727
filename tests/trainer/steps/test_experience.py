"""RLVR's prompt samplers and penalties."""

import pytest
import torch

from prism_fast.config import DynamicSamplingConfig, ObjectiveConfig, OverlongConfig, RLVRConfig
from prism_fast.records import Prompt, Rollout
from prism_fast.steps.advantage import reward_advantage
from prism_fast.steps.experience import (
    Experience,
    groups_with_mixed_accuracy,
    mixed_groups,
    overlong_penalty,
    uniform_prompts,
)
from prism_kernels import PolicyObjective


def config(prompts=2, tries=3, factor=2, **changes):
    return RLVRConfig.model_validate(
        {
            "policy": {"path": "p"},
            "data": {"files": ["f"]},
            "rollout": {"prompts_per_step": prompts, "samples": 2},
            "optimizer": {"lr": 1e-3},
            "run": {"out": "o"},
            "steps": 1,
            "dynamic_sampling": DynamicSamplingConfig(generation_factor=factor, max_tries=tries).model_dump(),
            **changes,
        }
    )


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
    batch, position, metrics = uniform_prompts(draw, 6, config())
    assert drawn == [(6, 2, 0)] and position == 8 and metrics == {"sampled_tokens": 8}
    assert [int(p.input_ids) for p in batch.rollout.prompts] == [6, 7]


def test_mixed_groups_replace_equal_ones_and_count_them():
    draw, drawn = source([(0, 0), (0, 1), (1, 1), (0, 0), (1, 0), (1, 1), (0, 1), (0, 1)])
    batch, position, metrics = mixed_groups(draw, 0, config())
    assert drawn == [(0, 4, 0), (4, 4, 1)] and position == 8
    assert [int(p.input_ids) for p in batch.rollout.prompts] == [1, 4]  # four were mixed, two are wanted
    assert batch.rollout.text == ["1", "1", "4", "4"]
    assert batch.rollout.group.tolist() == [0, 0, 1, 1]
    assert batch.accuracy.tolist() == [0, 1, 1, 0]
    assert metrics["dropped_groups"] == 4 and metrics["generation_batches"] == 2 and metrics["missing_groups"] == 0


def test_mixed_groups_go_on_with_what_there_is_after_the_last_try():
    draw, drawn = source([(0, 0), (1, 1), (0, 0), (0, 0), (0, 1), *[(1, 1)] * 20])
    batch, position, metrics = mixed_groups(draw, 0, config())
    assert len(drawn) == 3 and position == 12
    assert len(batch.rollout.prompts) == 1 and metrics["missing_groups"] == 1
    draw, _ = source([(1, 1)])
    batch, _, metrics = mixed_groups(draw, 0, config())
    assert batch is None and metrics["missing_groups"] == 2


def test_groups_with_mixed_accuracy():
    draw, _ = source([(0, 0), (0, 1), (1, 1)])
    assert groups_with_mixed_accuracy(draw(0, 3, 0)) == [1]


def test_overlong_penalty_is_linear_over_the_buffer():
    lengths = torch.tensor([1, 60, 61, 80, 100])
    got = overlong_penalty(lengths, 100, OverlongConfig(buffer=40, factor=0.5))
    torch.testing.assert_close(got, torch.tensor([0.0, 0.0, -0.0125, -0.25, -0.5]))


def test_dr_grpo_subtracts_the_mean_only():
    reward, group = torch.tensor([1.0, 0.0, 0.2, 0.2]), torch.tensor([0, 0, 1, 1])
    torch.testing.assert_close(reward_advantage(reward, group, "dr_grpo"), torch.tensor([0.5, -0.5, 0.0, 0.0]))
    assert reward_advantage(reward, group, "grpo")[0] == pytest.approx(0.5 / (0.5**0.5 + 1e-6))


def test_objectives_by_name():
    assert ObjectiveConfig(name="grpo").build(9) == PolicyObjective(kl_estimator="k3")
    dapo = ObjectiveConfig(name="dapo").build(9)
    assert (dapo.clip_low, dapo.clip_high, dapo.dual_clip) == (0.2, 0.28, 10.0)
    gspo = ObjectiveConfig(name="gspo", clip_high=5e-4).build(9)
    assert (gspo.ratio, gspo.clip_low, gspo.clip_high, gspo.aggregate) == ("sequence", 3e-4, 5e-4, "sequence_mean")
    assert ObjectiveConfig(name="dr_grpo").build(9).max_length == 9
