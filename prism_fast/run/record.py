"""What a run was started with: settings, contents of its inputs, versions; and how another start differs from it.

OUT/run.json, and "run" in every checkpoint's trainer.json:
{"stage": "sft", "config": {"optimizer": {"lr": 1e-5, ...}, ...}, "environment": {"packages": {...}, ...},
 "inputs": {"data.files": [{"path": "sft.json", "bytes": 812, "modified": 1.7e9, "sha256": "...", "hashed": "whole"}],
            "model.path": {"path": "base", "files": {"config.json": {...}, "model.safetensors": {...}}}},
 "chosen": {"run.tokens_per_pack": 12288},     where a setting is auto
 "records": 1024,                              good ones among data.files
 "starts": [{"step": 0, "time": 1.7e9}, {"step": 200, "time": 1.7e9, "changed": ["optimizer.lr: 1e-05 -> 2e-05"]}]}
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel

from prism_fast.config import DataConfig, ModelConfig, OptimizerConfig, OwnReward
from prism_fast.files import shards
from prism_fast.records import DataError
from prism_fast.run.environment import engine, environment

FILE_NAME = "run.json"
PER_PACK = "run.tokens_per_pack"
GOOD_RECORDS = "good records of data.files"  # images that were mended make more: another order
WHOLE = 64 << 20  # bytes: a longer file is hashed in samples
SAMPLES, SAMPLE = 64, 64 << 10  # how many, evenly spaced from the first bytes to the last, and bytes of each
MODEL_FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model")

# Settings that a resumed run may change without --accept-changes: the numbers do not depend on them.
FREE = (
    "run.out",
    "run.eval_every",
    "run.save_every",
    "run.keep_last",
    "run.save_in_background",
    "run.tracker",
    "run.max_skipped_updates",
    "run.threads",  # the number of threads that torch has is compared, on a CPU
    "data.cache",
    "data.workers",
    "data.image_cache",
    "data.skip_bad_records",  # a record that is passed over would have ended the run
    "watch.*",
    "*.activation_checkpointing",  # computes the same again
    "*rows_at_once",  # rounds otherwise; the noise is a response's own
    "cluster.*",  # rounds otherwise, as another machine does
    "*.offload",
)
LENGTH = ("steps", "epochs")  # free too where the learning rate does not depend on the number of steps
_ABSENT = object()


def record(stage: str, config: BaseModel, processes: int = 1) -> dict[str, Any]:
    """The record of a start with these settings, as JSON. Reads the inputs that are there."""
    here = environment()
    here["packages"] |= engine(getattr(getattr(config, "rollout", None), "engine", ""))
    return {
        "stage": stage,
        "config": config.model_dump(mode="json"),
        "inputs": dict(_inputs(config, "")),
        "environment": {**here, "processes": processes},
        "starts": [],
    }


def own_reward(settings: OwnReward) -> dict[str, Any] | None:
    """The name of a reward function, what it replaces, and its file; None where the judge is asked."""
    if settings.function is None:
        return None
    about = {"function": settings.function, "replaces": settings.replaces}
    return {**about, "file": _file(_source(settings.function.rpartition(":")[0]))}


def changes(old: Mapping[str, Any], new: Mapping[str, Any], config: BaseModel) -> list[str]:
    """``key: old -> new`` for everything that changes the numbers, between the records of two starts.

    ``config`` is the configuration of ``new``: a setting that ``old`` does not know was at its default. Inputs compare
    by their contents, wherever they lie; one that is no longer where it was, and is not named otherwise, is as it was.
    """
    found = [change_line("stage", old["stage"], new["stage"])] if old["stage"] != new["stage"] else []
    free = (*FREE, *(() if _length_matters(config) else LENGTH))
    inputs = new["inputs"].keys() | old["inputs"].keys()
    for key, before, after in differences(old["config"], new["config"], _defaults(config)):
        if key == "run.deterministic" and None in (before, after) and True in (before, after):
            continue  # on a CPU the same, and true in the records of versions whose default it was
        if key == "data.image_folders" and _is_looked_in_first(before, after):
            continue  # an image in a folder behind the others would have ended the run
        if key not in inputs and not any(fnmatch.fnmatchcase(key, pattern) for pattern in free):
            found.append(change_line(key, before, after))
    for key in sorted(inputs):
        before, after = old["inputs"].get(key), new["inputs"].get(key)
        if _contents(before) != _contents(after) and not (_paths(before) == _paths(after) and _gone(after)):
            found.append(_input_line(key, before, after))
    return found


def moved(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """``name old -> new`` of hardware and packages, which may round differently."""
    before, after = ({**side["environment"], **side["environment"]["packages"]} for side in (old, new))
    before.setdefault("processes", 1)  # a record from before there could be more
    packages = (name for name in new["environment"]["packages"] if name in before)  # not one that was not kept then
    names = ("cpu", "gpu", "python", "processes", *packages)
    return [f"{n} {before.get(n)} -> {after.get(n)}" for n in names if before.get(n) != after.get(n)]


def is_ours(file: Path) -> bool:
    """Whether ``file`` is a record, or not there: it may be written."""
    if not file.exists():
        return True
    try:
        return {"stage", "config", "inputs"} <= json.loads(file.read_bytes()).keys()
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


def is_record(value: Any) -> bool:
    """Whether this is what `record` gives, as far as a comparison reads it."""
    kinds = {"stage": str, "config": dict, "inputs": dict, "environment": dict, "starts": list}
    whole = isinstance(value, dict) and all(isinstance(value.get(name), kind) for name, kind in kinds.items())
    return whole and isinstance(value["environment"].get("packages"), dict)


def fingerprint(path: Path) -> dict[str, Any]:
    """Size, time and SHA-256 of a file: of all its bytes up to `WHOLE`, else of its size and `SAMPLES` samples."""
    state = path.stat()
    digest, hashed = hashlib.sha256(), "whole"
    with open(path, "rb") as file:
        if state.st_size <= WHOLE:
            while block := file.read(1 << 20):
                digest.update(block)
        else:
            hashed = f"{SAMPLES} samples of {SAMPLE} bytes"
            digest.update(str(state.st_size).encode())
            for i in range(SAMPLES):
                file.seek(i * (state.st_size - SAMPLE) // (SAMPLES - 1))
                digest.update(file.read(SAMPLE))
    return {"bytes": state.st_size, "modified": state.st_mtime, "sha256": digest.hexdigest(), "hashed": hashed}


def _inputs(node: BaseModel, prefix: str) -> Iterator[tuple[str, Any]]:
    """(key, fingerprints) of every data file, model directory and reward function's file that a configuration names."""
    for name in type(node).model_fields:
        value, key = getattr(node, name), f"{prefix}{name}"
        if isinstance(node, ModelConfig) and name == "path":
            yield key, _model(Path(value))
        elif isinstance(node, DataConfig) and name in ("files", "eval_files"):
            yield key, [_file(Path(path)) for path in value]
        elif isinstance(node, OwnReward) and name == "function" and value is not None:
            yield f"{prefix}file", _file(_source(value.rpartition(":")[0]))
        elif isinstance(value, BaseModel):
            yield from _inputs(value, f"{key}.")


