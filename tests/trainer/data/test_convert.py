"""Formats and containers into each other: what both hold comes back, what one lacks is said."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import weakref
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from typer.testing import CliRunner

from prism_fast.cli import app
from prism_fast.data import convert as convert_module
from prism_fast.data import writers
from prism_fast.data.check import Reading, check
from prism_fast.data.convert import KINDS, convert
from prism_fast.data.formats import FORMATS, Dataset, read_align, read_rlvr, read_sft
from prism_fast.data.images import content
from prism_fast.records import DataError, Sample
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


@pytest.mark.parametrize("kind", OURS)
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
    assert convert([source], once, kind, image_folders=[tmp_path])[:4] == (kind, 2, 0, frozenset())
    convert([once], twice, image_folders=[tmp_path])
    same(Dataset(twice, FORMATS[kind], image_folders=[tmp_path]), data)


def test_images_in_bytes_go_along(tmp_path):
    struct = {"bytes": png(3), "path": None}
    path = write(tmp_path, "align", record("align", images=[struct]))
    convert([path], tmp_path / "out" / "sft.json", "sft")
    (sample,) = read_sft(tmp_path / "out" / "sft.json")
    assert content(sample.images[0]) == png(3)
    convert([tmp_path / "out" / "sft.json"], tmp_path / "back.parquet", "alignment")
    (back,) = read_align(tmp_path / "back.parquet")
    assert (back.teacher_caption, back.teacher_reasoning, back.gold) == (CAPTION, REASONING, None)


def test_what_a_format_needs_and_a_record_lacks_is_named(tmp_path):
    path = write(tmp_path, "sft", record("sft"))
    for kind, lacking in (("rlvr", "gold"), ("warm-up", "student_caption")):
        with pytest.raises(DataError, match=f"sft.json:1: has no .*{lacking}"):
            convert([path], tmp_path / "out.jsonl", kind)
    assert not (tmp_path / "out.jsonl").exists()
    with pytest.raises(DataError, match=r"ends in .json, .jsonl, .parquet"):
        convert([path], tmp_path / "out.csv", "sft")


def test_records_that_lack_something_are_left_out_where_that_is_allowed(tmp_path):
    rows = [record("align"), record("align", reward_model=...), record("align")]
    path = write(tmp_path, "align", *rows, name="in.jsonl")
    assert convert([path], tmp_path / "out.jsonl", "rlvr", skip_bad=1)[:3] == ("rlvr", 2, 1)
    turns = [{"role": "user", "content": "<image>x"}, {"role": "assistant", "content": "no tags"}]
    path = write(tmp_path, "sft", record("sft"), record("sft", messages=turns), name="s.jsonl")
    assert convert([path], tmp_path / "out.jsonl", "alignment", skip_bad=1)[:3] == ("alignment", 1, 1)
    with pytest.raises(DataError, match=r"s.jsonl:2: the assistant's turn: not in the format"):
        convert([path], tmp_path / "none.jsonl", "alignment")


def test_images_that_stay_elsewhere_are_said(tmp_path):
    """As LLaVA's files name them: relative to a folder that is not theirs."""
    for name in ("coco", "gqa"):
        (tmp_path / "images" / name).mkdir(parents=True)
        (tmp_path / "images" / name / "a.png").write_bytes(png())
    turns = [{"from": "human", "value": "<image>\nSum?"}, {"from": "gpt", "value": "7"}]
    rows = [{"id": str(i), "image": f"{name}/a.png", "conversations": turns} for i, name in enumerate(("coco", "gqa"))]
    (tmp_path / "in").mkdir()
    path = write(tmp_path / "in", "sft", *rows, name="llava.json")
    with pytest.raises(DataError, match="no such image file"):
        convert([path], tmp_path / "out" / "sft.json", "sft")
    images = [tmp_path / "images"]
    for name in ("sft.json", "sft.parquet"):
        made = convert([path], tmp_path / "out" / name, "sft", image_folders=images)
        assert made.images_elsewhere == images[0]
        assert len(read_sft(tmp_path / "out" / name, image_folders=images)) == 2
    (tmp_path / "in" / "coco").mkdir()
    (tmp_path / "in" / "coco" / "a.png").symlink_to(tmp_path / "images" / "gqa" / "a.png")
    made = convert([path], tmp_path / "in" / "linked.json", "sft", image_folders=images)
    assert made.images_elsewhere == images[0] / "gqa"
    for out in (tmp_path / "out" / "shards", tmp_path / "beside.json"):
        assert convert([path], out, "sft", image_folders=images).images_elsewhere is None and len(read_sft(out)) == 2


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
    for wrong, said in ((["--to", "csv"], "--to"), (["--column", "prompt"], "--column"), ([], "out.jsonl")):
        done = CliRunner().invoke(app, [*asked, "--skip-bad-records", "1", *wrong])
        assert done.exit_code == 2 and said in done.output


