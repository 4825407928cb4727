"""What every stage needs around its loop: its folder, signals, resume, and the end of a step.

A session knows no model, no kernel and no data: a stage hands in what is saved, restored and evaluated.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from prism_fast import metric_names as names
from prism_fast import ranks
from prism_fast.config import AlignConfig, RLVRConfig, SFTConfig, WarmupConfig, WatchConfig
from prism_fast.files import system_reason, write_json
from prism_fast.records import DataError, Fault, StepStats
from prism_fast.run import checkpoint, pack_size, record
from prism_fast.run.alerts import Watch, halved_packs, sentence
from prism_fast.run.clock import Clock
from prism_fast.run.deterministic import set_up_torch
from prism_fast.run.folder import refuse_earlier_run, refuse_other_folder
from prism_fast.run.lock import FolderLock
from prism_fast.run.monitor import Monitor
from prism_fast.run.saving import REMEDY, Saver, newest_whole, write_final
from prism_fast.run.signals import Stopped, StopRequest
from prism_fast.run.skipped import SkippedUpdates
from prism_fast.run.watchdog import Watchdog

# Copies a model as it now is, dealt to so many processes: a call of all, each of which gets what writes its part.
CollectModel = Callable[[int], checkpoint.SaveModel]
StageConfig = SFTConfig | WarmupConfig | AlignConfig | RLVRConfig
# -> (held-out figures, what the best checkpoint has most of)
Evaluate = Callable[[], tuple[dict[str, float], float]]


class Optimizer(Protocol):
    """Tensors that a resumed run must find as they were; each is a call of all processes."""

    def tensors(self, parts: int) -> dict[str, Tensor]: ...  # copies, dealt to the first so many processes

    def load(self, tensors: Mapping[str, Tensor], steps: int) -> None: ...  # of others: ValueError

    def figures(self) -> dict[str, float]: ...  # metrics of this process's own since the last call, see names.OWN


class Part(Protocol):
    """Anything else that a resumed run must find as it was; ``state()`` is JSON. ``load`` of another's: ValueError."""

    def state(self) -> Any: ...

    def load(self, state: Any) -> None: ...


class HasClose(Protocol):
    def close(self) -> None: ...


Closes = TypeVar("Closes", bound=HasClose)


def _millions(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.2f} M"


