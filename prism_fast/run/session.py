"""What every stage needs around its loop: determinism, signals, timing, checkpoints and resume."""

from __future__ import annotations

import contextlib
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from prism_fast.config import ModelConfig, RunConfig
from prism_fast.models.backbone import local_directory
from prism_fast.records import DataError
from prism_fast.run import checkpoint
from prism_kernels.moe import load_product_choices, product_choices

T = TypeVar("T")

Saved = dict[str, Callable[[Path], None]]


class Stopped(Exception):
    """The run was asked to stop (SIGTERM, Ctrl-C) and has saved its state."""

    def __init__(self, signum: int, saved: Path):
        super().__init__(f"stopped by {signal.Signals(signum).name}; saved {saved}; go on with --resume")
        self.signum = signum


def set_up_torch(config: RunConfig) -> None:
    """Seeds, threads, and on a CPU algorithms that give the same bits every time."""
    torch.manual_seed(config.seed)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if config.deterministic and not torch.cuda.is_available():
        # Root rows repeat in a tree; the backward of an index with repeated rows is otherwise not repeatable.
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False


class Clock:
    """Seconds by part of a step."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start


class Run:
    """The folder of one stage: checkpoints, resume, and stopping at the end of a step.

    ::

        with Run("sft", config.run, resume) as run:
            first, tensors, state = run.restore()
            for step in range(first, total):
                ...
                run.step_done(step + 1, models, tensors, state)
            run.finish(models)
    """

    def __init__(self, stage: str, config: RunConfig, resume: bool):
        self.stage, self.config, self.resume = stage, config, resume
        self.out = config.out
        self.folder = config.out / "checkpoints"
        self.final = config.out / "final"
        self.best: tuple[int, float] | None = None
        self._signum: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Run:
        if not self.resume and (self.final.exists() or checkpoint.steps(self.folder)):
            raise DataError(f"{self.out}: holds an earlier run; add --resume to go on, or choose another run.out")
        self.out.mkdir(parents=True, exist_ok=True)
        set_up_torch(self.config)
        for signum in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(ValueError):  # not in the main thread: the caller handles signals
                self._previous[signum] = signal.signal(signum, self._ask_to_stop)
        return self

    def __exit__(self, *exc: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _ask_to_stop(self, signum: int, frame: object) -> None:
        if self._signum is not None:  # a second one does not wait for the step's end
            raise KeyboardInterrupt
        self._signum = signum

    @property
    def checkpoint(self) -> Path | None:
        """The checkpoint to resume from, where resuming was asked for and there is one."""
        return checkpoint.latest(self.folder) if self.resume else None

    def model(self, name: str, config: ModelConfig) -> ModelConfig:
        """Where to load a model from: the checkpoint, or the configured path."""
        found = self.checkpoint
        path = local_directory(config.path) if found is None else found / name
        return config.model_copy(update={"path": path})

    def restore(self) -> tuple[int, dict[str, Tensor], dict[str, Any]]:
        """(steps done, trainer tensors, trainer state); zeros and empty for a fresh start.

        Also puts back which library multiplied the experts on a GPU, so call it before the first forward: measured
        again, the choice could fall otherwise, and other products give other bits. A trainer of several processes
        then calls ``prism_kernels.moe.settle_products`` for its experts, which broadcasts rank 0's choices.
        """
        found = self.checkpoint
        if found is None:
            return 0, {}, {}
        tensors, state = checkpoint.load(found)
        threads = state.get("threads")
        if threads != torch.get_num_threads() and not torch.cuda.is_available():
            raise DataError(
                f"{found}: written with {threads} torch threads, now {torch.get_num_threads()}; "
                f"set run.threads={threads} to continue bit for bit"
            )
        try:
            load_product_choices(state.get("product_choices", {}))
        except ValueError as error:
            raise DataError(f"{found}/trainer.json: product_choices: {error}") from None
        if state.get("best") is not None:
            self.best = (state["best"], state["best_value"])
        return state["step"], tensors, state

    def improved(self, step: int, value: float) -> bool:
        """Tells whether ``value`` (higher is better) is the best so far; its checkpoint is then kept."""
        if self.best is None or value > self.best[1]:
            self.best = (step, value)
            return True
        return False

    def step_done(
        self, step: int, total: int, models: Saved, tensors: Callable[[], dict[str, Tensor]], state: dict[str, Any]
    ) -> None:
        """Saves where it is time to; raises Stopped, after saving, where a signal asked for it."""
        every = self.config.save_every
        is_best = self.best is not None and self.best[0] == step
        if (every and step % every == 0) or step == total or is_best or self._signum is not None:
            best, value = self.best if self.best is not None else (None, None)
            state = {**state, "best_value": value, "threads": torch.get_num_threads(), "stage": self.stage}
            state["product_choices"] = product_choices()
            saved = checkpoint.save(self.folder, step, models, tensors(), state, self.config.keep_last, best)
            if self._signum is not None and step < total:
                raise Stopped(self._signum, saved)

    def finish(self, models: Saved) -> None:
        """``OUT/final/``: the models of the last step as directories that other tools open."""

        def write(aside: Path) -> None:
            for name, save_model in models.items():
                save_model(aside / name)

        checkpoint.write_aside(self.final, write)

    def discard(self) -> None:
        """Removes everything a run of this stage wrote."""
        shutil.rmtree(self.out, ignore_errors=True)


def is_time(step: int, every: int, total: int) -> bool:
    """Every ``every`` steps, and at the end."""
    return step == total or (every > 0 and step % every == 0)
