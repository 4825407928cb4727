"""Stage 2b, warm-up: Bradley-Terry on (teacher, student) pairs, captions and reasonings as separate pairs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from prism_fast.config import WarmupConfig
from prism_fast.data.chat import Chat
from prism_fast.data.formats import read_warmup
from prism_fast.discriminator import Discriminator
from prism_fast.loss import bradley_terry
from prism_fast.metrics import Monitor
from prism_fast.pack import (
    KIND_STUDENT_CAPTION,
    KIND_STUDENT_REASONING,
    KIND_TEACHER_CAPTION,
    KIND_TEACHER_REASONING,
    Tree,
    merge_prompts,
    pack,
)
from prism_fast.records import DataError, PackedTree, Prompt, Sample, StepStats
from prism_fast.routing_metrics import ExpertLoad
from prism_fast.run import Clock, Run, encode_all, is_time, load_discriminator, order, with_chat
from prism_fast.update import Updater
from prism_fast.watch import Watch
from prism_kernels import load_balancing_loss

SIDES = ("perception", "reasoning")


@dataclass(frozen=True)
class PairRecord:
    """The tokens of one warm-up record: teacher and student, perception and reasoning."""

    place: str  # file and record, for messages
    prompt: Prompt
    teacher: tuple[Tensor, Tensor]
    student: tuple[Tensor, Tensor]


def warmup(config: WarmupConfig, *, resume: bool = False) -> dict[str, Any]:
    """Trains config.discriminator on pairs; writes config.run.out/final. Returns held-out pair accuracies."""
    with Run("warmup", config.run, resume) as run:
        model_config = run.model("discriminator", config.discriminator)
        chat = Chat.load(model_config.path)
        discriminator = load_discriminator(model_config, config.head_dropout)
        data = read_warmup(
            config.data.files, skip_bad=config.data.skip_bad_records, system_prompt=config.data.system_prompt
        )
        encode = partial(pair_record, chat=chat, config=config)
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
                    trees, pairs = pair_trees(records)
                    packs = pack(trees, config.run.tokens_per_pack, discriminator.image)
                with clock("update"):
                    metrics = {"loss": 0.0, **{f"loss/pair_{name}": 0.0 for name in SIDES}}
                    better: list[list[Tensor]] = [[], []]
                    fault = None
                    for packed in packs:
                        packed = packed.to(discriminator.head.device)
                        judgement = discriminator(packed, balance=config.balance_coef > 0)
                        loss = judgement.score.new_zeros(())
                        for side in range(2):
                            teacher, student = pair_scores(judgement.score, packed, pairs, side)
                            pair_loss = bradley_terry(teacher, student).sum() / len(records)
                            loss = loss + pair_loss / 2
                            metrics[f"loss/pair_{SIDES[side]}"] += float(pair_loss.detach())
                            better[side].append((teacher > student).detach())
                        if config.balance_coef > 0:
                            balance = load_balancing_loss(judgement.stats, discriminator.top_k) / len(packs)
                            loss = loss + config.balance_coef * balance
                            metrics["loss/balance"] = metrics.get("loss/balance", 0.0) + float(balance.detach())
                        loss.backward()
                        metrics["loss"] += float(loss.detach())
                        if not math.isfinite(metrics["loss"]):
                            fault = fault or not_finite(judgement.score, packed, pairs, records)
                        load.add(judgement.stats)
                    metrics["lr"] = updater.lr
                    metrics["grad_norm"] = updater.step()
                for side, name in enumerate(SIDES):
                    metrics[f"pair_accuracy/{name}"] = float(torch.cat(better[side]).float().mean())
                metrics.update(load.fractions())
                stats = StepStats(step + 1, metrics, clock.seconds, {"update": sum(p.num_tokens for p in packs)})
                monitor.step(stats)
                for line in watch.observe(stats):
                    monitor.warn(line)
                if not math.isfinite(metrics["grad_norm"]):
                    fault = fault or "a gradient is not finite"
                    monitor.warn(f"step {step + 1}: {fault}; that update was skipped")
                if is_time(step + 1, config.run.eval_every, total):
                    figures = pair_accuracy(discriminator, held_out, config)
                    monitor.evaluation(step + 1, figures)
                    run.improved(step + 1, sum(figures.values()))
                run.step_done(step + 1, total, models, updater.tensors, {"watch": watch.state()})
            for line in data.skipped:
                monitor.warn(f"skipped: {line}")
        run.finish(models)
        return figures


def pair_record(sample: Sample, chat: Chat, config: WarmupConfig) -> PairRecord:
    """Tokens of one record. Raises DataError where a part is too long: teacher and student have the same limit."""
    prompt = chat.encode_prompt(sample, config.data.max_prompt_tokens)
    parts = {}
    for voice in ("teacher", "student"):
        for part in ("caption", "reasoning"):
            ids = chat.encode_part(getattr(sample, f"{voice}_{part}"))
            if len(prompt) + len(ids) > config.max_tokens:
                raise DataError(
                    f"{sample.place}: {voice} {part}: {len(prompt) + len(ids)} tokens with the prompt are over "
                    f"max_tokens = {config.max_tokens}; raise it, or shorten the record"
                )
            parts[voice, part] = ids
    return PairRecord(
        sample.place,
        prompt,
        (parts["teacher", "caption"], parts["teacher", "reasoning"]),
        (parts["student", "caption"], parts["student", "reasoning"]),
    )


Pairs = list[tuple[int, tuple[int, int], tuple[int, int]]]  # (tree, teacher's branches, student's branches), by side


def pair_trees(records: list[PairRecord]) -> tuple[list[Tree], Pairs]:
    """One tree per distinct prompt; a branch that several records share stands once."""
    prompts, which = merge_prompts([r.prompt for r in records])
    branches: list[list[Tensor]] = [[] for _ in prompts]
    kinds: list[list[int]] = [[] for _ in prompts]
    known: dict[tuple, int] = {}

    def branch(tree: int, ids: Tensor, kind: int) -> int:
        key = (tree, kind, tuple(ids.tolist()))
        if key not in known:
            known[key] = len(branches[tree])
            branches[tree].append(ids)
            kinds[tree].append(kind)
        return known[key]

    pairs: Pairs = []
    for record, tree in zip(records, which):
        teacher = (
            branch(tree, record.teacher[0], KIND_TEACHER_CAPTION),
            branch(tree, record.teacher[1], KIND_TEACHER_REASONING),
        )
        student = (
            branch(tree, record.student[0], KIND_STUDENT_CAPTION),
            branch(tree, record.student[1], KIND_STUDENT_REASONING),
        )
        pairs.append((tree, teacher, student))
    teachers = (KIND_TEACHER_CAPTION, KIND_TEACHER_REASONING)
    trees = [
        Tree(p, b, k, together=tuple(i for i, kind in enumerate(k) if kind in teachers))
        for p, b, k in zip(prompts, branches, kinds)
    ]
    return trees, pairs


def pair_scores(score: Tensor, packed: PackedTree, pairs: Pairs, side: int) -> tuple[Tensor, Tensor]:
    """(teacher, student) scores of the pairs of one side whose student branch lies in this pack."""
    row = {name: i for i, name in enumerate(packed.branch)}
    here = [
        (row[t, teacher[side]], row[t, student[side]]) for t, teacher, student in pairs if (t, student[side]) in row
    ]
    index = torch.tensor(here, dtype=torch.int64, device=score.device).view(-1, 2)
    return score.index_select(0, index[:, 0]), score.index_select(0, index[:, 1])


def not_finite(score: Tensor, packed: PackedTree, pairs: Pairs, records: list[PairRecord]) -> str | None:
    """Names the first record a score of which, in this pack, is not finite."""
    bad = {packed.branch[i] for i in (~score.detach().isfinite()).nonzero().flatten().tolist()}
    for record, (tree, *voices) in zip(records, pairs):
        for voice, branches in zip(("teacher", "student"), voices):
            for side, branch in zip(SIDES, branches):
                if (tree, branch) in bad:
                    return f"the {side} score of the {voice} of {record.place} is not finite"
    return None


@torch.no_grad()
def pair_accuracy(discriminator: Discriminator, records: list[PairRecord], config: WarmupConfig) -> dict[str, float]:
    """How often the teacher's part scores higher than the student's, on held-out records."""
    discriminator.eval()
    trees, pairs = pair_trees(records)
    right: list[list[Tensor]] = [[], []]
    for packed in pack(trees, config.run.tokens_per_pack, discriminator.image):
        score = discriminator(packed.to(discriminator.head.device)).score
        for side in range(2):
            teacher, student = pair_scores(score, packed, pairs, side)
            right[side].append(teacher > student)
    discriminator.train()
    return {f"pair_accuracy_{name}": float(torch.cat(right[i]).float().mean()) for i, name in enumerate(SIDES)}
