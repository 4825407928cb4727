"""Stage 2b, warm-up: Bradley-Terry on (teacher, student) pairs, captions and reasonings as separate pairs."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from prism_fast.config import WarmupConfig
from prism_fast.data.chat import Chat
from prism_fast.data.encode import encode_all, pair_record
from prism_fast.data.formats import read_warmup
from prism_fast.data.order import order
from prism_fast.models.load import load_discriminator, with_chat
from prism_fast.pack import pack
from prism_fast.records import DataError, StepStats
from prism_fast.run.alerts import Watch
from prism_fast.run.monitor import Monitor
from prism_fast.run.session import Clock, Run, is_time
from prism_fast.steps.expert_load import ExpertLoad
from prism_fast.steps.pair_step import not_finite, pair_accuracy, pair_gradient, pair_trees
from prism_fast.steps.update import Updater


def warmup(config: WarmupConfig, *, resume: bool = False) -> dict[str, Any]:
    """Trains config.discriminator on pairs; writes config.run.out/final. Returns held-out pair accuracies."""
    with Run("warmup", config.run, resume) as run:
        model_config = run.model("discriminator", config.discriminator)
        chat = Chat.load(model_config.path)
        discriminator = load_discriminator(model_config, config.head_dropout)
        data = read_warmup(
            config.data.files, skip_bad=config.data.skip_bad_records, system_prompt=config.data.system_prompt
        )
        encode = partial(
            pair_record, chat=chat, max_prompt_tokens=config.data.max_prompt_tokens, max_tokens=config.max_tokens
        )
        if config.data.eval_files:
            held_out_data, count = (
                read_warmup(config.data.eval_files, system_prompt=config.data.system_prompt),
                len(data),
            )
            held_out = encode_all(held_out_data, list(range(len(held_out_data))), encode)
        else:
            count = len(data) - max(1, round(config.eval_fraction * len(data)))
            held_out = encode_all(data, list(range(count, len(data))), encode)
        if count < 1:
            raise DataError(
                f"{config.data.files[0]}: {len(data)} records, expected at least 2; one is kept for evaluation"
            )
        total = config.steps or math.ceil(config.epochs * count / config.batch_size)
        updater, watch, load = (
            Updater(discriminator, config.optimizer, total),
            Watch(**config.watch.model_dump()),
            ExpertLoad(),
        )
        first, tensors, state = run.restore()
        if first:
            updater.load(tensors, first)
            watch.load(state["watch"])
        models = {"discriminator": with_chat(discriminator, chat)}
        figures: dict[str, Any] = {}
        with Monitor("warmup", config.run.out, total, tracker=config.run.tracker, start_step=first) as monitor:
            for step in range(first, total):
                clock = Clock()
                with clock("data"):
                    picked = order(count, config.run.seed, step * config.batch_size, config.batch_size)
                    records = encode_all(data, picked, encode)
                    trees, labels = pair_trees(records)
                    packs = pack(trees, config.run.tokens_per_pack, discriminator.image)
                with clock("update"):
                    metrics, broken = pair_gradient(
                        discriminator, packs, labels, balance_coef=config.balance_coef, load=load
                    )
                    metrics["lr"] = updater.lr
                    metrics["grad_norm"] = updater.step()
                metrics.update(load.fractions())
                stats = StepStats(step + 1, metrics, clock.seconds, {"update": sum(p.num_tokens for p in packs)})
                monitor.step(stats)
                for line in watch.observe(stats):
                    monitor.warn(line)
                if not math.isfinite(metrics["grad_norm"]):
                    fault = not_finite(broken, labels, records) or "a gradient is not finite"
                    monitor.warn(f"step {step + 1}: {fault}; that update was skipped")
                if is_time(step + 1, config.run.eval_every, total):
                    figures = pair_accuracy(discriminator, held_out, tokens_per_pack=config.run.tokens_per_pack)
                    monitor.evaluation(step + 1, figures)
                    run.improved(step + 1, sum(figures.values()))
                run.step_done(step + 1, total, models, updater.tensors, {"watch": watch.state()})
            for line in data.skipped:
                monitor.warn(f"skipped: {line}")
        run.finish(models)
        return figures
