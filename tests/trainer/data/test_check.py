"""``data check`` says what the stages say: which records are bad, each once, and nothing that steers a terminal."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image
from rich.console import Console

from prism_fast.cli import app
from prism_fast.data import images
from prism_fast.data.chat import Chat
from prism_fast.data.check import AHEAD, Reading, _verdicts, check
from prism_fast.data.formats import read_rlvr, read_sft
from prism_fast.data.kinds import kind_of
from prism_fast.data.packing import Packing
from prism_fast.data.verdicts import Judged
from prism_fast.records import DataError
from prism_fast.stages.packing import plan
from tests.trainer.data.test_formats import RESPONSE, png, record, write


def checked(path, chat=None, terminal=False, processes=0, **options):
    """(what is printed, the lines of bad records)."""
    console = Console(file=io.StringIO(), width=100, force_terminal=terminal)
    found = check(path, console, chat, reading=Reading(processes=processes), **options)
    assert found.bad == len(found.first_bad)
    return console.file.getvalue(), [str(bad) for bad in found.first_bad]


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
        assert len(bad) == 1 and says in bad[0] and bad[0].startswith(f"{path}:2: ")
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
    assert len(bad) == 1 and says in bad[0] and "by the stage's defaults: max_prompt_tokens = 64" in shown
    assert kind == "rlvr" or says in shown


def test_images_are_opened_and_each_bad_record_counts_once(tmp_path):
    (tmp_path / "bad.png").write_bytes(png()[:30])
    damaged = record("rlvr", prompt=user("<image><image>x"), images=["bad.png", "bad.png"])
    records = [*[record("rlvr")] * 130, damaged, *[record("rlvr")] * 9, {"prompt": "x"}]
    path = write(tmp_path, "rlvr", *records, name="d.jsonl")
    shown, bad = checked(path, terminal=True)
    assert [line.split(": ")[0] for line in bad] == [f"{path}:131", f"{path}:141"]
    assert "139 records, 139 images" in shown
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
    with pytest.raises(DataError, match=r"fields a belong to none of the formats.* --column reward_model.ground"):
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
    packing = Packing(tokens_per_pack=4096, batch_size=2, histogram=tmp_path / "h.png", plan=plan(chat))
    shown, bad = checked(path, chat, packing=packing)
    assert not bad
    samples = [chat.encode_prompt(sample) for sample in read_sft(path)]
    roots = [len(prompt) for prompt in samples]
    whole = [
        root + len(chat.encode_response(sample.response)) for root, sample in zip(roots, read_sft(path), strict=True)
    ]
    assert f"prompt tokens: {min(roots):,} to {max(roots):,}" in shown
    assert f"whole tokens: {min(whole):,} to {max(whole):,}, mean {sum(whole) / 4:,.0f}" in shown
    assert "packing, 2 records a step into packs of 4,096 tokens: 1.00 packs a step" in shown
    assert "2 records repeat an earlier one" in shown
    with Image.open(tmp_path / "h.png") as image:
        assert image.size[0] > 100


def answer(steps):
    thought = " ".join(["3 + 4 = 7"] * steps)
    return {"role": "assistant", "content": f"<caption>3; 4</caption><think>{thought}</think><answer>7</answer>"}


@pytest.mark.parametrize("kind", ["warmup", "align", "rlvr"])
def test_every_format_has_lengths(kind, tmp_path, chat):
    path = write(tmp_path, kind, *[record(kind)] * 3, name="d.jsonl")
    shown, _ = checked(path, chat, packing=Packing(plan=plan(chat)))
    assert "prompt tokens: " in shown and ("packing" in shown) == (kind != "rlvr")
    assert "2 records repeat an earlier one" in shown


def test_other_images_are_no_repetition(tmp_path):
    path = write(tmp_path, "rlvr", record("rlvr"), record("rlvr", images=["b.png"]), name="d.jsonl")
    (tmp_path / "b.png").write_bytes(png(99))
    assert "repeat" not in checked(path)[0]
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes())
    assert "1 records repeat an earlier one" in checked(path)[0]


# ---- processes


def many(folder, count=150):
    """A folder of two shards, of several images and bad records."""
    images = [png(i, (4 + i % 5, 3)) for i in range(7)]
    for i, data in enumerate(images):
        (folder / f"{i}.png").write_bytes(data)
    rows = [record("rlvr", images=[f"{i % 9}.png"], data_source=str(i % 40)) for i in range(count)]
    for name, part in (("a", rows[:100]), ("b", rows[100:])):
        write(folder, "rlvr", *part, name=f"{name}.parquet")
    return folder


@pytest.mark.parametrize("model", [True, False])
def test_findings_are_the_same_whatever_the_number_of_processes(tmp_path, chat, model):
    found = []
    for processes in (0, 1, 3):
        told, console = [], Console(file=io.StringIO(), width=100)
        for machine in (told.append, None):
            check(
                many(tmp_path),
                console,
                chat if model else None,
                Packing(tokens_per_pack=512, plan=plan(chat)),
                Reading(processes=processes),
                machine,
            )
        found.append((told, console.file.getvalue()))
    assert found[0] == found[1] == found[2]
    ((told,), shown) = found[0]
    assert (told["files"], told["records"], told["bad"]) == (2, 118, 32)  # images 7 and 8 are not there
    first = told["bad_records"][0]
    assert first["place"] == f"{tmp_path}/a.parquet:8" and first["row_group"] == 4
    assert "no such image file" in first["problem"] and f"{first['problem']} (row group 4)" in shown
    assert told["images"]["count"] == 118 and told["images"]["distinct"] == 7
    json.dumps(told)


def test_a_process_that_dies_is_a_clear_end(tmp_path, monkeypatch):
    def judge(sample):
        if sample.place.endswith("b.parquet:20"):
            os.kill(os.getpid(), signal.SIGKILL)
        return Judged(0, [], "all", False)

    monkeypatch.setattr("prism_fast.data.check.judge_of", lambda *_: (judge, ""))
    with pytest.raises(DataError, match=r"signal 9 \(out of memory\?\); take fewer --workers, or look at ") as caught:
        checked(many(tmp_path, 145), processes=2)
    assert f"{tmp_path}/a.parquet:65 to {tmp_path}/b.parquet:28, which it had still to do" in str(caught.value)


def test_no_more_is_judged_than_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr("prism_fast.data.check.AT_ONCE", 1)
    asked = []

    class Checker:
        def begin(self, number, run):
            asked.append(number)

        def take(self, number, run):
            assert len(asked) <= number + 2 * AHEAD
            return ["bad"]

    runs = [run for run, _ in _verdicts(range(9), None, [Checker(), Checker()])]
    assert runs == [range(i, i + 1) for i in range(9)] and asked == [*range(9)]


INTERRUPTED = """
import os, sys, time
from prism_fast.data import check, verdicts
class Slow(verdicts.Judge):
    def __call__(self, sample):
        open(os.environ["STARTED"], "a").write(f"{os.getpid()}\\n")
        time.sleep(60)
