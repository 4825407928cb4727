"""One seed of the comparison: a base that drifts, and what each arm makes of it. Every piece is a process of its own.

python -m prism_fast.demo.arms OUT SEED PIECE      what `prism-fast demo --compare` starts
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from rich.console import Console

from prism_fast.config import (
    AlignConfig,
    DataConfig,
    EvalConfig,
    ModelConfig,
    Node,
    PairsConfig,
    ProbeConfig,
    RLVRConfig,
    SFTConfig,
    UpcycleConfig,
    WarmupConfig,
    load_config,
)
from prism_fast.data.formats import read_align
from prism_fast.data.order import order
from prism_fast.demo.demo import MARK, Demo, ShareOfAll
from prism_fast.demo.digits import write_teacher_texts
from prism_fast.files import write_json
from prism_fast.models.load import open_policy
from prism_fast.records import DataError
from prism_fast.run.monitor import breakdown, read_metrics
from prism_fast.stages.align import align
from prism_fast.stages.prepare import pairs
from prism_fast.stages.probe import probe
from prism_fast.stages.rlvr import rlvr
from prism_fast.stages.sft import sft
from prism_fast.stages.upcycle import upcycle_directory
from prism_fast.stages.warmup import warmup
from prism_fast.steps.evaluate import EvalSet, evaluate
from prism_fast.steps.sampler import BuiltinSampler
from prism_fast.steps.update import Backprop

START = "start"  # the piece that the arms begin from: a base, and its drift
HOW = {"sampled": 1.0, "greedy": 0.0}  # temperature of held-out responses


class HardSettings(Node):
    pairs: dict[str, Any] = Field({})
    warmup: dict[str, Any] = Field({})


class CompareSettings(Node):
    """The section compare of recipes/compare.yaml; what is over a stage's section there is a tree of its settings."""

    direct_steps: Annotated[int, Field(ge=1, le=10**6)]
    teacher_errors: ShareOfAll = 0.0
    probe: dict[str, Any] = Field({})
    control: dict[str, Any] = Field({})
    hard: HardSettings = HardSettings()


