"""The process that compares symbolic answers with math-verify; started and spoken to by `symbolic.py` alone.

It imports math-verify once and then forks a child that answers the questions, so that one that takes too long can be
killed with certainty and its successor is there in milliseconds, warm. The trainer's process, with its threads, is
never forked. A child may not use more than `MEMORY` bytes or write files, and nothing in it evaluates text as Python:
only LaTeX is parsed, by math-verify's grammar, and sympy's use of ``eval`` is replaced.

Protocol, one line each: question ``{"gold": latex, "answer": latex, "seconds": s}``; reply ``yes``, ``no``, ``late``
(out of time) or ``failed`` (out of memory, not LaTeX, ...). The first line says ``ready`` or ``missing <why>``.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import re
import resource
import select
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

MEMORY = 2 << 30  # bytes of address space
QUESTIONS = 500  # per child: sympy remembers what it has computed
MAX_FILES = 64  # the server opens a dozen
_REPLIES = {b"y": "yes", b"n": "no", b"l": "late"}
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
    child = _Child(compare)
    for line in sys.stdin.buffer:
        verdict = child.ask(line, json.loads(line)["seconds"])
        replies.write(_REPLIES.get(verdict, "failed") + "\n")
        if verdict not in (b"y", b"n") or child.asked == QUESTIONS:
            child.end()
            child = _Child(compare)
    child.end()
    return 0


def _load() -> Compare:
    import logging

    import sympy
    import sympy.parsing.sympy_parser
    from math_verify import LatexExtractionConfig, LatexNormalizationConfig, parse, verify

    logging.disable(logging.CRITICAL)
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


class _Child:
    """A fork that answers questions until one takes too long or `QUESTIONS` are answered."""

    def __init__(self, compare: Compare):
        questions, self.questions = os.pipe()
        self.verdicts, verdicts = os.pipe()
        self.asked = 0
        self.process = os.fork()
        if self.process == 0:
            _serve_and_exit(compare, questions, verdicts)
        os.close(questions)
        os.close(verdicts)

    def ask(self, line: bytes, seconds: float) -> bytes:
        """One letter of `_REPLIES`, or nothing where the child died of the question."""
        self.asked += 1
        try:
            os.write(self.questions, line)  # far less than a pipe holds
        except BrokenPipeError:
            return b""
        ready, _, _ = select.select([self.verdicts], [], [], seconds)
        return os.read(self.verdicts, 1) if ready else b"l"

    def end(self) -> None:
        os.kill(self.process, signal.SIGKILL)
        os.waitpid(self.process, 0)
        os.close(self.questions)
        os.close(self.verdicts)


def _serve_and_exit(compare: Compare, questions: int, verdicts: int) -> NoReturn:
    status = 1
    try:
        # Held open here, the server's pipes would outlive it.
        for inherited in [0, *range(3, MAX_FILES)]:
            if inherited not in (questions, verdicts):
                with contextlib.suppress(OSError):
                    os.close(inherited)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        for line in os.fdopen(questions):
            question = json.loads(line)
            used = resource.getrusage(resource.RUSAGE_SELF)
            limit = int(used.ru_utime + used.ru_stime + question["seconds"]) + 2
            resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
            os.write(verdicts, b"y" if compare(question["gold"], question["answer"]) else b"n")
        status = 0
    finally:
        os._exit(status)  # an error ends here too: nothing was written, and the answer counts as "failed"


if __name__ == "__main__":
    if sys.path[0] == os.path.dirname(os.path.abspath(__file__)):
        del sys.path[0]  # this folder, whose files must not pass for top-level modules
    sys.exit(main())
