"""Rewards by a function of a user's own (`reward.function`), in a process with limits on time and memory."""

from __future__ import annotations

import atexit
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from prism_fast.config import OwnReward
from prism_fast.records import DataError, Sample

START_SECONDS = 600.0  # imports of a function's module, by the wall clock


@lru_cache
def function_of(settings: OwnReward) -> RewardFunction:
    """The started function of these settings; DataError where it cannot be loaded."""
    function = RewardFunction(settings)
    atexit.register(function.stop)
    return function


class RewardFunction:
    """``f(response, record, images) -> number``, called in a process of its own, one call at a time.

    response: the text. record: `record_of`. images: paths of the record's images; those that a file holds as bytes lie
    in a temporary folder during the call. Every fault is a DataError of one line that names function and record: an
    exception, a value that is no finite number (or, in place of the accuracy, outside [0, 1]), more than
    ``settings.seconds`` of CPU time or ten times that by the wall clock, memory, an exit.
    """

    def __init__(self, settings: OwnReward):
        self.settings, self.name = settings, str(settings.function)
        self._lock, self._stopped = threading.Lock(), False
        self._folder = tempfile.TemporaryDirectory(prefix="prism-reward-")
        self._shown: tuple[Sample | None, list[str]] = (None, [])
        self._process = self._start()

    def __call__(self, response: str, sample: Sample) -> float:
        with self._lock:
            question = {"response": response, "record": record_of(sample), "images": self._images(sample)}
            try:
                reply = self._ask(json.dumps(question), 10 * self.settings.seconds)
            except _Fault as fault:
                self.stop()
                raise DataError(f"{sample.place}: reward.function {self.name}: {fault}; correct the function") from None
        problem, value = reply.get("fault"), float(reply.get("value", 0.0))
        if problem is None and self.settings.replaces == "accuracy" and not 0 <= value <= 1:
            problem = f"expected an accuracy from 0 to 1, got {value:g} (or set reward.replaces=reward)"
        if problem is not None:
            raise DataError(f"{sample.place}: reward.function {self.name}: {problem}; correct the function")
        return value

    def stop(self) -> None:
        if self._stopped:  # another's process may have its number by now
            return
        self._stopped = True
        atexit.unregister(self.stop)
        self._kill()
        function_of.cache_clear()  # a later question starts it anew

    def _kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # with what the function started
        self._process.wait()

    def _start(self) -> subprocess.Popen[bytes]:
        memory = int(self.settings.memory_gib * 2**30)
        command = [sys.executable, str(Path(__file__).with_name("own_server.py")), self.name]
        place = self.name.rpartition(":")[0]
        beside = [str(Path(place).resolve().parent)] if place.endswith(".py") else []  # what the file imports
        paths = [*beside, *(path or os.getcwd() for path in ["", *sys.path])]
        self._process = subprocess.Popen(
            [*command, str(self.settings.seconds), str(memory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )
        try:
            problem = self._read(START_SECONDS).get("fault")
        except _Fault as fault:
            problem = str(fault)
        if problem is not None:
            self._kill()
            raise DataError(f"reward.function: {self.name}: {problem}; give module:name or path.py:name")
        return self._process

    def _ask(self, question: str, seconds: float) -> dict[str, Any]:
        try:
            self._process.stdin.write(question.encode() + b"\n")  # type: ignore[union-attr]
        except BrokenPipeError:
            raise _Fault(self._end()) from None
        return self._read(seconds)

    def _read(self, seconds: float) -> dict[str, Any]:
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)  # type: ignore[arg-type]
            if not selector.select(seconds):
                raise _Fault(f"took more than {seconds:g} s")
        line = self._process.stdout.readline()  # type: ignore[union-attr]
        if not line.endswith(b"\n"):
            raise _Fault(self._end())
        return json.loads(line)

    def _end(self) -> str:
        status = self._process.wait()
        if status == -signal.SIGPROF:
            return f"took more than {self.settings.seconds:g} s of CPU time (reward.seconds)"
        how = f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
        return f"its process ended {how} (memory: at most {self.settings.memory_gib:g} GiB, reward.memory_gib)"

    def _images(self, sample: Sample) -> list[str]:
        if self._shown[0] is not sample:
            for old in Path(self._folder.name).iterdir():
                old.unlink()
            self._shown = (sample, [self._image(sample, number) for number in range(len(sample.images))])
        return self._shown[1]

    def _image(self, sample: Sample, number: int) -> str:
        image = sample.images[number]
        if image.data is None:
            return str(Path(str(image.path)).resolve())
        path = Path(self._folder.name) / f"{number}"
        path.write_bytes(image.data)
        return str(path)


class _Fault(Exception):
    """What went wrong, for a line."""


def record_of(sample: Sample) -> dict[str, Any]:
    """What a reward function is told of a record: plain values, as JSON has them.

    >>> record_of(Sample("a.jsonl:1", (Message("user", "Sum?"),), gold="10"))
    {'place': 'a.jsonl:1', 'messages': [{'role': 'user', 'content': 'Sum?'}], 'gold': '10', ...}
    """
    return {
        "place": sample.place,
        "messages": [{"role": message.role, "content": message.content} for message in sample.messages],
        "gold": sample.gold,
        "equivalents": list(sample.equivalents),
        "question_type": sample.question_type,
        "data_source": sample.data_source,
    }
