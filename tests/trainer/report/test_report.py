"""report.html: complete, self-contained, safe against what a model writes."""

import base64
import html.parser
import io
import json
import math
import re
import shutil
import statistics

import numpy as np
import pytest
from jinja2 import UndefinedError
from matplotlib.figure import Figure
from PIL import Image

from prism_fast import cli
from prism_fast.records import DataError, StepStats
from prism_fast.report import build, samples
from prism_fast.report import experts as report_experts
from prism_fast.report.build import PLOTS, Tile, build_report, report_html
from prism_fast.report.data import TRAINED, Run, expert_keys, load_run
from prism_fast.report.draw import curve, panels, render, wilson
from prism_fast.report.experts import shown_layers
from prism_fast.report.plots import lengths_and_entropy
from prism_fast.report.samples import MAX_CHARACTERS, MAX_IMAGE_BYTES, MAX_PROMPTS, shown_image
from prism_fast.run.monitor import Monitor

HOSTILE = "$\\frac{$<script>alert(1)</script><img src=x onerror=alert(1)>\"'&</td></table><caption>a\u202e\x00\ud800"
VOID = {"meta", "img", "br"}


class Page(html.parser.HTMLParser):
    """The elements and texts of a page; checks that every element is closed by its own tag."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self.texts, self.stack = [], [], []
        self.feed(text)
        self.close()
        assert not self.stack

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if self.stack[-1:] != ["style"]:
            self.texts.append(data)

    @property
    def text(self):
        return " ".join(self.texts)

    def count(self, name):
        return sum(tag == name for tag, _ in self.elements)


def read(out):
    text = build_report(out).read_text(encoding="utf-8")
    page = Page(text)
    assert page.count("script") == 0 and page.count("link") == 0 and page.count("iframe") == 0
    for tag, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes)
        assert tag != "img" or attributes["src"].startswith("data:image/")
        assert tag != "a" or attributes["href"].startswith("#")
    assert not re.search(r"url\(|@import", text)
    return page


def picture(width=64, height=16, noise=False):
    pixels = np.random.default_rng(0).integers(0, 255, (height, width), dtype=np.uint8) if noise else None
    image = Image.fromarray(pixels) if noise else Image.new("L", (width, height))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def write_stage(out, stage, figures, count=30):
    with Monitor(stage, out / stage, count, quiet=True) as monitor:
        for step in range(1, count + 1):
            seconds, tokens = {"rollout": 0.5, "update_policy": 0.25}, {"rollout": 90, "update_policy": 80}
            monitor.step(StepStats(step, {name: value(step) for name, value in figures.items()}, seconds, tokens))
            if step % 10 == 0:
                monitor.evaluation(step, {"accuracy": 0.5, "format_valid": 0.9})
    return monitor


def write_evaluation(out, name, count=3, **changes):
    rows = [
        {"index": index, "question": f"Sum {index}?", "gold": "7", "image": picture(), "accuracy": 1.0,
         "response": f"{name} says <caption>3</caption><think>3</think><answer>7</answer>", "format_valid": True}
        for index in range(count)
    ]  # fmt: skip
    entry = {
        "name": name,
        "accuracy": 0.5,
        "format_valid": 0.9,
        "by_type": {"sum": {"accuracy": 0.4, "count": 20}, "two_step": {"accuracy": 0.6, "count": 20}},
        "caption_items": [4, 4, 3, 0],
        "reasoning_steps": [4, 5, 4, 0],
        "response_length": [40, 41, 42, 43],
        "responses": rows,
        **changes,
    }
    (out / "evaluations").mkdir(exist_ok=True)
    (out / "evaluations" / f"{name}.json").write_text(json.dumps(entry))


def whole_run(out):
    out.mkdir(exist_ok=True)
    loads = {
        f"expert_load/{layer}/{kind}/{expert}": lambda step: 0.25
        for layer in range(2)
        for kind in ("prompt", "student_caption", "student_reasoning", "teacher_caption", "teacher_reasoning")
        for expert in range(4)
    }
    sides = ("perception", "reasoning")
    write_stage(out, "sft", {"loss": lambda s: 1 / s, "lr": lambda s: 1e-3, "grad_norm": lambda s: 1.0})
    write_stage(out, "warmup", {f"loss/pair_{side}": lambda s: 1 / s for side in sides}
                | {f"pair_accuracy/{side}": lambda s: 0.9 for side in sides} | loads)  # fmt: skip
    scored = {f"score/{who}_{side}": lambda s: 0.1 * s for who in ("student", "teacher") for side in sides}
    write_stage(out, "align", {
        **scored, **loads, **{f"discriminator_accuracy/{side}": lambda s: 0.8 for side in sides},
        "loss": lambda s: 0.0, "loss/discriminator": lambda s: 0.7, "entropy": lambda s: math.nan if s == 3 else 0.4,
        "format_valid": lambda s: 0.9, "response_length": lambda s: 40.0 + s, "grad_norm/policy": lambda s: 1.0,
        "sampler_gap/mean": lambda s: 1e-7, "sampler_gap/max": lambda s: 0.0 if s == 1 else 1e-6,
    })  # fmt: skip
    write_stage(out, "rlvr", {"loss": lambda s: 0.0, "reward": lambda s: 0.6, "accuracy": lambda s: 0.5,
                              "format_valid": lambda s: 1.0, "entropy": lambda s: 0.2})  # fmt: skip
    for name in ("teacher", "base", "sft", "align", "rlvr"):
        write_evaluation(out, name)
    timed = {"seconds": 84.25, "tokens_per_second": 8600.0}
    summary = {
        "stages": {
            "base": {"accuracy": 0.0, "format_valid": 0.0},
            "sft": {"accuracy": 0.551, "format_valid": 0.94, **timed},
            "warmup": {"pair_accuracy_perception": 0.945, "pair_accuracy_reasoning": 0.992, **timed},
            "align": {"accuracy": 0.585, "format_valid": 0.985, **timed},
            "rlvr": {"accuracy": 0.771, "format_valid": 0.992, **timed},
        },
        "drift": {s: {"caption_items": 1.42, "reasoning_steps": 0.12} for s in ("base", "sft", "align", "rlvr")},
        "seed": 17,
        "environment": {"torch": "2.13.0+cpu", "impl": {"moe_mlp": "cpu"}},
        "compare": {
            "seeds": [0, 1], "held_out": 300, "sampling_error": 0.028, "teacher_errors": 0.2,
            "arms": {"drifted": {"sampled": [0.41, 0.4], "greedy": [0.5, 0.52]},
                     "direct_short": {"sampled": [0.493, 0.5], "greedy": [0.7, 0.71], "policy_updates": 100,
                                      "teacher_texts": 0, "tokens": [1000, 1200], "seconds": [60.0, 61.0]},
                     "prism": {"sampled": [0.631, 0.64], "greedy": [0.84, 0.85], "policy_updates": 160,
                               "teacher_texts": 640}},
            "differences": [{"of": "prism", "to": "direct_short", "how": "sampled", "each": [0.138, 0.14],
                             "mean": 0.139, "low": 0.126, "high": 0.152}],
            "probes": {"prism": [{"before": {"perception": {"auc_form": 0.56}}},
                                 {"before": {"perception": {"auc_form": 0.58}}}]},
        },
    }  # fmt: skip
    (out / "summary.json").write_text(json.dumps(summary))


def test_whole_run(tmp_path, monkeypatch):
    whole_run(tmp_path)
    drawn, savefig = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: drawn.append(figure) or savefig(figure, *a, **k))
    page = read(tmp_path)
    assert len(drawn) == 12  # every plot once: they are what the page takes long for
    assert (tmp_path / "report.html").stat().st_size < 5e6
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    for shown in ("55.1 %", "58.5 %", "77.1 %", "+22.0 points from SFT", "1.42", "22.5", "What happened, and what",
                  "perception 94.5 %",
                  "Seed 17", "(c) PRISM less (a) RLVR", "+13.8, +14.0", "+12.6 to +15.2", "49.3, 50.0",
                  "0.57", "20 % of the teacher", "2.8 points", "impl.moe_mlp", "2.13.0+cpu", "Sum 2?",
                  "entropy is nan, written as null"):  # fmt: skip
        assert shown in page.text, shown
    plots = [a for tag, a in page.elements if tag == "img" and a["src"].startswith("data:image/svg+xml")]
    assert len(plots) == 12 and all(a["alt"] for a in plots)
    assert "Not shown" not in page.text
    for label in ("base says", "sft says", "align says", "rlvr says", "teacher says"):
        assert page.text.count(label) == 3
    links = [a["href"].removeprefix("#") for tag, a in page.elements if tag == "a"]
    assert links == [a["id"] for tag, a in page.elements if tag == "section"] and len(links) == 12
    assert page.count("style") == 1 and ".tiles {" in (tmp_path / "report.html").read_text()  # the look is inlined


def test_experts_apart():
    """Two layers: in one, captions and reasonings share no expert; in the other, student and teacher do not."""
    shares = {
        0: {"student_caption": 0, "teacher_caption": 0, "student_reasoning": 1, "teacher_reasoning": 1},
        1: {"student_caption": 1, "teacher_caption": 0, "student_reasoning": 1, "teacher_reasoning": 0},
    }
    line = {"step": 7} | {
        f"expert_load/{layer}/{kind}/{expert}": float(expert == taken)
        for layer, kinds in shares.items()
        for kind, taken in kinds.items()
        for expert in range(2)
    }
    (found,) = report_experts._splits([line, {"step": 8}], expert_keys([line]))
    assert found == {"step": 7, "perception | reasoning": [1.0, 0.0], "student | teacher": [0.0, 1.0]}


def test_equal_input_gives_an_equal_file(tmp_path):
    write_evaluation(tmp_path, "sft", caption_items=None, reasoning_steps=None)
    first = build_report(tmp_path).read_bytes()
    assert build_report(tmp_path).read_bytes() == first


def test_nothing_there_is_said_not_invented(tmp_path):
    page = read(tmp_path)
    assert page.count("img") == 0 and page.count("table") == 0
    assert page.text.count("Not shown") >= 10
    for name in ("summary.json", "sft/metrics.jsonl", "evaluations/rlvr.json"):
        assert name in page.text
    assert "%" not in page.text


@pytest.mark.parametrize("present", ["warmup", "evaluations"])
def test_each_input_alone(tmp_path, present):
    whole_run(tmp_path / "whole")
    (tmp_path / "part").mkdir()
    (tmp_path / "whole" / present).rename(tmp_path / "part" / present)
    page = read(tmp_path / "part")
    assert page.count("img") + page.count("table") > 0 and "Not shown" in page.text


METRICS = (
    "eval/accuracy", "reward", "format_valid", "score/student_perception", "pair_accuracy/perception",
    "loss/discriminator", "response_length", "sampler_gap/max", "seconds/rollout", "expert_load/1/prompt/2", "no/such",
)  # fmt: skip


@pytest.mark.parametrize("name", METRICS)
def test_plots_cope_with_absent_metrics(name):
    for value in (0.0, None):
        lines = [{"step": 1, "time": 1.0}, {"step": 2, name: value}, {"step": 2, "warning": "look"}]
        keys = expert_keys(lines)
        run = Run(metrics=dict.fromkeys(TRAINED, lines), experts=dict.fromkeys(TRAINED, keys) if keys else {})
        drawn = {plot.__name__ for plot in PLOTS if plot(run) is not None}
        assert not drawn & {"drift", "compare"}  # these need evaluations and the summary
        assert "accuracy_by_stage" not in drawn or (name, value) == ("eval/accuracy", 0.0)
        measured = name != "no/such" and name != "sampler_gap/max" and value is not None
        assert bool(drawn) == measured


def test_hostile_text_is_shown_as_text(tmp_path):
    row = {"index": 0, "question": HOSTILE, "gold": HOSTILE, "image": None, "response": HOSTILE, "accuracy": 0.0,
           "format_valid": False}  # fmt: skip
    write_evaluation(tmp_path, "sft", count=0, by_type={HOSTILE: {"accuracy": 0.5, "count": 3}})
    write_evaluation(tmp_path, "rlvr", responses=[row])
    (tmp_path / "summary.json").write_text(json.dumps({"seed": HOSTILE, "environment": {HOSTILE: [HOSTILE]}}))
    with Monitor("align", tmp_path / "align", 2, quiet=True) as monitor:
        monitor.warn(HOSTILE)
    page = read(tmp_path)  # no script element, no handler, balanced tags
    text = page.text
    assert text.count("<script>alert(1)</script><img src=x onerror=alert(1)>") >= 6
    assert "\x00" not in text and "\ufffd" in text and "\u202e" not in text
    assert "invalid format" in text and "wrong" in text
    meta = [a["content"] for tag, a in page.elements if tag == "meta" and "content" in a]
    assert any(content.startswith("default-src 'none'") for content in meta)


@pytest.mark.parametrize(
    "source",
    [
        "https://example.org/x.png",
        "javascript:alert(1)",
        "data:text/html;base64,PHNjcmlwdD4=",
        "data:image/svg+xml;base64,PHN2Zz4=",
        'data:image/png;base64,AAAA" onerror="alert(1)',
        "data:image/png;base64," + "A" * (MAX_IMAGE_BYTES + 4),
        7,
    ],
)
def test_only_raster_data_uris_are_shown(source, tmp_path):
    row = {"index": 0, "question": "Q?", "gold": "g", "image": source, "response": "r"}
    write_evaluation(tmp_path, "sft", responses=[row], accuracy=None, by_type=None, caption_items=None,
                     reasoning_steps=None)  # fmt: skip
    page = read(tmp_path)
    assert page.count("img") == 0 and page.text.count("Not shown: the image") == 1
    with pytest.raises(ValueError, match=r"the image (is not|does not open)"):
        shown_image(source)


def test_large_images_are_made_smaller():
    source = picture(900, 600, noise=True)
    assert len(source) > MAX_IMAGE_BYTES
    shown = shown_image(source)
    encoded = shown.removeprefix("data:image/jpeg;base64,")
    assert len(encoded) < MAX_IMAGE_BYTES * 3
    with Image.open(io.BytesIO(base64.b64decode(encoded))) as image:
        assert max(image.size) == 320
    assert shown_image(picture()) == picture()  # small ones stay as they are


def test_many_and_long_responses_are_bounded(tmp_path):
    write_evaluation(tmp_path, "sft", count=40, caption_items=None, reasoning_steps=None)
    long = [{"index": 39, "question": "Q?", "gold": "g", "image": None, "response": "x" * 100_000}]
    write_evaluation(tmp_path, "rlvr", responses=long, caption_items=None, reasoning_steps=None)
    page = read(tmp_path)
    assert page.text.count("sft says") == MAX_PROMPTS
    assert "x" * MAX_CHARACTERS in page.text and "x" * (MAX_CHARACTERS + 1) not in page.text
    assert f"{100_000 - MAX_CHARACTERS:,} more characters" in page.text  # the prompt that both answered is kept


def test_malformed_entries_are_left_out(tmp_path):
    write_evaluation(tmp_path, "sft", accuracy=None, by_type=None, caption_items=None, reasoning_steps=["4", None, 2],
                     responses="none")  # fmt: skip
    (tmp_path / "summary.json").write_text('{"stages": {"sft": {"accuracy": NaN, "seconds": "long"}}, "drift": null}')
    page = read(tmp_path)
    assert "nan" not in page.text.lower() and "None" not in page.text.replace("None was raised", "")


@pytest.mark.usefixtures("torch_settings")
def test_a_run_of_ones_own_has_its_page(finished, tmp_path):
    """`prism-fast report` of a stage's folder, whatever its name is, and of a folder of stages; else one line."""
    alone, several = tmp_path / "mine", tmp_path / "runs"
    shutil.copytree(finished("sft"), alone)
    shutil.copytree(alone, several / "sft")
    pages = []
    for folder in (alone, several):
        cli.app(["report", str(folder)], standalone_mode=False)
        pages.append((folder / "report.html").read_text(encoding="utf-8"))
    assert all(("SFT" in page and "<svg" in page) or "data:image" in page for page in pages)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit):
        cli.app(["report", str(tmp_path / "empty")], standalone_mode=False)


