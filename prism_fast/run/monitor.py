"""What a person sees of a running stage: a progress bar, warnings, and metrics.jsonl.

metrics.jsonl holds one JSON object per line, of three sorts, each with ``step`` and ``time`` (unix seconds)::

    {"step": 7, "time": 1.7e9, "tokens_per_second": 5120.0, "loss": 0.41, "seconds/update": 0.9, "tokens/update": 4608}
    {"step": 8, "time": 1.7e9, "eval/accuracy": 0.55, "eval/format_valid": 0.98}
    {"step": 8, "time": 1.7e9, "warning": "..."}

A metric that had nothing to measure is absent; one that was not finite is null.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from prism_fast import metric_names as names
from prism_fast.files import replacing, system_reason
from prism_fast.records import DataError, StepStats
from prism_fast.run.trackers import Log, Tracker, check_tracker, open_tracker

FILE_NAME = "metrics.jsonl"
PLAIN_SECONDS = 10.0  # without a terminal, a line is printed this often, or
PLAIN_SHARE = 0.1  # after this share of the stage, whichever comes first
BAR_WIDTH = 100  # a narrower terminal has room for the figures only
_SHOWN = ((names.LOSS, "loss"), (names.REWARD, "reward"), (names.FORMAT_VALID, "valid"))
_PERCENT = (names.ACCURACY, names.FORMAT_VALID, "valid")


class Monitor:
    """Records and shows one stage. A context manager; figures are on disk when a call returns.

    ``out`` is the stage's own folder. ``start_step`` is the last step that a resumed run does not repeat (0: a new
    run): later lines of ``out/metrics.jsonl`` are dropped, the rest is kept. A new run sets an older file aside as
    ``metrics.previous.jsonl``. ``quiet`` prints nothing; ``active=False`` (every rank but the first) also writes
    nothing. Raises DataError where the tracker's package is not installed, or metrics.jsonl is damaged. What the disk
    or a terminal later refuses is said once and does not end the run: figures wait in memory until there is room.
    """

    def __init__(
        self,
        stage: str,
        out: Path,
        total_steps: int,
        *,
        tracker: Tracker = "none",
        start_step: int = 0,
        console: Console | None = None,
        quiet: bool = False,
        active: bool = True,
    ):
        if start_step < 0:
            raise ValueError(f"start_step: expected 0 (a new run) or the last finished step, got {start_step}")
        self.stage, self.out, self.total_steps = stage, Path(out), total_steps
        if active:
            check_tracker(tracker)  # now, before anything on disk changes
        self._tracker_name: Tracker = tracker
        self._start_step = self._step = start_step
        self._console = console or Console()
        self._quiet, self._active = quiet, active
        self._file: Any = None
        self._waiting = b""  # what the disk has not taken yet
        self._refused = False
        self._tracker: Log | None = None
        self._display: _Bar | _Plain | None = None
        self._not_finite: Counter[str] = Counter()

    @property
    def path(self) -> Path:
        return self.out / FILE_NAME

    def __enter__(self) -> Monitor:
        if not self._active:
            return self
        self.out.mkdir(parents=True, exist_ok=True)
        lost = self._start_step > 0 and not self.path.exists()
        if self.path.exists():
            self._continue_file()
        self._tracker = open_tracker(self._tracker_name, self.stage, self.out, self._start_step)
        self._file = open(self.path, "ab", buffering=0)
        if not self._quiet:
            terminal = self._console.is_terminal and not self._console.is_dumb_terminal
            display = _Bar if terminal else _Plain
            with self._printing():
                self._display = display(self.stage, self.total_steps, self._start_step, self._console)
        if lost:
            self.warn(f"{self.path}: no such file, so the steps up to {self._start_step} are missing from the metrics")
        return self

    def __exit__(self, *_: object) -> None:
        if not self._active:
            return
        repeated = {name: count for name, count in self._not_finite.items() if count > 1}
        if repeated:
            counts = ", ".join(f"{name} {count} times" for name, count in repeated.items())
            self.warn(f"not finite, written as null: {counts}")
        with self._printing():
            if self._display is not None:
                self._display.close()
        with self._tracking():
            if self._tracker is not None:
                self._tracker.close()
        self._flush()
        self._file.close()
        if lost := self._waiting.count(b"\n"):
            self._print(Text(f"warning: {self.path}: its last {lost} lines are lost", "yellow"))

    def step(self, stats: StepStats) -> None:
        """Records one optimizer step and moves the bar; adds ``time`` and ``tokens_per_second``."""
        rate = tokens_per_second(stats.seconds, stats.tokens)
        line = self._record(
            stats.step, stats.record() if rate is None else {names.TOKENS_PER_SECOND: rate, **stats.record()}
        )
        with self._printing():
            if self._display is not None:
                self._display.update(stats.step, _figures(line))

    def evaluation(self, step: int, figures: Mapping[str, float]) -> None:
        """Records held-out figures as ``eval/<name>`` and prints them in one line."""
        named = {
            name if name.startswith(names.EVAL) else f"{names.EVAL}{name}": value for name, value in figures.items()
        }
        line = self._record(step, named)
        shown = "  ".join(_shown(name.removeprefix(names.EVAL), line.get(name)) for name in named)
        self._print(Text(f"{self.stage} step {step}, held out: {shown}", style="bold"))

    def warn(self, text: str) -> None:
        """Prints a warning above the bar and records it with the step it came at."""
        self._write({"step": self._step, "time": time.time(), "warning": text})
        said = text.removeprefix(f"step {self._step}: ")
        self._print(Text(f"warning, {self.stage} step {self._step}: {said}", "yellow"))

    def _print(self, text: Text) -> None:
        if self._active and not self._quiet:
            with self._printing():
                self._console.print(text, soft_wrap=True)

    @contextmanager
    def _printing(self) -> Iterator[None]:
        """The terminal may be gone, or the reader of a pipe: the run goes on without."""
        try:
            yield
        except (OSError, SystemExit):  # the latter from rich, where a pipe breaks
            self._console.quiet = self._quiet = True  # for the bar's own thread too
            self._display = None

    @contextmanager
    def _tracking(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._tracker = None
            self.warn(f"tracker: {system_reason(error)}; the run goes on without it")

    def _record(self, step: int, figures: Mapping[str, float]) -> dict[str, Any]:
        self._step = step
        line: dict[str, Any] = {"step": step, "time": time.time()}
        for name, value in figures.items():
            value = value if isinstance(value, int) else float(value)
            line[name] = value if math.isfinite(value) else None
            if line[name] is None:
                self._not_finite[name] += 1
                if self._not_finite[name] == 1:
                    self.warn(f"{name} is {value}, written as null")
        self._write(line)
        if self._tracker is not None:
            numbers = {
                name: value for name, value in line.items() if name not in ("step", "time") and value is not None
            }
            with self._tracking():
                self._tracker.log(numbers, step)
        return line

    def _write(self, line: dict[str, Any]) -> None:
        if self._active:
            self._waiting += json.dumps(line, allow_nan=False).encode() + b"\n"
            self._flush()

    def _flush(self) -> None:
        """Hands all that waits to the kernel: a killed process loses nothing."""
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
            self._refused = False
        except OSError as error:
            if not self._refused:  # only printed: there is nowhere to write it to
                self._refused = True
                text = f"{self.path}: cannot be written ({system_reason(error)}); its lines wait in memory until it can"
                self._print(Text(f"warning, {self.stage} step {self._step}: {text}", "yellow"))

    def _continue_file(self) -> None:
        if self._start_step == 0:
            if self.path.stat().st_size:
                os.replace(self.path, self.path.with_name("metrics.previous.jsonl"))
            return
        kept = [raw for raw, line in _lines(self.path) if line["step"] <= self._start_step]
        with replacing(self.path) as aside:
            aside.write_bytes(b"".join(raw + b"\n" for raw in kept))


class _Bar:
    """A live progress bar on a terminal. Where it is narrow, the figures give way, the last first; never the step."""

    def __init__(self, stage: str, total: int, start: int, console: Console):
        self._console, self._bar = console, console.width >= BAR_WIDTH
        bar = [BarColumn(bar_width=16)] if self._bar else []
        column = {"table_column": Column(no_wrap=True, overflow="crop")}
        self._fixed = len(f"{stage} {total}/{total}   0:00:00 left") + (17 if self._bar else 0)
        self._progress = Progress(
            TextColumn("[bold]{task.description}", **column),
            *bar,
            MofNCompleteColumn(**column),
            TextColumn("{task.fields[figures]}", markup=False, **column),
            TimeRemainingColumn(compact=True, **column),
            TextColumn("left", **column),
            console=console,
        )
        self._progress.start()
        self._task = self._progress.add_task(stage, total=total, completed=start, figures="")

    def update(self, step: int, figures: list[str]) -> None:
        while figures and len("  ".join(figures)) > self._console.width - self._fixed:
            figures = figures[:-1]
        self._progress.update(self._task, completed=step, figures="  ".join(figures))

    def close(self) -> None:
        self._progress.stop()


class _Plain:
    """Now and then a line, where there is no terminal (a pipe, CI)."""

    def __init__(self, stage: str, total: int, start: int, console: Console):
        self._stage, self._total, self._start, self._console = stage, total, start, console
        self._began = time.monotonic()
        self._last: tuple[float, int] | None = None  # when, at which step

    def update(self, step: int, figures: list[str]) -> None:
        now = time.monotonic()
        if self._last is not None and step < self._total:
            when, shown = self._last
            if now - when < PLAIN_SECONDS and step - shown < PLAIN_SHARE * self._total:
                return
        self._last = (now, step)
        left = (now - self._began) / max(step - self._start, 1) * max(self._total - step, 0)
        self._console.print(
            "  ".join([f"{self._stage} {step}/{self._total}", *figures, f"{left:.0f} s left"]),
            markup=False, highlight=False, soft_wrap=True,
        )  # fmt: skip

    def close(self) -> None:
        pass


def _figures(line: Mapping[str, Any]) -> list[str]:
    shown = [_shown(label, line[name]) for name, label in _SHOWN if name in line]
    rate = line.get(names.TOKENS_PER_SECOND)
    return [*shown, f"{rate:,.0f} tok/s"] if rate is not None else shown


def _shown(name: str, value: float | None) -> str:
    if value is None:
        return f"{name} not finite"
    return f"{name} {value:.1%}" if name in _PERCENT and 0 <= value <= 1 else f"{name} {value:.4g}"


def tokens_per_second(seconds: Mapping[str, float], tokens: Mapping[str, int]) -> float | None:
    """Tokens that all parts of a step went over, per second of these parts; the part ``eval`` is left out of both.

    A token that is sampled and then trained on counts twice, as it is computed twice. None where either is zero.
    """
    spent = sum(value for part, value in seconds.items() if part != "eval")
    count = sum(value for part, value in tokens.items() if part != "eval")
    return count / spent if spent > 0 and count > 0 else None


def breakdown(lines: Iterable[Mapping[str, Any]]) -> tuple[dict[str, float], dict[str, int]]:
    """Seconds and tokens by part, summed over the lines of a stage: the arguments of `tokens_per_second`."""
    seconds: dict[str, float] = {}
    tokens: dict[str, int] = {}
    for line in lines:
        for name, value in line.items():
            for prefix, totals in ((names.SECONDS, seconds), (names.TOKENS, tokens)):
                if name.startswith(prefix) and _is_number(value):
                    part = name.removeprefix(prefix)
                    totals[part] = totals.get(part, 0) + value
    return seconds, tokens


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e100


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl. A last line that a kill has torn is dropped; any other damage is a DataError."""
    return [line for _, line in _lines(Path(path))]


def _lines(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    try:
        raw = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    found = []
    for number, text in enumerate(raw, 1):
        try:
            line = json.loads(text) if text.strip() else None
        except (ValueError, RecursionError) as error:
            if number == len(raw):  # no newline at its end: torn by a kill
                break
            raise DataError(f"{path}:{number}: the line does not parse ({error}); remove the line") from error
        if line is None:
            continue
        if not isinstance(line, dict) or not isinstance(line.get("step"), int):
            if number == len(raw):
                break
            raise DataError(f"{path}:{number}: expected an object with a whole number `step`; remove the line")
        found.append((text, line))
    return found
