"""`prism-fast plan STAGE --config RECIPE`: what a run holds and how long its steps take, before there is a GPU.

Models are those that the settings name where their folders are there, else Qwen3-VL's published ones.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from prism_fast.config import ModelConfig, WarmupConfig
from prism_fast.records import DataError
from prism_fast.run.activations import Activations
from prism_fast.run.dimensions import DISCRIMINATOR, POLICIES, Model, Pack
from prism_fast.run.memory import CONTEXT, IMAGE, PROMPT, Need, Setup, Trained, largest, need
from prism_fast.run.pack_size import PART, Lengths, optimizer_of, pack_limit, trained_as
from prism_fast.run.seconds import GPU, GPUS, Batch, Efficiency, cache, parts, rows_at_once

MOST = 1 << 20  # tokens of a pack that are looked at
STEP = 256
MODELS = ("model", "policy", "discriminator")  # as settings name them
HUB_NAME = r"[\w.-]+/[\w.-]+"
MEAN = 3  # a response's limit by its mean: docs/method.md's lengths
DEMONSTRATION = 500  # tokens of a response to learn from, and of a pair's part


class Section(NamedTuple):
    """A table with a line above and lines below it."""

    title: str
    heads: list[str]
    rows: list[list[str]]
    notes: list[str] = []  # noqa: RUF012


class Question(NamedTuple):
    """What is asked beside the stage's settings; None: what follows from them."""

    gpu: str = "h100"
    gpus: int = 1
    memory: float | None = None  # GB of one GPU
    policy: str | None = None  # 4b or 8b, where the settings do not tell
    prompt: int | None = None  # tokens, as a mean
    response: int | None = None
    efficiency: Efficiency = Efficiency()
    records: int | None = None  # of the data, where settings name no number of steps


class Plan(NamedTuple):
    """A question with everything that its answer depends on."""

    stage: str
    models: dict[str, Trained]
    setup: Setup
    batch: Batch
    tokens: int  # of a pack
    gpu: GPU
    asked: Question
    steps: int | None = None  # where it is known

    @classmethod
    def of(cls, stage: str, settings: Any, asked: Question, hint: str = "") -> Plan:
        """``settings`` of the stage; ``hint``: a text, such as a recipe's name, that may name the policy's size."""
        gpu, models = gpu_of(asked), models_of(settings, asked, hint)
        optimizer, form = optimizer_of(settings), settings.cluster.sharding
        size = 4 if next(getattr(settings, name) for name in models).dtype == "float32" else 2
        setup = Setup(form, asked.gpus, optimizer.offload, optimizer.moments, size=size, memory=gpu.memory)
        tokens = settings.run.tokens_per_pack
        if tokens == "auto":  # as a run finds it, when its weights are there and nothing else is
            held = float(sum(size * one.model.parameters for one in models.values()))
            room = held + PART * (gpu.memory - held - CONTEXT)
            tokens = pack_limit(list(models.values()), setup, Lengths.of(settings), room)
        steps = _steps(settings, asked.records)
        return cls(stage, models, setup, _batch(stage, settings, asked), tokens, gpu, asked, steps)

    def need(self, tokens: int, checkpointing: bool | None = None) -> Need:
        """``checkpointing``: None: as the models have it."""
        chosen = [one if checkpointing is None else one._replace(checkpointing=checkpointing) for one in self.trained]
        return need(chosen, self.setup, self.pack(tokens))

    def pack(self, tokens: int) -> Pack:
        """A full one, of the batch's lengths."""
        whole = self.batch.pack(tokens)
        return whole.times(tokens / whole.tokens)

    def most(self, checkpointing: bool | None = None) -> int:
        """The largest tokens_per_pack that fits; 0: none does."""
        return largest(lambda tokens: self.need(tokens, checkpointing).training, self.gpu.memory, MOST, STEP)

    @property
    def trained(self) -> tuple[Trained, ...]:
        return tuple(self.models.values())

    @property
    def fits(self) -> bool:
        return self.need(self.tokens).training <= self.gpu.memory

    def sections(self) -> Iterator[Section]:
        found = self.need(self.tokens)
        yield Section(self.title, *_states(self, found))
        yield _passes(self, found)
        if self.batch.sampled:
            yield _cache(self)
        yield _seconds(self)

    @property
    def title(self) -> str:
        s = self.setup
        form = s.form + (", optimizer on the host" if s.offload else "")
        form += ", moments in bf16" if s.moments == "bfloat16" else ""
        sizes = ", ".join(f"{name} {one.model.parameters / 1e9:.2f} B" for name, one in self.models.items())
        gpu = f"{s.gpus} x {self.asked.gpu.upper()} of {self.gpu.memory / 1e9:g} GB"
        return f"{self.stage}: {sizes}; {gpu}, {form}; packs of {self.tokens:,} tokens"


