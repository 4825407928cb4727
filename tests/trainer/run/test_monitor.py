"""metrics.jsonl and the progress display."""

import io
import json
import math
import re
import resource
import time

import pytest
import torch
from rich.console import Console

from prism_fast.records import DataError, StepStats
from prism_fast.run import monitor as metrics
from prism_fast.run.monitor import Monitor, breakdown, read_metrics, tokens_per_second


def console(terminal=False, width=140):
    return Console(file=io.StringIO(), force_terminal=terminal, width=width)


def stats(step, **figures):
    return StepStats(step, {"loss": 1.0 / step, **figures}, {"rollout": 0.5, "eval": 9.0}, {"rollout": 100})


def strict(path):
    """The lines as a strict JSON parser reads them: NaN is not JSON."""

    def refuse(name):
        raise AssertionError(f"{name} in metrics.jsonl")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_a_line_per_step_on_disk_at_once(tmp_path):
    began = time.time()
    with Monitor("sft", tmp_path / "sft", 3, quiet=True) as monitor:
        for step in (1, 2, 3):
            monitor.step(stats(step))
            assert [line["step"] for line in read_metrics(monitor.path)] == list(range(1, step + 1))
        monitor.evaluation(3, {"accuracy": 0.5, "eval/format_valid": 1.0})
        monitor.warn("look")
    lines = read_metrics(tmp_path / "sft" / "metrics.jsonl")
    assert lines[1]["loss"] == 0.5 and lines[1]["seconds/rollout"] == 0.5 and lines[1]["tokens/rollout"] == 100
    assert lines[1]["tokens_per_second"] == 200.0  # evaluation is no part of a step
    assert began <= lines[0]["time"] <= lines[-1]["time"] <= time.time()
    assert lines[3]["eval/accuracy"] == 0.5 and lines[3]["eval/format_valid"] == 1.0
    assert lines[4]["warning"] == "look" and lines[4]["step"] == 3


def test_absent_metrics_stay_absent(tmp_path):
    with Monitor("sft", tmp_path, 1, quiet=True) as monitor:
        monitor.step(StepStats(1, {"loss": torch.tensor(2.0)}))
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    assert set(line) == {"step", "time", "loss"} and line["loss"] == 2.0


def test_not_finite_is_null_warned_once_and_counted(tmp_path):
    out = console()
    with Monitor("sft", tmp_path, 4, console=out) as monitor:
        for step, value in enumerate([math.nan, math.inf, -math.inf, 1.0], 1):
            monitor.step(StepStats(step, {"loss": value, "grad_norm": value if step == 1 else 1.0}))
    lines = strict(tmp_path / "metrics.jsonl")
    assert [line["loss"] for line in lines if "loss" in line] == [None, None, None, 1.0]
    warnings = [line["warning"] for line in lines if "warning" in line]
    assert warnings[:2] == ["loss is nan, written as null", "grad_norm is nan, written as null"]
    assert warnings[2:] == ["not finite, written as null: loss 3 times"]
    assert "warning, sft step 1: loss is nan" in out.file.getvalue()


def test_resume_drops_later_lines_and_a_torn_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with Monitor("sft", tmp_path, 10, quiet=True) as monitor:
        for step in range(1, 8):
            monitor.step(stats(step))
        monitor.evaluation(5, {"accuracy": 0.5})
    before = path.read_bytes().splitlines()
    with open(path, "ab") as file:
        file.write(b'{"step": 8, "loss": 0.1')
    with Monitor("sft", tmp_path, 10, quiet=True, start_step=5) as monitor:
        assert path.read_bytes().splitlines() == [*before[:5], before[7]]  # the evaluation at step 5 stays
        monitor.step(stats(6))
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3, 4, 5, 5, 6]
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]  # nothing left aside


