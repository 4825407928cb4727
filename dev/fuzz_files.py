"""Damaged data files: each is records, counted rejects or one DataError in one line; no crash, no hang, no silent loss.

    python -m dev.fuzz_files [--count 5000] [--seed 0] [--only sft.jsonl] [--case 17] [--jobs 2]

Every format that the readers take, damaged in its bytes, its texts, its types and its schema, is read as a stage reads
it: judged, each record encoded with its images, all within fuzzing.SECONDS and fuzzing.MEMORY. Records in are records
out and counted rejects. The same of what is made from data files (pieces of row groups, offsets, verdicts), of records
on their way between processes, of a checkpoint's tokenizer files and of its manifest and state.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from dev import damaged as make
from dev import fuzz_models
from dev.fuzzing import Judge, damaged, main
from prism_fast.data import dataset, kinds, pages, parquet, row_groups, source, wire
from prism_fast.data.bad_records import BadRecords
from prism_fast.data.cache import Cache
from prism_fast.data.chat import Chat
from prism_fast.data.dataset import Dataset
from prism_fast.data.formats import FORMATS
from prism_fast.data.verdicts import judge_of
from prism_fast.demo.tiny import make_tiny_model
from prism_fast.records import DataError, ImageRef, Message, Prompt, Sample
from prism_fast.run import checkpoint

COUNT = 5000
ALL = 10**9  # bad records that are allowed
LONGEST = 1000  # characters of an error

Verdict = Callable[[Sample], None]  # raises DataError for a bad record


def plain(error: DataError, path: Path) -> None:
    """Raises where an error is not one line that names the file, or what is beside it, and a remedy."""
    text = str(error)
    if not (text.isprintable() and str(path) in text and len(text) < LONGEST and len(text) > len(str(path)) + 20):
        raise AssertionError(f"no plain line: {text!r}") from error


@cache
def model() -> Path:
    """A tiny model's folder, for as long as this process lives."""
    held = tempfile.TemporaryDirectory(prefix="fuzz-model-")
    _HELD.append(held)
    with contextlib.redirect_stderr(io.StringIO()):  # a bar
        return make_tiny_model(Path(held.name) / "policy", ["How many?", make.RESPONSE] * 50)


_HELD: list[Any] = []


# ---- data files


def counted(path: Path) -> int | None:
    """Records of a file, counted without the readers; None where its bytes do not tell."""
    if path.is_dir():
        return None
    data = path.read_bytes()
    begins = data.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    try:
        if data[:4] == b"PAR1" or (path.suffix == ".parquet" and begins not in (b"{", b"[")):
            return pq.read_metadata(path).num_rows
        if begins == b"[":
            return len(json.loads(data.decode("utf-8-sig")))
    except (ValueError, RecursionError, OSError, pa.ArrowException):
        return None
    return sum(bool(line.strip()) for line in data.split(b"\n"))


def read(path: Path, kind: str, verdict: Verdict, expected: int | None = None) -> str:
    """Reads a file as a stage of ``kind`` does. ``expected``: how many records it holds, where that is known."""
    try:
        kinds.kind_of(path)
        kinds.glance(path)
    except DataError as error:
        plain(error, path)
    bad, told = BadRecords(ALL), io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            data = Dataset(path, FORMATS[kind], bad)
    except DataError as error:
        plain(error, path)
        return "refused"
    finally:
        for line in told.getvalue().splitlines():
            if not (line.startswith(f"{path}:") and "_response is not " in line):
                raise AssertionError(f"it says {line!r}")
    good, total = 0, len(data) + len(bad)
    try:
        for index in range(len(data)):
            try:
                verdict(data[index])
                good += 1
            except DataError as error:
                plain(error, path)
                data.skip(index, error)
    except DataError as error:
        plain(error, path)
    for text in bad.messages:
        plain(DataError(text), path)
    if good + len(bad) != total or total != (expected or counted(path) or total):
        raise AssertionError(f"{expected or counted(path)} records in, {good} out and {len(bad)} rejected of {total}")
    return "all read" if not bad.found else "part read" if good else "none read"


def verdict_of(kind: str) -> Verdict:
    """The stage's own encoding of a record. Raises AssertionError where `prism-fast data check` says otherwise."""
    judge, _ = judge_of(kind, Chat.load(model()), 2048)

    def said(look: Callable[[Sample], object], sample: Sample) -> DataError | None:
        try:
            look(sample)
        except DataError as error:
            return error
        return None

    def verdict(sample: Sample) -> None:
        checked, stage = said(judge, sample), said(judge._encode or judge, sample)
        if str(checked) != str(stage):
            raise AssertionError(f"data check says {checked}, the stage {stage}")
        if stage is not None:
            raise stage

    return verdict