def _file(path: Path) -> dict[str, Any]:
    try:
        if found := shards(path):  # of a folder, or of a pattern
            root = os.path.commonpath([file.parent for file in found])
            return {"path": str(path), "files": {os.path.relpath(file, root): fingerprint(file) for file in found}}
        if path.is_dir():  # a saved data set
            inside = sorted(file for file in path.iterdir() if file.is_file())
            return {"path": str(path), "files": {file.name: fingerprint(file) for file in inside}}
        return {"path": str(path), **fingerprint(path)}
    except (OSError, ValueError):  # reading the data says what is wrong
        return {"path": str(path)}


def _source(place: str) -> Path:
    """The file of "module" or "path.py"; a module that none is found for stands for itself."""
    if place.endswith(".py"):
        return Path(place)
    stem = place.replace(".", os.sep)
    tries = [Path(root or ".") / file for root in sys.path for file in (f"{stem}.py", f"{stem}{os.sep}__init__.py")]
    return next((path for path in tries if path.is_file()), Path(place))


def _model(path: Path) -> dict[str, Any]:
    """A directory's files that are the model; a name on the hub stands for itself."""
    try:
        files = sorted(p for p in path.iterdir() if any(fnmatch.fnmatchcase(p.name, m) for m in MODEL_FILES))
        return {"path": str(path), "files": {p.name: fingerprint(p) for p in files if p.is_file()}}
    except (OSError, ValueError):
        return {"path": str(path)}


