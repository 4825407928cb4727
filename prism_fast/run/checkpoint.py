"""Checkpoints: Hugging Face directories for the models, safetensors and JSON for the trainer's state.

    OUT/checkpoints/step-000100/{manifest.json, policy/, discriminator/, trainer.safetensors, trainer.json}

Of several processes each writes a part of the weights and of the trainer's tensors, as ``model-00001-of-00002`` and
``trainer-00001-of-00002.safetensors``: whole tensors by name, so that any number of processes reads them. All of it is
written aside and renamed, so that a directory of that name is always whole; manifest.json has size and SHA-256 of every
file, and what is not as it says is not read. Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from prism_fast.files import put_in_place, sync
from prism_fast.records import DataError

_NAME = re.compile(r"step-(\d{6,})")
_SHARD = "model-*-of-*.safetensors"

VERSION = 2  # 1: without a manifest, all of it written by one process
MANIFEST, STATE = "manifest.json", "trainer.json"
REMOVE = "remove the checkpoint to resume from an earlier one"
_KINDS = {"best": (int,), "best_value": (int, float), "threads": (int,), "skipped_updates": (int,), "run": (dict,)}

SaveModel = Callable[[Path], None]  # writes a model's directory, or this process's part of it
Files = dict[str, dict[str, Any]]  # by their paths in a checkpoint: {"bytes": 812, "sha256": "..."}


# ---- writing


@dataclass(frozen=True)
class Part:
    """What one process writes of a checkpoint: nothing of it changes any more, so that it may be written later."""

    step: int
    models: Mapping[str, SaveModel]
    tensors: dict[str, Tensor]
    file: str  # of the tensors
    state: str | None  # of `state_text`; of the first process alone
    best: int | None  # the step of the best checkpoint

    def write(self, folder: Path) -> Files:
        """Writes it into a new folder, and reads it again for the manifest."""
        folder.mkdir(parents=True)
        for name, save_model in self.models.items():
            save_model(folder / name)
        if self.tensors:
            save_file(self.tensors, folder / self.file)
        if self.state is not None:
            (folder / STATE).write_text(self.state)
        sync(folder)
        return {str(path.relative_to(folder)): digest(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def state_text(step: int, best: int | None, state: Mapping[str, Any]) -> str:
    """trainer.json; ``state``: JSON, by name."""
    return json.dumps({"version": VERSION, "step": step, "best": best, **state})


def aside(folder: Path, step: int) -> Path:
    """Where a checkpoint is written before it is one."""
    return folder / f".step-{step:06d}.partial"


def own_folder(folder: Path, step: int, rank: int) -> Path:
    """... by one process."""
    return aside(folder, step) / f".{rank}"


def commit(folder: Path, step: int, parts: Sequence[Files]) -> None:
    """Makes ``folder/step-NNNNNN`` of what the processes have written."""
    whole, files = aside(folder, step), dict[str, dict[str, Any]]()
    for rank, part in enumerate(parts):
        own = own_folder(folder, step, rank)
        for name in part:
            (whole / name).parent.mkdir(exist_ok=True)
            try:
                (own / name).rename(whole / name)
            except FileNotFoundError:
                raise DataError(
                    f"{own / name}: process {rank} wrote it and process 0 does not find it; let run.out lie where all "
                    "of them see it"
                ) from None
        shutil.rmtree(own, ignore_errors=True)
        files |= part
    for index in _write_indexes(whole):
        files[str(index.relative_to(whole))] = digest(index)
    (whole / MANIFEST).write_text(json.dumps({"version": 1, "step": step, "processes": len(parts), "files": files}))
    sync(whole)
    put_in_place(whole, folder / f"step-{step:06d}")


def prune(folder: Path, keep_last: int, best: int | None) -> None:
    """Removes all but the last ``keep_last`` and the best, each renamed first: what is left of one is no checkpoint."""
    for old in steps(folder)[:-keep_last]:
        if old != best:
            gone = folder / f".step-{old:06d}.old"
            (folder / f"step-{old:06d}").rename(gone)
            shutil.rmtree(gone, ignore_errors=True)


def _write_indexes(folder: Path) -> Iterator[Path]:
    """What tells, where a model's weights are in several files, which of them is where."""
    for directory in sorted({path.parent for path in folder.rglob(_SHARD)}):
        where, total = dict[str, str](), 0
        for file in sorted(directory.glob(_SHARD)):
            total += file.stat().st_size
            with safe_open(file, framework="pt") as tensors:
                where |= dict.fromkeys(tensors.keys(), file.name)
        index = directory / "model.safetensors.index.json"
        index.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=1))
        yield index


def digest(path: Path) -> dict[str, Any]:
    sha256, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            sha256.update(block)
            size += len(block)
    return {"bytes": size, "sha256": sha256.hexdigest()}


# ---- what there is


def steps(folder: Path) -> list[int]:
    """Steps of the whole checkpoints in a folder, ascending."""
    found = [_NAME.fullmatch(path.name) for path in folder.glob("step-*")] if folder.is_dir() else []
    return sorted(int(match.group(1)) for match in found if match)


def clear_partial(folder: Path) -> None:
    """Removes what a kill has left half written or half removed; only for who holds the run's folder."""
    for path in (*folder.glob(".step-*.partial"), *folder.glob(".step-*.old")):
        shutil.rmtree(path, ignore_errors=True)


