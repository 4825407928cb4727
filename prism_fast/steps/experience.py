"""Prompts -> Experience: responses with their rewards, and which groups a step trains on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from prism_fast.config import OverlongConfig, RLVRConfig
from prism_fast.data.chat import Chat
from prism_fast.data.encode import encode_all
from prism_fast.data.order import order
from prism_fast.records import Rollout
from prism_fast.reward import verifiable_reward
from prism_fast.steps.sampler import generate


@dataclass(frozen=True)
class Experience:
    """Rewarded responses, B = prompts * samples."""

    rollout: Rollout
    reward: Tensor  # (B,) fp32, overlong penalty included
    accuracy: Tensor  # (B,) fp32 in {0, 1}
    format_valid: Tensor  # (B,) bool


# draw(first prompt, number of prompts, try) -> their Experience
Draw = Callable[[int, int, int], Experience]


def experience(policy, chat: Chat, data, start: int, number: int, seed: int, config: RLVRConfig) -> Experience:
    """Samples and rewards ``number`` prompts from position ``start`` of the shuffled data."""
    picked = order(len(data), config.run.seed, start, number)
    encoded = encode_all(data, picked, lambda s: (s, chat.encode_prompt(s, config.data.max_prompt_tokens)))
    rollout = generate(
        policy,
        chat,
        [prompt for _, prompt in encoded],
        samples=config.rollout.samples,
        max_tokens=config.rollout.max_response_tokens,
        temperature=config.rollout.temperature,
        seed=seed,
        rows_at_once=config.rollout.rows_at_once,
    )
    rewards = []
    for text, group in zip(rollout.text, rollout.group.tolist()):
        sample = encoded[group][0]
        rewards.append(
            verifiable_reward(
                text,
                sample.gold,
                equivalents=sample.equivalents,
                accuracy_weight=config.accuracy_weight,
                format_weight=config.format_weight,
            )
        )
    reward = torch.tensor([r.score for r in rewards])
    if config.overlong is not None:
        lengths = torch.tensor([len(ids) for ids in rollout.response_ids])
        reward = reward + overlong_penalty(lengths, config.rollout.max_response_tokens, config.overlong)
    return Experience(
        rollout,
        reward,
        torch.tensor([r.accuracy for r in rewards]),
        torch.tensor([r.format_valid for r in rewards]),
    )


def overlong_penalty(lengths: Tensor, limit: int, config: OverlongConfig) -> Tensor:
    """(B,) in [-factor, 0]: 0 up to limit - buffer tokens, then linear to -factor (DAPO, arXiv 2503.14476)."""
    beyond = (lengths - (limit - config.buffer)).clamp(min=0).float()
    return -(beyond / config.buffer).clamp(max=1.0) * config.factor


def uniform_prompts(draw: Draw, position: int, config: RLVRConfig) -> tuple[Experience, int, dict[str, float]]:
    """The next prompts in order: (batch, next position, metrics)."""
    batch = draw(position, config.rollout.prompts_per_step, 0)
    return batch, position + config.rollout.prompts_per_step, {"sampled_tokens": _tokens(batch)}


def mixed_groups(draw: Draw, position: int, config: RLVRConfig) -> tuple[Experience | None, int, dict[str, float]]:
    """DAPO's dynamic sampling: groups whose accuracies are all equal are dropped and replaced by new prompts.

    After ``max_tries`` generations it goes on with what there is: fewer groups, or None where there is none.
    """
    wanted, dynamic = config.rollout.prompts_per_step, config.dynamic_sampling
    kept: list[Experience] = []
    have, drawn, sampled, attempt = 0, 0, 0, 0
    while have < wanted and attempt < dynamic.max_tries:
        batch = draw(position, wanted * dynamic.generation_factor, attempt)
        position += wanted * dynamic.generation_factor
        attempt, drawn, sampled = attempt + 1, drawn + len(batch.rollout.prompts), sampled + _tokens(batch)
        mixed = groups_with_mixed_accuracy(batch)
        kept.append(select_groups(batch, mixed))
        have += len(mixed)
    metrics = {
        "sampled_tokens": sampled,
        "dropped_groups": float(drawn - have),
        "generation_batches": float(attempt),
        "missing_groups": float(max(0, wanted - have)),
    }
    if not have:
        return None, position, metrics
    merged = concatenate(kept)
    return select_groups(merged, list(range(min(wanted, have)))), position, metrics


def groups_with_mixed_accuracy(batch: Experience) -> list[int]:
    """Groups that hold both right and wrong responses."""
    found = []
    for group in range(len(batch.rollout.prompts)):
        accuracy = batch.accuracy[batch.rollout.group == group]
        if accuracy.min() != accuracy.max():
            found.append(group)
    return found


def select_groups(batch: Experience, groups: list[int]) -> Experience:
    """These groups, renumbered in the order given."""
    rollout = batch.rollout
    rows = [i for g in groups for i in (rollout.group == g).nonzero().flatten().tolist()]
    counts = [int((rollout.group == g).sum()) for g in groups]
    chosen = Rollout(
        prompts=[rollout.prompts[g] for g in groups],
        group=torch.arange(len(groups)).repeat_interleave(torch.tensor(counts, dtype=torch.int64)),
        response_ids=[rollout.response_ids[i] for i in rows],
        logprob=[rollout.logprob[i] for i in rows],
        text=[rollout.text[i] for i in rows],
        finished=rollout.finished[rows],
    )
    return Experience(chosen, batch.reward[rows], batch.accuracy[rows], batch.format_valid[rows])


def concatenate(batches: list[Experience]) -> Experience:
    """Batches after one another, groups renumbered."""
    offsets, total = [], 0
    for batch in batches:
        offsets.append(total)
        total += len(batch.rollout.prompts)
    rollouts = [b.rollout for b in batches]
    merged = Rollout(
        prompts=[p for r in rollouts for p in r.prompts],
        group=torch.cat([r.group + offset for r, offset in zip(rollouts, offsets)]),
        response_ids=[x for r in rollouts for x in r.response_ids],
        logprob=[x for r in rollouts for x in r.logprob],
        text=[x for r in rollouts for x in r.text],
        finished=torch.cat([r.finished for r in rollouts]),
    )
    return Experience(
        merged,
        torch.cat([b.reward for b in batches]),
        torch.cat([b.accuracy for b in batches]),
        torch.cat([b.format_valid for b in batches]),
    )


def _tokens(batch: Experience) -> int:
    return sum(len(ids) for ids in batch.rollout.response_ids)
