"""Stage 1, supervised fine-tuning: cross-entropy on the assistant's tokens of demonstrations."""

from __future__ import annotations

import math
from functools import partial

from prism_fast import metric_names as names
from prism_fast.config import SFTConfig
from prism_fast.data.batches import Batches
from prism_fast.data.encode import NO_RECORDS, demonstration
from prism_fast.data.formats import read_sft
from prism_fast.models.load import ProductChoices, collected, open_policy
from prism_fast.records import Fault
from prism_fast.run.session import Clock, Session
from prism_fast.steps.evaluate import evaluator
from prism_fast.steps.free_memory import free_bytes
from prism_fast.steps.sampler import BuiltinSampler
from prism_fast.steps.sft_step import demonstration_packs, supervised_gradient
from prism_fast.steps.update import open_updater


def sft(config: SFTConfig, *, resume: bool = False, accept_changes: bool = False) -> dict[str, float]:
    """Trains config.model on config.data; writes config.run.out/final. Returns the last evaluation's figures."""
    with Session("sft", config, resume, accept_changes) as session:
        policy, chat = open_policy(config.model, session.saved("policy"))
        chat.images.keep(session.data.image_cache)
        data = read_sft(session.data.files, **session.data.reading)
        session.loaded(len(data), policy=policy)
        per_pack = session.tokens_per_pack(free_bytes(policy.device), model=policy)
        total = config.steps or math.ceil(config.epochs * len(data) / config.batch_size)
        updater = open_updater(policy, config.optimizer, total, config.cluster, session.out)
        first = session.begin(
            total,
            models={"policy": collected(policy, chat, updater.stream)},
            optimizers={"": updater},
            parts={"product_choices": ProductChoices(), "bad_records": data.bad},
            evaluate=evaluator(
                BuiltinSampler(updater, chat), chat, session.data, config.eval, config.run.seed, bad=data.bad
            ),
        )
        encode = partial(
            demonstration, chat=chat, max_prompt_tokens=config.data.max_prompt_tokens, max_tokens=config.max_tokens
        )
        batches = session.closing(Batches(data, len(data), encode, config.run.seed, session.data.workers))
        for step in range(first, total):
            clock, warnings, fault = Clock(), [], None
            with clock("data"):
                records = batches.take(step * config.batch_size, config.batch_size)
                packs = demonstration_packs(records, per_pack, policy)
            metrics: dict[str, float] = {names.LEARNING_RATE: updater.lr}
            if not packs:
                warnings.append(NO_RECORDS)
                updater.next_step()
            else:
                with clock("update"):
                    metrics[names.LOSS] = supervised_gradient(updater, packs)
                    metrics[names.GRAD_NORM] = updater.step()
                if not math.isfinite(metrics[names.GRAD_NORM]):
                    fault = Fault("a gradient is not finite", tuple(prompt.place for prompt, _ in records))
                    warnings.append(f"{fault.what}; that update was skipped")
            tokens = {"update": packs.num_tokens}
            session.end_of_step(step + 1, clock, tokens, metrics, warnings, fault=fault)
        return session.finish(data.bad.messages)