def latest(folder: Path) -> Path | None:
    found = steps(folder)
    return folder / f"step-{found[-1]:06d}" if found else None


def set_aside(path: Path) -> Path:
    """Renames a damaged checkpoint, so that it is none any more."""
    kept = path.with_name(f"damaged-{path.name}")
    shutil.rmtree(kept, ignore_errors=True)
    path.rename(kept)
    return kept


# ---- reading


def fault(path: Path, share: int = 0, shares: int = 1) -> str | None:
    """What is wrong with a checkpoint, in a line that names the file; None where nothing is.

    Of its files every ``shares``-th is looked at, from number ``share`` on, and its state by share 0. A checkpoint of
    version 1 has no checksums: there only what a header tells is seen. Raises DataError where it is of a later version.
    """
    try:
        files = _manifest(path)
        for name in sorted(files)[share::shares]:
            if not (path / name).is_file():
                return f"{name} is missing"
            if (size := (path / name).stat().st_size) != files[name]["bytes"]:
                return f"{name} has {size:,} bytes, expected {files[name]['bytes']:,}"
        with ThreadPoolExecutor(4) as pool:
            names = sorted(files)[share::shares]
            for name, found in zip(names, pool.map(digest, [path / name for name in names])):
                if found != files[name]:
                    return f"{name} is not as it was written: its SHA-256 is another"
        if share == 0:
            read_state(path)
            Tensors(tensor_files(path))
    except Newer:
        raise
    except DataError as error:
        return str(error).removeprefix(f"{path}/").removeprefix(f"{path}: ")
    except (OSError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        return " ".join(str(error).split())
    return None


class Newer(DataError):
    """A checkpoint of a later version than this one reads."""


def _manifest(path: Path) -> Files:
    """The files of a checkpoint; none where it is of version 1."""
    if not (path / MANIFEST).exists():
        if read_state(path)["version"] == 1:
            return {}
        raise DataError(f"{path}: {MANIFEST} is missing")
    try:
        files = json.loads((path / MANIFEST).read_bytes())["files"]
        odd = [name for name in files if not name.isprintable()]
        if odd:
            raise ValueError(f"it names a file {odd[0]!r}")
        return {name: {"bytes": int(held["bytes"]), "sha256": str(held["sha256"])} for name, held in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise DataError(f"{path}: {MANIFEST} cannot be read ({error})") from None


class Tensors(Mapping[str, Tensor]):
    """Tensors of safetensors files, each read when it is asked for."""

    def __init__(self, files: Sequence[Path], prefix: str = ""):
        self.files, self.prefix = files, prefix
        self._opened: dict[str, Any] = {}
        for file in files:
            opened = safe_open(file, framework="pt")
            self._opened |= {name: opened for name in opened.keys() if name.startswith(prefix)}  # noqa: SIM118

    def under(self, prefix: str) -> Tensors:
        """Those whose names begin so, by the rest of their names."""
        return Tensors(self.files, self.prefix + prefix)

    def __getitem__(self, name: str) -> Tensor:
        return self._opened[self.prefix + name].get_tensor(self.prefix + name)

    def __iter__(self) -> Iterator[str]:
        return (name.removeprefix(self.prefix) for name in self._opened)

    def __len__(self) -> int:
        return len(self._opened)


def tensor_files(path: Path) -> list[Path]:
    """The files of the trainer's tensors, however many processes wrote them."""
    found = [path / name for name in sorted(_manifest(path)) if re.fullmatch(r"trainer.*\.safetensors", name)]
    return found or [path / "trainer.safetensors"]


def load(path: Path) -> tuple[Tensors, dict[str, Any]]:
    """(tensors, state) of a checkpoint; the random states are put back. Raises DataError where it is not readable."""
    state = read_state(path)
    try:
        tensors = Tensors(tensor_files(path))
        torch.set_rng_state(tensors["torch_rng"])
    except (OSError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise _unreadable(path, error) from None
    if "cuda_rng" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda_rng"])
    return tensors, state


def random_states() -> dict[str, Tensor]:
    """What `load` puts back."""
    found = {"torch_rng": torch.get_rng_state()}
    if torch.cuda.is_available():
        found["cuda_rng"] = torch.cuda.get_rng_state()
    return found


def read_state(path: Path) -> dict[str, Any]:
    """The JSON state of a checkpoint. Raises DataError where it is not readable."""
    try:
        state = json.loads((path / STATE).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(path, error) from None
    version = state.get("version") if isinstance(state, dict) else "unknown"
    if type(version) is not int or not 1 <= version <= VERSION:
        kind = Newer if type(version) is int and version > VERSION else DataError
        raise kind(f"{path}/{STATE}: version {version}, expected at most {VERSION}; {REMOVE}")
    named = _NAME.fullmatch(path.name)
    if type(state.get("step")) is not int or (named and state["step"] != int(named.group(1))):
        raise _unreadable(path, ValueError(f"{STATE}: step is {state.get('step')!r}"))
    for key, kinds in _KINDS.items():
        if state.get(key) is not None and type(state[key]) not in kinds:
            raise _unreadable(path, ValueError(f"{STATE}: {key} is a {type(state[key]).__name__}"))
    return state


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(f"{path}: not a readable checkpoint ({error}); remove it to resume from an earlier one")
