"""Formats and containers into each other: what both hold comes back, what one lacks is said."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from typer.testing import CliRunner

from prism_fast.cli import app
from prism_fast.data.convert import KINDS, convert
from prism_fast.data.formats import FORMATS, Dataset, read_align, read_rlvr, read_sft
from prism_fast.data.images import content
from prism_fast.records import DataError
from tests.trainer.data.test_formats import CAPTION, REASONING, png, record, refuse, write

datasets = pytest.importorskip("datasets", reason="the library datasets is not installed")
OURS = {"sft": "sft", "warm-up": "warmup", "alignment": "align", "rlvr": "rlvr"}


def same(one, other) -> None:
    """All that a format holds, but where the files lie."""
    blank = {"place": "", "images": ()}
    assert [replace(sample, **blank) for sample in one] == [replace(sample, **blank) for sample in other]
    assert [[content(ref) for ref in sample.images] for sample in one] == [
        [content(ref) for ref in sample.images] for sample in other
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first", ["json", "jsonl", "parquet"])
@pytest.mark.parametrize("second", ["json", "jsonl", "parquet"])
def test_a_round_trip_changes_nothing(tmp_path, kind, first, second):
    (tmp_path / "in").mkdir()
    several = record(OURS[kind])
    key = "image" if kind == "warm-up" else "images"
    more = {**several, key: ["a.png", "b.png"]}
    if kind == "warm-up":
        more["prompt"] = "<image>Compare.<image>"
    else:
        name = "messages" if kind == "sft" else "prompt"
        more[name] = [{**turn, "content": turn["content"].replace("Sum?", "Sum?<image>")} for turn in several[name]]
    (tmp_path / "in" / "b.png").write_bytes(png(99))
    source = write(tmp_path / "in", OURS[kind], more, more, name="d.jsonl")
    data = Dataset(source, FORMATS[kind])
    once, twice = tmp_path / f"once.{first}", tmp_path / "out" / f"twice.{second}"
    assert convert(data, kind, once) == 2
    convert(Dataset(once, FORMATS[kind]), kind, twice)
    same(Dataset(twice, FORMATS[kind], image_folders=[tmp_path]), data)


def test_images_in_bytes_go_along(tmp_path):
    struct = {"bytes": png(3), "path": None}
    path = write(tmp_path, "align", record("align", images=[struct]))
    convert(read_align(path), "sft", tmp_path / "out" / "sft.json")
    (sample,) = read_sft(tmp_path / "out" / "sft.json")
    assert content(sample.images[0]) == png(3)
    convert(read_sft(tmp_path / "out" / "sft.json"), "alignment", tmp_path / "back.parquet")
    (back,) = read_align(tmp_path / "back.parquet")
    assert (back.teacher_caption, back.teacher_reasoning, back.gold) == (CAPTION, REASONING, None)


def test_what_a_format_needs_and_a_record_lacks_is_named(tmp_path):
    path = write(tmp_path, "sft", record("sft"))
    for kind, lacking in (("rlvr", "gold"), ("warm-up", "student_caption")):
        with pytest.raises(DataError, match=f"sft.json:1: has no .*{lacking}"):
            convert(read_sft(path), kind, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()
    with pytest.raises(DataError, match=r"ends in .json, .jsonl, .parquet"):
        convert(read_sft(path), "sft", tmp_path / "out.csv")


def test_llava_conversations(tmp_path):
    turns = [{"from": "human", "value": "<image>\nSum?"}, {"from": "gpt", "value": CAPTION + REASONING}]
    path = write(tmp_path, "sft", {"id": "1", "image": "a.png", "conversations": turns}, name="llava.json")
    done = CliRunner().invoke(
        app, ["data", "convert", str(path), "--out", str(tmp_path / "a.parquet"), "--to", "alignment"]
    )
    assert done.exit_code == 0, done.output
    assert "1 records, alignment, 0 left out" in done.output
    (sample,) = read_align(tmp_path / "a.parquet")
    assert sample.messages[0].content == "<image>\nSum?" and sample.teacher_caption == CAPTION


def test_the_command_line(tmp_path):
    rows = [{"ask": record("rlvr")["prompt"], "pic": ["a.png"], "solution": str(i)} for i in range(3)]
    path = write(tmp_path, "rlvr", *rows, {"ask": [], "pic": [], "solution": ""}, name="hub.jsonl")
    names = ["--column", "prompt=ask", "--column", "images=pic", "--column", "reward_model.ground_truth=solution"]
    asked = ["data", "convert", str(path), "--out", str(tmp_path / "out.jsonl"), *names]
    assert CliRunner().invoke(app, asked).exit_code != 0
    done = CliRunner().invoke(app, [*asked, "--skip-bad-records", "1"])
    assert done.exit_code == 0, done.output
    assert "3 records, rlvr, 1 left out" in done.output
    assert [sample.gold for sample in read_rlvr(tmp_path / "out.jsonl")] == ["0", "1", "2"]
    for wrong, said in ((["--to", "llava"], "--to"), (["--column", "prompt"], "--column"), ([], "out.jsonl")):
        done = CliRunner().invoke(app, [*asked, "--skip-bad-records", "1", *wrong])
        assert done.exit_code == 2 and said in done.output


# ---- data sets that the library datasets saved


def test_a_saved_data_set_reads_as_its_file(tmp_path):
    records = [{**record("align", data_source=str(i)), "images": [{"bytes": png(i), "path": None}]} for i in range(7)]
    made = datasets.Dataset.from_list(records)
    made.save_to_disk(tmp_path / "saved", num_shards=3)
    made.to_parquet(tmp_path / "d.parquet")
    data = read_align(tmp_path / "saved")
    same(data, read_align(tmp_path / "d.parquet"))
    assert data[4].place == f"{tmp_path / 'saved'}:5"
    datasets.DatasetDict(train=made, test=made).save_to_disk(tmp_path / "splits")
    refuse(read_align, tmp_path / "splits", "holds the data sets test, train; name one of them")
    assert len(read_align(tmp_path / "splits" / "test")) == 7
    made.select([3, 1]).save_to_disk(tmp_path / "selected")
    assert [sample.data_source for sample in read_align(tmp_path / "selected")] == ["3", "1"]


def test_a_damaged_saved_data_set(tmp_path):
    made = datasets.Dataset.from_list([record("align")])
    made.save_to_disk(tmp_path / "saved")
    (file,) = (tmp_path / "saved").glob("*.arrow")
    whole = file.read_bytes()
    file.unlink()
    file.write_bytes(whole[:100])
    refuse(read_align, tmp_path / "saved", file.name, "not a readable Arrow stream")
    (tmp_path / "saved" / "state.json").write_text("[]")
    refuse(read_align, tmp_path / "saved", "state.json", "not a data set's state")


def test_a_saved_data_set_cut_between_batches_is_not_a_shorter_one(tmp_path):
    made = datasets.Dataset.from_list([record("rlvr", data_source=str(i), images=[], prompt="x") for i in range(4)])
    made.save_to_disk(tmp_path / "saved")
    (file,) = (tmp_path / "saved").glob("*.arrow")
    table = made.data.table
    ends = []
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
        for batch in table.to_batches(max_chunksize=2):
            stream.write_batch(batch)
            ends.append(sink.tell())
    whole = file.read_bytes()
    assert len(read_rlvr(tmp_path / "saved")) == 4
    file.write_bytes(whole[: ends[0]])
    refuse(read_rlvr, tmp_path / "saved", file.name, "its end is missing", "save it again")
    file.write_bytes(whole + whole)
    refuse(read_rlvr, tmp_path / "saved", file.name, "bytes follow its end")


def test_offsets_that_lead_out_of_a_saved_data_set(tmp_path):
    """pyarrow follows them, and the process ends: so this is one where that may happen."""
    made = datasets.Dataset.from_list(
        [record("rlvr", data_source=f"chart {i}", images=[], prompt="x") for i in range(4)]
    )
    made.save_to_disk(tmp_path / "saved")
    (file,) = (tmp_path / "saved").glob("*.arrow")
    offsets = np.array([0, 7, 14, 21, 28], np.int32)  # of data_source
    assert file.read_bytes().count(offsets.tobytes()) == 1
    offsets[2] = 2**31 - 1
    file.write_bytes(file.read_bytes().replace(np.array([0, 7, 14, 21, 28], np.int32).tobytes(), offsets.tobytes()))
    program = (
        "from prism_fast.data.formats import read_rlvr; from prism_fast.data.bad_records import BadRecords\n"
        f"bad = BadRecords(9); data = read_rlvr({str(tmp_path / 'saved')!r}, skip_bad=bad)\n"
        "print(len(data), *bad.messages, sep='\\n')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    good, *bad = done.stdout.splitlines()
    assert int(good) + len(bad) == 4 and bad
    assert all("is damaged" in line and "save the data set again" in line for line in bad)


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"_data_files": [{"filename": "../other/data.arrow"}]}, "a file in the folder is expected"),
        ({"_data_files": [{"filename": "/etc/passwd"}]}, "a file in the folder is expected"),
        ({"_data_files": [{"filename": 5}]}, "not a data set's state"),
        ([["x"]], "not a data set's state"),
    ],
)
def test_states_of_saved_data_sets(tmp_path, state, said):
    (tmp_path / "state.json").write_text(json.dumps(state))
    refuse(read_rlvr, tmp_path, "state.json", said)
    (tmp_path / "state.json").write_text('{"_data_files":' + "[" * 5000 + "]" * 5000 + "}")
    refuse(read_rlvr, tmp_path, "state.json", "not a data set's state")


def test_files_of_a_saved_data_set_have_the_same_columns(tmp_path):
    made = datasets.Dataset.from_list([record("rlvr", images=[], prompt="x")] * 4)
    made.save_to_disk(tmp_path / "saved", num_shards=2)
    second = tmp_path / "saved" / "data-00001-of-00002.arrow"
    table = made.data.table.drop_columns(["prompt"])
    with pa.OSFile(str(second), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    refuse(read_rlvr, tmp_path / "saved", second.name, "its columns are not those of data-00000-of-00002.arrow")
