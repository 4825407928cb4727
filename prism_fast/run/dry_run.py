"""`--dry-run` of every command: what would end it, found without a GPU, without weights, and without writing.

Looked at: settings (read before), models' folders by their configuration and the names of their files, data files by
their first record, places to write to by their rights, and memory by the plan. All faults are told at once.

Exit status: 0 where nothing is wrong, 1 where it does not fit the memory, 2 where anything is wrong or missing.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from prism_fast.config import BenchmarksConfig, DataConfig, ModelConfig, OwnReward
from prism_fast.files import refuse_existing, refuse_unwritable, shards
from prism_fast.records import DataError
from prism_fast.run.folder import refuse_earlier_run, refuse_other_folder
from prism_fast.run.launch import STAGES
from prism_fast.run.plan import HUB_NAME, Question, Section, config_file, read_model
from prism_fast.run.plans import plan_of
from prism_fast.run.seconds import GPUS

FITS, DOES_NOT_FIT = 0, 1  # what is wrong or missing is a DataError, which ends in status 2

Kind = Callable[[Path, dict[str, str]], str | None]  # the format of a data file, where it is told at a glance

# The formats that a command reads: of data.files, of data.eval_files.
PROMPTS = ("rlvr", "alignment")
READS = {
    "sft": (("sft",), PROMPTS),
    "warmup": (("warm-up",), ("warm-up",)),
    "align": (("alignment",), PROMPTS),
    "pairs": (("alignment",), PROMPTS),
    "probe": (("alignment",), PROMPTS),
    **dict.fromkeys(("rlvr", "filter", "eval"), (PROMPTS, PROMPTS)),
}
# Files of a model's folder beside its weights; any one of each.
BESIDE = (("tokenizer.json", "vocab.json"), ("preprocessor_config.json", "processor_config.json"))


class DryRun(NamedTuple):
    """What was found: ``faults`` end the command, ``notes`` may."""

    faults: list[str]
    notes: list[str]
    sections: list[Section]
    fits: bool

    @property
    def status(self) -> int:
        """Raises DataError where there are faults."""
        if self.faults:
            raise DataError("; ".join(self.faults))
        return FITS if self.fits else DOES_NOT_FIT


def dry_run(
    stage: str, settings: Any, kind: Kind, *, processes: int = 1, resume: bool = False, hint: str = ""
) -> DryRun:
    """Of a command with these settings, on so many GPUs; ``hint`` as `Plan.of` takes it."""
    faults = [*_faults_of(settings, stage, kind, resume), *_faults_of_places(settings, stage, resume)]
    notes = [*_notes_of_models(settings), *_missing_packages(settings)]
    try:
        plan = plan_of(stage, settings, _question(processes), hint)
        return DryRun(faults, notes, list(plan.sections()), plan.fits)
    except DataError as error:  # of a model's folder: told already
        return DryRun(faults if str(error) in faults else [*faults, str(error)], notes, [], True)


def dry_files(
    files: Iterable[Path],
    kind: Kind,
    *,
    columns: dict[str, str] | None = None,
    model: Path | None = None,
    out: Path | None = None,
) -> DryRun:
    """Of a command that reads data files, by the tokens of ``model`` if it has one, and may write ``out``."""
    faults = [fault for file in files for fault in _faults_of_file(file, (), kind, columns or {})]
    faults += [] if model is None else _faults_of_tokens(model)
    faults += [] if out is None else _raised(lambda: refuse_new(out, "--out"))
    return DryRun(faults, [], [], True)


def dry_benchmarks(settings: BenchmarksConfig) -> DryRun:
    """Of `eval --lmms`: policies, the place of results, the package. What tasks ask is lmms-eval's to fetch."""
    faults = [fault for path in settings.policies for fault in _faults_of_model(path, "policies")]
    faults += _raised(lambda: refuse_unwritable(settings.out, "out"))
    notes = []
    if importlib.util.find_spec("lmms_eval") is None:
        notes = ["lmms-eval is not installed here; where it runs: pip install 'prism-fast[eval]'"]
    return DryRun(faults, notes, [], True)


def refuse_new(path: Path, key: str = "out") -> None:
    """As `files.try_new`, which tries by writing."""
    refuse_existing(path, key)
    refuse_unwritable(path, key)


def _raised(check: Callable[[], object]) -> list[str]:
    try:
        check()
    except DataError as error:
        return [str(error)]
    return []


def _question(processes: int) -> Question:
    """Of the GPU that is here; else of an H100 of 80 GB."""
    if not torch.cuda.is_available():
        return Question(gpus=processes)
    here = torch.cuda.get_device_properties(0)
    gpu = next((name for name in GPUS if name in here.name.lower()), "h100")
    return Question(gpu, processes, here.total_memory / 1e9)


