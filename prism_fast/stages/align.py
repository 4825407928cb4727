"""Stage 2c, adversarial alignment: the policy plays against the discriminator (PRISM, arXiv 2604.28123).

One discriminator forward per step: it gives the scores and its own loss. One policy forward and backward per step.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from torch import Tensor

from prism_fast.config import AlignConfig
from prism_fast.data.chat import Chat
from prism_fast.data.encode import encode_all, lesson
from prism_fast.data.formats import read_align
from prism_fast.data.order import order
from prism_fast.models.load import load_discriminator, load_policy, with_chat
from prism_fast.records import StepStats
from prism_fast.run.alerts import Watch
from prism_fast.run.monitor import Monitor
from prism_fast.run.session import Clock, Run, is_time
from prism_fast.steps.advantage import alignment_advantage
from prism_fast.steps.discriminator_step import discriminator_gradient, not_finite, part_lengths, student_parts
from prism_fast.steps.evaluate import EvalSet, evaluate
from prism_fast.steps.experience import answer_accuracy
from prism_fast.steps.expert_load import ExpertLoad
from prism_fast.steps.policy_step import policy_gradient
from prism_fast.steps.sampler import generate
from prism_fast.steps.update import Updater
from prism_kernels import PolicyObjective


def align(config: AlignConfig, *, resume: bool = False) -> dict[str, Any]:
    """Moves config.policy towards the teacher; writes config.run.out/final/{policy,discriminator}."""
    with Run("align", config.run, resume) as run:
        policy_config = run.model("policy", config.policy)
        chat = Chat.load(policy_config.path)
        policy = load_policy(policy_config, chat)
        discriminator = load_discriminator(run.model("discriminator", config.discriminator))
        data = read_align(
            config.data.files, skip_bad=config.data.skip_bad_records, system_prompt=config.data.system_prompt
        )
        held_out = EvalSet.read(config.data, config.data.eval_files, config.eval.limit, chat)
        encode = partial(lesson, chat=chat, max_prompt_tokens=config.data.max_prompt_tokens, config=config)
        updater = Updater(policy, config.policy_optimizer, config.steps)
        judge_updater = Updater(discriminator, config.discriminator_optimizer, config.steps)
        watch, load = Watch(**config.watch.model_dump()), ExpertLoad()
        first, tensors, state = run.restore()
        if first:
            updater.load(_under("policy", tensors), first)
            judge_updater.load(_under("discriminator", tensors), first)
            watch.load(state["watch"])
        models = {"policy": with_chat(policy, chat), "discriminator": with_chat(discriminator, chat)}
        figures: dict[str, Any] = {}
        objective = PolicyObjective.grpo()
        with Monitor("align", config.run.out, config.steps, tracker=config.run.tracker, start_step=first) as monitor:
            for step in range(first, config.steps):
                clock, metrics = Clock(), {}
                with clock("data"):
                    n = config.rollout.prompts_per_step
                    lessons = encode_all(data, order(len(data), config.run.seed, step * n, n), encode)
                with clock("rollout"):
                    rollout = generate(
                        policy,
                        chat,
                        [item.prompt for item in lessons],
                        config.rollout,
                        seed=config.run.seed * 1_000_003 + step,
                    )
                with clock("update_discriminator"):
                    parts = student_parts(rollout, chat, config)
                    scores, judged, judged_tokens = discriminator_gradient(
                        discriminator,
                        lessons,
                        rollout,
                        parts,
                        config,
                        tokens_per_pack=config.run.tokens_per_pack,
                        load=load,
                    )
                    fault = not_finite(scores, rollout, lessons)
                    if fault is None:
                        metrics["grad_norm/discriminator"] = judge_updater.step()
                    else:
                        judge_updater.next_step()
                metrics.update(judged, lr=updater.lr)
                accuracy, policy_tokens = answer_accuracy(rollout, [item.sample for item in lessons]), 0
                if fault is None:
                    with clock("advantage"):
                        advantages = alignment_advantage(
                            scores, rollout.group, config.advantage, config.score_clamp, accuracy
                        )
                    with clock("update_policy"):
                        learned, policy_tokens = policy_gradient(
                            policy,
                            rollout,
                            advantages,
                            objective,
                            temperature=config.rollout.temperature,
                            tokens_per_pack=config.run.tokens_per_pack,
                        )
                        metrics["grad_norm/policy"] = updater.step()
                    metrics.update(learned)
                    metrics["advantage/std"] = float(advantages.std()) if len(advantages) > 1 else 0.0
                else:
                    updater.next_step()
                metrics.update(
                    format_valid=float(scores.format_valid.float().mean()),
                    response_length=rollout.mean_length,
                )
                metrics.update(part_lengths(rollout, chat))
                if accuracy is not None:
                    metrics["accuracy"] = float(accuracy.mean())
                metrics.update(load.fractions())
                tokens = {
                    "rollout": rollout.num_tokens,
                    "update_discriminator": judged_tokens,
                    "update_policy": policy_tokens,
                }
                stats = StepStats(step + 1, metrics, clock.seconds, tokens)
                monitor.step(stats)
                for line in watch.observe(stats):
                    monitor.warn(line)
                if fault is not None:
                    monitor.warn(f"step {step + 1}: {fault}; nothing was updated")
                elif not policy_tokens:
                    monitor.warn(f"step {step + 1}: every advantage is 0; the policy was not updated")
                for name in ("policy", "discriminator"):
                    if not math.isfinite(metrics.get(f"grad_norm/{name}", 0.0)):
                        monitor.warn(f"step {step + 1}: a gradient of the {name} is not finite; it was not updated")
                if held_out and is_time(step + 1, config.run.eval_every, config.steps):
                    result = evaluate(policy, chat, held_out, config.eval, seed=config.run.seed)
                    figures = result.figures()
                    monitor.evaluation(step + 1, figures)
                    run.improved(step + 1, result.accuracy)
                run.step_done(
                    step + 1,
                    config.steps,
                    models,
                    lambda: {**_named("policy", updater), **_named("discriminator", judge_updater)},
                    {"watch": watch.state()},
                )
            for line in data.skipped:
                monitor.warn(f"skipped: {line}")
        run.finish(models)
        return figures


def _named(name: str, updater: Updater) -> dict[str, Tensor]:
    return {f"{name}/{key}": value for key, value in updater.tensors().items()}


def _under(name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(f"{name}/"): value for key, value in tensors.items() if key.startswith(f"{name}/")}
