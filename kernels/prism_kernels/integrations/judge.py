"""A judge that scores and learns in a process of its own, for a host in whose environment it cannot be imported.

>>> judge = JudgeProcess([python, "-m", "prism_fast.steps.judge_process", "--discriminator", "warmup/final", ...])
>>> judge(completion_ids=[[5, 7], [9]], record=[0, 0])
{'perception': [0.3, None], 'reasoning': [0.1, None], 'format_valid': [1.0, 0.0]}

A line of JSON goes to the process for every call, and one comes back; nothing listens anywhere.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any


class JudgeProcess:
    """What ``algorithm.prism.judge`` of the integration of verl takes; any program that speaks these lines will do.

    Args:
        command: the program and its arguments. It answers a first line, ``{}``, when it is ready; ends with its input.
        environment: variables set for it, as CUDA_VISIBLE_DEVICES: Ray hides the GPUs from a trainer without one.
    Raises:
        RuntimeError: it ended, or answered an error; what it printed stands before.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, Any] | None = None):
        self.command = [str(word) for word in command]
        extra = {name: str(value) for name, value in (environment or {}).items()}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(self.command, stdin=pipe, stdout=pipe, text=True, env={**os.environ, **extra})
        self._answer()

    def __call__(
        self, *, log_metric: Callable[[str, float], None] | None = None, learn: bool = True, **columns: Sequence[Any]
    ) -> dict[str, list[float | None]]:
        """``completion_ids`` and what else the judge takes, lists of one entry per response -> scores by name."""
        answer = self._ask({"judge": columns, "learn": learn})
        for name, value in answer["metrics"].items():
            if log_metric is not None:
                log_metric(name, value)
        return answer["scores"]

    def save(self, folder: str | Path) -> None:
        self._ask({"save": str(folder)})

    def load(self, folder: str | Path) -> None:
        self._ask({"load": str(folder)})

    def close(self) -> None:
        """Ends the process, which has its input's end to stop at."""
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
        self.process.wait()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended: reading says so
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the judge's process ended with status {self.process.wait()}: {' '.join(self.command)}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"the judge's process: {answer['error']}")
        return answer
