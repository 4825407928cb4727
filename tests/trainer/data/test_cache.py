"""What is made once of large data files (pieces of row groups, offsets, verdicts), anew where a file has changed."""

from __future__ import annotations

import gc
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from prism_fast.data import cache as cache_module
from prism_fast.data import dataset, parquet, row_groups, source
from prism_fast.data.cache import Cache
from prism_fast.data.check import Reading, check
from prism_fast.data.convert import convert
from prism_fast.data.formats import read_align, read_sft
from prism_fast.records import DataError
from tests.damage import flip, tear
from tests.trainer.data.test_formats import png, record, refuse, write


@pytest.fixture
def small(monkeypatch):
    """Limits that a file of a test is over."""
    monkeypatch.setattr(parquet, "GROUP_BYTES", 100)
    monkeypatch.setattr(source, "INDEXED_BYTES", 100)
    monkeypatch.setattr(dataset, "JUDGED_ONCE", 2)


def numbered(folder, count: int = 40, rows: int = 40, **changes):
    """An alignment file whose records are numbered, ``rows`` to a row group."""
    (folder / "a.png").write_bytes(png())
    path = folder / "align.parquet"
    records = [{**record("align", data_source=str(i), **changes), "junk": "x" * 99} for i in range(count)]
    pq.write_table(pa.Table.from_pylist(records), path, row_group_size=rows)
    return path


def numbers(data) -> list[str]:
    return [sample.data_source for sample in data]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("rows", [7, 40])
def test_large_row_groups_are_cut_once(tmp_path, capsys, kept, rows):
    path, folder = numbered(tmp_path, rows=rows), tmp_path / "cache" if kept else None
    want = [str(i) for i in range(40)]
    assert numbers(read_align(path, cache=folder)) == want
    assert "are cut into pieces" in capsys.readouterr().err
    if kept:
        (copy,) = folder.glob("*.rows.parquet")
        assert "junk" not in pq.read_schema(copy).names  # only what is read
        before = copy.stat().st_mtime_ns
        assert numbers(read_align(path, cache=folder)) == want
        assert copy.stat().st_mtime_ns == before
        assert not capsys.readouterr().err
    else:
        assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.png", "align.parquet"]


def test_pieces_have_few_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(row_groups, "PIECE_BYTES", 4000)
    path = numbered(tmp_path, count=400, rows=400)
    row_groups.cut(path, tmp_path / "cut.parquet", ["data_source", "prompt", "extra_info.question_type"])
    meta = pq.read_metadata(tmp_path / "cut.parquet")
    assert meta.num_rows == 400
    assert all(meta.row_group(i).total_byte_size < 8000 for i in range(meta.num_row_groups))


@pytest.mark.usefixtures("small")
def test_a_changed_file_is_read_anew(tmp_path):
    path = numbered(tmp_path)
    read_align(path, cache=tmp_path / "cache")
    assert numbers(read_align(numbered(tmp_path, count=30), cache=tmp_path / "cache")) == [str(i) for i in range(30)]
    path = write(tmp_path, "sft", *[record("sft")] * 3)
    assert len(read_sft(path, cache=tmp_path / "cache")) == 3
    path.unlink()
    path = write(tmp_path, "sft", *[record("sft")] * 5)
    assert len(read_sft(path, cache=tmp_path / "cache")) == 5


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", ["sft.json", "sft.jsonl"])
def test_offsets_are_found_once(tmp_path, monkeypatch, name):
    path = write(tmp_path, "sft", *[record("sft")] * 4, name=name)
    first = read_sft(path, cache=tmp_path / "cache")
    monkeypatch.setattr(source, "_list_spans", None)
    monkeypatch.setattr(source, "array", None)
    again = read_sft(path, cache=tmp_path / "cache")
    assert list(again) == list(first)
    assert again[3].place == f"{path}:4"
    with pytest.raises(TypeError):
        read_sft(path)