# ---- what is not carried over is said


MORE = {"id": "x1", "license": "cc-by", "meta": {"split": "train"}, "height": 30}
NESTED = {"extra_info": {"index": 0, "split": "train", "answer_key": "B"}}


def written(folder, container, rows):
    """Rows as a file of this container, or as a data set that the library datasets saved."""
    if container == "saved":
        made = datasets.Dataset.from_list(rows)
        made.save_to_disk(folder / "saved")
        return folder / "saved"
    return write(folder, "rlvr", *rows, name=f"in.{container}")


@pytest.mark.parametrize("container", ["json", "jsonl", "parquet", "saved"])
@pytest.mark.parametrize("kind", OURS)
def test_fields_that_nothing_reads_are_named_once(tmp_path, kind, container):
    image = {"bytes": png(3), "path": None, "rotated": True}
    row = record(OURS[kind], **MORE)
    if kind != "sft":
        row["prompt"] = [{"role": "user", "content": "<image>Sum?"}]
    row |= {"images": [image], **(NESTED if kind in ("alignment", "rlvr") else {})}
    row.pop("image", None)
    rows = [row, {**row, "license": None}]
    if container == "json" or container == "jsonl":
        (tmp_path / "a.png").write_bytes(png(3))
        rows = [{**row, "images": [{"path": "a.png", "rotated": True}]} for row in rows]
    path = written(tmp_path, container, rows)
    want = {*MORE, "images.rotated"}
    want |= {"extra_info.split", "extra_info.answer_key"} if kind in ("alignment", "rlvr") else set()
    made = convert([path], tmp_path / "out.parquet")
    assert made[:3] == (kind, 2, 0) and made.not_written == want
    for processes in (0, 2):
        told, console = [], Console(file=io.StringIO(), width=500)
        for machine in (told.append, None):
            check(path, console, reading=Reading(processes=processes), machine=machine)
        assert (
            told[0]["not_read"] == sorted(want) and f"not read: {', '.join(sorted(want))}\n" in console.file.getvalue()
        )
    assert convert([tmp_path / "out.parquet"], tmp_path / "again.jsonl").not_written == set()


def test_what_a_format_does_not_hold_is_named(tmp_path):
    gold = {"reward_model.ground_truth", "reward_model.equivalent_answers", "data_source", "extra_info.question_type"}
    path = write(tmp_path, "align", record("align", extra_info={"question_type": "sum", "pass_rate": 0.5}))
    assert convert([path], tmp_path / "a.json", "sft").not_written == gold | {"extra_info.pass_rate"}
    assert convert([path], tmp_path / "a.parquet", "rlvr").not_written == {"teacher_caption", "teacher_cot"}
    path = write(tmp_path, "warmup", record("warmup"))
    assert convert([path], tmp_path / "b.json", "llava").not_written == {"student_caption", "student_cot"}
    turns = [{"from": "human", "value": "<image>\nSum?"}, {"from": "gpt", "value": CAPTION + REASONING}]
    llava = {"id": "1", "image": "a.png", "conversations": turns, "model": "x", "reward_model": {"ground_truth": "7"}}
    path = write(tmp_path, "sft", llava, name="llava.json")
    done = CliRunner().invoke(app, ["data", "convert", str(path), "--out", str(tmp_path / "c.parquet"), "--to", "sft"])
    assert "\nnot written, as the format has no place for them: id, model, reward_model\n" in done.output
    other = record("rlvr", reward_model={"style": "model", "ground_truth": "7", "weight": 3})
    path = write(tmp_path, "rlvr", other, name="d.jsonl")
    assert convert([path], tmp_path / "d.json").not_written == {"reward_model.style", "reward_model.weight"}


def test_a_response_beside_its_parts_is_read_with_them(tmp_path):
    for whole in (CAPTION + REASONING, f"{CAPTION}\n{REASONING}"):
        path = write(
            tmp_path, "align", record("align", teacher_response=whole, teacher_caption=CAPTION, teacher_cot=REASONING)
        )
        assert convert([path], tmp_path / "a.jsonl").not_written == set()
    other = record("align", teacher_response="another", teacher_caption=CAPTION, teacher_cot=REASONING)
    assert convert([write(tmp_path, "align", other)], tmp_path / "a.jsonl").not_written == {"teacher_response"}


