"""Whole steps of the stages, part by part: rlvr, align and sft, as their loops run them, by the trainer's own code.

- rollout: sampling the responses (built-in sampler).
- score: the discriminator's forward and backward, which give scores and its gradient at once (align).
- update: the policy's forward and backward.
- optimizer: clipping and AdamW, of both models in align.
- host: what no model computes: reading images and texts, tokenising and judging responses, advantages, packing.

Responses are ragged, as they end by chance (benchmarks/steps/stage_case.py). One step warms up, with short responses,
and is told apart, as it compiles; what is known is kept after every part. TFLOP/s of the whole step and of score and
update count the products of gradients by formula, the vision tower's with them (benchmarks/steps/flops.py),
not sampling's.
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from benchmarks.harness import measure
from benchmarks.harness.document import add_times, clear_times
from benchmarks.harness.measure import DTYPES, Timer
from benchmarks.harness.run import Options
from benchmarks.steps import flops, stage_case
from benchmarks.steps.case import GPU, MINI, TINY
from benchmarks.steps.flops import Work
from benchmarks.steps.policy import QWEN3_VL_4B
from benchmarks.steps.stage_case import Load
from prism_fast.config import AdvantageConfig, DiscriminatorStep, OptimizerConfig, OwnReward, Sampling
from prism_fast.data.encode import demonstration, lesson, question
from prism_fast.steps.advantage import alignment_advantage, reward_advantage
from prism_fast.steps.discriminator_step import discriminator_gradient, student_parts
from prism_fast.steps.experience import rewards_of
from prism_fast.steps.expert_load import ExpertLoad
from prism_fast.steps.policy_step import policy_gradient
from prism_fast.steps.sampler import BuiltinSampler
from prism_fast.steps.sft_step import demonstration_packs, supervised_gradient
from prism_fast.steps.update import Updater, open_updater
from prism_kernels import PolicyObjective

ABOUT = __doc__  # of this file: in a class the name is its own

WHOLE = "whole step"
OBJECTIVE = PolicyObjective.grpo()
LOADS = {
    "mini": Load(replace(MINI.dense(), vocab=640), replace(MINI, vocab=640), 2, 60, 256),
    "tiny": Load(replace(TINY.dense(), responses=8), TINY, 2, 630, 2048),
    # Widths of Qwen3-VL-4B and of four experts out of the 2B, lengths that docs/method.md counts with; 64 responses.
    "gpu": Load(QWEN3_VL_4B, GPU, 4, 3072, 16_384),
}
DEFAULT = {"cpu": "tiny", "cuda": "gpu"}
# (bf16 moments, discriminator's optimizer on the host, policy's too), from the fastest to the smallest.
WAYS_TO_HOLD = ((False, False, False), (True, False, False), (True, True, False), (True, True, True))
WARMUP_TOKENS = 256  # of a response in the step that warms up
ROOM = 24e9  # on a GPU besides states and activations: context, sampler's copies of weights, pages, logits
Keep = Callable[[dict[str, Any]], None]


@dataclass
class Clock:
    """``with clock(part):`` adds up the seconds of a part; what a GPU still runs at its end is waited for."""

    timer: Timer
    tell: Callable[[], None] = lambda: None
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    peak: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        on_gpu = self.timer.device.type == "cuda"
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        began = self.timer.clock()
        yield
        if on_gpu:
            torch.cuda.synchronize()
            self.peak[part] = max(self.peak[part], torch.cuda.max_memory_allocated())
        self.seconds[part] += self.timer.clock() - began
        self.tell()


@dataclass
class Stage:
    """The models, records and updaters of one stage. ``step(clock, number)`` -> (work of score and update, tokens)."""

    load: Load
    samples: list
    chat: Any
    policy: Updater
    judge: Updater | None
    sampler: stage_case.Spoken
    checkpointing: bool
    config: DiscriminatorStep = field(default_factory=DiscriminatorStep)

    def sampling(self, number: int) -> Sampling:
        """The first step's responses are short: it compiles."""
        longest = self.load.longest if number else min(self.load.longest, WARMUP_TOKENS)
        return Sampling(samples=self.load.policy.responses, max_response_tokens=longest)

    def limits(self) -> dict[str, Any]:
        return {"chat": self.chat, "max_prompt_tokens": 1 << 20}

    def policy_work(self, branches: list[list[int]]) -> Work:
        """One tree a prompt, as long as there are branches."""
        shape, found = self.load.policy, Work()
        for some in filter(None, branches):
            found += flops.vision(shape) + flops.tree(shape, some) + flops.head(shape, sum(some), shape.vocab)
        return found

    def update(self, clock: Clock, rollout, advantages) -> tuple[Work, int]:
        with clock("update"):
            metrics, tokens = policy_gradient(
                self.policy, rollout, advantages, OBJECTIVE, temperature=1.0, tokens_per_pack=self.load.tokens_per_pack
            )
        if not math.isfinite(metrics["loss"]):
            raise RuntimeError(f"the policy's loss is {metrics['loss']}")
        kept = advantages != 0
        return self.policy_work([stage_case.lengths(rollout, i, kept) for i in range(self.load.prompts)]), tokens

    def optimize(self, clock: Clock, updater: Updater) -> None:
        with clock("optimizer"):
            norm = updater.step()
        if not math.isfinite(norm):
            raise RuntimeError("a gradient is not finite")


