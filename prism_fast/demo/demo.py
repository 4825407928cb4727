"""The whole of PRISM in miniature, on real images: a policy that SFT made drift -> discriminator warm-up -> adversarial
alignment -> RLVR; and RLVR alone from the same drift.

The demo is a user: it writes the published file formats to disk, and calls the stages on them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from prism_fast import metric_names as names
from prism_fast.config import (
    CONFIGS,
    RECIPES,
    AlignConfig,
    DataConfig,
    EvalConfig,
    FilterConfig,
    ModelConfig,
    Node,
    PairsConfig,
    RLVRConfig,
    SFTConfig,
    UpcycleConfig,
    WarmupConfig,
    load_config,
    merge,
    read_yaml,
)
from prism_fast.data.formats import read_sft
from prism_fast.demo.digits import DemoFiles, DemoSizes, Voices, write_demo_data, write_demonstrations
from prism_fast.demo.tiny import make_tiny_model
from prism_fast.files import write_json
from prism_fast.models.load import open_policy
from prism_fast.records import DataError
from prism_fast.report.build import build_report
from prism_fast.run.deterministic import set_up_torch
from prism_fast.run.environment import environment
from prism_fast.run.folder import begun
from prism_fast.run.lock import FILE_NAME as LOCK
from prism_fast.run.lock import FolderLock
from prism_fast.run.monitor import breakdown, read_metrics, tokens_per_second
from prism_fast.run.record import change_line, differences
from prism_fast.stages.align import align
from prism_fast.stages.prepare import filter_prompts, pairs
from prism_fast.stages.rlvr import rlvr
from prism_fast.stages.sft import sft
from prism_fast.stages.upcycle import upcycle_directory
from prism_fast.stages.warmup import warmup
from prism_fast.steps.evaluate import EvalSet, Evaluation, drift, evaluate, judge_teacher
from prism_fast.steps.sampler import BuiltinSampler
from prism_fast.steps.update import Backprop

MARK = "demo.json"  # what the demo in this folder was started with


Scenes = Annotated[int, Field(ge=1, le=10**6)]


class SizesConfig(Node):
    """Scenes in every data file, where it is not digits.DemoSizes's."""

    sft: Scenes | None = None
    align: Scenes | None = None
    rlvr: Scenes | None = None
    eval: Scenes | None = None


ShareOfAll = Annotated[float, Field(ge=0, le=1)]


class DriftConfig(Node):
    """What SFT makes the policy drift on: demonstrations, mostly of the public voice; ``sft`` is over the section's."""

    records: Scenes
    public: ShareOfAll
    sft: dict[str, Any] = Field({})


class DemoSettings(Node):
    """The demo's own keys; the other sections of recipes/demo.yaml are the stages' settings without their paths."""

    preset: Literal["easy", "full"] = "easy"
    sizes: SizesConfig = SizesConfig()
    drift: DriftConfig


SECTIONS = ("sft", "upcycle", "pairs", "warmup", "align", "filter", "rlvr")  # as CONFIGS names them


