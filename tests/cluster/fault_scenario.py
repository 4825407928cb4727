"""The command line in several processes, with a fault put into one of them.

Processes are forked from one that has imported what they need, which takes longer than their steps; each is otherwise
what a launcher starts: its own environment, output and end.
"""

from __future__ import annotations

import faulthandler
import math
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from prism_fast import cli, ranks
from prism_fast.run import checkpoint, watchdog
from prism_fast.run.session import Session
from prism_fast.steps.update import DeepSpeedUpdater
from prism_fast.steps.updater import FSDPUpdater, Updater
from tests.cluster.launch import environment, free_port

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload([__name__, "prism_fast.stages.sft", "prism_fast.stages.align", "tests.tiny_run"])

done = 0  # steps of this run, in this process


def at(step: int, act: Callable[[], None], *, on: bool = False) -> Callable[[], None]:
    """``act`` in step ``step``, once; ``on``: from then on."""
    acted = []

    def maybe() -> None:
        if (done + 1 == step and not acted) or (on and done + 1 >= step):
            acted.append(1)
            act()

    return maybe


def before(owner: Any, name: str, act: Callable[[], None]) -> None:
    real = getattr(owner, name)

    def wrapped(*args: Any, **options: Any) -> Any:
        act()
        return real(*args, **options)

    setattr(owner, name, wrapped)


def count_steps() -> None:
    real = Session.end_of_step

    def end_of_step(self: Session, step: int, *args: Any, **options: Any) -> None:
        global done
        real(self, step, *args, **options)
        done = step

    Session.end_of_step = end_of_step  # type: ignore[method-assign]
    begin = Session.begin

    def begun(self: Session, *args: Any, **options: Any) -> int:
        global done
        done = begin(self, *args, **options)
        return done

    Session.begin = begun  # type: ignore[method-assign]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang() -> None:
    while True:
        time.sleep(60)


def in_a_collective(step: int) -> None:
    """Dies with its part of a sum on the way."""
    real = dist.all_reduce

    def all_reduce(tensor: torch.Tensor, *args: Any, **options: Any) -> Any:
        if done + 1 == step and tensor.numel() > 1000:
            real(tensor, async_op=True)
            die()
        return real(tensor, *args, **options)

    dist.all_reduce = all_reduce


def in_writing(step: int, around: Callable[[Callable[[], Any]], Any]) -> None:
    """``around`` what this process writes of the checkpoint of step ``step``, in the thread that does."""
    real = checkpoint.Part.write

    def write(part: checkpoint.Part, folder: Path) -> checkpoint.Files:
        return around(lambda: real(part, folder)) if part.step == step else real(part, folder)

    checkpoint.Part.write = write  # type: ignore[method-assign]


def written_and_dead(write: Callable[[], Any]) -> None:
    """Its part is there, and the others do not hear of it."""
    write()
    die()


def full(write: Callable[[], Any]) -> Any:
    """As a full disk, for this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        return write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def lose(step: int, factor: float, on: bool) -> None:
    """Losses of this process's packs are not finite."""

    def around(form: type[Updater]) -> None:
        real = form.__call__

        def loss_of(self: Updater, *args: Any, **options: Any) -> Any:
            broken = done + 1 == step or (on and done + 1 > step)
            loss = real(self, *args, **options)
            return loss * factor if broken else loss

        form.__call__ = loss_of  # type: ignore[method-assign]

    for form in (Updater, DeepSpeedUpdater):
        around(form)


def spoil(step: int, on: bool) -> None:
    """One number of this process's gradients is NaN; its losses are not."""

    def act() -> None:
        for module in spoilt:
            for parameter in module.parameters():
                if parameter.grad is not None:
                    parameter.grad.view(-1)[0] = math.nan
                    return

    spoilt: list[Any] = []
    real = Updater.step

    def step_of(self: Updater) -> float:
        spoilt[:] = [self.module]
        at(step, act, on=on)()
        return real(self)

    Updater.step = step_of  # type: ignore[method-assign]


