"""Folders and patterns of shards: all records in the order of names, nothing dropped, what is amiss in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prism_fast import ranks
from prism_fast.config import SFTConfig, load_config
from prism_fast.data import dataset, parquet, saved, source
from prism_fast.data.batches import Batches
from prism_fast.data.formats import read_align, read_sft
from prism_fast.data.held import Held
from prism_fast.data.order import order
from prism_fast.files import shards
from prism_fast.records import DataError
from prism_fast.run.record import record as run_record
from tests.trainer.data.test_formats import png, record, refuse, write

datasets = pytest.importorskip("datasets", reason="the library datasets is not installed")


def shard(folder, name: str, first: int, count: int = 3, **changes):
    """A file of records that are numbered from ``first``."""
    folder.mkdir(parents=True, exist_ok=True)
    return write(
        folder, "align", *[record("align", data_source=str(first + i), **changes) for i in range(count)], name=name
    )


def numbers(data) -> list[int]:
    return [int(sample.data_source) for sample in data]


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
@pytest.mark.parametrize("asked", ["{}", "{}/*.{}", "{}/b*.{},{}/a*.{}"])
def test_all_shards_are_one_data_set_in_the_order_of_their_names(tmp_path, suffix, asked):
    for name, first in (("b", 3), ("a", 0), ("c", 6)):  # made in another order
        shard(tmp_path / "d", f"{name}.{suffix}", first)
    (tmp_path / "d" / "README.md").write_text("# data")
    (tmp_path / "d" / f".{suffix}").touch()
    if "*" not in asked:
        (tmp_path / "d" / "_metadata.parquet").touch()
    asked = asked.replace("{}/", f"{tmp_path}/d/").replace("{}", suffix if "*" in asked else f"{tmp_path}/d")
    data = read_align(asked.split(","))
    want = [3, 4, 5, 0, 1, 2] if "," in asked else [*range(9)]
    assert numbers(data) == want
    assert data[0].place == f"{tmp_path}/d/{'b' if ',' in asked else 'a'}.{suffix}:1"


def test_a_parquet_export_of_datasets(tmp_path):
    made = datasets.Dataset.from_list(
        [{**record("align", data_source=str(i)), "images": [{"bytes": png(i), "path": None}]} for i in range(7)]
    )
    folder = tmp_path / "hub" / "data"
    folder.mkdir(parents=True)
    for split, count in (("train", 3), ("test", 1)):
        for i in range(count):
            made.shard(count, i, contiguous=True).to_parquet(folder / f"{split}-{i:05}-of-{count:05}.parquet")
    refuse(read_align, tmp_path / "hub", "holds the splits test, train; name those that are meant, as", "data/train-*")
    assert numbers(read_align(folder / "train-*")) == [*range(7)]
    (folder / "test-00000-of-00001.parquet").unlink()
    assert numbers(read_align(tmp_path / "hub")) == [*range(7)]
    (folder / "train-00001-of-00003.parquet").unlink()
    refuse(read_align, tmp_path / "hub", "2 of 3 files train-*-of-00003 are there; download the others")


def test_empty_shards_are_said(tmp_path, capsys):
    full = shard(tmp_path, "a.parquet", 0)
    pq.write_table(pq.read_table(full).slice(0, 0), tmp_path / "b.parquet")
    assert numbers(read_align(tmp_path)) == [0, 1, 2]
    told = capsys.readouterr().err
    assert told == f"{tmp_path}: 1 of 2 files hold no record and are passed over, as {tmp_path}/b.parquet\n"
    full.unlink()
    refuse(read_align, tmp_path, "none of 1 files holds a record")
    (tmp_path / "c.parquet").touch()  # a copy that has begun is no shard without records
    refuse(read_align, tmp_path, "c.parquet: the file is empty")


def test_shards_of_several_kinds(tmp_path):
    shard(tmp_path, "a.parquet", 0)
    shard(tmp_path, "b.parquet", 3, teacher_caption="x", teacher_cot="y <answer>7</answer>")
    refuse(read_align, tmp_path, "b.parquet has the column teacher_caption, a.parquet has not; write all files alike")
    assert numbers(read_align([tmp_path / "a.parquet", tmp_path / "b.parquet"])) == [*range(6)]
    pq.write_table(
        pq.read_table(tmp_path / "a.parquet").append_column("junk", pa.array([1, 2, 3])), tmp_path / "b.parquet"
    )
    assert len(read_align(tmp_path)) == 6  # a column that nobody reads
    shard(tmp_path, "c.jsonl", 6)
    refuse(read_align, tmp_path, "holds .jsonl and .parquet files; name one kind, as")
    refuse(read_align, tmp_path / "*.csv", "no file fits this pattern")


def test_a_file_whose_name_is_a_pattern(tmp_path):
    path = shard(tmp_path, "a[1].jsonl", 0)
    shard(tmp_path, "a1.jsonl", 3)
    assert numbers(read_align(path)) == [0, 1, 2]


def test_one_shard_added_makes_its_own_index_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "GROUP_BYTES", 100)
    monkeypatch.setattr(source, "INDEXED_BYTES", 100)
    monkeypatch.setattr(dataset, "JUDGED_ONCE", 2)
    folder, cache = tmp_path / "d", tmp_path / "cache"
    shard(folder, "a.parquet", 0)
    assert numbers(read_align(folder, cache=cache)) == [0, 1, 2]
    before = {file: file.stat().st_mtime_ns for file in cache.iterdir()}
    assert len(before) == 2
    shard(folder, "b.parquet", 3)
    assert numbers(read_align(folder, cache=cache)) == [*range(6)]
    assert len([*cache.iterdir()]) == 4
    assert all(file.stat().st_mtime_ns == time for file, time in before.items())
    (folder / "a.parquet").unlink()
    assert numbers(read_align(folder, cache=cache)) == [3, 4, 5]


def test_a_run_knows_its_shards(tmp_path):
    def known():
        told = ["model.path=m", f"data.files={tmp_path}/*.jsonl", "run.out=o", "optimizer.lr=1e-4", "steps=1"]
        return run_record("sft", load_config(SFTConfig, None, told))["inputs"]["data.files"]

    write(tmp_path, "sft", record("sft"), name="a.jsonl")
    first = known()
    assert [*first[0]["files"]] == ["a.jsonl"]
    write(tmp_path, "sft", record("sft"), name="b.jsonl")
    second = known()
    assert first != second and [*second[0]["files"]] == ["a.jsonl", "b.jsonl"]


def test_processes_that_find_other_shards(tmp_path, monkeypatch):
    shard(tmp_path, "a.jsonl", 0)
    monkeypatch.setattr(ranks, "world", lambda: 2)
    monkeypatch.setattr(ranks, "gather", lambda told: [told, told])
    assert len(read_align(tmp_path)) == 3
    monkeypatch.setattr(ranks, "gather", lambda told: [told, [told[0] + 1, "other"]])
    refuse(
        read_align, tmp_path, "process 0 finds 1 files, process 1 2 or of other sizes; give all hosts the same files"
    )


FEW_FILES = """
import resource, sys
from prism_fast.data.formats import read_align
from prism_fast.data.order import order
resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))
data = read_align(sys.argv[1])
print(len({data[i].data_source for i in order(len(data), 0, 0, len(data))}))
"""


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_more_shards_than_a_process_may_open(tmp_path, suffix):
    shard(tmp_path / "d", f"0.{suffix}", 0, 1)
    for i in range(1, 150):
        if suffix == "jsonl":
            (tmp_path / "d" / f"{i}.jsonl").write_text(json.dumps(record("align", data_source=str(i))))
        else:
            table = pq.read_table(tmp_path / "d" / "0.parquet")
            column = table.schema.get_field_index("data_source")
            pq.write_table(table.set_column(column, "data_source", pa.array([str(i)])), tmp_path / "d" / f"{i}.parquet")
    done = subprocess.run(
        [sys.executable, "-c", FEW_FILES, tmp_path / "d"],
        capture_output=True,
        text=True,
        check=False,
        env=dict(os.environ),
    )
    assert done.stdout.strip() == "150", done.stderr[-400:]


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_shards_share_what_is_held(tmp_path, suffix):
    for i in range(4):
        shard(tmp_path, f"{i}.{suffix}", 3 * i)
    held = Held(held_bytes=1, held_files=2)
    sources = [source.opened_source(file, None, source.Cache(), held) for file in shards(tmp_path)]
    for i in order(12, 0, 0, 24):
        assert sources[i // 3][i % 3]["data_source"] == str(i)
    assert len(held._groups) <= 1 and len(held._files) == 2


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_a_file_that_changes_while_it_is_read(tmp_path, suffix):
    held = Held(held_bytes=1, held_files=1)
    files = [shard(tmp_path, f"{i}.{suffix}", 3 * i) for i in range(2)]
    sources = [source.opened_source(file, None, source.Cache(), held) for file in files]
    assert [sources[0][0]["data_source"], sources[1][0]["data_source"]] == ["0", "3"]
    shard(tmp_path, f"0.{suffix}", 7, count=9)
    with pytest.raises(DataError, match="has changed since it was opened"):
        sources[0][0]
    files[0].unlink()
    with pytest.raises(DataError, match="has changed since it was opened"):
        sources[0][0]


def test_sft_shards(tmp_path):
    write(tmp_path, "sft", record("sft"), name="a.jsonl")
    write(tmp_path, "sft", record("sft", messages=[]), record("sft"), name="b.jsonl")
    assert [sample.place for sample in read_sft(tmp_path, skip_bad=1)] == [
        f"{tmp_path}/a.jsonl:1",
        f"{tmp_path}/b.jsonl:2",
    ]
    refuse(read_sft, tmp_path, f"{tmp_path}/b.jsonl:1: messages")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_position_in_shards_is_a_position(tmp_path, workers):
    """A run that begins in the middle, with any number of processes, draws what one that began at the start does."""
    for name, first in (("b", 3), ("a", 0), ("c", 6)):
        shard(tmp_path, f"{name}.parquet", first)
    want = order(9, 5, 0, 27)
    data = read_align(tmp_path)
    batches = Batches(data, len(data), lambda sample: sample.data_source, 5, workers)
    try:
        assert [int(number) for start in (12, 16, 20) for number in batches.take(start, 4)] == want[12:24]
    finally:
        batches.close()
    assert sorted(want[:9]) == [*range(9)]  # an epoch: each once


def test_a_saved_data_set_by_other_names_reads_its_columns_alone(tmp_path, monkeypatch):
    raw = record("align")
    row = {"dialogue": raw["prompt"], "shown": raw["teacher_response"], "notes": "x" * 99, "solution": "7"}
    rows = [{**row, "picture": [{"bytes": png(i), "path": None}], "kind": str(i)} for i in range(5)]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved", num_shards=2)
    read = []
    one = saved.row
    monkeypatch.setattr(saved, "row", lambda table, *where: read.append({*table.column_names}) or one(table, *where))
    columns = {"prompt": "dialogue", "images": "picture", "teacher_response": "shown", "data_source": "kind"}
    columns["reward_model.ground_truth"] = "solution"
    data = read_align(tmp_path / "saved", columns=columns)
    assert [(sample.data_source, sample.gold) for sample in data] == [(str(i), "7") for i in range(5)]
    assert {*map(frozenset, read)} == {frozenset(columns.values())}