class Demo:
    """The folder of one demo, and its stages."""

    errors = 0.0  # share of the teacher's texts that are wrong
    watched = True  # stages are evaluated while they train

    def __init__(self, out: Path, seed: int, recipe: dict[str, Any], console: Console, resume: bool):
        self.out, self.seed, self.console, self.resume = out, seed, console, resume
        self.recipe = dict(recipe)
        unknown = sorted(set(self.recipe) - {"demo", "run", "eval", *SECTIONS})
        if unknown:
            raise DataError(f"demo recipe: unknown section {unknown[0]}; known here: {', '.join(SECTIONS)}, run, eval")
        for section, tree in self.recipe.items():
            if not isinstance(tree, dict):
                raise DataError(f"demo recipe: {section}: expected keys below it, for example sft.steps, got {tree!r}")
        self.settings = load_config(DemoSettings, None, base=self.recipe.pop("demo", {}))
        self._check()
        self.files = DemoFiles(
            *(out / "data" / n for n in ("sft.json", "align.parquet", "rlvr.parquet", "eval.parquet"))
        )
        self.teacher: Evaluation | None = None
        self.evaluations: dict[str, Evaluation] = {}

    def _check(self) -> None:
        """All stages' settings, before the first one runs."""
        settings = {section: {} for section in SECTIONS}
        for section, over in [*settings.items(), ("sft", self.settings.drift.sft)]:
            cls, given = CONFIGS[section], {"path": self.out}
            paths = {name: given for name in ("model", "policy", "discriminator") if name in cls.model_fields}
            paths |= {"data": {"files": [self.out]}} if "data" in cls.model_fields else {}
            paths |= {"out": self.out} if "out" in cls.model_fields else {}
            try:
                self.config(cls, section, over=over, **paths)
            except DataError as error:
                raise DataError(f"demo recipe, section {section} (with run and eval): {error}") from None

    def config(self, cls, section: str, stage: str | None = None, over: dict[str, Any] | None = None, **paths: Any):
        """The stage's settings of the recipe, ``over`` over them, with this demo's paths, seed and shared settings."""
        tree = merge(merge(self.recipe.get(section, {}), over or {}), paths)
        if "run" in cls.model_fields:
            tree = merge({"run": {**self.recipe.get("run", {}), "seed": self.seed}}, tree)
            tree = merge(tree, {"run": {"out": self.out / (stage or section)}})
        elif "seed" in cls.model_fields:
            tree["seed"] = self.seed
        if "eval" in cls.model_fields:
            tree = merge({"eval": self.recipe.get("eval", {})}, tree)
        return load_config(cls, None, base=tree)

    def prepare(self) -> None:
        """Data files and the random base model."""
        if not (self.out / "base").exists():
            self.console.print(
                f"[bold]data[/]  digit scenes ({self.settings.preset}) and a tiny Qwen3-VL -> {self.out}"
            )
            write_demo_data(
                self.out / "data",
                self.seed,
                DemoSizes(**self.settings.sizes.model_dump(exclude_none=True)),
                self.settings.preset,
                self.errors,
            )
            texts = [t for s in read_sft(self.files.sft) for t in (*(m.content for m in s.messages), s.response)]
            make_tiny_model(self.out / "base", texts, seed=self.seed)
        set_up_torch(
            self.config(SFTConfig, "sft", model={"path": self.out / "base"}, data={"files": [self.files.sft]}).run
        )
        self.console.print(f"threads {torch.get_num_threads()}, seed {self.seed}")

    def finished(self, stage: str) -> bool:
        return (self.out / stage / "final").exists()

    def measure(self, name: str, model: Path) -> Evaluation:
        """Held-out figures of a model directory, written for the report."""
        policy, chat = open_policy(ModelConfig(path=model))
        settings = load_config(EvalConfig, None, base=self.recipe.get("eval", {}))
        data = DataConfig(files=(self.files.eval,))
        held_out = EvalSet.read(data, data.files, settings.limit, chat)
        if self.teacher is None:
            self.teacher = judge_teacher(data.files, settings.limit, chat)
            self.teacher.write(self.out / "evaluations" / "teacher.json")
        result = evaluate(BuiltinSampler(Backprop(policy), chat), held_out, settings, name=name, seed=self.seed)
        result.write(self.out / "evaluations" / f"{name}.json")
        self.evaluations[name] = result
        distance = drift(result, self.teacher)
        self.console.print(
            f"[bold]{name}[/]  accuracy {result.accuracy:.1%}, valid format {result.format_valid:.1%}, "
            f"drift: caption items {distance['caption_items']:.2f}, reasoning steps {distance['reasoning_steps']:.2f}"
        )
        return result

    def run_sft(self) -> Path:
        """The competent base."""
        return self._stage("sft", sft, self._sft("sft", self.out / "base", self.files.sft)) / "policy"

    def run_drift(self, policy: Path) -> Path:
        """SFT on demonstrations that are mostly the public voice's."""
        demonstrations, drift = self.out / "data" / "drift.json", self.settings.drift
        if not demonstrations.exists():
            voices = Voices(drift.public, self.errors)
            write_demonstrations(demonstrations, self.seed, drift.records, self.settings.preset, voices)
        return self._stage("drift", sft, self._sft("drift", policy, demonstrations, drift.sft)) / "policy"

    def run_warmup(self, policy: Path) -> Path:
        """Upcycles the policy, rolls it out on the teacher's prompts and trains on the pairs."""
        dense, moe, records = {"path": policy}, self.out / "discriminator", self.out / "data" / "pairs.jsonl"
        if not moe.exists():
            upcycle_directory(self.config(UpcycleConfig, "upcycle", model=dense, out=moe))
        if not records.exists():
            counts = pairs(
                self.config(PairsConfig, "pairs", model=dense, data=self._data(self.files.align), out=records)
            )
            self.console.print(f"[bold]pairs[/]  {counts['written']} records from {counts['prompts']} prompts")
        config = self.config(WarmupConfig, "warmup", discriminator={"path": moe}, data=self._data(records))
        return self._stage("warmup", warmup, config) / "discriminator"

    def run_align(self, policy: Path, discriminator: Path) -> Path:
        config = self.config(
            AlignConfig,
            "align",
            policy={"path": policy},
            discriminator={"path": discriminator},
            data=self._data(self.files.align, evaluated=True),
        )
        return self._stage("align", align, config) / "policy"

    def run_rlvr(self, policy: Path, stage: str = "rlvr") -> Path:
        prompts = self.out / "data" / f"{stage}-kept.parquet"
        if "filter" in self.recipe and not prompts.exists():
            data = self._data(self.files.rlvr)
            counts = filter_prompts(self.config(FilterConfig, "filter", model={"path": policy}, data=data, out=prompts))
            self.console.print(f"[bold]filter[/]  {counts['kept']} of {counts['prompts']} prompts kept by pass rate")
        files = prompts if prompts.exists() else self.files.rlvr
        data = self._data(files, evaluated=True)
        config = self.config(RLVRConfig, "rlvr", stage, policy={"path": policy}, data=data)
        return self._stage(stage, rlvr, config) / "policy"

    def _sft(self, stage: str, model: Path, file: Path, over: dict[str, Any] | None = None) -> SFTConfig:
        data = self._data(file, evaluated=True)
        return self.config(SFTConfig, "sft", stage, over=over, model={"path": model}, data=data)

    def _data(self, file: Path, evaluated: bool = False) -> dict[str, Any]:
        return {"files": [file], "eval_files": [self.files.eval] if evaluated and self.watched else []}

    def _stage(self, name: str, run, config) -> Path:
        final = self.out / name / "final"
        if not self.finished(name):
            run(config, resume=self.resume and begun(config.run.out))
        return final

    def summary(self, seconds: float) -> dict[str, Any]:
        """The figures of summary.json."""
        stages: dict[str, dict[str, Any]] = {}
        for name, result in self.evaluations.items():
            stages[name] = {**result.figures(), "by_type": result.by_type}
        for name in ("sft", "drift", "warmup", "align", "rlvr", "direct"):
            lines = read_metrics(self.out / name / "metrics.jsonl")
            parts, tokens = breakdown(lines)
            entry = stages.setdefault(name, {})
            entry["seconds"] = sum(parts.values())  # without evaluations and checkpoints, as the report's
            entry["tokens_per_second"] = tokens_per_second(parts, tokens)
            entry["steps"] = max(line["step"] for line in lines)
            if name == "warmup":
                last = [line for line in lines if names.EVAL_PAIR_ACCURACY["perception"] in line][-1]
                for side, name in names.EVAL_PAIR_ACCURACY.items():
                    entry[f"pair_accuracy_{side}"] = last[name]
        return {
            "stages": stages,
            "drift": {name: drift(result, self.teacher) for name, result in self.evaluations.items()},
            "seed": self.seed,
            "preset": self.settings.preset,
            "seconds": seconds,
            "environment": environment(),
        }


