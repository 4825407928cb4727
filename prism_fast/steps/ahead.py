"""Batches of responses, each of which is sampled while the one before it trains where a run asks for it.

With ``rollout.overlap`` 1 a thread samples the batch of step s + 1 from the weights after s steps while step s trains
on its own. Between two steps nothing runs: evaluation, saving and new weights find the sampler idle. The weights that a
batch was sampled from are gone when a run is resumed, so a checkpoint holds the responses of the batch that is due: the
calls of the sampler are answered from it, and all that follows from them is made again.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from threading import Thread
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from prism_fast import metric_names as names
from prism_fast import ranks
from prism_fast.config import AlignConfig, RLVRConfig, Sampling
from prism_fast.data.chat import Chat
from prism_fast.records import DataError, Prompt, Rollout
from prism_fast.steps.sampler import Sampler
from prism_fast.steps.sampler_shares import Response, rollout_from

B = TypeVar("B")
END_SECONDS = 30.0  # that a run which ends early waits for its sampler


class _Call(NamedTuple):
    """A call of `Sampler.generate`, and its responses."""

    asked: bytes
    responses: Sequence[Response]
    tokens_by_rank: tuple[int, ...]


@dataclass
class _Drawn(Generic[B]):
    step: int  # that trains on it
    version: int  # steps of the weights that sampled it
    batch: B
    calls: list[_Call]


@dataclass
class _Saved:
    """A batch that was due when a checkpoint was written."""

    version: int
    calls: list[_Call] = field(default_factory=list)


class _Others(Exception):
    """What was saved is of other calls."""


class _Ended(Exception):
    """The run ends before its sampler is done."""


class Ahead(Generic[B]):
    """``take`` and ``give`` at both ends of every step; in between the next batch is drawn, where the run overlaps.

    A draw, ``draw(step, batch before)``, makes the batch that step ``step`` trains on, calling this object's
    ``generate``; it runs in another thread, so it changes nothing that a step reads. ``warn`` is called in ``take``.
    """

    def __init__(self, sampler: Sampler, chat: Chat, config: AlignConfig | RLVRConfig, warn: Callable[[str], None]):
        self.sampler, self.chat, self.warn = sampler, chat, warn
        self.overlap, self.last = config.rollout.overlap, config.steps
        self._group = ranks.another_group(config.cluster.timeout_minutes) if self.overlap else None
        self._before: B | None = None  # that was taken last
        self._next: _Drawn[B] | None = None
        self._saved: _Saved | None = None
        self._thread: Thread | None = None
        self._fault: Exception | None = None
        self._seconds: float | None = None  # of the draw that ran beside the last step
        self._ending = False
        # Of the draw that runs.
        self._made: list[_Call] = []
        self._kept: list[_Call] | None = None  # of a checkpoint, which answer its calls

    def figures(self) -> dict[str, float]:
        """None: the optimizers measure what a process does by itself."""
        return {}

    # ---- a step

    def take(self, draw: Callable[[int, B | None], B], step: int) -> B:
        """The batch of step ``step``, whose weights are those of now; the next one is drawn from here on."""
        drawn = self._next
        if drawn is None:
            drawn = self._again(draw, step) or self._draw(draw, step, self._before, now=step)
        elif (drawn.step, drawn.version) != (step, step - self.overlap):
            raise DataError(
                f"rollout.overlap = {self.overlap}: the batch of step {drawn.step}, of weights of step {drawn.version},"
                f" came to step {step}, expected weights of step {step - self.overlap}"
            )
        self._next, self._before, self._seconds = None, drawn.batch, None
        if not self.overlap or step + 1 >= self.last:
            self.sampler.rest()
        elif self.sampler.apart:
            given = (draw, step + 1, drawn.batch, step, torch.get_num_threads())
            self._thread = Thread(target=self._beside, args=given, daemon=True)
            self._thread.start()
        else:
            self._next = self._draw(draw, step + 1, drawn.batch, now=step)
        return drawn.batch

    def give(self, weights: Iterable[tuple[str, Tensor]], step: int) -> dict[str, float]:
        """Waits for the next batch, then has the sampler take the weights after ``step`` steps; returns metrics.

        What went wrong in a draw beside the step is raised here.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._fault is not None:
            raise self._fault
        self.sampler.update(weights, step)
        return {} if self._seconds is None else {names.OVERLAP_SECONDS: self._seconds}

    def close(self) -> None:
        """Ends a draw that nobody waits for any more at its next finished response."""
        self._ending = True
        if self._thread is not None:
            self._thread.join(END_SECONDS)

    # ---- a draw

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, *, seed: int) -> Rollout:
        """`Sampler.generate`, as a draw calls it."""
        asked = _asked(prompts, sampling, seed)
        if self._kept is None:
            rollout = self.sampler.generate(prompts, sampling, seed=seed, progress=self._heed)
            responses = [Response(*each) for each in zip(rollout.response_ids, rollout.logprob)]
            call = _Call(asked, responses, rollout.tokens_by_rank)
        elif self._kept and self._kept[0].asked == asked:
            call = self._kept.pop(0)
            rollout = rollout_from(prompts, sampling.samples, call.responses, call.tokens_by_rank, self.chat)
        else:
            raise _Others
        self._made.append(call)
        return rollout

    def _heed(self, done: int) -> None:
        if self._ending:
            raise _Ended

    def _draw(self, draw: Callable[[int, B | None], B], step: int, before: B | None, *, now: int) -> _Drawn[B]:
        version = now if self.sampler.step is None else self.sampler.step
        if version != now:
            raise DataError(f"rollout: the sampler has weights of step {version}, expected those of step {now}")
        self._made = []
        return _Drawn(step, version, draw(step, before), self._made)

    def _again(self, draw: Callable[[int, B | None], B], step: int) -> _Drawn[B] | None:
        """The batch that a checkpoint holds the responses of."""
        saved, self._saved = self._saved, None
        if saved is None:
            return None
        self._made, self._kept = [], list(saved.calls)
        try:
            batch = draw(step, None)
            if not self._kept:
                return _Drawn(step, saved.version, batch, self._made)
        except _Others:
            pass
        finally:
            self._kept = None
        self.warn("the checkpoint's responses are to other prompts than are due now; new ones are sampled")
        return None

    def _beside(self, draw: Callable[[int, B | None], B], step: int, before: B, now: int, threads: int) -> None:
        """In a thread."""
        began = time.perf_counter()
        try:
            torch.set_num_threads(threads)  # OpenMP's and MKL's number is a thread's own
            with ranks.through(self._group):
                self._next = self._draw(draw, step, before, now=now)
        except Exception as error:  # noqa: BLE001 (whatever it is, `give` raises it)
            self._fault = error
        self._seconds = time.perf_counter() - began

    # ---- checkpoints: an `Optimizer` of `run/session.py`

    def tensors(self, parts: int = 1) -> dict[str, Tensor]:
        """The responses of the batch that is due; in the first process, as all have the same. They never change."""
        if not self.overlap or self._next is None or not ranks.is_first():
            return {}
        kept = {"version": torch.tensor(self._next.version), "calls": torch.tensor(len(self._next.calls))}
        for number, call in enumerate(self._next.calls):
            found = {
                "asked": torch.frombuffer(bytearray(call.asked), dtype=torch.uint8),
                "length": torch.tensor([len(r.ids) for r in call.responses], dtype=torch.int64),
                "ids": torch.cat([r.ids for r in call.responses]).int(),
                "logprob": torch.cat([r.logprob for r in call.responses]),
                "tokens_by_rank": torch.tensor(call.tokens_by_rank, dtype=torch.int64),
            }
            kept |= {f"{number}.{name}": value for name, value in found.items()}
        return kept

    def load(self, tensors: Mapping[str, Tensor], steps: int) -> None:
        """Raises ValueError where they are not what `tensors` gives."""
        if not self.overlap or not tensors:
            return
        try:
            version, count = int(tensors["version"]), int(tensors["calls"])
            calls = [_call({name: tensors[f"{i}.{name}"] for name in _NAMES}) for i in range(count)]
        except (KeyError, RuntimeError) as error:
            raise ValueError(f"responses of the next step: {' '.join(str(error).split())}") from None
        if version != steps - self.overlap:
            raise ValueError(f"responses of the next step: of weights of step {version}, expected {steps - 1}")
        self._saved = _Saved(version, calls)


_NAMES = ("asked", "length", "ids", "logprob", "tokens_by_rank")


def _call(found: dict[str, Tensor]) -> _Call:
    lengths = found["length"].tolist()
    parts = zip(found["ids"].long().split(lengths), found["logprob"].split(lengths), strict=True)
    return _Call(
        found["asked"].numpy().tobytes(), [Response(*part) for part in parts], tuple(found["tokens_by_rank"].tolist())
    )


def _asked(prompts: Sequence[Prompt], sampling: Sampling, seed: int) -> bytes:
    """What two equal calls have in common: their answers may be each other's."""
    said = f"{seed} {sampling.samples} {sampling.max_response_tokens} {sampling.temperature} {len(prompts)}"
    digest = hashlib.sha256(said.encode())
    for prompt in prompts:
        digest.update(prompt.key)
    return digest.digest()