# ---- every format into every other


HELD = {  # fields of a sample that a format holds
    "sft": {"messages", "images", "response"},
    "llava": {"messages", "images", "response"},
    "warm-up": {"messages", "images", *(f"{v}_{p}" for v in ("teacher", "student") for p in ("caption", "reasoning"))},
    "alignment": {
        "messages",
        "images",
        "teacher_caption",
        "teacher_reasoning",
        "gold",
        "equivalents",
        "data_source",
        "question_type",
    },
    "rlvr": {"messages", "images", "gold", "equivalents", "data_source", "question_type"},
}
TO = {  # what each of them is made of
    "sft": {"sft", "llava", "warm-up", "alignment"},
    "llava": {"sft", "llava", "warm-up", "alignment"},
    "warm-up": {"warm-up"},
    "alignment": {"sft", "llava", "warm-up", "alignment"},
    "rlvr": {"rlvr", "alignment"},
}
READS = {**{kind: kind for kind in FORMATS}, "llava": "sft"}


@pytest.mark.parametrize("to", KINDS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_format_into_every_other_and_back(tmp_path, kind, to):
    def opened(path, kind):
        return list(Dataset(path, FORMATS[READS[kind]]))

    struct = {"bytes": png(3), "path": None}
    image = {"image" if kind == "warm-up" else "images": [struct]}
    if kind == "warm-up":
        image["prompt"] = [{"role": "user", "content": "<image>Sum?"}]
    rows = [record({**OURS, "llava": "sft"}[kind], **image) for _ in range(3)]
    source = write(tmp_path, "rlvr", *rows, name="in.parquet")
    if kind == "llava":
        convert([source], tmp_path / "llava.jsonl", "llava")
        source = tmp_path / "llava.jsonl"
    for suffix in (".json", ".jsonl", ".parquet", ""):
        out, back = tmp_path / f"out{suffix}", tmp_path / f"back{suffix}"
        if kind not in TO[to]:
            with pytest.raises(DataError, match=r"in.parquet:1: has no \w+|llava.jsonl:1: has no \w+"):
                convert([source], out, to)
            assert not out.exists()
            continue
        assert convert([source], out, to)[:3] == (to, 3, 0)
        pairs = [(opened(source, kind), opened(out, to), HELD[kind] & HELD[to])]
        if to in TO[kind]:
            convert([out], back, kind)
            pairs.append((pairs[0][0], opened(back, kind), HELD[kind] & HELD[to]))
        for one, other, fields in pairs:
            for field in fields - {"images"}:
                assert [getattr(sample, field) for sample in one] == [getattr(sample, field) for sample in other], field
            assert [[content(ref) for ref in s.images] for s in one] == [
                [content(ref) for ref in s.images] for s in other
            ]
    assert not [entry for entry in tmp_path.iterdir() if entry.name.startswith(".")]


def test_llava_is_written_as_llava_is(tmp_path):
    path = write(tmp_path, "sft", record("sft"), name="in.jsonl")
    convert([path], tmp_path / "out.json", "llava")
    (made,) = json.loads((tmp_path / "out.json").read_text())
    assert made["image"] == "a.png" and made["id"] == "0"
    assert [turn["from"] for turn in made["conversations"]] == ["system", "human", "gpt"]


def test_a_folder_is_a_data_set_of_hugging_face(tmp_path, monkeypatch):
    monkeypatch.setattr(writers, "ROWS_PER_GROUP", 2)
    monkeypatch.setattr(writers, "SHARD_BYTES", 5 * len(png()))
    path = write(tmp_path, "align", *[record("align", data_source=str(i)) for i in range(11)], name="in.jsonl")
    convert([path], tmp_path / "folder")
    assert [file.name for file in sorted((tmp_path / "folder").iterdir())] == [
        f"train-{i:05}-of-00002.parquet" for i in range(2)
    ]
    made = datasets.load_dataset(str(tmp_path / "folder"), split="train", cache_dir=str(tmp_path / "hf"))
    assert made["data_source"] == [str(i) for i in range(11)]
    assert made[3]["images"][0]["bytes"] == png()  # a path before
    moved = (tmp_path / "folder").rename(tmp_path / "moved")
    same(read_align(moved), read_align(path))


@pytest.mark.parametrize("shape", ["folder", "saved", "both"])
def test_from_shards_and_saved_data_sets(tmp_path, shape):
    rows = [{**record("align", data_source=str(i)), "images": [{"bytes": png(i), "path": None}]} for i in range(5)]
    made, inputs = datasets.Dataset.from_list(rows), []
    if shape in ("folder", "both"):
        (tmp_path / "d").mkdir()
        for i in range(2):
            made.shard(2, i, contiguous=True).to_parquet(tmp_path / "d" / f"part-{i}.parquet")
        inputs.append(tmp_path / "d")
    if shape in ("saved", "both"):
        made.save_to_disk(tmp_path / "saved", num_shards=2)
        inputs.append(tmp_path / "saved")
    count = 5 * len(inputs)
    assert convert(inputs, tmp_path / "out.jsonl", "rlvr")[:3] == ("rlvr", count, 0)
    back = read_rlvr(tmp_path / "out.jsonl")
    assert [sample.data_source for sample in back] == [str(i % 5) for i in range(count)]
    assert [content(sample.images[0]) for sample in back] == [png(i % 5) for i in range(count)]


def test_files_of_several_formats_become_one(tmp_path):
    first = write(tmp_path, "sft", record("sft"), name="a.jsonl")
    second = write(tmp_path, "align", record("align"), name="b.parquet")
    third = write(
        tmp_path, "warmup", record("warmup", prompt=[{"role": "user", "content": "<image>x"}]), name="c.jsonl"
    )
    assert convert([first, second, third], tmp_path / "out.jsonl")[:3] == ("sft", 3, 0)
    assert [sample.messages[-1].content for sample in read_sft(tmp_path / "out.jsonl")] == ["<image>Sum?"] * 2 + [
        "<image>x"
    ]


# ---- what is written, and over what


def test_nothing_stays_of_what_fails(tmp_path):
    image = {"bytes": png(), "path": None}
    good, bad = record("align", images=[image]), record("align", images=[image], teacher_response="7")
    path = write(tmp_path, "align", *[good] * 3, bad)
    before = sorted(tmp_path.iterdir())
    for name in ("out.jsonl", "out.parquet", "out"):
        with pytest.raises(DataError, match=r"align.parquet:4: teacher_response"):
            convert([path], tmp_path / name, "sft")
        assert sorted(tmp_path.iterdir()) == before
    with pytest.raises(DataError, match="no valid record is left, 1 are bad"):
        convert(
            [write(tmp_path, "rlvr", {**record("rlvr"), "prompt": 3}, name="none.jsonl")],
            tmp_path / "o.json",
            skip_bad=9,
        )


def test_what_is_there_is_replaced_where_that_is_asked_for(tmp_path):
    def run(out, *more):
        return CliRunner().invoke(app, ["data", "convert", str(path), "--out", str(out), *more])

    path = write(tmp_path, "sft", record("sft"), name="in.jsonl")
    for name in ("out.json", "out"):
        assert run(tmp_path / name).exit_code == 0
        done = run(tmp_path / name)
        assert done.exit_code == 2 and "exists already; choose another --out, or --overwrite it" in done.output
        assert run(tmp_path / name, "--overwrite").exit_code == 0
        assert len(read_sft(tmp_path / name)) == 1
    assert run(path, "--overwrite").exit_code == 0 and len(read_sft(path)) == 1  # over itself
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    for out, said in (
        ("mine", "a folder that no conversion has made"),
        ("a.png", "a name that ends in"),
        ("x.csv", "ends in"),
    ):
        done = run(tmp_path / out, "--overwrite")
        assert done.exit_code == 2 and said in done.output
    assert (tmp_path / "mine" / "thesis.tex").exists()


def test_few_records_are_in_memory_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(writers, "GROUP_BYTES", 3 * len(png()))
    image = {"bytes": png(), "path": None}
    path = write(tmp_path, "align", *[record("align", images=[image], data_source=str(i)) for i in range(40)])
    alive, most = weakref.WeakSet(), []
    made = convert_module._as

    class Followed(Sample):
        pass

    def follow(kind, sample):
        sample = Followed(**vars(made(kind, sample)))
        alive.add(sample)
        most.append(len(alive))
        return sample

    monkeypatch.setattr(convert_module, "_as", follow)
    for name in ("out.jsonl", "out.parquet", "out"):
        convert([path], tmp_path / name)
    assert len(most) == 120 and max(most) <= 3
    assert pq.read_metadata(tmp_path / "out.parquet").row_group(0).num_rows == 3


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
        ({"_data_files": [{"filename": "x" * 3000}]}, "a file in the folder is expected"),
        ({"_data_files": [{"filename": "a\x1b[31m"}]}, "a file in the folder is expected"),
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
