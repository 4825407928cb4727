"""The process that compares symbolic answers with math-verify; started and spoken to by `symbolic.py` alone.

It imports math-verify once and forks a child for every question, so that each meets the same state: what a comparison
costs depends on the question alone. That cost is counted in Python calls, as many at any load; the clock of the
child's CPU time stops what the count does not see (long integers), and the wall clock only what hangs: a
child that in ``wall`` seconds had no CPU time at all. The trainer's
process, with its threads, is never forked. A child may not use more than `MEMORY` bytes, start a process, open a socket
or any file but a library's, and nothing in it evaluates text as Python: only LaTeX is parsed, by math-verify's grammar,
and sympy's use of ``eval`` is replaced.

Protocol, one line each: question ``{"gold": latex, "answer": latex, "calls": n, "seconds": of CPU, "wall": s}``; reply
``yes``, ``no``, ``costly`` (more calls or CPU time than that), ``failed`` (out of memory, not LaTeX, ...) or ``late``
(it hung, or was killed from outside), then the calls and the CPU seconds that it took. The first line
says ``ready`` or ``missing <why>``.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import re
import resource
import select
import signal
import sys
import sysconfig
import time
from collections.abc import Callable
from typing import NoReturn

MEMORY = 1 << 30  # bytes of address space
MAX_FILES = 64  # the server opens a dozen
_LITERAL = re.compile(r"\s*(Integer|Float) *\( *'?([0-9.]+)'? *\)\s*")
_WARM_UP = [
    (r"\frac{(x-1)(x+1)}{2}", r"(x^{2}-1)/2"),
    (r"-b-\sqrt{b^2-4ac}", r"-(b+\sqrt{b^{2}-4ac})"),
    (r"\sin x", r"\log_{2} x"),
]
Compare = Callable[[str, str], bool]


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the trainer, whose end closes our input
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    silence = os.open(os.devnull, os.O_RDWR)
    os.dup2(silence, 1)  # parsers print warnings
    try:
        compare = _load()
    except ImportError as error:
        replies.write(f"missing {error!r}\n")
        return 1
    os.dup2(silence, 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    replies.write("ready\n")
    gc.freeze()  # a collection in a child would copy every page that it looks at
    for line in sys.stdin.buffer:
        replies.write(_answer(compare, json.loads(line)) + "\n")
    return 0


def _load() -> Compare:
    import logging

    import math_verify.parser
    import sympy
    import sympy.parsing.sympy_parser
    from latex2sympy2_extended import symbols
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
    from math_verify import LatexExtractionConfig, LatexNormalizationConfig, parse, verify

    logging.disable(logging.CRITICAL)
    # Otherwise R would be r.
    for constant in ("gamma", "Gamma"):  # letters, not Euler's constant
        symbols.sympy_singleton_map.pop(constant, None)
    keep_case = ConversionConfig(lowercase_symbols=False)
    math_verify.parser.latex2sympy = functools.partial(latex2sympy, conversion_config=keep_case)
    # It would take letters off as units ("3ab" is 3 abcoulomb); units are judged before a text comes here.
    normalization = LatexNormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all", equations=False
    )
    config = [LatexExtractionConfig(normalization_config=normalization)]

    def compare(gold: str, answer: str) -> bool:
        # The time limit is ours: math-verify's works by SIGALRM and is switched off.
        parsed = [
            parse(f"${text}$", extraction_config=config, fallback_mode="no_fallback", parsing_timeout=None)
            for text in (gold, answer)
        ]
        return all(parsed) and bool(verify(*parsed, allow_set_relation_comp=True, timeout_seconds=None))

    def literal_only(code: object, *_scopes: object) -> sympy.Basic:
        """In place of sympy's ``eval``, which it uses even for the digits of a number."""
        match = _LITERAL.fullmatch(code) if isinstance(code, str) else None
        if match is None:
            raise ValueError("text is not evaluated here")
        return sympy.Integer(int(match[2])) if match[1] == "Integer" else sympy.Float(match[2])

    # sympy imports half of itself late, and the grammar learns its tables as it parses: once here, not in every child.
    for gold, answer in _WARM_UP:
        compare(gold, answer)
    sympy.parsing.sympy_parser.eval_expr = literal_only
    return compare


def _answer(compare: Compare, question: dict) -> str:
    """The reply to one question, from a child of its own."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        _compare_and_exit(compare, question, writer)
    os.close(writer)
    clock = (~child << 3) | 2  # Linux: the CPU clock of that process
    in_time, used = [], -1.0
    while not in_time and (now := time.clock_gettime(clock)) > used:  # waiting for a processor is no hang
        used = now
        in_time, _, _ = select.select([reader], [], [], question["wall"])
    if not in_time:
        os.kill(child, signal.SIGKILL)
    _, status, usage = os.wait4(child, 0)
    reply = os.read(reader, 64).decode() if in_time else ""
    os.close(reader)
    if not reply:
        ended_by = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        verdict = {signal.SIGKILL: "late", signal.SIGPROF: "costly", signal.SIGXCPU: "costly"}.get(ended_by, "failed")
        reply = f"{verdict} {question['calls'] if verdict == 'costly' else 0}"
    return f"{reply} {usage.ru_utime + usage.ru_stime:.4f}"


def _compare_and_exit(compare: Compare, question: dict, writer: int) -> NoReturn:
    status, calls, limit = 1, 0, question["calls"]

    def count(*_event: object) -> None:
        nonlocal calls
        calls += 1
        if calls > limit:  # an exception could be caught on its way out
            os.write(writer, b"costly %d" % limit)
            os._exit(0)

    try:
        os.closerange(3, writer)
        os.closerange(writer + 1, MAX_FILES)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (int(question["seconds"]) + 2, resource.RLIM_INFINITY))
        signal.setitimer(signal.ITIMER_PROF, question["seconds"])  # SIGPROF ends a process, also in the midst of C
        sys.addaudithook(_refuse)
        sys.settrace(count)
        same = compare(question["gold"], question["answer"])
        sys.settrace(None)
        os.write(writer, b"%s %d" % (b"yes" if same else b"no", calls))
        status = 0
    finally:
        os._exit(status)  # an error ends here too: nothing was written, and the answer counts as "failed"


_PATHS = [sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")]
_LIBRARIES = tuple(os.path.realpath(path) + os.sep for path in _PATHS if path)
_REFUSED = ("os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.system", "os.remove", "os.rename", "os.kill")
_REFUSED += ("subprocess.", "socket.", "shutil.", "pty.", "ctypes.")


def _refuse(event: str, arguments: tuple) -> None:
    """An audit hook: libraries may be imported late, and nothing else is opened or started."""
    if event == "open":
        path, _, flags = arguments
        if flags & (os.O_WRONLY | os.O_RDWR) or not os.path.realpath(path).startswith(_LIBRARIES):
            raise PermissionError(f"{path}: not opened here")
    elif event.startswith(_REFUSED):
        raise PermissionError(f"{event}: not done here")


if __name__ == "__main__":
    if sys.path[0] == os.path.dirname(os.path.abspath(__file__)):
        del sys.path[0]  # this folder, whose files must not pass for top-level modules
    sys.exit(main())