@pytest.mark.usefixtures("small")
def test_records_are_judged_once(tmp_path, monkeypatch):
    good, bad = record("sft"), record("sft", messages=[])
    path = write(tmp_path, "sft", good, bad, good, record("sft", images=["late.png"]))
    with pytest.raises(DataError, match=r"sft.json:2: messages"):
        read_sft(path, cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.bad"))  # nothing is known of the others
    first = read_sft(path, skip_bad=2, cache=tmp_path / "cache")
    read: list[int] = []
    judge = dataset.Records.read
    monkeypatch.setattr(
        dataset.Records, "read", lambda self, file, number: read.append(number) or judge(self, file, number)
    )
    again = read_sft(path, skip_bad=2, cache=tmp_path / "cache")
    assert read == [1, 3]  # the bad ones, which may have been mended
    assert (list(again), again.bad.found) == (list(first), first.bad.found)
    with pytest.raises(DataError, match="skip_bad_records=1"):
        read_sft(path, skip_bad=1, cache=tmp_path / "cache")
    (tmp_path / "late.png").write_bytes(png())
    assert [sample.place for sample in read_sft(path, skip_bad=1, cache=tmp_path / "cache")] == [
        f"{path}:{number}" for number in (1, 3, 4)
    ]
    # Other options are other verdicts.
    read.clear()
    read_sft(path, skip_bad=1, system_prompt="Think.", cache=tmp_path / "cache")
    assert read == [0, 1, 2, 3]


@pytest.mark.usefixtures("small")
def test_what_cannot_be_cut_is_said_in_one_line(tmp_path, monkeypatch):
    path = numbered(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[:200] + bytes(200) + whole[400:])
    with pytest.raises(DataError, match=r"align.parquet: row group 1 cannot be read; copy the file again \(") as caught:
        read_align(path, cache=tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert not any((tmp_path / "cache").iterdir())
    monkeypatch.setattr(row_groups, "__name__", "prism_fast.data.nothing")
    with pytest.raises(DataError, match=r"align.parquet: row groups of .* could not be cut into .* \(exit status 1,"):
        read_align(numbered(tmp_path), cache=tmp_path / "cache")
    monkeypatch.undo()
    monkeypatch.setattr(parquet, "GROUP_ROWS", 39)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"data.cache"):
        read_align(numbered(tmp_path), cache=tmp_path / "file")


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("where", ["pieces", "dictionary"])
def test_a_full_disk_is_told_by_its_folder(tmp_path, monkeypatch, kept, where):
    """A limit of a file's size stands for it, in the process that cuts; what it wrote goes."""
    for name in ("tmp", "data"):
        (tmp_path / name).mkdir()
    path, cache = numbered(tmp_path / "data"), tmp_path / "cache"
    if where == "dictionary":  # of which too much is held for memory
        path = tmp_path / "data" / "large.parquet"
        rows = [record("align", data_source="x" * (9 << 20)), record("align", data_source="y" * (9 << 20))]
        pq.write_table(pa.Table.from_pylist(rows), path)
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (2000, 2000))
    monkeypatch.setattr(parquet.subprocess, "run", partial(subprocess.run, preexec_fn=limit))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    with pytest.raises(DataError, match=r"row groups of .* could not be cut into ") as caught:
        check(path, Console(quiet=True), reading=Reading(processes=0, cache=cache if kept else None))
    told = str(caught.value)
    assert f"into {cache} (" in told if kept else f"into {tmp_path / 'tmp' / 'prism-fast-'}" in told
    assert ("by data.cache, of data commands --cache," if kept else "by TMPDIR, or by data.cache, of data ") in told
    assert "copy the file again" not in told
    del caught
    gc.collect()
    assert not any((tmp_path / "tmp").iterdir())
    assert not kept or not any(cache.iterdir())


@pytest.mark.usefixtures("small")
def test_data_commands_keep_pieces_where_they_are_told(tmp_path, capsys):
    path, cache = numbered(tmp_path), tmp_path / "cache"
    for _ in range(2):
        assert check(path, Console(quiet=True), reading=Reading(processes=0, cache=cache)).records == 40
        assert convert([path], tmp_path / "out.jsonl", cache=cache).records == 40
    assert len([*cache.iterdir()]) == 1
    assert capsys.readouterr().err.count("are cut into pieces") == 1


def test_no_temporary_folder_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    with pytest.raises(
        DataError, match=r"no temporary folder can be written \(No such .*; choose one by TMPDIR, or by "
    ):
        Cache().folder  # noqa: B018


def test_a_terminated_command_leaves_no_temporary_folder(tmp_path):
    told = (
        "import os, signal; from prism_fast.cli.command_line import interruptible; from prism_fast.data.cache import "
        "Cache; interruptible(terminable=True); cache = Cache(); (cache.folder / 'x').touch()\n"
        "if not (child := os.fork()): os.kill(os.getpid(), signal.SIGTERM); signal.pause()\n"
        "os.waitpid(child, 0); print(cache.folder, (cache.folder / 'x').exists(), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGTERM); signal.pause()"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=False, env=environment)
    folder, is_there = done.stdout.split()  # a child that ends leaves it to its parent
    assert (done.returncode, Path(folder).parent, is_there) == (143, tmp_path, "True"), done.stderr
    assert not any(tmp_path.iterdir())


def test_cutting_loads_no_torch():
    told = "import sys, prism_fast.data.row_groups; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", told], capture_output=True, text=True, check=True, env=dict(os.environ)
    )
    assert done.stdout.strip() == "[]"


def test_a_temporary_folder_goes_with_its_cache(tmp_path):
    cache = Cache()
    (tmp_path / "a.txt").write_text("x")
    made = cache.file(tmp_path / "a.txt", "copy", None, lambda target: target.write_text("y"))
    assert made.read_text() == "y"
    del cache
    assert not made.exists()