def rlvr(stage: Stage, clock: Clock, number: int) -> tuple[dict[str, float], dict[str, int]]:
    with clock("host"):
        questions = [question(sample, **stage.limits()) for sample in stage.samples]
    with clock("rollout"):
        rollout = stage.sampler.generate([prompt for _, prompt in questions], stage.sampling(number), seed=number)
    with clock("host"):
        rewards = rewards_of(rollout, stage.samples, OwnReward())
        reward = torch.tensor([found.score for found in rewards])
        advantages = reward_advantage(reward, rollout.group, "grpo")
    work, tokens = stage.update(clock, rollout, advantages)
    stage.optimize(clock, stage.policy)
    return {"update": work.trained(stage.checkpointing)}, {"rollout": rollout.num_tokens, "update": tokens}


def align(stage: Stage, clock: Clock, number: int) -> tuple[dict[str, float], dict[str, int]]:
    load, judge = stage.load, stage.judge
    assert judge is not None
    with clock("host"):
        lessons = [lesson(sample, config=stage.config, **stage.limits()) for sample in stage.samples]
    with clock("rollout"):
        rollout = stage.sampler.generate([each.prompt for each in lessons], stage.sampling(number), seed=number)
    with clock("host"):
        parts = student_parts(rollout, stage.chat, stage.config)
    with clock("score"):
        scores, _, judged = discriminator_gradient(
            judge, lessons, rollout, parts, stage.config, tokens_per_pack=load.tokens_per_pack, load=ExpertLoad()
        )
    stage.optimize(clock, judge)
    with clock("host"):
        advantages = alignment_advantage(scores, rollout.group, AdvantageConfig(), stage.config)
    work, tokens = stage.update(clock, rollout, advantages)
    stage.optimize(clock, stage.policy)
    score = Work()
    for group, each in enumerate(lessons):
        mine = [pair for pair, of in zip(parts, rollout.group.tolist()) if of == group]
        branches = stage_case.part_lengths(mine, each.teacher)
        score += flops.vision(load.judge) + flops.tree(load.judge, branches, read_out=True, kernels=True)
        score += flops.head(load.judge, len(branches), 1)
    counted = {"score": score.trained(stage.checkpointing), "update": work.trained(stage.checkpointing)}
    return counted, {"rollout": rollout.num_tokens, "score": judged, "update": tokens}