def _contents(entry: Any) -> Any:
    """What two inputs compare by."""
    if isinstance(entry, list):
        return [_contents(item) for item in entry]
    if entry is None or "sha256" in entry:
        return entry and entry["sha256"]
    files = entry.get("files")
    return {name: item["sha256"] for name, item in files.items()} if files else entry["path"]


def _paths(entry: Any) -> list[str]:
    entries = entry if isinstance(entry, list) else [] if entry is None else [entry]
    return [os.path.abspath(item["path"]) for item in entries]


def _gone(entry: Any) -> bool:
    """Whether some of it is not there now: a model that lies in the checkpoint is not needed, a reader names a file."""
    entries = entry if isinstance(entry, list) else [entry]
    return any(item is not None and "sha256" not in item and not item.get("files") for item in entries)


def _is_looked_in_first(before: Any, after: Any) -> bool:
    """Whether each image that was found in these folders is found at the same place."""
    if not (isinstance(before, list) and isinstance(after, list)):
        return False
    return [*map(os.path.abspath, before)] == [*map(os.path.abspath, after[: len(before)])]


def _length_matters(config: BaseModel) -> bool:
    values = [getattr(config, name) for name in type(config).model_fields]
    optimizers = [value for value in values if isinstance(value, OptimizerConfig)]
    return any(optimizer.schedule != "constant" or optimizer.warmup_ratio > 0 for optimizer in optimizers)


def _defaults(node: BaseModel) -> dict[str, Any]:
    """The defaults of a configuration's settings, as its dump; those that have none are left out."""
    found: dict[str, Any] = {}
    for name, field in type(node).model_fields.items():
        value = getattr(node, name)
        if isinstance(value, BaseModel):
            found[name] = _defaults(value)
        elif not field.is_required():
            found[name] = json.loads(json.dumps(field.get_default(call_default_factory=True), default=str))
    return found


def differences(old: Any, new: Any, defaults: Any = None, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(key, old, new) of the leaves of two trees that differ; what ``old`` lacks is at its default."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        defaults = defaults if isinstance(defaults, Mapping) else {}
        for name in [*new, *(name for name in old if name not in new)]:
            default = defaults.get(name, _ABSENT)
            yield from differences(old.get(name, default), new.get(name, _ABSENT), default, f"{prefix}{name}.")
    elif old is _ABSENT or new is _ABSENT or old != new:
        yield prefix[:-1], old, new


def change_line(key: str, before: Any, after: Any) -> str:
    return f"{key}: {_shown(before)} -> {_shown(after)}"


def _shown(value: Any) -> str:
    if value is _ABSENT:
        return "(no such setting)"
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _input_line(key: str, before: Any, after: Any) -> str:
    old, new = ", ".join(_paths(before)) or "nothing", ", ".join(_paths(after)) or "nothing"
    if old != new:
        return f"{key}: {old} -> {new}"
    return f"{key}: the contents of {old} {_short(before)} -> {_short(after)}"


def _short(entry: Any) -> str:
    """A few letters of the hash of all contents."""
    return hashlib.sha256(json.dumps(_contents(entry), sort_keys=True).encode()).hexdigest()[:8]


def threads_line(before: Any) -> list[str]:
    """As `changes`, for the threads of torch: on a CPU their number decides about the order of sums."""
    now = torch.get_num_threads()
    if before in (None, now) or torch.cuda.is_available():
        return []
    return [f"run.threads: {before} -> {now}"]


def refuse(checkpoint: Path, found: list[str]) -> None:
    """Raises DataError where something differs."""
    if found:
        raise DataError(
            f"{checkpoint}: the run would go on with other settings: {'; '.join(found)}; "
            f"set them back, or add --accept-changes"
        )