@pytest.mark.parametrize("fails", [False, True])
def test_who_waits_hears_of_the_first_process_while_it_works(tmp_path, monkeypatch, fails):
    """A thread stands for the other process: its waits have a limit, and the work may take longer."""
    monkeypatch.setattr(cache_module, "BEAT", 0.001)
    all_there, board, beats = threading.Barrier(2, timeout=60), {}, []
    rank = lambda: int(threading.current_thread().name.startswith("other"))  # noqa: E731

    def gather(value):
        board[rank()] = json.dumps(value)
        all_there.wait()
        found = [json.loads(board[number]) for number in (0, 1)]
        all_there.wait()
        beats.append(found[0])
        return found

    def make(target):
        while beats.count(False) < 6:  # three of either
            time.sleep(0.001)
        if fails:
            raise DataError("torn")
        target.write_text("y")

    def process():
        try:
            return cache.file(tmp_path / "a.txt", "copy", None, make).read_text()
        except DataError as error:
            return str(error)

    for name, value in (("world", lambda: 2), ("rank", rank), ("gather", gather)):
        monkeypatch.setattr(cache_module.ranks, name, value)
    (tmp_path / "a.txt").write_text("x")
    cache = Cache(tmp_path / "cache")
    with ThreadPoolExecutor(1, thread_name_prefix="other") as other:
        told = other.submit(process)
        assert process() == ("torn" if fails else "y") and told.result(60) == ("torn" if fails else "y")


# ---- names of columns


@pytest.mark.parametrize("name", ["data.jsonl", "data.parquet"])
def test_fields_are_read_by_other_names(tmp_path, name):
    raw = record("align")
    other = {
        "dialogue": raw["prompt"],
        "picture": raw["images"],
        "solution": "7",
        "kind": "sum",
        "shown": raw["teacher_response"],
    }
    path = write(tmp_path, "align", other, other, name=name)
    columns = {
        "prompt": "dialogue",
        "images": "picture",
        "reward_model.ground_truth": "solution",
        "extra_info.question_type": "kind",
        "teacher_response": "shown",
    }
    for sample in read_align(path, columns=columns):
        assert (sample.gold, sample.question_type, len(sample.images)) == ("7", "sum", 1)
    with pytest.raises(DataError, match="the field is missing"):
        read_align(path, columns={})


def test_a_renamed_field_takes_the_place_of_its_name(tmp_path):
    path = write(tmp_path, "align", {**record("align"), "answer_text": "8"}, name="data.jsonl")
    (sample,) = read_align(path, columns={"reward_model.ground_truth": "answer_text", "extra_info.x": "nowhere"})
    assert (sample.gold, sample.equivalents) == ("8", ("7.0",))


def test_a_place_without_fields_is_refused(tmp_path):
    path = write(tmp_path, "align", {**record("align"), "answer_text": "8"}, name="data.jsonl")
    with pytest.raises(DataError, match="data_source: holds no fields"):
        read_align(path, columns={"data_source.x": "answer_text"})


def test_columns_of_the_command_line(tmp_path):
    from prism_fast.config import DataConfig

    told = DataConfig.model_validate({"files": ["a.json"], "columns": {"images": "picture"}})
    assert told.reading["columns"] == {"images": "picture"}
    assert told.beside(tmp_path).cache == tmp_path / "cache"
    assert json.loads(told.model_dump_json())["cache"] is None


# ---- damage


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("damage", [flip, tear, Path.unlink], ids=["flipped", "torn", "missing"])
@pytest.mark.parametrize("name", ["sft.json", "sft.jsonl"])
def test_what_is_kept_is_made_anew_where_it_is_damaged(tmp_path, name, damage):
    path = write(tmp_path, "sft", *[record("sft")] * 2, record("sft", messages=[]), record("sft"), name=name)

    def outcome():
        data = read_sft(path, skip_bad=1, cache=tmp_path / "cache")
        return list(data), data.bad.found

    first = outcome()
    kept = {file: file.read_bytes() for file in (tmp_path / "cache").iterdir()}
    assert sorted(file.suffix for file in kept) == [".bad", ".offsets"]
    for file, content in kept.items():
        damage(file)
        assert outcome() == first
        assert file.read_bytes() == content


@pytest.mark.usefixtures("small")
def test_a_damaged_copy_is_made_anew_or_named(tmp_path):
    path = numbered(tmp_path)
    first = numbers(read_align(path, cache=tmp_path / "cache"))
    (copy,) = (tmp_path / "cache").glob("*.rows.parquet")
    tear(copy)
    assert numbers(read_align(path, cache=tmp_path / "cache")) == first
    content, column = bytearray(copy.read_bytes()), pq.read_metadata(copy).row_group(0).column(0)
    content[column.data_page_offset + column.total_compressed_size - 2] ^= (
        1  # in a page: the footer tells nothing of it
    )
    copy.write_bytes(content)
    refuse(read_align, path, copy.name, "row group", "remove it, it is made anew", cache=tmp_path / "cache")
