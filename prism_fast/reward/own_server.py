"""The process that calls a reward function of a user's own; started and spoken to by `own.py` alone.

Protocol, one JSON object a line: question ``{"response", "record", "images"}``; reply ``{"value": number}`` or
``{"fault": one line}``. The first line is ``{"value": 0}`` once the function is loaded, or its fault. What the function
prints goes to stderr.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def main(name: str, seconds: float, memory: int) -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the trainer, whose end closes our input
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    questions = os.fdopen(os.dup(0), "rb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    try:
        function = load(name)
    except BaseException as error:  # noqa: BLE001 (whatever it is, it is told)
        replies.write(json.dumps({"fault": _one_line(error)}) + "\n")
        return 1
    replies.write(json.dumps({"value": 0}) + "\n")
    ours = os.getpid()
    for line in questions:
        question = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, seconds)  # SIGPROF ends a process
        try:
            reply = _value(function(question["response"], question["record"], question["images"]))
        except BaseException as error:  # noqa: BLE001 (whatever it is, it is told)
            reply = {"fault": _one_line(error)}
        if os.getpid() != ours:  # the function forked: one of the two goes on
            os._exit(0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        replies.write(json.dumps(reply) + "\n")
    return 0


def load(name: str) -> Callable[..., Any]:
    """The function that "module:name" or "path.py:name" is."""
    place, _, attribute = name.rpartition(":")
    if place.endswith(".py"):
        path = Path(place)
        if not path.is_file():
            raise FileNotFoundError(f"no file {place!r}")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(place)
    function = getattr(module, attribute)
    if not callable(function):
        raise TypeError(f"{attribute} is no function but {type(function).__name__}")
    return function


def _value(value: Any) -> dict[str, Any]:
    try:
        number = float(None if isinstance(value, str | bytes | bytearray) else value)
    except (TypeError, ValueError):
        return {"fault": f"expected a number, got {type(value).__name__}"}
    return {"value": number} if math.isfinite(number) else {"fault": f"expected a finite number, got {number}"}


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}".rstrip(": ")


if __name__ == "__main__":
    if sys.path[0] == os.path.dirname(os.path.abspath(__file__)):
        del sys.path[0]  # this folder, whose files must not pass for top-level modules
    sys.exit(main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3])))