def test_damaged_files_are_errors_and_the_old_report_stays(tmp_path):
    whole_run(tmp_path)
    (tmp_path / "report.html").write_text("old")
    (tmp_path / "summary.json").write_text('{"stages": ')
    with pytest.raises(DataError, match=r"summary\.json: does not hold readable JSON"):
        build_report(tmp_path)
    (tmp_path / "summary.json").write_text("[]")
    with pytest.raises(DataError, match="expected a JSON object, got list"):
        build_report(tmp_path)
    assert (tmp_path / "report.html").read_text() == "old"
    with pytest.raises(DataError, match="no such folder"):
        build_report(tmp_path / "nowhere")


def test_torn_metrics_line(tmp_path):
    monitor = write_stage(tmp_path, "sft", {"loss": lambda s: 1 / s})
    with open(monitor.path, "ab") as file:
        file.write(b'{"step": 31, "lo')
    assert read(tmp_path).count("img") == 4  # accuracy, losses, held-out curves, time


@pytest.mark.parametrize("count", [1, 2, 14, 15, 16, 399, 400, 401, 2003])
def test_curves_keep_their_level_whatever_their_length(count):
    _, axes = panels(1, 2.0)
    lines = [{"step": step, "x": 3.0} for step in range(1, count + 1)]
    assert curve(axes[0, 0], lines, "x")
    assert not curve(axes[0, 0], [{"step": 1, "y": 1.0}, {"step": 2, "x": None}], "x")
    for drawn in axes[0, 0].lines:
        assert len(drawn.get_xdata()) == len(drawn.get_ydata()) <= 400
        np.testing.assert_allclose(drawn.get_ydata(), 3.0, atol=1e-12)
        assert drawn.get_xdata()[0] >= 1 and drawn.get_xdata()[-1] <= count


