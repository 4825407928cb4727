"""``data check`` says what the stages say: which records are bad, each once, and nothing that steers a terminal."""

from __future__ import annotations

import io
import json
import sys

import pytest
from PIL import Image
from rich.console import Console

from prism_fast.data.bad_records import BadRecords
from prism_fast.data.chat import Chat
from prism_fast.data.check import Packing, check, kind_of
from prism_fast.data.formats import read_sft
from prism_fast.records import DataError
from tests.trainer.data.test_formats import RESPONSE, png, record, write


def checked(path, chat=None, terminal=False, **options):
    """(what is printed, bad records)."""
    console = Console(file=io.StringIO(), width=100, force_terminal=terminal)
    bad = BadRecords(sys.maxsize)
    check(path, console, bad, chat, **options)
    return console.file.getvalue(), bad


@pytest.fixture(scope="module")
def chat(tiny_folder):
    return Chat.load(tiny_folder / "base")


def user(text):
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize(
    ("changes", "size", "says"),
    [
        ({"prompt": user("<image>a<|im_end|>b")}, (4, 3), "holds the control token <|im_end|>"),
        ({"prompt": user("<image>a<|video_pad|>")}, (4, 3), "holds the control token <|video_pad|>"),
        ({}, (1, 201), "aspect ratio over the limit of 200"),
        ({"reward_model": {"ground_truth": ""}}, (4, 3), "the answer is empty"),
        ({"options": ["A. 3"]}, (4, 3), "options: the field is not read"),
    ],
)
def test_what_every_stage_refuses(changes, size, says, tmp_path, chat):
    path = write(tmp_path, "rlvr", record("rlvr"), record("rlvr", images=["b.png"], **changes), name="d.jsonl")
    (tmp_path / "b.png").write_bytes(png(size=size))
    for opened in (None, chat):
        shown, bad = checked(path, opened)
        assert len(bad) == 1 and says in bad.messages[0] and f"{path}:2: " in bad.messages[0]
        assert "rlvr: 1 records, 1 images" in shown and "1 bad records skipped" in shown


@pytest.mark.parametrize(
    ("kind", "changes", "says"),
    [
        ("rlvr", {"prompt": user("<image>" + "x " * 300)}, "over the limit of 64"),
        ("sft", {"messages": [*user("<image>x"), {"role": "assistant", "content": "7 " * 9000}]}, "max_tokens = 8192"),
        ("warmup", {"student_caption": "7 " * 9000, "student_cot": "<answer>1</answer>"}, "max_tokens = 8192"),
        ("align", {"teacher_response": RESPONSE.replace("a 3", "7 " * 7000)}, "max_part_tokens is 6144"),
    ],
)
def test_limits_are_those_of_the_stage(kind, changes, says, tmp_path, chat):
    path = write(tmp_path, kind, record(kind), record(kind, **changes), name="d.jsonl")
    shown, bad = checked(path)
    assert len(bad) == 0 and "lengths were not looked at: they need a stage's --model" in shown
    shown, bad = checked(path, chat, packing=Packing(max_prompt_tokens=64))
    assert len(bad) == 1 and says in bad.messages[0] and "by the stage's defaults: max_prompt_tokens = 64" in shown
    assert kind == "rlvr" or says in shown


def test_images_are_opened_and_each_bad_record_counts_once(tmp_path):
    (tmp_path / "bad.png").write_bytes(png()[:30])
    damaged = record("rlvr", prompt=user("<image><image>x"), images=["bad.png", "bad.png"])
    records = [*[record("rlvr")] * 130, damaged, *[record("rlvr")] * 9, {"prompt": "x"}]
    path = write(tmp_path, "rlvr", *records, name="d.jsonl")
    shown, bad = checked(path, terminal=True)
    assert list(bad.found) == [f"{path}:141", f"{path}:131"] and "139 records, 139 images" in shown
    many = write(tmp_path, "rlvr", record("rlvr"), *[damaged] * 30, name="many.jsonl")
    assert "and 10 more" in checked(many)[0]
    shown, bad = checked(write(tmp_path, "rlvr", damaged, damaged, name="none.jsonl"))
    assert len(bad) == 2 and "none.jsonl:2: images" in shown and "0 records" in shown


def test_responses_without_the_tags_are_counted(tmp_path):
    plain = record("sft", messages=[*user("<image>x"), {"role": "assistant", "content": "7"}])
    shown, bad = checked(write(tmp_path, "sft", record("sft"), plain))
    assert "1 responses lack the format" in shown and len(bad) == 0