check.judge_of = lambda *_: (Slow(), "")
from prism_fast.cli import main
main()
"""


def test_ctrl_c_ends_it_and_its_processes(tmp_path):
    started = tmp_path / "started"
    running = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, "data", "check", str(many(tmp_path)), "--workers", "2"],
        env={**os.environ, "STARTED": str(started)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        until = time.monotonic() + 120
        while not started.exists() or len(started.read_text().split()) < 2:
            assert running.poll() is None and time.monotonic() < until, running.communicate()
            time.sleep(0.05)
        os.killpg(running.pid, signal.SIGINT)
        _, said = running.communicate(timeout=120)
    finally:
        running.kill()
    assert running.returncode == 130 and said.startswith("stopped; ") and said.count("\n") == 1
    assert not any(os.path.exists(f"/proc/{pid}") for pid in started.read_text().split())


# ---- images and repetitions


def stored(image, format, **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return {"bytes": buffer.getvalue(), "path": None}


def test_images_are_counted_by_format_mode_and_size(tmp_path):
    made = [
        *[stored(Image.new(mode, (8, 6)), "PNG") for mode in ("RGB", "RGB", "L", "RGBA", "P", "LA", "1", "I;16")],
        *[stored(Image.new(mode, (8, 6)), "JPEG") for mode in ("RGB", "L", "CMYK")],
        stored(Image.new("RGB", (9, 30)), "WEBP"),
        stored(Image.new("P", (8, 6)), "GIF"),
        stored(
            Image.new("RGB", (60, 20)),
            "JPEG",
            exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0" + bytes(4),
        ),
    ]
    path = write(tmp_path, "rlvr", *[record("rlvr", images=[image]) for image in made])
    found = check(path, Console(file=io.StringIO()), reading=Reading(processes=0))
    assert not found.bad
    assert dict(found.stored) == {
        ("PNG", "RGB"): 2,
        **{("PNG", mode): 1 for mode in ("L", "RGBA", "P", "LA", "1", "I;16")},
        **{("JPEG", "L"): 1, ("JPEG", "CMYK"): 1, ("JPEG", "RGB"): 2, ("WEBP", "RGB"): 1, ("GIF", "P"): 1},
    }
    told = found.image_figures()
    assert told["most_common"][0] == [8, 6, 12] and told["sizes"] == 3 and told["distinct"] == len(made) - 1
    assert (told["width"], told["height"]) == (
        {"min": 8, "median": 8, "max": 20},  # 60 x 20, upright
        {"min": 6, "median": 6, "max": 60},
    )
    assert "images by format and mode: PNG RGB 2, JPEG RGB 2, PNG L 1" in checked(path)[0]


def test_an_image_is_decoded_once(tmp_path, chat, monkeypatch):
    decoded = []
    seen = images._seen
    monkeypatch.setattr(images, "_seen", lambda file: decoded.append(1) or seen(file))
    rows = [
        record("rlvr", prompt=user("<image><image>x"), images=[name, "a.png"]) for name in ("b.png", "c.png", "b.png")
    ]
    path = write(tmp_path, "rlvr", *rows, name="d.jsonl")
    (tmp_path / "b.png").write_bytes(png(9))
    (tmp_path / "c.png").write_bytes(png(9))
    assert checked(path, chat)[1] == [] and len(decoded) == 2


@pytest.mark.parametrize("size", [(4, 3), (33, 64), (500, 31), (199, 1), (640, 479), (1500, 1100)])
def test_lengths_need_no_patches(tmp_path, chat, size):
    path = write(tmp_path, "rlvr", record("rlvr", images=["b.png"]), name="d.jsonl")
    (tmp_path / "b.png").write_bytes(png(size=size))
    (sample,) = read_rlvr(path)
    found = check(path, Console(file=io.StringIO()), chat, reading=Reading(processes=0))
    assert found.lengths[0] == (len(chat.encode_prompt(sample)), [])


def test_the_first_repetitions_are_named(tmp_path):
    rows = [record("rlvr", data_source="geo", reward_model={"ground_truth": str(i % 3)}) for i in range(5)]
    path = write(tmp_path, "rlvr", {"prompt": 3}, rows[0], *rows, name="d.jsonl")
    shown, _ = checked(path)
    assert (
        f"3 records repeat an earlier one, texts and images alike: {path}:3 as {path}:2; {path}:6 as {path}:2; "
        in shown
    )


def test_json_for_machines(tmp_path, capsys):
    path = write(tmp_path, "sft", record("sft"), record("sft", messages=[]), name="d.jsonl")
    with pytest.raises(SystemExit) as end:
        app(["data", "check", str(path), str(path), "--json", "--workers", "0"])
    shown = capsys.readouterr()
    first, second = json.loads(shown.out)
    assert end.value.code == 2 and first == second and "2 bad records" in shown.err
    assert first["bad_records"] == [{"place": f"{path}:2", "problem": first["bad_records"][0]["problem"]}]
    assert (first["format"], first["records"], first["tokens"], first["packing"]) == ("sft", 1, None, None)