class SeedOfArms(Demo):
    """The folder of one seed: its data, its base, and a folder of stages for every arm."""

    watched = False

    def __init__(self, out: Path, seed: int, recipe: dict[str, Any], console: Console):
        recipe = dict(recipe)
        self.compare = load_config(CompareSettings, None, base=recipe.pop("compare", {}))
        super().__init__(out, seed, recipe, console, resume=True)
        self.errors = self.compare.teacher_errors
        self._check_arms()
        if not self.recipe["rlvr"]["steps"] < self.compare.direct_steps:
            raise DataError("demo recipe: compare.direct_steps: expected more than rlvr.steps, as it has no alignment")

    def _check_arms(self) -> None:
        """The arms' own settings, before the first stage runs."""
        given, data = {"path": self.out}, {"data": {"files": [self.out]}}
        own = self.compare
        self.config(SFTConfig, "sft", over=own.control, model=given, **data)
        self.config(PairsConfig, "pairs", over=own.hard.pairs, model=given, out=self.out, **data)
        self.config(WarmupConfig, "warmup", over=own.hard.warmup, discriminator=given, **data)
        self._probing(given, given, self.out)

    def start(self) -> dict[str, Any]:
        self.prepare()
        base = self.run_sft()
        drifted = self.run_drift(base)
        return {"base": self.judge("base", base), "drifted": self.judge("drifted", drifted)}

    def direct(self) -> dict[str, Any]:
        """RLVR straight away, read at two lengths."""
        short, long = self.recipe["rlvr"]["steps"], self.compare.direct_steps
        config = self._rlvr("direct", self.drifted, {"steps": long, "run": {"save_every": short}})
        final = self._stage("direct/rlvr", rlvr, config) / "policy"
        early = self.out / "direct/rlvr/checkpoints" / f"step-{short:06d}" / "policy"
        each = {"teacher_texts": 0}
        return {
            "direct_short": {**self.judge("direct_short", early), **self._spent(["direct/rlvr"], short), **each},
            "direct_long": {**self.judge("direct_long", final), **self._spent(["direct/rlvr"]), **each},
        }

    def control(self) -> dict[str, Any]:
        """SFT on the teacher's texts of the alignment records, then RLVR."""
        texts = self.out / "data" / "control.json"
        count = len(self._align_records())
        if not texts.exists():
            write_teacher_texts(texts, self.files.align)
        config = self._sft("control/sft", self.drifted, texts, self.compare.control)
        taught = self._stage("control/sft", sft, config) / "policy"
        final = self._stage("control/rlvr", rlvr, self._rlvr("control", taught)) / "policy"
        seen = min(count, config.steps * config.batch_size)
        spent = self._spent(["control/sft", "control/rlvr"])
        return {"control": {**self.judge("control", final), **spent, "teacher_texts": seen}}

    def prism(self, arm: str = "prism") -> dict[str, Any]:
        """Warm-up, alignment, RLVR; the discriminator is probed before, in the middle of and after alignment."""
        hard = self.compare.hard if arm == "prism_hard" else HardSettings()
        moe, records, folder = self.out / arm / "discriminator", self.out / arm / "pairs.jsonl", self.out / arm
        if not moe.exists():
            upcycle_directory(self.config(UpcycleConfig, "upcycle", model={"path": self.drifted}, out=moe))
        making = self.config(
            PairsConfig, "pairs", over=hard.pairs, model={"path": self.drifted}, data=self._data(self.files.align),
            out=records,
        )  # fmt: skip
        if not records.exists():
            pairs(making)
        warm = self.config(
            WarmupConfig, "warmup", f"{arm}/warmup", over=hard.warmup, discriminator={"path": moe},
            data=self._data(records),
        )  # fmt: skip
        judge = self._stage(f"{arm}/warmup", warmup, warm) / "discriminator"
        playing = self.config(
            AlignConfig, "align", f"{arm}/align", policy={"path": self.drifted}, discriminator={"path": judge},
            data=self._data(self.files.align),
        )  # fmt: skip
        half = playing.steps // 2
        playing = playing.model_copy(update={"run": playing.run.model_copy(update={"save_every": max(1, half)})})
        aligned = self._stage(f"{arm}/align", align, playing)
        middle = folder / "align/checkpoints" / f"step-{max(1, half):06d}"
        probes = {
            "before": self._probe(self.drifted, judge, folder / "probes/before.json"),
            "during": self._probe(middle / "policy", middle / "discriminator", folder / "probes/during.json"),
            "after": self._probe(aligned / "policy", aligned / "discriminator", folder / "probes/after.json"),
        }
        final = self._stage(f"{arm}/rlvr", rlvr, self._rlvr(arm, aligned / "policy")) / "policy"
        spent = self._spent([f"{arm}/align", f"{arm}/rlvr"], warmup=f"{arm}/warmup")
        seen = self._teacher_texts(making, playing)
        return {arm: {**self.judge(arm, final), **spent, "teacher_texts": seen, "probes": probes}}

    def prism_hard(self) -> dict[str, Any]:
        """The same, with hard negatives in the warm-up."""
        return self.prism("prism_hard")

    @property
    def drifted(self) -> Path:
        return self.out / "drift/final/policy"

    def judge(self, name: str, model: Path) -> dict[str, float]:
        """Held-out accuracy, sampled and greedy."""
        policy, chat = open_policy(ModelConfig(path=model))
        data, given = DataConfig(files=(self.files.eval,)), self.recipe.get("eval", {})
        found: dict[str, float] = {}
        for how, temperature in HOW.items():
            settings = load_config(EvalConfig, None, base={**given, "temperature": temperature})
            held_out = EvalSet.read(data, data.files, settings.limit, chat)
            result = evaluate(BuiltinSampler(Backprop(policy), chat), held_out, settings, name=name, seed=self.seed)
            result.write(self.out / "evaluations" / f"{name}-{how}.json")
            found |= {how: result.accuracy, f"{how}_valid": result.format_valid, "held_out": len(held_out)}
        self.console.print(f"{name}: sampled {found['sampled']:.1%}, greedy {found['greedy']:.1%}")
        return found

    def _rlvr(self, arm: str, policy: Path, over: dict[str, Any] | None = None) -> RLVRConfig:
        data = self._data(self.files.rlvr)
        return self.config(RLVRConfig, "rlvr", f"{arm}/rlvr", over=over, policy={"path": policy}, data=data)

    def _probing(self, policy: dict[str, Any], discriminator: dict[str, Any], out: Path) -> ProbeConfig:
        sizes = {"max_response_tokens": self.recipe["align"]["rollout"]["max_response_tokens"], "truth": "teacher"}
        tree = {**sizes, "tokens_per_pack": self.recipe["run"]["tokens_per_pack"], **self.compare.probe}
        paths = {"policy": policy, "discriminator": discriminator, "data": {"files": [self.files.eval]}, "out": out}
        return load_config(ProbeConfig, None, base={**tree, **paths, "seed": self.seed})

    def _probe(self, policy: Path, discriminator: Path, out: Path) -> dict[str, Any]:
        if out.exists():
            return json.loads(out.read_bytes())
        return probe(self._probing({"path": policy}, {"path": discriminator}, out))

    def _align_records(self) -> range:
        return range(len(read_align([self.files.align])))

    def _teacher_texts(self, making: PairsConfig, playing: AlignConfig) -> int:
        """Distinct records whose teacher's text the warm-up or the alignment saw."""
        records = self._align_records()
        if making.hard_negatives.share:
            return len(records)
        count = playing.steps * playing.rollout.prompts_per_step
        drawn = order(len(records), playing.run.seed, 0, count)
        return len({*records[: making.limit], *drawn})

    def _spent(self, stages: list[str], steps: int | None = None, warmup: str | None = None) -> dict[str, Any]:
        """Policy updates, and what they and the warm-up took: sampled responses, tokens through any model, seconds."""
        updates, tokens, seconds = 0, 0, 0.0
        for stage in [*stages, *([warmup] if warmup else [])]:
            lines = read_metrics(self.out / stage / "metrics.jsonl")
            lines = [line for line in lines if "warning" not in line and (steps is None or line["step"] <= steps)]
            took, through = breakdown(lines)
            updates += max(line["step"] for line in lines) if stage != warmup else 0
            tokens, seconds = tokens + sum(through.values()), seconds + sum(took.values())
        return {"policy_updates": updates, "tokens": tokens, "seconds": seconds}


ARMS: dict[str, Callable[[SeedOfArms], dict[str, Any]]] = {
    "prism_hard": SeedOfArms.prism_hard,  # the longest first
    "direct": SeedOfArms.direct,
    "prism": SeedOfArms.prism,
    "control": SeedOfArms.control,
}


def result_file(out: Path, seed: int, piece: str) -> Path:
    return folder_of(out, seed) / "results" / f"{piece}.json"


def folder_of(out: Path, seed: int) -> Path:
    return out / "seeds" / str(seed)


def main(out: Path, seed: int, piece: str) -> None:
    """Runs a piece, or what an interrupted one has left of it, and writes its result."""
    recipe = json.loads((out / MARK).read_bytes())["recipe"]
    run = SeedOfArms(folder_of(out, seed), seed, recipe, Console())
    if piece != START:
        run.prepare()  # sets torch up; the data are there
    made = run.start() if piece == START else ARMS[piece](run)
    write_json(result_file(out, seed, piece), made, indent=1)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
    except DataError as fault:
        sys.exit(f"error: {fault}")
