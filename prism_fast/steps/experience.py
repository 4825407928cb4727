"""Prompts -> Experience: responses with their rewards, and which groups a step trains on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from prism_fast import metric_names as names
from prism_fast import ranks
from prism_fast.config import BY_THE_JUDGE, DynamicSamplingConfig, OverlongConfig, OwnReward, RewardConfig, Sampling
from prism_fast.records import DataError, Experience, Prompt, Rollout, Sample
from prism_fast.reward import Reward, reward_of
from prism_fast.steps.sampler import Answers

# draw(first prompt, number of prompts, try) -> their Experience; None where every record among them is bad
Draw = Callable[[int, int, int], Experience | None]
Taken = tuple[Experience | None, int, dict[str, float]]  # a step's batch if there is one, next position, metrics


def experience(
    sampler: Answers,
    questions: Sequence[tuple[Sample, Prompt]],
    sampling: Sampling,
    config: RewardConfig,
    *,
    seed: int,
) -> Experience:
    """Samples and rewards responses to some prompts."""
    rollout = sampler.generate([prompt for _, prompt in questions], sampling, seed=seed)
    weights = {"accuracy_weight": config.accuracy_weight, "format_weight": config.format_weight}
    rewards = rewards_of(rollout, [sample for sample, _ in questions], config.reward, **weights)
    reward = torch.tensor([r.score for r in rewards])
    if config.overlong is not None:
        lengths = torch.tensor([len(ids) for ids in rollout.response_ids])
        reward = reward + overlong_penalty(lengths, sampling.max_response_tokens, config.overlong)
    return Experience(
        rollout,
        reward,
        torch.tensor([r.accuracy for r in rewards]),
        torch.tensor([r.format_valid for r in rewards]),
        sum(r.late for r in rewards),
        sum(r.costly for r in rewards),
    )


def experience_metrics(batch: Experience) -> dict[str, float]:
    """Means over a batch's responses."""
    return {
        names.REWARD: float(batch.reward.mean()),
        names.ACCURACY: float(batch.accuracy.mean()),
        names.FORMAT_VALID: float(batch.format_valid.float().mean()),
        names.RESPONSE_LENGTH: batch.rollout.mean_length,
        names.JUDGE_LATE: float(batch.late),
        names.JUDGE_COSTLY: float(batch.costly),
        **sampling_balance(batch.rollout),
    }


def sampling_balance(rollout: Rollout) -> dict[str, float]:
    """How evenly the processes sampled; absent in one."""
    even = names.max_over_mean(rollout.tokens_by_rank)
    return {} if even is None else {names.RANKS["sampled_tokens"]: even}


def rewards_of(
    rollout: Rollout, samples: Sequence[Sample], own: OwnReward = BY_THE_JUDGE, **weights: float
) -> list[Reward]:
    """One reward per response; samples (G,), by prompt. Each process judges a part: all have the same verdicts."""
    asked = [samples[group] for group in rollout.group.tolist()]
    return judged(rollout.text, asked, own, **weights)


def judged(
    texts: Sequence[str], samples: Sequence[Sample], own: OwnReward = BY_THE_JUDGE, **weights: float
) -> list[Reward]:
    """The reward of each text as an answer to its sample, of which each process finds a part.

    What a reward function of the user's own is refused for in one process, all raise: the first one's.
    """
    mine: dict[int, Any] = {}
    for i in range(ranks.rank(), len(texts), ranks.world()):
        try:
            mine[i] = vars(reward_of(texts[i], samples[i], own, **weights))
        except DataError as error:
            if ranks.world() == 1:
                raise
            mine[i] = str(error)
            break
    found = {int(i): what for part in ranks.gather(mine) for i, what in part.items()}
    fault = next((found[i] for i in sorted(found) if isinstance(found[i], str)), None)
    if fault is not None:
        raise DataError(fault)
    return [Reward(**found[i]) for i in range(len(texts))]


def answer_accuracy(rollout: Rollout, samples: Sequence[Sample]) -> tuple[Tensor | None, dict[str, float]]:
    """((B,) fp32 in {0, 1}, metrics of the judge); (None, {}) where some record has no gold answer. samples (G,)."""
    if any(sample.gold is None for sample in samples):
        return None, {}
    rewards = rewards_of(rollout, samples)
    metrics: dict[str, float] = {
        names.JUDGE_LATE: float(sum(r.late for r in rewards)),
        names.JUDGE_COSTLY: float(sum(r.costly for r in rewards)),
    }
    return torch.tensor([r.accuracy for r in rewards]), metrics


def overlong_penalty(lengths: Tensor, limit: int, config: OverlongConfig) -> Tensor:
    """(B,) in [-factor, 0]: 0 up to limit - buffer tokens, then linear to -factor (DAPO, arXiv 2503.14476)."""
    beyond = (lengths - (limit - config.buffer)).clamp(min=0).float()
    return -(beyond / config.buffer).clamp(max=1.0) * config.factor


def uniform_prompts(draw: Draw, position: int, wanted: int) -> Taken:
    """The next ``wanted`` prompts in order: (batch, next position, metrics); None where none of them is usable."""
    batch = draw(position, wanted, 0)
    return batch, position + wanted, {"sampled_tokens": 0 if batch is None else batch.rollout.num_tokens}


def mixed_groups(draw: Draw, position: int, wanted: int, config: DynamicSamplingConfig) -> Taken:
    """DAPO's dynamic sampling: groups whose accuracies are all equal are dropped and replaced by new prompts.

    After ``max_tries`` generations it goes on with what there is: fewer groups, or None where there is none.
    """
    kept: list[Experience] = []
    have, drawn, sampled, attempt = 0, 0, 0, 0
    while have < wanted and attempt < config.max_tries:
        batch = draw(position, wanted * config.generation_factor, attempt)
        position += wanted * config.generation_factor
        attempt += 1
        if batch is None:
            continue
        drawn += len(batch.rollout.prompts)
        sampled += batch.rollout.num_tokens
        mixed = groups_with_mixed_accuracy(batch)
        kept.append(batch.select_groups(mixed))
        have += len(mixed)
    metrics = {
        "sampled_tokens": sampled,
        names.DROPPED_GROUPS: float(drawn - have),
        names.GENERATION_BATCHES: float(attempt),
        names.MISSING_GROUPS: float(max(0, wanted - have)),
    }
    if not have:  # what the judge could not do is told all the same
        metrics[names.JUDGE_LATE] = float(sum(b.late for b in kept))
        metrics[names.JUDGE_COSTLY] = float(sum(b.costly for b in kept))
        return None, position, metrics
    return Experience.concatenate(kept).select_groups(range(min(wanted, have))), position, metrics


def groups_with_mixed_accuracy(batch: Experience) -> list[int]:
    """Groups that hold both right and wrong responses."""
    found = []
    for group in range(len(batch.rollout.prompts)):
        accuracy = batch.accuracy[batch.rollout.group == group]
        if accuracy.min() != accuracy.max():
            found.append(group)
    return found