def unnamed(config: type[Any]) -> dict[str, Any]:
    """What a stage's settings must name and a plan does not read: below a recipe that leaves it to the user."""
    base: dict[str, Any] = {name: {"path": name} for name in MODELS if name in config.model_fields}
    named = {"data": {"files": "data"}, "run": {"out": "run"}, "out": "out"}
    return base | {name: value for name, value in named.items() if name in config.model_fields}


def gpu_of(asked: Question) -> GPU:
    if asked.gpu not in GPUS:
        raise DataError(f"plan: --gpu: expected one of {', '.join(GPUS)}, got {asked.gpu!r}")
    gpu = GPUS[asked.gpu]
    return gpu if asked.memory is None else gpu._replace(memory=asked.memory * 1e9)


def models_of(settings: Any, asked: Question, hint: str) -> dict[str, Trained]:
    """By the names that they have in the settings; the one that samples comes first."""
    if asked.policy not in (None, *POLICIES):
        raise DataError(f"plan: --policy: expected {' or '.join(POLICIES)}, got {asked.policy!r}")
    given = {name: getattr(settings, name) for name in type(settings).model_fields}
    found = {name: given[name] for name in (*MODELS, "reference") if isinstance(given.get(name), ModelConfig)}
    return {name: _model(name, value, asked.policy, hint) for name, value in found.items()}


def config_file(path: Path) -> Path | None:
    """The config.json of a folder, or of a model of the hub that is in its cache; None where neither is here."""
    if (path / "config.json").is_file():
        return path / "config.json"
    if path.exists() or not re.fullmatch(HUB_NAME, str(path)):
        return None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(str(path), "config.json")
    except HFValidationError:
        return None
    return Path(cached) if isinstance(cached, str) else None


def read_model(file: Path) -> Model:
    try:
        return Model.of(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file}: {str(error).removeprefix('config.json: ')}") from None


def _model(name: str, settings: ModelConfig, policy: str | None, hint: str) -> Trained:
    file = config_file(settings.path)
    if file is not None:
        model = read_model(file)
    elif name == "discriminator":
        model = DISCRIMINATOR
    else:
        told = re.search(r"(?i)(?<![0-9a-z])(4b|8b)(?![0-9a-z])", f"{settings.path} {hint}".replace("_", " "))
        model = POLICIES[policy or (told[1].lower() if told else "4b")]
    return trained_as(settings, model, name)