def data_file(kind: str, container: str) -> Judge:
    base = make.records(kind, embedded=container == "parquet")
    kind = {"llava": "sft"}.get(kind, kind)
    verdict = verdict_of(kind)
    pictures = {name: make.picture(name) for name in make.PICTURES}
    _must_read(base, kind, container, pictures, verdict)

    def judge(rng: random.Random, folder: Path) -> str:
        path = folder / f"data.{container}"
        if container == "parquet":
            path.write_bytes(make.parquet_file(base, rng)[0])
        else:
            path.write_bytes(make.json_file(base, container == "json", rng))
            for name, data in pictures.items():
                (folder / name).write_bytes(data)
        return read(path, kind, verdict)

    return judge


def _must_read(base: Any, kind: str, container: str, pictures: dict[str, bytes], verdict: Verdict) -> None:
    """Raises where the records are bad before they are damaged."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"data.{container}"
        if container == "parquet":
            pq.write_table(pa.Table.from_pylist(base), path)
        else:
            rows = [json.dumps(record) for record in base]
            path.write_text("[" + ",".join(rows) + "]" if container == "json" else "\n".join(rows))
            for name, data in pictures.items():
                (path.parent / name).write_bytes(data)
        if (found := read(path, kind, verdict, len(base))) != "all read":
            raise AssertionError(f"{kind}, undamaged: {found}")


def saved() -> Judge:
    """A data set that the library datasets saved, its Arrow stream or its state damaged."""
    base = make.records("rlvr", embedded=True)
    verdict = verdict_of("rlvr")

    def judge(rng: random.Random, folder: Path) -> str:
        path, expected = folder / "saved", None
        path.mkdir()
        names = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
        streams = [make.arrow_stream(base, rng, whole=True) for _ in names]
        state: Any = {"_data_files": [{"filename": name} for name in names], "_indices_data_files": None}
        how = rng.choice(("bytes", "bytes", "cut", "table", "state", "state bytes"))
        if how == "bytes":
            streams[0] = damaged(streams, rng, from_end=0.3)
        elif how == "cut":
            expected = sum(pa.ipc.open_stream(stream).read_all().num_rows for stream in streams)
            streams[0] = streams[0][: rng.randrange(len(streams[0]))]
        elif how == "table":
            streams[0] = make.arrow_stream(base, rng)
        elif how == "state":
            make.edited([state], rng)
        text = json.dumps(state).encode()
        (path / "state.json").write_bytes(damaged([text], rng) if how == "state bytes" else text)
        for name, stream in zip(names, streams):
            (path / name).write_bytes(stream)
        return read(path, "rlvr", verdict, expected)

    return judge


def pieces() -> Judge:
    """The program that cuts large row groups, and what is read of its copy; half of them have large pages."""
    base = make.records("alignment", embedded=True)

    def judge(rng: random.Random, folder: Path) -> str:
        path = folder / "data.parquet"
        data, is_damaged = make.parquet_file(base, rng)
        path.write_bytes(data)
        largest, held = rng.choice((50, pages.LARGEST_PAGE)), None
        try:
            held = parquet.Parquet(path, Cache(folder / "cache"))
            with mock.patch.object(pages, "LARGEST_PAGE", largest):
                row_groups.cut(path, folder / "cut.parquet", held.columns)
        except DataError as error:
            plain(error, path)
            if held and not is_damaged:
                raise AssertionError(f"a sound file is refused: {error}") from error
            return "refused"
        if not (folder / "cut.parquet").exists():
            return f"nothing of {len(held)} rows" if not len(held) else _lost(len(held), 0)
        cut = parquet.Parquet(folder / "cut.parquet", Cache(folder / "cache"))
        return "cut" if len(cut) == len(held) else _lost(len(held), len(cut))

    return judge


def _lost(before: int, after: int) -> str:
    raise AssertionError(f"{before} rows in, {after} out")


# ---- what is made from data files


@contextlib.contextmanager
def small() -> Iterator[None]:
    """Limits that a file of six records is over; row groups are cut in this process."""

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        asked = json.loads(command[-1])
        try:
            row_groups.cut(Path(asked["source"]), Path(asked["target"]), asked["columns"])
        except DataError as error:
            return subprocess.CompletedProcess(command, row_groups.UNREADABLE, str(error), "")
        return subprocess.CompletedProcess(command, 0, "", "")

    limits = [(source, "INDEXED_BYTES", 0), (dataset, "JUDGED_ONCE", 1), (parquet, "GROUP_ROWS", 5)]
    limits += [(row_groups, "PIECE_BYTES", 500), (parquet.subprocess, "run", run)]
    with contextlib.ExitStack() as changed, contextlib.redirect_stderr(io.StringIO()):  # what is made is said
        for holder, name, value in limits:
            changed.enter_context(mock.patch.object(holder, name, value))
        yield


def made_files(container: str) -> Judge:
    """What the cache keeps (offsets and verdicts, or a copy in small row groups), damaged between two starts: made
    anew, or as it was, or refused."""
    held = tempfile.TemporaryDirectory(prefix="fuzz-made-")
    _HELD.append(held)
    path, kept = Path(held.name) / f"data.{container}", Path(held.name) / "cache"
    base = make.records("rlvr", embedded=container == "parquet")
    base[3]["prompt"] = [] if container == "parquet" else 5
    if container == "parquet":
        pq.write_table(pa.Table.from_pylist(base), path)
    else:
        rows = [json.dumps(record) for record in base]
        path.write_text("[" + ",".join(rows) + "]" if container == "json" else "\n".join(rows))
    for name in make.PICTURES:
        (path.parent / name).write_bytes(b"x")

    def outcome(cache: Path) -> tuple[list[Sample], dict[str, str]]:
        with small():
            data = Dataset(path, FORMATS["rlvr"], bad := BadRecords(ALL), cache=cache)
            return list(data), bad.found

    before = outcome(kept)

    def judge(rng: random.Random, folder: Path) -> str:
        cache = folder / "cache"
        shutil.copytree(kept, cache)
        victim = rng.choice(sorted(cache.iterdir()))
        sound = victim.read_bytes()
        victim.write_bytes(damaged([sound], rng, from_end=0.5))
        try:
            after = outcome(cache)
        except DataError as error:
            plain(error, cache)
            return "refused"
        if after == before:
            return "as before" if victim.read_bytes() != sound else "as before, made anew"
        told = set(after[1].values()) - set(before[1].values())
        if len(after[0]) + len(after[1]) != len(base) or not told or any(str(victim) not in line for line in told):
            raise AssertionError(f"{victim.name}: {before} before, {after} after")
        return "part read"

    return judge


def on_the_wire() -> Judge:
    """Records as bytes between processes: they come from our own, so that any exception will do."""
    prompt = Prompt(torch.arange(9), torch.ones(4, 12), torch.tensor([[1, 2, 2]]), b"k" * 16, "d:1")
    sample = Sample("d:1", (Message("user", "<image>x"),), (ImageRef(data=b"png"),), response="y")
    files = [wire.to_bytes((1, True, (sample, prompt)))]
    files.append(wire.to_bytes([torch.ones(3, dtype=torch.bfloat16), Path("x"), 2.5, None, b"", torch.empty(0, 3)]))

    def judge(rng: random.Random, _: Path) -> str:
        try:
            wire.from_bytes(damaged(files, rng))
        except Exception:  # noqa: BLE001
            return "refused"
        return "read"

    return judge


# ---- checkpoints


CHAT_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "preprocessor_config.json")


def chat_files() -> Judge:
    """The files of a model's folder that a `Chat` is made of."""
    base = model()

    def judge(rng: random.Random, folder: Path) -> str:
        for file in base.iterdir():
            if file.is_file() and file.suffix != ".safetensors":
                shutil.copy(file, folder / file.name)
        fuzz_models.mutate_texts([folder / name for name in CHAT_FILES if (folder / name).exists()], rng)
        try:
            Chat.load(folder)
        except DataError as error:
            plain(error, folder)
            return "refused"
        return "opens"

    return judge