def test_running_mean_is_centred():
    _, axes = panels(1, 2.0)
    curve(axes[0, 0], [{"step": step, "x": float(step)} for step in range(1, 76)], "x")
    steps, values = axes[0, 0].lines[1].get_data()
    np.testing.assert_allclose(values[3:-3], steps[3:-3])  # a straight line is its own running mean


@pytest.mark.parametrize("share, count", [(0.0, 20), (0.55, 100), (0.29, 100), (1.0, 20), (2 / 3, 3), (1.0, 1)])
def test_wilson_interval(share, count):
    z = statistics.NormalDist().inv_cdf(0.975)
    for bound in wilson(share, count):  # where the share is 1.96 standard errors of the bound away from the bound
        assert (share - bound) ** 2 == pytest.approx(z**2 * bound * (1 - bound) / count, abs=1e-12)


def test_layers_of_a_deep_model():
    assert shown_layers([1, 0]) == [0, 1]
    assert shown_layers(range(28)) == [0, 5, 11, 16, 22, 27]


def test_a_value_that_the_page_has_no_word_for_is_an_error(monkeypatch):
    report_html(Run())
    monkeypatch.setattr("prism_fast.report.build._tiles", lambda run: [Tile("name", None, "detail")])
    with pytest.raises(ValueError, match="writes a value that is None"):
        report_html(Run())
    monkeypatch.setattr("prism_fast.report.build._tiles", lambda run: [("no", "attributes")])
    with pytest.raises(UndefinedError, match="name"):
        report_html(Run())


