"""Stage 2c, adversarial alignment: the policy plays against the discriminator (PRISM, arXiv 2604.28123).

One discriminator forward per step: it gives the scores and its own loss. One policy forward and backward per step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from prism_fast import metric_names as names
from prism_fast.config import AlignConfig
from prism_fast.data.batches import Batches
from prism_fast.data.chat import Chat
from prism_fast.data.encode import NO_RECORDS
from prism_fast.data.formats import read_align
from prism_fast.models.discriminator import Discriminator
from prism_fast.models.load import ProductChoices, collected, load_discriminator, open_policy
from prism_fast.models.policy import Policy
from prism_fast.records import Fault, Lesson
from prism_fast.run.session import Clock, CollectModel, Session
from prism_fast.steps.advantage import advantage_metrics, alignment_advantage
from prism_fast.steps.ahead import Ahead
from prism_fast.steps.discriminator_step import discriminator_gradient, not_finite, response_metrics, student_parts
from prism_fast.steps.draws import Taught, draw_lessons, lesson_encoder
from prism_fast.steps.evaluate import evaluator
from prism_fast.steps.experience import answer_accuracy
from prism_fast.steps.expert_load import ExpertLoad
from prism_fast.steps.free_memory import free_bytes
from prism_fast.steps.policy_step import policy_gradient
from prism_fast.steps.probe import content_metrics
from prism_fast.steps.sampler import open_sampler
from prism_fast.steps.update import Updater, open_updater


def align(config: AlignConfig, *, resume: bool = False, accept_changes: bool = False) -> dict[str, float]:
    """Moves config.policy towards the teacher; writes config.run.out/final/{policy,discriminator}."""
    with Session("align", config, resume, accept_changes) as session:
        policy, chat, discriminator, batches, per_pack = _open(config, session)
        place = (config.steps, config.cluster, session.out)
        updater = open_updater(policy, config.policy_optimizer, *place)
        judge_updater = open_updater(discriminator, config.discriminator_optimizer, *place, name="discriminator")
        sampler = session.closing(open_sampler(config.sampler, updater, chat, session.saved("policy"), session.warn))
        ahead = session.closing(Ahead[Taught](sampler, chat, config, session.warn))
        first = session.begin(
            config.steps,
            models=_collected(updater, judge_updater, chat),
            optimizers={"policy/": updater, "discriminator/": judge_updater, "rollout/": ahead},
            parts={"product_choices": ProductChoices(), "bad_records": batches.bad},
            evaluate=evaluator(sampler, chat, session.data, config.eval, config.run.seed, bad=batches.bad),
            watch=config.watch,
        )
        load, draw = ExpertLoad(), draw_lessons(ahead, batches, config)
        for step in range(first, config.steps):
            clock, metrics = Clock(), {names.LEARNING_RATE: updater.lr}
            with clock("rollout"):
                lessons, rollout = ahead.take(draw, step)
            if rollout is None:
                judge_updater.next_step()
                updater.next_step()
                metrics |= ahead.give(updater.stream(), step + 1)
                session.end_of_step(step + 1, clock, {"rollout": 0}, metrics, [NO_RECORDS])
                continue
            tokens = {"rollout": rollout.num_tokens, "update_policy": 0}
            with clock("update_discriminator"):
                parts = student_parts(rollout, chat, config)
                scores, judged, tokens["update_discriminator"] = discriminator_gradient(
                    judge_updater, lessons, rollout, parts, config, load=load, **per_pack
                )
                fault = not_finite(scores, rollout, lessons)  # before a clamp makes numbers of infinities
                if fault is None:
                    metrics[names.DISCRIMINATOR_GRAD_NORM] = judge_updater.step()
                else:
                    judge_updater.next_step()
            accuracy, judge_metrics = answer_accuracy(rollout, [item.sample for item in lessons])
            if fault is None:
                with clock("advantage"):
                    advantages = alignment_advantage(scores, rollout.group, config.advantage, config, accuracy)
                with clock("update_policy"):
                    learned, tokens["update_policy"] = policy_gradient(
                        updater, rollout, advantages, config.objective, **config.rollout.sampled, **per_pack
                    )
                    metrics[names.POLICY_GRAD_NORM] = updater.step()
                metrics |= learned | advantage_metrics(scores, rollout.group, config, advantages)
            else:
                updater.next_step()
            with clock("rollout"):
                metrics |= ahead.give(updater.stream(), step + 1)
            metrics |= response_metrics(rollout, scores, accuracy, chat) | load.fractions() | judged | judge_metrics
            metrics |= content_metrics(rollout, scores, parts, accuracy)
            session.end_of_step(step + 1, clock, tokens, metrics, **_said(fault, tokens, metrics, lessons))
        return session.finish(batches.bad.messages)


def _open(config: AlignConfig, session: Session) -> tuple[Policy, Chat, Discriminator, Batches[Lesson], dict[str, int]]:
    """... and how large a pack is."""
    policy, chat = open_policy(config.policy, session.saved("policy"))
    discriminator = load_discriminator(config.discriminator, session.saved("discriminator"), chat=chat)
    chat.images.keep(session.data.image_cache)
    data = read_align(session.data.files, **session.data.reading)
    models = {"policy": policy, "discriminator": discriminator}
    session.loaded(len(data), **models)
    per_pack = {"tokens_per_pack": session.tokens_per_pack(free_bytes(policy.device), **models)}
    encode = lesson_encoder(chat, config)
    batches = session.closing(Batches(data, len(data), encode, config.run.seed, session.data.workers))
    return policy, chat, discriminator, batches, per_pack


def _collected(updater: Updater, judge_updater: Updater, chat: Chat) -> dict[str, CollectModel]:
    both = {"policy": updater, "discriminator": judge_updater}
    return {name: collected(each.module, chat, each.stream) for name, each in both.items()}


def _said(
    fault: str | None, tokens: dict[str, int], metrics: dict[str, float], lessons: Sequence[Lesson]
) -> dict[str, Any]:
    """Warnings of a step, and what was not finite in it."""
    norms = (("policy", names.POLICY_GRAD_NORM), ("discriminator", names.DISCRIMINATOR_GRAD_NORM))
    broken = [f"a gradient of the {m} is not finite" for m, norm in norms if not math.isfinite(metrics.get(norm, 0.0))]
    found = []
    if fault is not None:
        found.append(f"{fault}; nothing was updated")
    elif not tokens["update_policy"]:
        found.append("every advantage is 0; the policy was not updated")
    found += [f"{text}; it was not updated" for text in broken]
    what = fault or next(iter(broken), None)
    places = tuple(item.sample.place for item in lessons)
    return {"warnings": found, "fault": None if what is None else Fault(what, places)}