def sft(stage: Stage, clock: Clock, number: int) -> tuple[dict[str, float], dict[str, int]]:
    """As many demonstrations as the others sample responses: every prompt's record as often as it has samples."""
    load = stage.load
    with clock("host"):
        each = [demonstration(sample, max_tokens=1 << 20, **stage.limits()) for sample in stage.samples]
        ragged = stage_case.cut_unevenly(each, load, number)
        packs = demonstration_packs(ragged, load.tokens_per_pack, stage.policy.module)
    with clock("update"):
        loss = supervised_gradient(stage.policy, packs)
    if not math.isfinite(loss):
        raise RuntimeError(f"the loss is {loss}")
    stage.optimize(clock, stage.policy)
    groups = range(0, len(ragged), load.policy.responses)
    work = stage.policy_work([[len(ids) for _, ids in ragged[i : i + load.policy.responses]] for i in groups])
    return {"update": work.trained(stage.checkpointing)}, {"update": packs.num_tokens}


STAGES = {"rlvr": rlvr, "align": align, "sft": sft}
PARTS = {
    "rlvr": ("rollout", "update", "optimizer", "host"),
    "align": ("rollout", "score", "update", "optimizer", "host"),
    "sft": ("update", "optimizer", "host"),
}


def open_stage(name: str, load: Load, options: Options) -> tuple[Stage, str]:
    """(the stage, how its optimizers' state is held)."""
    device, judged = options.device, name == "align"
    checkpointing = (load is LOADS["gpu"]) if options.recompute is None else options.recompute
    chat = stage_case.make_chat(load)
    samples = stage_case.make_samples(load, chat)
    policy, judge = stage_case.make_models(
        load, chat, options.dtype, device, judged=judged, checkpointing=checkpointing
    )
    if name != "sft":
        stage_case.favour_the_end(policy, chat, chat.encode_prompt(samples[0]), load)
    models = [policy] if judge is None else [policy, judge]
    small, judge_away, away = way_to_hold([sum(p.numel() for p in model.parameters()) for model in models], options)
    held = {"lr": 1e-6, "moments": "bfloat16" if small else "float32"}
    updater = open_updater(policy, OptimizerConfig(**held, offload=away), 1000)
    judging = None if judge is None else open_updater(judge, OptimizerConfig(**held, offload=judge_away), 1000)
    said = f"{held['moments']} moments" + (", policy's on the host" if away else "")
    said += ", discriminator's on the host" if judge_away and judged else ""
    sampler = stage_case.Spoken(BuiltinSampler(updater, chat))
    return Stage(load, samples, chat, updater, judging, sampler, checkpointing), said


def way_to_hold(parameters: list[int], options: Options) -> tuple[bool, bool, bool]:
    """The first of WAYS_TO_HOLD that fits the GPU: 6 bytes a parameter for weight and gradient, and on it or on the
    host 10 for remainder and moments, 6 where those are bf16."""
    if options.device.type != "cuda":
        return WAYS_TO_HOLD[0]
    room = torch.cuda.get_device_properties(options.device).total_memory - ROOM
    for way in WAYS_TO_HOLD:
        state = 6 if way[0] else 10
        away = (way[2], way[1])  # the policy comes first
        if sum(count * (6 + (0 if out else state)) for count, out in zip(parameters, away)) <= room:
            return way
    return WAYS_TO_HOLD[-1]


def measured(name: str, size: str, options: Options, keep: Keep) -> dict[str, Any]:
    """One stage: a warm-up, then step after step. What fails has its reason, and no speed of what came before."""
    load = LOADS[size]
    result: dict[str, Any] = {
        "name": name, "title": f"one step of {name}", "status": "ok", "limit": None, "flops": 0.0, "bytes": 0.0,
        "shape": {"dtype": str(options.dtype).removeprefix("torch."), **_told(load)},
        "sizes": ["dtype", "layers", "hidden", "vocab", "prompts", "samples", "prompt", "mean", "longest"],
        "parts": True, "first": {},
        "rows": [{"name": part, "role": "ours", "status": "ok"} for part in (WHOLE, *PARTS[name])],
    }  # fmt: skip
    try:
        measure.say(f"step, {name}: opening")
        stage, result["held"] = open_stage(name, load, options)
        _steps(name, stage, options, result, keep)
    except Exception as error:  # noqa: BLE001 - out of memory, or a library's fault: other stages are measured
        measure.say(f"step, {name}: {measure.short(error)}")
        result.update(status="refused", reason=measure.short(error))
        clear_times(result["rows"], {})
    return result


