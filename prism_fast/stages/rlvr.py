"""Stage 3, reinforcement learning with verifiable rewards: GRPO, DAPO, GSPO and Dr.GRPO are an objective (a value) and
a prompt sampler (a function) given to one loop."""

from __future__ import annotations

import math

from prism_fast import metric_names as names
from prism_fast.config import RLVRConfig
from prism_fast.data.batches import Batches
from prism_fast.data.encode import NO_RECORDS
from prism_fast.data.formats import read_rlvr
from prism_fast.models.load import ProductChoices, collected, load_policy, open_policy
from prism_fast.records import Fault
from prism_fast.reward import started
from prism_fast.run.session import Clock, Session
from prism_fast.steps.advantage import reward_advantage
from prism_fast.steps.ahead import Ahead
from prism_fast.steps.draws import draw_experience, question_encoder
from prism_fast.steps.evaluate import evaluator
from prism_fast.steps.experience import Taken, experience_metrics
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
        chat.images.keep(session.data.image_cache)
        data = read_rlvr(session.data.files, **session.data.reading)
        session.loaded(len(data), policy=policy)
        per_pack = session.tokens_per_pack(free_bytes(policy.device), policy=policy, reference=frozen)
        updater = open_updater(policy, config.optimizer, config.steps, config.cluster, session.out)
        sampler = session.closing(open_sampler(config.sampler, updater, chat, session.saved("policy"), session.warn))
        ahead = session.closing(Ahead[Taken](sampler, chat, config, session.warn))
        first = session.begin(
            config.steps,
            models={"policy": collected(policy, chat, updater.stream)},
            optimizers={"": updater, "rollout/": ahead},
            parts={"product_choices": ProductChoices(), "bad_records": data.bad},
            evaluate=evaluator(
                sampler, chat, session.data, config.eval, config.run.seed, bad=data.bad, own=config.reward
            ),
            watch=config.watch,
        )
        objective = config.objective.build(config.rollout.max_response_tokens, config.rollout.importance_cap)
        settings = {"tokens_per_pack": per_pack, **config.rollout.sampled}
        encode = question_encoder(chat, config)
        batches = session.closing(Batches(data, len(data), encode, config.run.seed, session.data.workers))
        draw = draw_experience(ahead, batches, config, session.state.get("position", 0))
        for step in range(first, config.steps):
            clock, warnings, fault = Clock(), [], None
            with clock("rollout"):
                batch, position, metrics = ahead.take(draw, step)
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
                metrics |= learned | experience_metrics(batch)
                if not tokens["update_policy"]:
                    warnings.append("every advantage is 0; no update was made")
                if not math.isfinite(metrics[names.GRAD_NORM]):
                    what = batch.rollout.fault() or "a gradient is not finite"
                    fault = Fault(what, tuple(prompt.place for prompt in batch.rollout.prompts))
                    warnings.append(f"{what}; that update was skipped")
            with clock("rollout"):
                metrics |= ahead.give(updater.stream(), step + 1)
            session.end_of_step(step + 1, clock, tokens, metrics, warnings, {"position": position}, fault)
        return session.finish(data.bad.messages)
