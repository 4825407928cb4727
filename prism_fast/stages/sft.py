"""Stage 1, supervised fine-tuning: cross-entropy on the assistant's tokens of demonstrations."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from prism_fast.config import SFTConfig
from prism_fast.data.chat import Chat
from prism_fast.data.encode import demonstration, encode_all
from prism_fast.data.formats import read_sft
from prism_fast.data.order import order
from prism_fast.models.load import load_policy, with_chat
from prism_fast.pack import pack
from prism_fast.records import StepStats
from prism_fast.run.monitor import Monitor
from prism_fast.run.session import Clock, Run, is_time
from prism_fast.steps.evaluate import EvalSet, evaluate
from prism_fast.steps.sft_step import demonstration_trees, supervised_gradient
from prism_fast.steps.update import Updater


def sft(config: SFTConfig, *, resume: bool = False) -> dict[str, Any]:
    """Trains config.model on config.data; writes config.run.out/final. Returns the last evaluation's figures."""
    with Run("sft", config.run, resume) as run:
        model_config = run.model("policy", config.model)
        chat = Chat.load(model_config.path)
        policy = load_policy(model_config, chat)
        data = read_sft(
            config.data.files, skip_bad=config.data.skip_bad_records, system_prompt=config.data.system_prompt
        )
        held_out = EvalSet.read(config.data, config.data.eval_files, config.eval.limit, chat)
        total = config.steps or math.ceil(config.epochs * len(data) / config.batch_size)
        updater = Updater(policy, config.optimizer, total)
        first, tensors, _ = run.restore()
        if first:
            updater.load(tensors, first)
        encode = partial(
            demonstration, chat=chat, max_prompt_tokens=config.data.max_prompt_tokens, max_tokens=config.max_tokens
        )
        models = {"policy": with_chat(policy, chat)}
        figures: dict[str, Any] = {}
        with Monitor("sft", config.run.out, total, tracker=config.run.tracker, start_step=first) as monitor:
            for step in range(first, total):
                clock = Clock()
                with clock("data"):
                    picked = order(len(data), config.run.seed, step * config.batch_size, config.batch_size)
                    trees = demonstration_trees(encode_all(data, picked, encode))
                    packs = pack(trees, config.run.tokens_per_pack, policy.image)
                with clock("update"):
                    loss = supervised_gradient(policy, packs)
                    lr = updater.lr
                    norm = updater.step()
                stats = StepStats(
                    step + 1,
                    {"loss": loss, "lr": lr, "grad_norm": norm},
                    clock.seconds,
                    {"update": sum(p.num_tokens for p in packs)},
                )
                monitor.step(stats)
                if not math.isfinite(norm):
                    monitor.warn(f"step {step + 1}: a gradient is not finite; that update was skipped")
                if held_out and is_time(step + 1, config.run.eval_every, total):
                    result = evaluate(policy, chat, held_out, config.eval, seed=config.run.seed)
                    figures = result.figures()
                    monitor.evaluation(step + 1, figures)
                    run.improved(step + 1, result.accuracy)
                run.step_done(step + 1, total, models, updater.tensors, {})
            for line in data.skipped:
                monitor.warn(f"skipped: {line}")
        run.finish(models)
        return figures
