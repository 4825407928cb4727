"""The plan of any command that opens models: `Plan` of the stages that train; here of those that answer prompts, and of
`upcycle`. They run in one process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

from prism_fast.records import DataError
from prism_fast.run.dimensions import DISCRIMINATOR, Model
from prism_fast.run.launch import STAGES
from prism_fast.run.memory import CONTEXT, IMAGE, PROMPT, Setup, Trained
from prism_fast.run.plan import MEAN, Plan, Question, Section, config_file, gb, gpu_of, hours, models_of, read_model
from prism_fast.run.seconds import GPU, Batch, cache, forward, rollout, rows_at_once

ANSWERS = ("pairs", "filter", "eval", "probe")
PLANNED = (*STAGES, *ANSWERS, "upcycle")
DENSE = DISCRIMINATOR._replace(text=DISCRIMINATOR.text._replace(experts=1, top_k=1), head=0)  # the published 2B
BLOCK = 1024  # responses that are sampled before the next are begun, as stages/answers.py has them


class AnyPlan(Protocol):
    def sections(self) -> Iterator[Section]: ...

    @property
    def fits(self) -> bool: ...


def check_planned(stage: str) -> None:
    """Raises DataError where no command of that name has a plan."""
    if stage not in PLANNED:
        raise DataError(f"plan: {stage!r} has none; expected one of {', '.join(PLANNED)}")


def plan_of(stage: str, settings: Any, asked: Question, hint: str = "") -> AnyPlan:
    """As `Plan.of`, of any of PLANNED."""
    if stage in STAGES:
        return Plan.of(stage, settings, asked, hint)
    if asked.gpus > 1:
        raise DataError(f"plan: --gpus={asked.gpus}: {stage} runs in one process; leave it out")
    return Upcycled.of(settings) if stage == "upcycle" else Answers.of(stage, settings, asked, hint)


class Answers(NamedTuple):
    """Of `data pairs`, `data filter`, `eval` and `probe`, as the built-in sampler answers."""

    stage: str
    models: dict[str, Trained]  # the one that answers first
    setup: Setup
    batch: Batch  # a block of responses
    prompts: int | None  # in all, where it is known
    gpu: GPU
    asked: Question

    @classmethod
    def of(cls, stage: str, settings: Any, asked: Question, hint: str) -> Answers:
        gpu, models = gpu_of(asked), models_of(settings, asked, hint)
        policy = next(iter(models))
        size = 4 if getattr(settings, policy).dtype == "float32" else 2
        sampling = settings.eval if stage == "eval" else settings
        limit, n = sampling.max_response_tokens, sampling.samples
        prompt = min(asked.prompt or PROMPT, settings.data.max_prompt_tokens)
        response = min(asked.response or limit // MEAN, limit)
        batch = Batch(max(1, BLOCK // n), n, prompt, min(round(prompt * IMAGE / PROMPT), prompt), response, limit)
        prompts = min((count for count in (sampling.limit, asked.records) if count is not None), default=None)
        read = {name: one._replace(reference=True) for name, one in models.items()}
        return cls(stage, read, Setup(size=size, memory=gpu.memory), batch, prompts, gpu, asked)

    @property
    def rows(self) -> int:
        return rows_at_once(tuple(self.models.values()), self.setup, self.batch, self.gpu)

    @property
    def held(self) -> dict[str, float]:
        """Bytes."""
        first = next(iter(self.models.values())).model
        each = cache(first, self.setup.size) * (self.batch.longest / 2 + self.batch.prompt / self.batch.samples)
        weights = float(self.setup.size * sum(one.model.parameters for one in self.models.values()))
        return {"weights": weights, f"cache of {self.rows} responses": self.rows * each, "context": CONTEXT}

    @property
    def fits(self) -> bool:
        return sum(self.held.values()) <= self.gpu.memory

    @property
    def seconds(self) -> dict[str, float]:
        """Of a block."""
        e, batch, (first, *others) = self.asked.efficiency, self.batch, (one.model for one in self.models.values())
        scored = [forward(each, batch.pack(BLOCK * batch.response)) for each in others]
        return {
            "rollout": rollout(first, batch, 1, self.rows, self.gpu, e),
            "score": sum(work.repeated + work.other for work in scored) / (self.gpu.flops * e.flops),
            "host": batch.prompts * e.prompt + batch.prompts * batch.samples * e.response,
        }

    def sections(self) -> Iterator[Section]:
        sizes = ", ".join(f"{name} {one.model.parameters / 1e9:.2f} B" for name, one in self.models.items())
        title = f"{self.stage}: {sizes}; one {self.asked.gpu.upper()} of {self.gpu.memory / 1e9:g} GB"
        rows = [*([name, gb(value)] for name, value in self.held.items()), ["in all", gb(sum(self.held.values()))]]
        fits = "fits" if self.fits else "does not fit"
        note = f"{gb(sum(self.held.values()))} of {self.gpu.memory / 1e9:g} GB: {fits}. By count, nothing is measured."
        yield Section(title, ["held by the GPU", "GB"], rows, [note, "A cache is counted at half of the limit."])
        batch, total = self.batch, sum(self.seconds.values())
        rows = [[name, f"{value:.1f}"] for name, value in self.seconds.items() if value]
        e = self.asked.efficiency
        notes = [
            f"Prompts of {batch.prompt:,} tokens ({batch.image:,} of an image), {batch.samples} x {batch.response:,} "
            f"tokens behind each. Assumed: {e.flops:.0%} of the datasheet's FLOP/s, {e.bytes:.0%} of its bandwidths."
        ]
        if self.prompts is not None:
            responses = self.prompts * batch.samples
            notes.append(hours(responses, "responses", total / (batch.prompts * batch.samples)))
        title = f"Seconds of {batch.prompts * batch.samples:,} responses, predicted."
        yield Section(title, ["part", "s"], [*rows, ["in all", f"{total:.1f}"]], notes)


class Upcycled(NamedTuple):
    """Of `upcycle`, which computes in host memory."""

    dense: Model
    made: Model
    size: int

    @classmethod
    def of(cls, settings: Any) -> Upcycled:
        file = config_file(settings.model.path)
        dense = read_model(file) if file is not None else DENSE
        text = dense.text._replace(experts=settings.num_experts, top_k=settings.top_k)
        size = 4 if settings.model.dtype == "float32" else 2
        return cls(dense, dense._replace(text=text, head=text.hidden), size)

    @property
    def fits(self) -> bool:
        return True  # host memory is not planned

    def sections(self) -> Iterator[Section]:
        dense, made = self.dense.parameters, self.made.parameters
        rows = [["dense", f"{dense / 1e9:.2f}", gb(self.size * dense)]]
        rows.append(["discriminator", f"{made / 1e9:.2f}", gb(self.size * made)])
        text = self.made.text
        title = f"upcycle: {text.experts} experts in each of {text.layers} layers, top {text.top_k}"
        yield Section(title, ["", "B parameters", "GB"], rows, ["Both are in host memory at once."])