def checkpoints() -> Judge:
    """A checkpoint's manifest, state and tensors: a fault in words, or as it was."""
    held = tempfile.TemporaryDirectory(prefix="fuzz-checkpoint-")
    _HELD.append(held)
    base = Path(held.name)
    own = checkpoint.own_folder(base, 3, 0)
    tensors = {**checkpoint.random_states(), "m": torch.ones(8)}
    state = checkpoint.state_text(3, None, {"run": {"seed": 1}, "threads": 2, "skipped_updates": 0})
    part = checkpoint.Part(3, {}, tensors, "trainer.safetensors", state, None)
    checkpoint.commit(base, 3, [part.write(own)])
    sound = checkpoint.latest(base)

    def judge(rng: random.Random, folder: Path) -> str:
        path = folder / sound.name
        shutil.copytree(sound, path)
        victim = rng.choice(sorted(path.iterdir()))
        if victim.suffix == ".json" and rng.random() < 0.6:
            tree = [json.loads(victim.read_text())]
            make.edited(tree, rng)
            text = json.dumps(tree[0] if tree else None)
            if rng.random() < 0.1:
                text = text.replace("3", make.nested(make.depth(rng)), 1)
            victim.write_text(text)
        else:
            victim.write_bytes(damaged([victim.read_bytes()], rng))
        try:
            fault = checkpoint.fault(path)
        except DataError as error:
            plain(error, path)
            return "refused"
        if fault is None:
            checkpoint.load(path)
            return "whole"
        if not fault or "\n" in fault:
            raise AssertionError(f"no plain line: {fault!r}")
        return "faulty"

    return judge


CONTAINERS = {"sft": "sft", "warmup": "warm-up", "align": "alignment", "rlvr": "rlvr"}
JUDGES: dict[str, Callable[[], Judge]] = {
    **{
        f"{name}.{container}": partial(data_file, kind, container)
        for name, kind in CONTAINERS.items()
        for container in ("json", "jsonl", "parquet")
    },
    "llava.json": partial(data_file, "llava", "json"),
    "saved": saved,
    "pieces": pieces,
    **{f"cache.{container}": partial(made_files, container) for container in ("json", "jsonl", "parquet")},
    "wire": on_the_wire,
    "chat": chat_files,
    "checkpoint": checkpoints,
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(__doc__, COUNT, JUDGES))