def _told(load: Load) -> dict[str, Any]:
    lengths = {"prompts": load.prompts, "samples": load.policy.responses, "mean": load.mean, "longest": load.longest}
    return {**asdict(load.policy), **lengths, "tokens_per_pack": load.tokens_per_pack, "judge": asdict(load.judge)}


def _steps(name: str, stage: Stage, options: Options, result: dict[str, Any], keep: Keep) -> None:
    timer, run = Timer(options.device, options.busy), STAGES[name]

    def told(clock: Clock) -> None:
        result["first"] = {part: round(seconds, 4) for part, seconds in clock.seconds.items()}
        keep(result)

    first = Clock(timer)
    first.tell = lambda: told(first)
    run(stage, first, 0)
    samples: dict[str, list[float]] = defaultdict(list)
    rounds, spent = options.rounds, 0.0
    number = 0
    while number < (rounds or 100) and (rounds or number < 2 or spent < options.seconds):
        number += 1
        clock = Clock(timer)
        work, tokens = run(stage, clock, number)
        for part, seconds in clock.seconds.items():
            samples[part].append(seconds)
        samples[WHOLE].append(sum(clock.seconds.values()))
        spent += samples[WHOLE][-1]
        fill_rows(result, samples, work, tokens, clock.peak)
        keep(result)


def fill_rows(
    result: dict[str, Any],
    samples: measure.Samples,
    work: dict[str, float],
    tokens: dict[str, int],
    peak: dict[str, int],
) -> None:
    """Operations and tokens are those of the last step: about those of each."""
    result["flops"] = sum(work.values())
    tokens = {**tokens, WHOLE: tokens["update"]}
    for row in result["rows"]:
        part = row["name"]
        add_times(row, samples[part], flops={**work, WHOLE: result["flops"]}.get(part))
        row["share"] = row["median_s"] / measure.Summary.of(samples[WHOLE]).median
        if part in tokens:
            row["tokens"], row["tokens_per_s"] = tokens[part], tokens[part] / row["median_s"]
        if peak.get(part):
            row["peak_bytes"] = peak[part]
    if peak:
        result["rows"][0]["peak_bytes"] = max(peak.values())


class Stages:
    """A benchmark as `harness.run` runs them: a problem a stage, which grows part by part."""

    op = "step"
    description = ABOUT
    seconds = 60.0  # of a stage, after its first step; two steps at least

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--stage", action="append", choices=tuple(STAGES), help="repeatable; default: all")
        shown = ", ".join(f"{size} on {device}" for device, size in DEFAULT.items())
        parser.add_argument("--shape", choices=tuple(LOADS), help=f"default: {shown}")
        parser.add_argument("--dtype", choices=("fp32", "bf16"), help="default: bf16 on a GPU")
        recompute = argparse.BooleanOptionalAction
        parser.add_argument("--recompute", action=recompute, help="of activations; default: at --shape gpu")

    def options(self, given: argparse.Namespace) -> dict[str, Any]:
        size = given.shape or ("mini" if given.dry_run else DEFAULT[given.device])
        dtype = DTYPES[given.dtype or ("bf16" if given.device == "cuda" else "fp32")]
        return {"shapes": (size,), "only": given.stage or (), "dtype": dtype, "recompute": given.recompute}

    def dtypes(self, options: Options) -> dict[str, torch.dtype]:
        return {str(options.dtype).removeprefix("torch."): options.dtype}

    def results(self, options: Options, keep: Keep) -> Iterator[dict[str, Any]]:
        for size in options.shapes:
            for name in options.only or STAGES:
                yield measured(name, size, options, keep)
                measure.free(options.device)


BENCH = Stages()