class Session:
    """One stage in its folder ``config.run.out``: resumed where it was left, stopped at the end of a step.

    It holds the folder's lock, and keeps a record of what the run was started with. A resumed run with other settings
    or data is refused, unless ``accept_changes``.

    ::

        with Session("sft", config, resume) as session:
            ...                                             # models, from session.saved(name) where it is not None
            first = session.begin(total, models=..., optimizers=...)
            for step in range(first, total):
                clock = Clock()
                ...
                session.end_of_step(step + 1, clock, tokens, metrics, warnings)
            return session.finish()
    """

    def __init__(self, stage: str, config: StageConfig, resume: bool, accept_changes: bool = False):
        self.stage, self.config, self.resume, self.accept_changes = stage, config.run, resume, accept_changes
        self.settings = config
        self.out = self.config.out
        self.data = config.data.beside(self.out)  # what is made of large files stays with the run
        self.folder = self.out / "checkpoints"
        self.final = self.out / "final"
        self.state: dict[str, Any] = {}  # of the checkpoint: what ``end_of_step`` was given, among others
        self.figures: dict[str, float] = {}  # of the last evaluation
        self._best: tuple[int, float] | None = None  # step, value
        self._best_saving = self._best_saved = self._best  # of the checkpoint that is being written, of those there are
        self._damaged: dict[Path, str] = {}  # newer checkpoints than the one that is resumed from, and what is wrong
        self._checkpoint: Path | None = None
        self._lock, self._open = contextlib.ExitStack(), contextlib.ExitStack()  # the latter holds the monitor
        self._record: dict[str, Any] = {}
        self._notes: list[str] = []  # warnings from before there was a monitor
        self._chosen: dict[str, Any] = {}  # what was chosen where settings say auto, by the checkpoint's record
        self._changed: list[str] = []  # since the checkpoint, and accepted
        self._skipped = SkippedUpdates(self.out, self.config.max_skipped_updates)
        self._halved = False  # packs were, and it was said
        self._cpu_seconds = 0.0  # of this process, when a step last ended
        self._asked = StopRequest()  # of this process
        self._agreed: int | None = None  # that asked any process, as all of them know it

    def __enter__(self) -> Session:
        cluster = self.settings.cluster
        with contextlib.ExitStack() as entered:
            alone = cluster.sharding != "none"
            entered.enter_context(ranks.joined(timeout_minutes=cluster.timeout_minutes, alone=alone))
            self._watchdog = entered.enter_context(Watchdog(cluster.timeout_minutes))
            with ranks.together():
                set_up_torch(self.config)
                if ranks.is_first():
                    self._claim_folder(entered)
                    checkpoint.clear_partial(self.folder)
                    self._record = record.record(self.stage, self.settings, ranks.world())
            if self.resume:
                self._checkpoint, self._damaged = newest_whole(self.folder)
            with ranks.together():
                if ranks.is_first() and self._checkpoint is not None:
                    self._compare(self._checkpoint)
            self._saver = Saver(self.folder, self.config.keep_last, cluster.timeout_minutes)
            self._lock = entered.pop_all()
        self._asked.__enter__()
        return self

    def _claim_folder(self, entered: contextlib.ExitStack) -> None:
        """Locks the folder, and raises DataError where it is not one for this run."""
        refuse_other_folder(self.out, self.stage, self.resume)
        if not entered.enter_context(FolderLock(self.out)).supported:
            self._notes.append(f"{self.out}: its file system has no locks; start no second run in this folder")
        refuse_earlier_run(self.out, self.resume)

    def _compare(self, found: Path) -> None:
        """Raises DataError where the checkpoint was made with other settings or data, and that is not accepted."""
        state = checkpoint.read_state(found)
        before = state.get("run")
        changed = record.threads_line(state.get("threads"))
        if before is None:
            self._notes.append(f"{found}: has no record of its settings and data; they were not compared")
        elif not record.is_record(before):
            raise DataError(f"{found}/trainer.json: run: no record of a run; {checkpoint.REMOVE}")
        else:
            changed += record.changes(before, self._record, self.settings)
            self._record["starts"] = before["starts"]
            if "records" in before:
                self._record["records"] = before["records"]
            self._chosen = before.get("chosen", {})
            if other := record.moved(before, self._record):
                self._notes.append(
                    f"resumed on other software or hardware, which may round otherwise: {', '.join(other)}"
                )
        if not self.accept_changes:
            record.refuse(found, changed)
        self._changed = changed

    def _compare_records(self, now: int) -> None:
        before = self._record["records"] = self._record.get("records", now)
        if before != now:
            changed = [record.change_line(record.GOOD_RECORDS, before, now)]
            if not self.accept_changes:
                record.refuse(self._checkpoint or self.out, changed)
            self._changed += changed
            self._record["records"] = now

    def __exit__(self, *exc: Any) -> None:
        with contextlib.ExitStack() as last:
            last.push(self._asked)
            try:
                self._end_saving(*exc[:2])
                self._open.close()
            finally:
                self._lock.__exit__(*exc)

    def _end_saving(self, kind: type[BaseException] | None, error: BaseException | None) -> None:
        """Waits for a checkpoint that is being written, whatever ended the run, but for who will not wait."""
        if kind is not None and not issubclass(kind, Exception):
            return
        try:
            self._settle()
        except Exception as fault:
            if error is None:
                raise
            # Which process is lost, the run's last line says.
            why = "a process is gone, or does not answer" if ranks.is_lost(fault) else fault
            self._monitor.warn(f"a checkpoint was not written: {why}")

    def saved(self, model: str) -> Path | None:
        """The directory of a model in the checkpoint that this run resumes from; None for a fresh start."""
        return None if self._checkpoint is None else self._checkpoint / model

    def loaded(self, records: int, **models: torch.nn.Module) -> None:
        """Says in one line what this run works on. ``records``: the good ones, on whose number their order depends, so
        that a resumed run must find as many."""
        with ranks.together():
            if ranks.is_first():
                self._compare_records(records)
        sizes = (f"{name} {_millions(sum(p.numel() for p in m.parameters()))} parameters" for name, m in models.items())
        device = (
            torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
        )
        if ranks.world() > 1:
            device += f", {ranks.world()} processes"
        if ranks.is_first():
            print(f"{self.stage}: {records:,} records, {', '.join([*sizes, device])} -> {self.out}", flush=True)

    def tokens_per_pack(self, free: int, **models: Any) -> int:
        """The setting; for auto what a resumed run began with, else the most that the plan has room for.

        ``free``: bytes beside the ``models``, which are as they were loaded, by the names of their settings; None: no
        such model. Where the processes' differ the least decides. Bits depend on it, so it is in the run's record.
        """
        if self.config.tokens_per_pack != "auto":
            return self.config.tokens_per_pack
        least = min(ranks.gather(free))
        with ranks.together():
            chosen = self._chosen.get(record.PER_PACK) if ranks.is_first() else None
            if ranks.is_first() and chosen is None:
                there = {name: model for name, model in models.items() if model is not None}
                chosen = pack_size.choose(self.settings, there, least, ranks.world())
        chosen = ranks.from_first(chosen)
        self._record["chosen"] = {record.PER_PACK: chosen}
        if ranks.is_first():
            print(f"{record.PER_PACK}: auto is {chosen:,}, as {least / 1e9:.1f} GB were free", flush=True)
        return chosen

    def begin(
        self,
        total: int,
        *,
        models: Mapping[str, CollectModel],
        optimizers: Mapping[str, Optimizer],
        parts: Mapping[str, Part] | None = None,
        evaluate: Evaluate | None = None,
        watch: WatchConfig | None = None,
    ) -> int:
        """Restores what the checkpoint holds and opens the records; returns the number of steps that are done.

        Call it before the first forward, which the restored state may decide about. A checkpoint holds ``models`` as
        directories, the tensors of ``optimizers`` under their names as prefixes, and ``parts`` by name in trainer.json;
        a part that it lacks (it was written before there was one) stays as it is.
        """
        self.total, self._models, self._optimizers, self._evaluate = total, models, optimizers, evaluate
        self._watch = None if watch is None else Watch(**watch.model_dump())
        self._parts = {**(parts or {}), **({} if self._watch is None else {"watch": self._watch})}
        first = 0 if self._checkpoint is None else self._restore(self._checkpoint)
        if first > total:
            raise DataError(f"{self._checkpoint}: is past the {total} steps of this run; set at least steps={first}")
        with ranks.together():
            self._open_records(total, first)
        self._cpu_seconds = time.process_time()
        if self.resume and self._checkpoint is None:
            self._notes.append("nothing was saved before; begins at step 0")
        for text in (*self._notes, *(f"resumed with other settings: {text}" for text in self._changed)):
            self._monitor.warn(text)
        self._watchdog.alive()
        return first

    def _open_records(self, total: int, first: int) -> None:
        """The monitor, which is silent in all processes but the first, and the run's record."""
        active = ranks.is_first()
        try:
            self._monitor = self._open.enter_context(
                Monitor(self.stage, self.out, total, tracker=self.config.tracker, start_step=first, active=active)
            )
            if active:
                for path, fault in self._damaged.items():
                    self._notes.append(
                        f"{path} is damaged: {fault}; it is now {checkpoint.set_aside(path).name}, and the run goes on "
                        f"from {self._checkpoint}"
                    )
                changed = {"changed": self._changed} if self._changed else {}
                self._record["starts"] = [*self._record["starts"], {"step": first, "time": time.time(), **changed}]
                write_json(self.out / record.FILE_NAME, self._record, indent=1)
        except OSError as error:
            raise DataError(
                f"{self.out}: cannot be written ({system_reason(error)}); free space or restore access there"
            ) from error

    def _restore(self, found: Path) -> int:
        tensors, self.state = checkpoint.load(found)
        step = self.state["step"]
        for prefix, optimizer in self._optimizers.items():
            try:
                optimizer.load(tensors.under(prefix), step)
            except ValueError as error:
                file = checkpoint.tensor_files(found)[0]
                raise DataError(f"{file}: {prefix}{error}; {checkpoint.REMOVE}") from None
        for name, part in self._parts.items():
            if name in self.state:
                try:
                    part.load(self.state[name])
                except (ValueError, TypeError, KeyError, AttributeError) as error:
                    raise DataError(f"{found}/trainer.json: {name}: {error}") from None
        if self.state.get("best") is not None:
            self._best = self._best_saved = (self.state["best"], self.state["best_value"])
        self._skipped.in_a_row = self.state.get("skipped_updates", 0)
        return step

    def end_of_step(
        self,
        step: int,
        clock: Clock,
        tokens: dict[str, int],
        metrics: dict[str, float],
        warnings: Sequence[str] = (),
        state: Mapping[str, Any] | None = None,
        fault: Fault | None = None,
    ) -> None:
        """Records step ``step`` (from 1), warns, evaluates and saves where it is time to.

        ``tokens`` by part of the step; ``state``: what else a resumed run needs, as JSON, by name; ``fault``: what was
        not finite, so that an update was skipped, which is counted, and its records kept. Raises, after
        saving, Stopped where a signal asked for it, DataError where ``max_skipped_updates`` in a row were skipped. A
        checkpoint that cannot be written is a warning.
        """
        metrics = metrics | self._heed_others() | self._skipped.count(step, fault, self._monitor.warn)
        stats = StepStats(step, metrics, clock.seconds, tokens)
        self._monitor.step(stats)
        alerts = self._watch.observe(stats) if self._watch is not None else []
        for text in (*alerts, *(f"step {step}: {text}" for text in (*self._first_halved(metrics), *warnings))):
            self._monitor.warn(text)
        hopeless = self._skipped.too_many
        if self._evaluate is not None and self._is_time(step, self.config.eval_every):
            self._settle()  # or the best may be one that is not there
            self.figures, value = self._evaluate()
            self._monitor.evaluation(step, self.figures)
            if self._best is None or value > self._best[1]:
                self._best = (step, value)
        is_best = self._best is not None and self._best[0] == step
        # Saving is a call of all processes: a signal that one of them got meanwhile is heeded at the next step's end.
        signum = self._asked.signum if ranks.world() == 1 else self._agreed
        if not (self._is_time(step, self.config.save_every) or is_best or hopeless or signum is not None):
            return
        self._settle()  # one at a time
        self._save(step, {**(state or {}), "skipped_updates": 0 if hopeless else self._skipped.in_a_row})
        if not (hopeless or signum is not None or not self.config.save_in_background):
            return
        unsaved = self._settle()
        saved = ranks.from_first(str(checkpoint.latest(self.folder) or self.folder))
        if hopeless:
            raise self._skipped.error(step, fault, saved)
        if signum is not None and step < self.total:
            if unsaved is not None:
                raise DataError(f"stopped by {signal.Signals(signum).name} at step {step}; {unsaved}")
            raise Stopped(signum, Path(saved))

    def warn(self, text: str) -> None:
        """Prints and records a warning, as of the step that was recorded last."""
        self._monitor.warn(text)

    def closing(self, thing: Closes) -> Closes:
        """The same; its ``close()`` is called when the session ends, however it does."""
        self._lock.callback(thing.close)
        return thing

    def _first_halved(self, metrics: Mapping[str, float]) -> list[str]:
        """What to say, once, where packs did not fit in memory; metrics count them at every step."""
        count = halved_packs([metrics])
        if count is None or self._halved:
            return []
        self._halved = True
        return [f"{sentence('halved', count=count)} (now {self.config.tokens_per_pack})"]

    def _heed_others(self) -> dict[str, float]:
        """Says that this process gets on, hears of a signal that any was sent, compares work, and brings together what
        the optimizers of each have measured by themselves."""
        self._watchdog.alive()
        before, self._cpu_seconds = self._cpu_seconds, time.process_time()
        found = [optimizer.figures() for optimizer in self._optimizers.values()]
        own = {name: sum(each.get(name, 0.0) for each in found) for name in names.OWN if any(name in x for x in found)}
        if ranks.world() == 1:
            if self._saver.done:
                self._settle()
            return own
        said = ranks.gather([self._asked.signum or 0, self._cpu_seconds - before, own, self._saver.done])
        signums, seconds, measured, saved = zip(*said)
        if all(saved):
            self._settle()
        self._agreed = max(signums) or None
        even = names.max_over_mean(seconds)
        metrics: dict[str, float] = {} if even is None else {names.RANKS["cpu_seconds"]: even}
        for name in names.OWN:
            value = name.combine((each[name], 1) for each in measured if name in each)
            metrics |= {} if value is None else {name: value}
        return metrics

    def _is_time(self, step: int, every: int) -> bool:
        """Every ``every`` steps, and at the end."""
        return step == self.total or (every > 0 and step % every == 0)

    def _save(self, step: int, state: dict[str, Any]) -> None:
        """Copies what a checkpoint holds to the hosts, and begins to write it: a call of all processes."""
        share = ranks.world()
        tensors = {
            f"{prefix}{name}": value
            for prefix, optimizer in self._optimizers.items()
            for name, value in optimizer.tensors(share).items()
        }
        models = {name: collect(share) for name, collect in self._models.items()}
        best, value = self._best if self._best is not None else (None, None)
        text = None
        if ranks.is_first():
            tensors |= checkpoint.random_states()
            state.update({name: part.state() for name, part in self._parts.items()})
            state.update(best_value=value, threads=torch.get_num_threads(), stage=self.stage, run=self._record)
            text = checkpoint.state_text(step, best, state)  # as it is now
        self._best_saving = self._best
        self._saver.start(checkpoint.Part(step, models, tensors, ranks.Share(share).file("trainer"), text, best))

    def _settle(self) -> str | None:
        """Waits for a checkpoint that is being written; where the system refused, says so, and returns what it said."""
        outcome = self._saver.wait()
        if outcome is None:
            return None
        if outcome.refused is None:
            self._best_saved = self._best_saving
            return None
        self._best = self._best_saved
        kept = checkpoint.latest(self.folder) or "none"
        unsaved = f"the checkpoint could not be written ({outcome.refused}); the last one is {kept}; {REMEDY}"
        self._monitor.warn(f"step {outcome.step}: {unsaved}")
        return unsaved

    def finish(self, skipped: Sequence[str] = ()) -> dict[str, float]:
        """Reports the records that were ``skipped``, writes ``OUT/final/``: the models of the last step as directories
        that other tools open. Returns the figures of the last evaluation."""
        for line in skipped:
            self._monitor.warn(f"skipped: {line}")
        self._settle()
        self._open.close()
        models = {name: collect(1) for name, collect in self._models.items()}
        with ranks.together():
            if ranks.is_first():
                write_final(self.final, models, self.folder)
        return self.figures