def test_a_new_run_sets_the_old_file_aside(tmp_path):
    for loss in (1.0, 2.0):
        with Monitor("sft", tmp_path, 1, quiet=True) as monitor:
            monitor.step(StepStats(1, {"loss": loss}))
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["loss"] == 2.0
    assert read_metrics(tmp_path / "metrics.previous.jsonl")[0]["loss"] == 1.0


def test_resume_without_a_file_is_said(tmp_path):
    with Monitor("sft", tmp_path, 9, quiet=True, start_step=4):
        pass
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    assert line["step"] == 4 and "missing from the metrics" in line["warning"]


@pytest.mark.parametrize(
    "torn", [b'{"step": 2, "lo', b'{"step"', b"{", b"2", b'{"loss": 1}', b'{"step": 2, "a": "\xc3']
)
def test_only_a_torn_last_line_is_tolerated(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 1.0}\n' + torn)
    assert read_metrics(path) == [{"step": 1, "loss": 1.0}]
    path.write_bytes(torn + b'\n{"step": 3}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:1: "):
        read_metrics(path)
    with pytest.raises(DataError), Monitor("sft", tmp_path, 9, start_step=1, quiet=True):
        pass
    assert path.read_bytes() == torn + b'\n{"step": 3}\n'  # damaged input is not overwritten


def test_a_whole_last_line_without_newline_counts(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}')
    assert [line["step"] for line in read_metrics(path)] == [1, 2]
    with Monitor("sft", tmp_path, 9, start_step=2, quiet=True) as monitor:
        monitor.step(stats(3))
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3]


def test_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.jsonl: cannot be read"):
        read_metrics(tmp_path / "nowhere.jsonl")


def test_plain_lines_come_now_and_then(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    out = console()
    with Monitor("rlvr", tmp_path, 100, console=out) as monitor:
        for step in range(1, 51):
            now[0] += 0.1
            monitor.step(stats(step, reward=0.25, format_valid=0.9))
        assert len(out.file.getvalue().splitlines()) == 5  # 1, 11, 21, 31, 41: a tenth of the steps each
        for step in range(51, 53):
            now[0] += 11.0
            monitor.step(stats(step, reward=0.25))
    lines = out.file.getvalue().splitlines()
    assert len(lines) == 7  # slow steps: every ten seconds
    assert lines[0] == "rlvr 1/100  loss 1  reward 0.25  valid 90.0%  200 tok/s  10 s left"
    assert "\x1b" not in out.file.getvalue()


def test_the_last_step_is_always_shown(tmp_path):
    out = console()
    with Monitor("sft", tmp_path, 11, console=out) as monitor:
        for step in range(1, 12):
            monitor.step(stats(step))
    assert out.file.getvalue().splitlines()[-1].startswith("sft 11/11 ")


def test_bar_on_a_terminal_warnings_above_it(tmp_path):
    out = console(terminal=True)
    with Monitor("align", tmp_path, 20, console=out, start_step=0) as monitor:
        monitor.step(stats(1, reward=0.5))
        monitor.warn("[red]look[/red]")
        monitor.evaluation(1, {"accuracy": 0.5, "mean_length": 12.0})
    text = out.file.getvalue()
    assert "1/20" in text and "reward 0.5" in text and "200 tok/s" in text
    assert "[red]look[/red]" in text  # messages are text, not markup
    assert "align step 1, held out: accuracy 50.0%  mean_length 12" in text


@pytest.mark.parametrize("width", [30, 40, 58, 80, 99, 100, 140])
def test_a_narrow_terminal_keeps_the_step(tmp_path, width):
    out = console(terminal=True, width=width)
    with Monitor("align", tmp_path, 10_000, console=out) as monitor:
        monitor.step(stats(9_999, reward=0.12345, format_valid=0.987))
    shown = out.file.getvalue().replace("\r", "\n").splitlines()
    last = re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]", "", next(line for line in reversed(shown) if "left" in line))
    assert "9999/10000" in last and "align" in last and last.rstrip().endswith("left") and len(last) <= width
    assert ("loss" in last) == (width >= 58) and ("tok/s" in last) == (width >= 99)


