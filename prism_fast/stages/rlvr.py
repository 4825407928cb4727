"""Stage 3, reinforcement learning with verifiable rewards: GRPO, DAPO, GSPO and Dr.GRPO are an objective (a value) and
a prompt sampler (a function) given to one loop."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prism_fast.advantage import reward_advantage
from prism_fast.config import OverlongConfig, RLVRConfig
from prism_fast.data.chat import Chat
from prism_fast.data.formats import read_rlvr
from prism_fast.evaluate import EvalSet, evaluate
from prism_fast.loss import policy_gradient, response_lengths
from prism_fast.metrics import Monitor
from prism_fast.records import Rollout, StepStats
from prism_fast.reward import verifiable_reward
from prism_fast.rollout import generate
from prism_fast.run import Clock, Run, encode_all, is_time, load_policy, order, with_chat
from prism_fast.update import Updater
from prism_fast.watch import Watch


@dataclass(frozen=True)
class Experience:
    """Rewarded responses, B = prompts * samples."""

    rollout: Rollout
    reward: Tensor  # (B,) fp32, overlong penalty included
    accuracy: Tensor  # (B,) fp32 in {0, 1}
    format_valid: Tensor  # (B,) bool


# draw(first prompt, number of prompts, try) -> their Experience
Draw = Callable[[int, int, int], Experience]


def rlvr(config: RLVRConfig, *, resume: bool = False) -> dict[str, Any]:
    """Trains config.policy on verifiable rewards; writes config.run.out/final/policy."""
    with Run("rlvr", config.run, resume) as run:
        policy_config = run.model("policy", config.policy)
        chat = Chat.load(policy_config.path)
        policy = load_policy(policy_config, chat)
        reference = None
        if config.reference is not None:
            reference = load_policy(config.reference, chat).requires_grad_(False)
        data = read_rlvr(
            config.data.files, skip_bad=config.data.skip_bad_records, system_prompt=config.data.system_prompt
        )
        held_out = EvalSet.read(config.data, config.data.eval_files, config.eval.limit, chat)
        objective = config.objective.build(config.rollout.max_response_tokens)
        sampler = uniform_prompts if config.dynamic_sampling is None else mixed_groups
        updater, watch = Updater(policy, config.optimizer, config.steps), Watch(**config.watch.model_dump())
        first, tensors, state = run.restore()
        position = state.get("position", 0)
        if first:
            updater.load(tensors, first)
            watch.load(state["watch"])
        models = {"policy": with_chat(policy, chat)}
        figures: dict[str, Any] = {}
        with Monitor("rlvr", config.run.out, config.steps, tracker=config.run.tracker, start_step=first) as monitor:
            for step in range(first, config.steps):
                clock = Clock()

                def draw(start: int, number: int, attempt: int, step: int = step) -> Experience:
                    seed = (config.run.seed * 1_000_003 + step) * 101 + attempt
                    return experience(policy, chat, data, start, number, seed, config)

                with clock("rollout"):
                    batch, position, sampled = sampler(draw, position, config)
                metrics: dict[str, float] = dict(sampled)
                trained = 0
                if batch is None:
                    monitor.warn(f"step {step + 1}: every group had equal accuracies; no update was made")
                    updater.next_step()
                else:
                    with clock("advantage"):
                        advantages = reward_advantage(batch.reward, batch.rollout.group, config.objective.name)
                    with clock("update_policy"):
                        learned, trained = policy_gradient(
                            policy,
                            batch.rollout,
                            advantages,
                            objective,
                            temperature=config.rollout.temperature,
                            tokens_per_pack=config.run.tokens_per_pack,
                            reference=reference,
                        )
                        metrics["lr"] = updater.lr
                        metrics["grad_norm"] = updater.step()
                    metrics.update(learned)
                    metrics.update(
                        reward=float(batch.reward.mean()),
                        accuracy=float(batch.accuracy.mean()),
                        format_valid=float(batch.format_valid.float().mean()),
                        response_length=response_lengths(batch.rollout.response_ids),
                    )
                    if not trained:
                        monitor.warn(f"step {step + 1}: every advantage is 0; no update was made")
                    if not math.isfinite(metrics["grad_norm"]):
                        fault = batch.rollout.fault() or "a gradient is not finite"
                        monitor.warn(f"step {step + 1}: {fault}; that update was skipped")
                tokens = {"rollout": int(metrics.pop("sampled_tokens")), "update_policy": trained}
                stats = StepStats(step + 1, metrics, clock.seconds, tokens)
                monitor.step(stats)
                for line in watch.observe(stats):
                    monitor.warn(line)
                if held_out and is_time(step + 1, config.run.eval_every, config.steps):
                    result = evaluate(policy, chat, held_out, config.eval, seed=config.run.seed)
                    figures = result.figures()
                    monitor.evaluation(step + 1, figures)
                    run.improved(step + 1, result.accuracy)
                run.step_done(
                    step + 1, config.steps, models, updater.tensors, {"position": position, "watch": watch.state()}
                )
            for line in data.skipped:
                monitor.warn(f"skipped: {line}")
        run.finish(models)
        return figures


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