def test_render_of_nothing():
    assert render(lambda run: None, None) is None


def test_a_stage_has_one_time(tmp_path):
    whole_run(tmp_path)
    run = load_run(tmp_path)
    shown = {row[0]: row[5] for row in build._stage_rows(run)}
    parts = {}
    for row in build._part_rows(run):
        parts[row[0]] = parts.get(row[0], 0.0) + float(row[2])
    assert float(shown["SFT"]) == parts["SFT"] == 22.5
    assert "SFT 22 s" in build._time_tile(run).detail


def test_alignment_and_rlvr_follow_each_other(tmp_path):
    whole_run(tmp_path)
    figure = lengths_and_entropy(load_run(tmp_path))
    steps = [line.get_xdata() for line in figure.axes[1].lines if len(line.get_xdata()) > 2]
    assert max(steps[0]) == 30 and min(steps[-1]) == 31 and max(steps[-1]) == 60


def test_elements_of_a_response_stand_on_lines_of_their_own(tmp_path):
    texts = (
        "<caption>3</caption><think>3</think><answer>7</answer>",
        "<caption>3</caption>\n\n<think>3</think> <answer>7</answer>\n",
    )
    shown = [samples._response({"response": text}).pieces for text in texts]
    assert shown[0] == shown[1] and "".join(piece for piece, _ in shown[0]).count("\n") == 2