def test_a_step_is_named_once_and_as_the_bar_shows_it(tmp_path):
    out = console(terminal=True)
    with Monitor("align", tmp_path, 20, console=out) as monitor:
        monitor.step(stats(7))
        monitor.warn("step 7: look")
        monitor.evaluation(7, {"accuracy": 0.5})
    text = out.file.getvalue()
    assert "7/20" in text and "warning, align step 7: look" in text and "align step 7, held out" in text


def test_quiet_prints_nothing_and_inactive_writes_nothing(tmp_path):
    out = console()
    for name, options in (("quiet", {"quiet": True}), ("other_rank", {"active": False})):
        with Monitor("sft", tmp_path / name, 2, console=out, **options) as monitor:
            monitor.step(stats(1, entropy=math.nan))
            monitor.warn("look")
            monitor.evaluation(1, {"accuracy": 0.5})
    assert out.file.getvalue() == ""
    assert not (tmp_path / "other_rank").exists()


def test_an_error_closes_the_file_and_passes(tmp_path):
    with pytest.raises(KeyError), Monitor("sft", tmp_path, 2, quiet=True) as monitor:
        monitor.step(stats(1))
        raise KeyError
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1
    with pytest.raises(ValueError, match="start_step"):
        Monitor("sft", tmp_path, 2, start_step=-1)


def test_breakdown_and_rate():
    lines = [stats(1).record(), stats(2).record(), {"step": 2, "eval/accuracy": 1.0}, {"step": 3, "seconds/eval": None}]
    seconds, tokens = breakdown(lines)
    assert seconds == {"rollout": 1.0, "eval": 18.0} and tokens == {"rollout": 200}
    assert tokens_per_second(seconds, tokens) == 200.0
    assert tokens_per_second({}, {"rollout": 3}) is None and tokens_per_second({"rollout": 1.0}, {}) is None


def test_figures_wait_for_a_disk_that_is_full(tmp_path):
    said = io.StringIO()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Monitor("sft", tmp_path, 9, console=Console(file=said, width=200)) as monitor:
        try:
            for step in range(1, 9):
                if step == 3:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (300, hard))
                monitor.step(StepStats(step, {"loss": 0.5}, {"update": 1.0}, {"update": 3}))
                if step == 6:
                    assert (tmp_path / "metrics.jsonl").stat().st_size == 300  # in the middle of a line
                    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == list(range(1, 9))
    assert said.getvalue().count("cannot be written (File too large); its lines wait in memory") == 1


def test_lines_that_never_found_room_are_counted(tmp_path):
    said = io.StringIO()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with Monitor("sft", tmp_path, 9, console=Console(file=said, width=200)) as monitor:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
            for step in (1, 2):
                monitor.step(StepStats(step, {"loss": 0.5}, {}, {}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "its last 2 lines are lost" in said.getvalue()
    assert read_metrics(tmp_path / "metrics.jsonl") == []


@pytest.mark.parametrize("error", [BrokenPipeError(), OSError(5, "Input/output error")])
@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # the bar's own thread ends so
@pytest.mark.parametrize("at_once", [True, False])
def test_a_terminal_that_is_gone_ends_nothing(at_once, terminal, error, tmp_path):
    class Gone(io.StringIO):
        broken = False

        def write(self, text):
            if self.broken:
                raise error
            return super().write(text)

    class Ends(Console):
        def on_broken_pipe(self):  # rich's own also turns the standard output off
            raise SystemExit(1)

    file = Gone()
    file.broken = at_once
    with Monitor("sft", tmp_path, 3, console=Ends(file=file, force_terminal=terminal)) as monitor:
        file.broken = True
        for step in (1, 2, 3):
            monitor.step(StepStats(step, {"loss": 0.5}, {}, {}))
            monitor.warn("odd")
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 6
