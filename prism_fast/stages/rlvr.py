"""Stage 3, reinforcement learning with verifiable rewards: GRPO, DAPO, GSPO and Dr.GRPO are an objective (a value) and
a prompt sampler (a function) given to one loop."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from prism_fast.config import RLVRConfig
from prism_fast.data.chat import Chat
from prism_fast.data.encode import encode_all, question
from prism_fast.data.formats import read_rlvr
from prism_fast.data.order import order
from prism_fast.models.load import load_policy, with_chat
from prism_fast.records import Experience, StepStats
from prism_fast.run.alerts import Watch
from prism_fast.run.monitor import Monitor
from prism_fast.run.session import Clock, Run, is_time
from prism_fast.steps.advantage import reward_advantage
from prism_fast.steps.evaluate import EvalSet, evaluate
from prism_fast.steps.experience import experience, mixed_groups, uniform_prompts
from prism_fast.steps.policy_step import policy_gradient
from prism_fast.steps.update import Updater


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
        encode = partial(question, chat=chat, max_prompt_tokens=config.data.max_prompt_tokens)
        sampler = uniform_prompts
        if config.dynamic_sampling is not None:
            sampler = partial(mixed_groups, config=config.dynamic_sampling)
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
                    picked = order(len(data), config.run.seed, start, number)
                    questions = encode_all(data, picked, encode)
                    return experience(policy, chat, questions, config.rollout, config, seed=seed)

                with clock("rollout"):
                    batch, position, sampled = sampler(draw, position, config.rollout.prompts_per_step)
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
                        response_length=batch.rollout.mean_length,
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