def demo(
    out: Path,
    *,
    seed: int = 0,
    smoke: bool = False,
    preset: str | None = None,
    resume: bool = False,
    overrides: dict[str, Any] | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Runs the demo in ``out`` and returns what it wrote to ``out/summary.json``; ``out/report.html`` lies beside
    it."""
    console = console or Console()
    recipe = recipe_of(["demo", *(["smoke"] if smoke else [])], overrides, preset)
    run = Demo(out, seed, recipe, console, resume)
    with claim(out, {"seed": seed, "recipe": recipe}, resume):
        summary = _pipeline(run)
        report = build_report(out)
    _show(console, summary)
    console.print(f"summary {out / 'summary.json'}   report {report}   {summary['seconds']:.0f} s", soft_wrap=True)
    return summary


def _pipeline(run: Demo) -> dict[str, Any]:
    began = time.perf_counter()
    run.prepare()
    run.measure("base", run.out / "base")
    supervised = run.run_sft()
    run.measure("sft", supervised)
    drifted = run.run_drift(supervised)
    run.measure("drift", drifted)
    discriminator = run.run_warmup(drifted)
    aligned = run.run_align(drifted, discriminator)
    run.measure("align", aligned)
    run.measure("rlvr", run.run_rlvr(aligned))
    run.measure("direct", run.run_rlvr(drifted, "direct"))
    summary = run.summary(time.perf_counter() - began)
    write_json(run.out / "summary.json", summary, indent=1)
    return summary


def recipe_of(names: Sequence[str], overrides: dict[str, Any] | None, preset: str | None) -> dict[str, Any]:
    """Recipes over each other, and what the command line says over them."""
    recipe: dict[str, Any] = {}
    for name in names:
        recipe = merge(recipe, read_yaml(RECIPES / f"{name}.yaml"))
    recipe = merge(recipe, overrides or {})
    return recipe if preset is None else merge(recipe, {"demo": {"preset": preset}})


@contextmanager
def claim(out: Path, started_with: dict[str, Any], resume: bool) -> Iterator[None]:
    """Marks the folder as this demo's, and holds its lock. Nothing of an earlier run is overwritten."""
    mark = out / MARK
    started_with = json.loads(json.dumps(started_with, default=str))
    if mark.exists() and not resume:
        raise DataError(f"{out}: holds an earlier demo; add --resume to go on, or choose another --out")
    if resume and not mark.exists():
        raise DataError(f"{out}: holds no demo to resume; correct --out, or leave out --resume to begin one")
    if not resume and out.is_dir() and any(path.name != LOCK for path in out.iterdir()):
        raise DataError(f"{out}: is not empty; choose another --out")
    with FolderLock(out, "--out"):
        if resume:
            found = [change_line(*changed) for changed in differences(_read(mark), started_with)]
            if found:
                raise DataError(
                    f"{mark}: was started with other settings: {'; '.join(found)}; resume with the same ones, or "
                    f"choose another --out"
                )
        else:
            write_json(mark, started_with, indent=1)
        yield


def _read(mark: Path) -> Any:
    try:
        return json.loads(mark.read_bytes())
    except ValueError as error:
        raise DataError(f"{mark}: does not hold readable JSON ({error}); choose another --out") from None


def _show(console: Console, summary: dict[str, Any]) -> None:
    table = Table(box=SIMPLE_HEAD, padding=0, show_edge=False)  # fits into 58 columns
    heads = ("stage", "accuracy", "valid\nformat", "drift:\ncaption", "drift:\nreasoning", "seconds", "tokens/s")
    for head in heads:
        table.add_column(head, justify="left" if head == "stage" else "right", overflow="fold")
    for name in ("base", "sft", "drift", "align", "rlvr", "direct"):
        stage, distance = summary["stages"][name], summary["drift"][name]
        rate, seconds = stage.get("tokens_per_second"), stage.get("seconds")
        table.add_row(
            name,
            f"{stage['accuracy']:.1%}",
            f"{stage['format_valid']:.1%}",
            f"{distance['caption_items']:.2f}",
            f"{distance['reasoning_steps']:.2f}",
            "" if seconds is None else f"{seconds:.0f}",
            "" if rate is None else f"{rate:,.0f}",
        )
    console.print(table)
    warm = summary["stages"]["warmup"]
    console.print(
        f"discriminator after warm-up: the teacher's caption scores higher in {warm['pair_accuracy_perception']:.1%} "
        f"of held-out pairs, its reasoning in {warm['pair_accuracy_reasoning']:.1%}"
    )
    drifted, both, alone = (summary["stages"][name]["accuracy"] for name in ("drift", "rlvr", "direct"))
    console.print(
        f"after the drift {drifted:.1%}; from there alignment and RLVR reach {both:.1%}, as much RLVR alone {alone:.1%}"
    )