def _batch(stage: str, settings: Any, asked: Question) -> Batch:
    """Means where nothing is asked: docs/method.md's prompt, and a third of a response's limit."""
    prompt = min(asked.prompt or PROMPT, settings.data.max_prompt_tokens)
    image = min(round(prompt * IMAGE / PROMPT), prompt)
    if stage in ("align", "rlvr"):
        limit = settings.rollout.max_response_tokens
        response = min(asked.response or limit // MEAN, limit)
        r = settings.rollout
        return Batch(r.prompts_per_step, r.samples, prompt, image, response, limit, pair=stage == "align")
    response = min(asked.response or DEMONSTRATION, settings.max_tokens)
    branches = 1 if stage == "sft" else 4  # two parts of the teacher, two of the student
    return Batch(settings.batch_size, branches, prompt, image, response, response, sampled=False)


def _steps(settings: Any, records: int | None) -> int | None:
    if settings.steps is not None or records is None:
        return settings.steps
    if isinstance(settings, WarmupConfig) and not settings.data.eval_files:
        records -= max(1, round(settings.eval_fraction * records))
    return math.ceil(settings.epochs * records / settings.batch_size)


def hours(count: int, what: str, each: float) -> str:
    return f"{count:,} {what}: {count * each / 3600:,.1f} hours."


def gb(value: float) -> str:
    return f"{value / 1e9:.1f}"


def _states(plan: Plan, found: Need) -> tuple[list[str], list[list[str]], list[str]]:
    names = ("weights", "gradients", "masters", "moments", "buffers")
    rows = [[name, gb(getattr(found, name))] for name in names]
    rows += [["a pass over a pack", gb(found.peak)], ["or an update", gb(found.update)], ["context", gb(found.context)]]
    rows.append(["in training", gb(found.training)])
    fits = "fits" if plan.fits else "does not fit"
    notes = [f"{gb(found.training)} of {plan.gpu.memory / 1e9:g} GB: {fits}. By count, nothing is measured."]
    most, kept = plan.most(), plan.most(False)
    notes.append(f"Largest run.tokens_per_pack: {most:,}; without activation checkpointing {kept:,}.")
    if found.host:
        notes.append(f"On the hosts, of all GPUs: {gb(found.host)} GB.")
    return ["held by each GPU", "GB"], rows, notes


def _passes(plan: Plan, found: Need) -> Section:
    """By model, with and without recompute."""
    trained = [(name, one) for name, one in plan.models.items() if not one.reference]
    both = [plan.need(plan.tokens, checkpointing).passes for checkpointing in (True, False)]
    heads = ["GB of a pass", *(f"{name}{how}" for name, _ in trained for how in ("", ", kept"))]
    shown = [each for pair in zip(*both) for each in pair]
    labels = {
        "layers": "layers", "vision": "vision tower", "throughout": "rotation", "inside": "a layer's backward",
        "head": "or LM head", "flash": "  of it flash, fp32",
    }  # fmt: skip
    assert labels.keys() == set(Activations._fields)
    rows = [[label, *(gb(getattr(each, name)) for each in shown)] for name, label in labels.items()]
    rows.append(["at its peak", *(gb(each.peak) for each in shown)])
    set_to = ", ".join(f"{name} {'recomputes' if one.checkpointing else 'keeps'}" for name, one in trained)
    return Section(
        "Activations: recomputed in the backward, or all kept. Their peak is a layer's backward or the LM head.",
        heads,
        rows,
        [f"As set: {set_to}."],
    )


def _cache(plan: Plan) -> Section:
    batch, model = plan.batch, plan.trained[0].model
    rows = rows_at_once(plan.trained, plan.setup, batch, plan.gpu)
    each, prompts = cache(model, plan.setup.size), math.ceil(rows / batch.samples)
    lengths = {"mean": batch.response, "limit": batch.longest}
    table = [[f"responses at their {name}", f"{tokens:,}", gb(each * (rows * tokens + prompts * batch.prompt))]
             for name, tokens in lengths.items()]  # fmt: skip
    return Section(
        f"Cache of the rollout: {each / 1e3:.0f} kB a token, {rows} responses at once.", ["", "tokens", "GB"], table
    )


def _seconds(plan: Plan) -> Section:
    batch, e = plan.batch, plan.asked.efficiency
    found = parts(plan.trained, plan.setup, batch, plan.tokens, plan.gpu, e)
    rows = [[name, f"{value:.2f}"] for name, value in found._asdict().items() if value]
    rows.append(["a step", f"{found.total:.2f}"])
    what = f"{batch.prompts} prompts of {batch.prompt:,} tokens ({batch.image:,} of an image), {batch.samples} x "
    notes = [
        f"A step: {what}{batch.response:,} tokens behind each. Assumed: {e.flops:.0%} of the datasheet's FLOP/s, "
        f"{e.bytes:.0%} of its bandwidths, {1e3 * e.prompt:g} ms of the host a prompt, {1e3 * e.response:g} a response."
    ]
    if plan.steps is not None:
        notes.append(f"{hours(plan.steps, 'steps', found.total)} Evaluations and checkpoints are not in it.")
    return Section("Seconds of a step, predicted.", ["part", "s"], rows, notes)
