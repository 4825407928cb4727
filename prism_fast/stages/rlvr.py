"""Stage 3, reinforcement learning with verifiable rewards: GRPO, DAPO, GSPO and Dr.GRPO are an objective (a value) and
a prompt sampler (a function) given to one loop."""

from __future__ import annotations

import math
from functools import partial

from prism_fast import metric_names as names
from prism_fast.config import RLVRConfig
from prism_fast.data.encode import NO_RECORDS, encode_all, question
from prism_fast.data.formats import read_rlvr
from prism_fast.data.order import order
from prism_fast.models.load import ProductChoices, collected, load_policy, open_policy
from prism_fast.records import Experience
from prism_fast.reward import started
from prism_fast.run.session import Clock, Session
from prism_fast.steps.advantage import reward_advantage
from prism_fast.steps.evaluate import evaluator
from prism_fast.steps.experience import experience, experience_metrics, mixed_groups, uniform_prompts
from prism_fast.steps.free_memory import free_bytes
from prism_fast.steps.policy_step import policy_gradient
from prism_fast.steps.sampler import open_sampler
from prism_fast.steps.update import Backprop, open_updater


def rlvr(config: RLVRConfig, *, resume: bool = False, accept_changes: bool = False) -> dict[str, float]:
    """Trains config.policy on verifiable rewards; writes config.run.out/final/policy."""
    with Session("rlvr", config, resume, accept_changes) as session, started(config.reward):
        policy, chat = open_policy(config.policy, session.saved("policy"))
        frozen = None if config.reference is None else load_policy(config.reference, chat).requires_grad_(False)
        reference = None if frozen is None else Backprop(frozen)
        data = read_rlvr(config.data.files, **config.data.reading)
        session.loaded(len(data), policy=policy)
        per_pack = session.tokens_per_pack(free_bytes(policy.device), policy=policy, reference=frozen)
        updater = open_updater(policy, config.optimizer, config.steps, config.cluster, session.out)
        sampler = session.closing(open_sampler(config.sampler, updater, chat, session.saved("policy"), session.warn))
        first = session.begin(
            config.steps,
            models={"policy": collected(policy, chat, updater.stream)},
            optimizers={"": updater},
            parts={"product_choices": ProductChoices(), "bad_records": data.bad},
            evaluate=evaluator(
                sampler, chat, config.data, config.eval, config.run.seed, bad=data.bad, own=config.reward
            ),
            watch=config.watch,
        )
        objective = config.objective.build(config.rollout.max_response_tokens, config.rollout.importance_cap)
        settings = {"temperature": config.rollout.temperature, "tokens_per_pack": per_pack}
        encode = partial(question, chat=chat, max_prompt_tokens=config.data.max_prompt_tokens)
        dapo = config.dynamic_sampling
        take = uniform_prompts if dapo is None else partial(mixed_groups, config=dapo)

        def draw(step: int, start: int, number: int, attempt: int) -> Experience | None:
            seed = (config.run.seed * 1_000_003 + step) * 101 + attempt
            questions = encode_all(data, order(len(data), config.run.seed, start, number), encode)
            return experience(sampler, questions, config.rollout, config, seed=seed) if questions else None

        position = session.state.get("position", 0)
        for step in range(first, config.steps):
            clock, warnings, fault = Clock(), [], None
            with clock("rollout"):
                batch, position, metrics = take(partial(draw, step), position, config.rollout.prompts_per_step)
                sampler.rest()
            tokens = {"rollout": int(metrics.pop("sampled_tokens")), "update_policy": 0}
            metrics[names.LEARNING_RATE] = updater.lr
            if batch is None:
                equal = "every group had equal accuracies; no update was made"
                warnings.append(equal if tokens["rollout"] else NO_RECORDS)
                updater.next_step()
            else:
                with clock("advantage"):
                    advantages = reward_advantage(batch.reward, batch.rollout.group, config.objective.name)
                with clock("update_policy"):
                    learned, tokens["update_policy"] = policy_gradient(
                        updater, batch.rollout, advantages, objective, reference=reference, **settings
                    )
                    metrics[names.GRAD_NORM] = updater.step()
                    sampler.update(updater.stream(), step + 1)
                metrics |= learned | experience_metrics(batch)
                if not tokens["update_policy"]:
                    warnings.append("every advantage is 0; no update was made")
                if not math.isfinite(metrics[names.GRAD_NORM]):
                    fault = batch.rollout.fault() or "a gradient is not finite"
                    warnings.append(f"{fault}; that update was skipped")
            session.end_of_step(step + 1, clock, tokens, metrics, warnings, {"position": position}, fault)
        return session.finish(data.bad.messages)
