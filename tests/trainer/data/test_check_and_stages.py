"""``data check --model`` and a stage's run, side by side: the same records are bad, in the same words."""

from __future__ import annotations

import io
import json
import struct
import zlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from rich.console import Console

from prism_fast.data.chat import Chat
from prism_fast.data.check import Reading, check
from prism_fast.records import DataError
from tests.tiny_run import run_stage, settings
from tests.trainer.data.test_formats import CAPTION, READERS, RESPONSE, png, record, write

pytestmark = pytest.mark.usefixtures("torch_settings")


def huge_png() -> bytes:
    """Of 13,000 x 13,000 zeros, by its header."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 13_000, 13_000, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def rotated() -> Image.Exif:
    exif = Image.Exif()
    exif[274] = 6
    return exif


IMAGES = {  # what lies under these names; whether it opens is the image reader's to say
    "good.png": png(),
    "cut.png": png()[:40],
    "cut.jpg": encoded(Image.new("RGB", (64, 64)), "JPEG")[:300],
    "empty.png": b"",
    "text.png": b"not an image",
    "pointer.png": b"version https://git-lfs.github.com/spec/v1\n",
    "thin.png": png(size=(1, 201)),
    "huge.png": huge_png(),
    "upright.jpg": encoded(Image.new("RGB", (60, 20)), "JPEG", exif=rotated()),
    "clear.png": encoded(Image.new("RGBA", (40, 20), (0, 0, 0, 0))),
    "cmyk.jpg": encoded(Image.new("CMYK", (20, 20)), "JPEG"),
    "grey16.png": encoded(Image.new("I;16", (20, 20), 40_000)),
    "grey32.tif": encoded(Image.new("I", (20, 20), 7), "TIFF"),
}


def cases(kind: str) -> list[dict]:
    """Records of a kind with everything that data have been seen to hold; some are good."""
    key = {"sft": "messages"}.get(kind, "prompt")
    image = {"warmup": "image"}.get(kind, "images")

    def asks(text, **more):
        turns = [{"role": "user", "content": text}]
        turns += [{"role": "assistant", "content": RESPONSE}] if kind == "sft" else []
        return record(kind, **{key: turns}, **more)

    def shows(name, **more):
        value = name if kind == "warmup" else [name]
        return record(kind, **{image: value}, **more)

    turns = [{"role": "user", "content": "What is it?"}, *([USER_ANSWER] if kind == "sft" else [])]
    found = [*(shows(name) for name in IMAGES), shows("missing.png"), shows("iVBORw0KGgo" + "A" * 6000)]
    found += [shows("https://x.org/a.png"), shows("clip.mp4"), shows("../outside.png"), shows(".")]
    found += [asks(f"<image>a{token}b") for token in ("<|im_end|>", "<|image_pad|>", "<|endoftext|>")]
    found += [
        asks("<image>" + "x " * 3000),
        asks("no placeholder"),
        asks("<image>x <video>"),
        asks("<image> ![](a.png)"),
    ]
    found += [
        record(kind, **{key: json.dumps(turns), image: ...}),
        record(kind, **{key: []}),
        record(kind, **{key: ...}),
    ]
    found += [record(kind, options=["A. 3"]), record(kind, system="Answer in French."), {"what": 1}]
    if kind == "sft":
        plain = {"role": "assistant", "content": "just 7"}
        user, long = {"role": "user", "content": "<image>x"}, {"role": "assistant", "content": "7 " * 9000}
        found += [record("sft", messages=[user, plain]), record("sft", messages=[user, long])]
        sharegpt = [{"from": "human", "value": "<image>x"}, {"from": "gpt", "value": RESPONSE}]
        found += [{"conversations": sharegpt, "image": "good.png"}, record("sft", images="good.png")]
        parts = [{"type": "image"}, {"type": "text", "text": "Sum?"}]
        found += [record("sft", messages=[{"role": "user", "content": parts}, USER_ANSWER], images=["good.png"])]
    if kind == "warmup":
        found += [record(kind, prompt=..., question="Sum?"), record(kind, teacher_cot="no answer"), shows(None)]
        found += [record(kind, student_response=CAPTION), record(kind, teacher_caption="7 " * 9000, teacher_cot="x")]
    if kind == "align":
        found += [
            record(kind, teacher_response="7"),
            record(kind, teacher_response=RESPONSE.replace("a 3", "7 " * 7000)),
        ]
    if kind in ("align", "rlvr"):
        for gold in (float("nan"), float("inf"), "nan", "", "['a', 'b']", 7, ["7"], None):
            found.append(record(kind, reward_model={"ground_truth": gold}))
    return [{**each, image: "good.png" if kind == "warmup" else ["good.png"]} if each.get(image) in ("a.png", ["a.png"])
            else each for each in found]  # fmt: skip


USER_ANSWER = {"role": "assistant", "content": RESPONSE}


def checked(path, chat) -> dict[str, str]:
    found = check(path, Console(file=io.StringIO()), chat, reading=Reading(processes=2))
    return {bad["place"]: bad["problem"] for bad in found.first_bad}


def files(folder: Path, kind: str) -> tuple[Path, int]:
    """(a file of all cases, the number of its records)."""
    folder.mkdir()
    for name, data in IMAGES.items():
        (folder / name).write_bytes(data)
    (folder.parent / "outside.png").write_bytes(png())
    lines = [json.dumps(case) for case in cases(kind)] + ['{"a": ', "[1]", '{"a": 1, "a": 2}', r'{"a": "\ud800"}']
    path = folder / "d.jsonl"
    path.write_text("\n\n".join(lines))
    return path, len(lines)


@pytest.mark.parametrize("kind", READERS)
def test_every_case_is_judged_alike(kind, tiny_folder, tmp_path):
    path, count = files(tmp_path / "in", kind)
    told = checked(path, Chat.load(tiny_folder / "base"))
    tree = settings(tiny_folder, kind, tmp_path / "out", steps=1)
    tree["data"] = {"files": [str(path)], "skip_bad_records": count}
    tree["run"] |= {"tokens_per_pack": 9216, "eval_every": 9, "save_every": 1}
    if kind in ("sft", "warmup"):
        tree["batch_size"] = count
    else:
        tree["rollout"] = {**tree["rollout"], "prompts_per_step": count, "samples": 2, "max_response_tokens": 2}
    if kind == "warmup":
        tree["data"]["eval_files"] = [str(tiny_folder / "data" / "pairs.jsonl")]
    run_stage(kind, tree)
    (saved,) = (tmp_path / "out" / "checkpoints").glob("*/trainer.json")
    assert json.loads(saved.read_text())["bad_records"] == told
    assert 20 < len(told) < count - 5  # or it is no test of both verdicts


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("pretty.json", json.dumps(record("rlvr"), indent=1)),
        ("inside.json", json.dumps({"data": [record("rlvr")]})),
        ("table.csv", "prompt,answer\nx,7\n"),
        ("open.json", "[" + json.dumps(record("rlvr"))),
        ("empty.jsonl", ""),
        ("blank.jsonl", "\n \n"),
        ("none.json", "[]"),
        ("utf16.jsonl", None),
        ("other.parquet", None),
    ],
)
def test_files_that_are_no_data_are_refused_alike(name, text, tmp_path):
    path = tmp_path / name
    path.write_bytes(json.dumps(record("rlvr")).encode("utf-16") if text is None else text.encode())
    with pytest.raises(DataError) as stage:
        READERS["rlvr"](path)
    with pytest.raises(DataError) as ours:
        checked(path, None)
    if name == "inside.json":  # a check has to find the format too
        assert "write that list alone" in str(ours.value) and "write that list alone" in str(stage.value)
    else:
        assert str(ours.value) == str(stage.value)


def test_columns_that_nobody_reads_may_hold_anything(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    table = pa.Table.from_pylist([record("rlvr")])
    table = table.append_column("created", pa.array([253402300800], pa.timestamp("s")))
    table = table.append_column("changed", pa.array([0], pa.timestamp("s", "Mars/Olympus")))
    pq.write_table(table, tmp_path / "d.parquet")
    assert checked(tmp_path / "d.parquet", None) == {} and len(READERS["rlvr"](tmp_path / "d.parquet")) == 1


def test_check_knows_columns_by_other_names(tmp_path, tiny_folder):
    raw = record("rlvr")
    other = {"dialogue": raw["prompt"], "picture": raw["images"], "solution": "7"}
    path = write(tmp_path, "rlvr", other, {**other, "picture": ["b.png"]}, name="d.parquet")
    columns = {"prompt": "dialogue", "images": "picture", "reward_model.ground_truth": "solution"}
    found = check(path, Console(file=io.StringIO()), reading=Reading(columns, processes=0))
    data = READERS["rlvr"](path, skip_bad=1, columns=columns)
    assert [bad["problem"] for bad in found.first_bad] == data.bad.messages and found.records == len(data) == 1