def put_in(fault: str, step: int) -> None:
    name = fault.removesuffix("-on")
    on = fault != name
    if name == "dies-in-step":
        for form in (Updater, FSDPUpdater, DeepSpeedUpdater):
            before(form, "backward", at(step, die))
    elif name == "dies-in-collective":
        in_a_collective(step)
    elif name == "dies-while-writing":
        in_writing(step, written_and_dead)
    elif name == "full-disk":
        in_writing(step, full)
    elif name == "hangs":
        before(Updater, "step", at(step, hang))
    elif name == "halts":
        before(Updater, "step", at(step, lambda: os.kill(os.getpid(), signal.SIGSTOP)))
    elif name == "nan-loss":
        lose(step, math.nan, on)
    elif name == "infinite-loss":
        lose(step, math.inf, on)
    elif name == "nan-gradient":
        spoil(step, on)
    elif name == "waits":  # so that something can happen in the middle of a step

        def wait() -> None:
            Path(os.environ["WAITS"], str(ranks.rank())).touch()
            time.sleep(2)

        before(Updater, "step", at(step, wait))
    elif name != "none":
        raise ValueError(f"no fault {fault}")


class Fault(NamedTuple):
    """``Fault("hangs", step=3)``; "-on" behind a name: from that step on. ``rank``: None for each."""

    name: str = "none"
    step: int = 1
    rank: int | None = 1


NOTHING = Fault()


class End(NamedTuple):
    """``status``: of the process, minus the signal that ended it; None: it had to be killed."""

    status: int | None
    seconds: float
    out: str
    errors: str


class Started:
    """``prism-fast COMMAND`` in ``world`` processes (0: one, by itself), whose ends nobody but they themselves bring
    about; a launcher would end the others where one fails."""

    def __init__(
        self,
        command: Sequence[str],
        folder: Path,
        fault: Fault = NOTHING,
        world: int = 2,
        environ: Mapping[str, str] | None = None,
    ):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.begun, port = folder, time.monotonic(), free_port()
        self.processes = []
        for rank in range(max(1, world)):
            here = {**environment(rank, world, port), "WAITS": str(folder), **(environ or {})}
            put = fault if fault.rank in (None, rank) else NOTHING
            process = PROCESSES.Process(target=_run, args=(command, put, here, folder / f"said-{rank}"), daemon=True)
            process.start()
            self.processes.append(process)

    def ends(self, seconds: float = 150, but: Sequence[int] = ()) -> list[End]:
        """Waits for all ``but`` some, which are killed then, as is what has not ended in ``seconds``."""
        ended: dict[int, float] = {}
        while time.monotonic() < self.begun + seconds and len(ended) < len(self.processes) - len(but):
            for rank, process in enumerate(self.processes):
                if rank not in ended and rank not in but and process.exitcode is not None:
                    ended[rank] = time.monotonic() - self.begun
            time.sleep(0.05)
        for rank, process in enumerate(self.processes):
            if rank not in ended:
                process.kill()
            process.join()
        said = [[(self.folder / f"said-{rank}.{way}").read_text() for way in ("out", "err")] for rank in self.ranks]
        return [
            End(process.exitcode if rank in ended else None, ended.get(rank, math.inf), *said[rank])
            for rank, process in enumerate(self.processes)
        ]

    @property
    def ranks(self) -> range:
        return range(len(self.processes))

    def wait_for(self, rank: int, seconds: float = 120) -> None:
        """Until that process is where the fault "waits" has put it."""
        while not (self.folder / str(rank)).exists():
            assert time.monotonic() < self.begun + seconds, "it has not come so far"
            time.sleep(0.05)


def _run(command: Sequence[str], fault: Fault, environ: Mapping[str, str], said: Path) -> None:
    os.environ.clear()
    os.environ.update(environ)
    for number, way in ((1, "out"), (2, "err")):
        with open(said.with_name(f"{said.name}.{way}"), "w") as file:
            os.dup2(file.fileno(), number)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    faulthandler.enable(file=2)
    watchdog.GRACE = 5.0  # which is long for what is tiny
    count_steps()
    put_in(fault.name, fault.step)
    sys.argv = ["prism-fast", *command]
    try:
        cli.main()
    finally:
        sys.stdout.flush()


if __name__ == "__main__":  # under torchrun: FAULT STEP RANK COMMAND...
    name, step, where, *words = sys.argv[1:]
    count_steps()
    if os.environ["RANK"] == where:
        put_in(name, int(step))
    sys.argv = ["prism-fast", *words]
    cli.main()