def test_what_is_printed_steers_no_terminal(tmp_path):
    text = "<image>\x1b]0;title\x07[red]x[/red]\u202e [/]"
    odd = record("rlvr", prompt=user(text), extra_info={"question_type": "\x1b[2J[bold]"})
    bad = record("rlvr", prompt=user("<image>x\x1b[2J<image>"), images=["\x1b[31m.png"])
    shown, _ = checked(write(tmp_path, "rlvr", odd, bad, name="[b]d.jsonl"))
    assert "\x1b" not in shown and "\x07" not in shown and "\u202e" not in shown
    assert r"\x1b]0;title\x07[red]x[/red]" in shown and "[bold]" in shown and "[b]d.jsonl" in shown


def test_the_kind_is_told_by_the_first_record_that_parses(tmp_path):
    path = write(tmp_path, "align", record("align"), name="d.jsonl")
    path.write_text('{"a": \n' + path.read_text())
    assert kind_of(path) == "alignment"
    sharegpt = record("sft", messages=..., conversations=[{"from": "human", "value": "x"}])
    assert kind_of(write(tmp_path, "sft", sharegpt, name="s.json")) == "sft"
    (tmp_path / "e.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(DataError, match="fields a belong to none of the formats"):
        kind_of(tmp_path / "e.jsonl")
    (tmp_path / "f.jsonl").write_text(json.dumps({"student_response": None, "reward_model": {"x": 1}}))
    assert kind_of(tmp_path / "f.jsonl") == "rlvr"


def test_large_images_are_measured(tmp_path):
    Image.new("RGB", (640, 480)).save(tmp_path / "big.png")
    path = write(tmp_path, "rlvr", record("rlvr", images=["big.png"]), record("rlvr"), name="d.jsonl")
    assert "image sizes: 4x3 to 640x480 pixels" in checked(path)[0]


# ---- lengths and repetitions


def test_lengths_and_packing_are_those_of_the_stage(tmp_path, chat):
    records = [record("sft", images=["a.png"], messages=[*user("<image>Sum?"), answer(i)]) for i in (1, 40)]
    path = write(tmp_path, "sft", *records * 2, name="d.jsonl")
    shown, bad = checked(path, chat, packing=Packing(tokens_per_pack=4096, batch_size=2, histogram=tmp_path / "h.png"))
    assert not bad.found
    samples = [chat.encode_prompt(sample) for sample in read_sft(path)]
    roots = [len(prompt) for prompt in samples]
    whole = [
        root + len(chat.encode_response(sample.response)) for root, sample in zip(roots, read_sft(path), strict=True)
    ]
    assert f"prompt tokens: {min(roots):,} to {max(roots):,}" in shown
    assert f"whole tokens: {min(whole):,} to {max(whole):,}, mean {sum(whole) / 4:,.0f}" in shown
    assert "packing, 2 records a step into packs of 4,096 tokens: 1.00 packs a step" in shown
    assert f"{sum(whole) / (2 * 4096):.1%} full" in shown
    assert "2 records repeat an earlier one" in shown
    with Image.open(tmp_path / "h.png") as image:
        assert image.size[0] > 100
    assert "over --tokens-per-pack=50" in checked(path, chat, packing=Packing(tokens_per_pack=50))[0]


def answer(steps):
    thought = " ".join(["3 + 4 = 7"] * steps)
    return {"role": "assistant", "content": f"<caption>3; 4</caption><think>{thought}</think><answer>7</answer>"}


@pytest.mark.parametrize("kind", ["warmup", "align", "rlvr"])
def test_every_format_has_lengths(kind, tmp_path, chat):
    path = write(tmp_path, kind, *[record(kind)] * 3, name="d.jsonl")
    shown, _ = checked(path, chat)
    assert "prompt tokens: " in shown and ("packing, " in shown) == (kind != "rlvr")
    assert "2 records repeat an earlier one" in shown


def test_other_images_are_no_repetition(tmp_path):
    path = write(tmp_path, "rlvr", record("rlvr"), record("rlvr", images=["b.png"]), name="d.jsonl")
    (tmp_path / "b.png").write_bytes(png(99))
    assert "repeat" not in checked(path)[0]
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes())
    assert "1 records repeat an earlier one" in checked(path)[0]