def _faults_of(settings: Any, stage: str, kind: Kind, resume: bool) -> Iterator[str]:
    """Of models, data and reward functions that settings name. A run that goes on has its models in its checkpoint."""
    for key in type(settings).model_fields:
        value = getattr(settings, key)
        if isinstance(value, ModelConfig) and not resume:
            yield from _faults_of_model(value.path, f"{key}.path", expert=key == "discriminator")
        elif isinstance(value, DataConfig):
            for files, reads in zip((value.files, value.eval_files), READS[stage]):
                yield from (fault for file in files for fault in _faults_of_file(file, reads, kind, value.columns))
        elif isinstance(value, OwnReward) and value.function is not None:
            file, _, _ = value.function.rpartition(":")
            if file.endswith(".py") and not Path(file).is_file():
                yield f"{file}: no such file; correct {key}.function"


def _faults_of_model(path: Path, key: str, expert: bool = False) -> Iterator[str]:
    """Of a model's folder; ``expert``: a discriminator's. A name of the hub has none: `_notes_of_models`."""
    if path.exists() and not path.is_dir():
        yield f"{path}: a file, expected a model's folder; correct {key}"
        return
    if not path.is_dir():
        if not _of_the_hub(path):
            made = "; the stage that makes it has not ended yet?" if "final" in path.parts else ""
            yield f"{path}: no such folder{made or '; correct ' + key}"
        return
    if config_file(path) is None:
        yield f"{path}: no config.json; expected a Hugging Face model"
        return
    try:
        model = read_model(path / "config.json")
    except DataError as error:
        yield str(error)
        return
    if expert != (model.text.experts > 1):
        wants = "a discriminator, of several experts" if expert else "a policy, without experts"
        yield f"{path}: {key}: expected {wants}; its config.json has {model.text.experts}"
    yield from _missing_weights(path)
    yield from _missing_tokens(path)


def _faults_of_tokens(path: Path) -> list[str]:
    """Of a folder whose tokenizer alone is read."""
    if path.is_dir():
        return [*_missing_tokens(path)]
    return [] if _of_the_hub(path) else [f"{path}: no such folder; correct --model"]


def _missing_weights(folder: Path) -> Iterator[str]:
    """Files that a download has left out."""
    index, whole = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        try:
            shards = {*json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            yield f"{index}: cannot be read; download it again"
            return
        lacks = sorted(name for name in map(str, shards) if not (folder / name).is_file())
        if lacks:
            yield f"{folder}: {len(lacks)} of {len(shards)} files of weights are missing, as {lacks[0]}; download them"
    elif not whole.is_file():
        yield f"{folder}: no model.safetensors; download the weights"


def _missing_tokens(folder: Path) -> Iterator[str]:
    for names in BESIDE:
        if not any((folder / name).is_file() for name in names):
            yield f"{folder}: no {names[0]}; download it"


def _of_the_hub(path: Path) -> bool:
    """Whether it may be a name of the hub: two parts, of which the first is no folder here."""
    return re.fullmatch(HUB_NAME, str(path)) is not None and not Path(path.parts[0]).exists()


def _faults_of_file(file: Path, reads: tuple[str, ...], kind: Kind, columns: dict[str, str]) -> Iterator[str]:
    """``reads``: the formats that are expected; empty: any."""
    try:
        found = shards(file)
    except DataError as error:
        yield str(error)
        return
    if found:
        yield from (fault for each in found for fault in _faults_of_file(each, reads, kind, columns))
    elif not file.exists():
        yield f"{file}: no such file"
    elif not os.access(file, os.R_OK):
        yield f"{file}: cannot be read; check its rights"
    elif file.is_file() and not file.stat().st_size:
        yield f"{file}: the file is empty"
    else:
        try:
            found = kind(file, columns)
        except DataError as error:
            yield str(error)
            return
        if found is not None and reads and found not in reads:
            yield f"{file}: holds {found} records, expected {' or '.join(reads)}"


def _faults_of_places(settings: Any, stage: str, resume: bool) -> Iterator[str]:
    if stage in STAGES:
        out = settings.run.out
        for check in (
            lambda: refuse_other_folder(out, stage, resume),
            lambda: refuse_earlier_run(out, resume),
            lambda: refuse_unwritable(out, "run.out"),
        ):
            yield from _raised(check)
    else:
        yield from _raised(lambda: refuse_new(settings.out))


def _notes_of_models(settings: Any) -> Iterator[str]:
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        if isinstance(value, ModelConfig) and not value.path.exists() and _of_the_hub(value.path):
            there = "in the hub's cache here" if config_file(value.path) else "downloaded from the hub when it starts"
            yield f"{value.path}: no folder here, so a name of the hub; {there}"


def _missing_packages(settings: Any) -> Iterator[str]:
    """What the settings need and this machine, on which the command may never run, lacks."""
    rollout = getattr(settings, "rollout", settings)
    wants = {
        "deepspeed": getattr(settings, "cluster", None) and settings.cluster.sharding.startswith("zero"),
        "vllm": getattr(rollout, "engine", None) == "vllm",
    }
    extras = {"deepspeed": "cluster", "vllm": "vllm"}
    for package, wanted in wants.items():
        if wanted and importlib.util.find_spec(package) is None:
            yield f"{package} is not installed here; where it runs: pip install 'prism-fast[{extras[package]}]'"
