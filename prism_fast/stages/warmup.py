"""Stage 2b, warm-up: Bradley-Terry on (teacher, student) pairs, captions and reasonings as separate pairs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

from prism_fast import metric_names as names
from prism_fast.config import WarmupConfig
from prism_fast.data.batches import Batches
from prism_fast.data.encode import NO_RECORDS, Held, pair_record
from prism_fast.data.formats import Dataset, read_warmup
from prism_fast.models.load import ProductChoices, collected, open_discriminator
from prism_fast.records import DataError, Fault, PairRecord, Sample
from prism_fast.run.session import Clock, Session
from prism_fast.steps.expert_load import ExpertLoad
from prism_fast.steps.free_memory import free_bytes
from prism_fast.steps.pair_step import not_finite, pair_accuracy, pair_gradient, pair_packs
from prism_fast.steps.update import Updater, open_updater


def warmup(config: WarmupConfig, *, resume: bool = False, accept_changes: bool = False) -> dict[str, float]:
    """Trains config.discriminator on pairs; writes config.run.out/final. Returns held-out pair accuracies."""
    with Session("warmup", config, resume, accept_changes) as session:
        saved = session.saved("discriminator")
        discriminator, chat = open_discriminator(config.discriminator, saved, config.head_dropout)
        chat.images.keep(session.data.image_cache)
        data = read_warmup(session.data.files, **session.data.reading)
        session.loaded(len(data), discriminator=discriminator)
        per_pack = session.tokens_per_pack(free_bytes(discriminator.device), discriminator=discriminator)
        encode = partial(
            pair_record, chat=chat, max_prompt_tokens=config.data.max_prompt_tokens, max_tokens=config.max_tokens
        )
        count, held_out = _held_out(data, config, encode)
        batches = session.closing(Batches(data, count, encode, config.run.seed, session.data.workers))
        total = config.steps or math.ceil(config.epochs * count / config.batch_size)
        updater = open_updater(discriminator, config.optimizer, total, config.cluster, session.out)
        load = ExpertLoad()
        first = session.begin(
            total,
            models={"discriminator": collected(discriminator, chat, updater.stream)},
            optimizers={"": updater},
            parts={"product_choices": ProductChoices(), "bad_records": data.bad},
            evaluate=lambda: _evaluate(updater, held_out, per_pack),
            watch=config.watch,
        )
        for step in range(first, total):
            clock, warnings, fault, lr = Clock(), [], None, updater.lr
            with clock("data"):
                records = batches.take(step * config.batch_size, config.batch_size)
            if not records:
                updater.next_step()
                session.end_of_step(step + 1, clock, {"update": 0}, {names.LEARNING_RATE: lr}, [NO_RECORDS])
                continue
            with clock("data"):
                packs, labels = pair_packs(records, per_pack, discriminator)
            with clock("update"):
                metrics, broken = pair_gradient(updater, packs, labels, balance_coef=config.balance_coef, load=load)
                metrics[names.LEARNING_RATE] = lr
                metrics[names.GRAD_NORM] = updater.step()
            metrics.update(load.fractions())
            if not math.isfinite(metrics[names.GRAD_NORM]):
                what = not_finite(broken, labels, records) or "a gradient is not finite"
                fault = Fault(what, tuple(record.prompt.place for record in records))
                warnings.append(f"{what}; that update was skipped")
            tokens = {"update": packs.num_tokens}
            session.end_of_step(step + 1, clock, tokens, metrics, warnings, fault=fault)
        return session.finish(data.bad.messages)


def _held_out(
    data: Dataset, config: WarmupConfig, encode: Callable[[Sample], PairRecord]
) -> tuple[int, Sequence[PairRecord]]:
    """(records to train on, held-out records): those of data.eval_files, or the last eval_fraction of ``data``."""
    if config.data.eval_files:
        source = config.data.beside(config.run.out)
        other = read_warmup(source.eval_files, **{**source.reading, "skip_bad": data.bad})
        count, held_out = len(data), Held(other, range(len(other)), encode)
    else:
        count = len(data) - max(1, round(config.eval_fraction * len(data)))
        held_out = Held(data, range(count, len(data)), encode)
    if count < 1:
        raise DataError(
            f"{config.data.files[0]}: eval_fraction = {config.eval_fraction:g} keeps all of {len(data)} records for"
            " evaluation, expected at least 2, one of them to train on; add records, lower it, or give data.eval_files"
        )
    if not held_out:
        raise DataError(f"{config.data.files[0]}: every record kept for evaluation is bad ({data.bad.messages[-1]})")
    return count, held_out


def _evaluate(updater: Updater, held_out: Sequence[PairRecord], per_pack: int) -> tuple[dict[str, float], float]:
    """(pair accuracies, their sum, by which checkpoints compare)."""
    figures = pair_accuracy(updater, held_out, tokens_per_pack=per_pack)
    return figures, sum(figures.values())
