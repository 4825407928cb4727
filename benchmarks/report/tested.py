"""Whether what a result shows was tested: by its own run, or by the part of ``make gpu`` beside it.

An op whose tests failed shows no speed; one whose tests did not run says so.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

COUNTS = ("passed", "failed", "skipped", "unfinished")
PASSED, FAILED, UNFINISHED, NOT_RUN = "passed", "failed", "not finished", "not run"
REFUSED = "refused: its tests failed"
Document = dict[str, Any]


def tests_of(document: Document, documents: Sequence[Document]) -> tuple[str, str]:
    """(status, what is known of it) of a benchmark's tests.

    They are in its document, or, where `make gpu` ran "bench-<name>" or "first-<name>", in the newest "tests-<name>" of
    the same commit and device. A whole step's test is the agreement of its ways, which every document of one holds; the
    trainer's own steps, part by part, are tested with the trainer.
    """
    own = document.get("tests")
    if own is not None:
        return own["status"], own["summary"]
    if any("checked" in problem for problem in document["problems"]):
        return PASSED, "times stand only where all ways agree"
    if any("parts" in problem for problem in document["problems"]):
        return NOT_RUN, "they are the trainer's: make test"
    name = re.sub("^(bench|first)-", "tests-", document.get("part", {}).get("name", ""))
    beside = [other for other in documents if other["op"] == name and "part" in other and _same(document, other)]
    if not name or not beside:
        return NOT_RUN, ""
    part = max(beside, key=lambda other: other["date"])["part"]
    counts = part.get("tests", {"passed": 0, "failed": 0, "unfinished": 0, "not collected": []})
    shown = f"{counts['passed']} passed, {counts['failed']} failed"
    if failed(part):
        return FAILED, shown
    if part["status"] == "ok" and counts["passed"]:
        return PASSED, shown
    return UNFINISHED if counts["passed"] else NOT_RUN, ", ".join([shown, part["status"], *counts["not collected"]])


def failed(part: dict[str, Any]) -> bool:
    """Whether the outcome of a part of tests holds a failure, or it ended without a count: a crash. A file that lacks
    an optional package, and tests out of time, are no failures."""
    return part["tests"]["failed"] > 0 if "tests" in part else part["status"] == "failed"


def summary(part: dict[str, Any]) -> str:
    """Counts of a part of tests, or the last line that the part has written."""
    if "tests" in part:
        return ", ".join(f"{part['tests'][key]} {key}" for key in COUNTS)
    return next((line for line in reversed(part["tail"]) if line.strip()), "")


def refused(document: Document, documents: Sequence[Document]) -> bool:
    return tests_of(document, documents)[0] == FAILED


def _same(one: Document, other: Document) -> bool:
    return (one["commit"], one["environment"]["device"]) == (other["commit"], other["environment"]["device"])
