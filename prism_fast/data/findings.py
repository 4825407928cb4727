"""What `prism-fast data check` has found in one file, folder or pattern, for a person and as JSON."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel

from prism_fast import printable
from prism_fast.data.lengths import Lengths
from prism_fast.data.packing import Packing, Steps, figures, lines
from prism_fast.data.unread import named
from prism_fast.data.verdicts import Judged
from prism_fast.records import Sample

SHOWN_CHARACTERS = 1200
SHOWN_BAD = 20
KEPT_BAD = 1000  # that are named in JSON; all are counted
SHOWN_REPEATS = 5
SHOWN_SIZES = 5


Place = Callable[[int], str]  # of a record, by its number among all


class Bad(dict[str, Any]):
    """One bad record: place, problem and, of a parquet file, row_group."""

    def __str__(self) -> str:
        group = self.get("row_group")
        return self["problem"] if group is None else f"{self['problem']} (row group {group})"


@dataclass
class Findings:
    """Counts of the good records, and the first bad ones: some 60 bytes a record and 24 an image."""

    path: str
    kind: str
    files: int = 1
    limits: str = ""
    records: int = 0
    bad: int = 0
    first_bad: list[Bad] = field(default_factory=list)
    unread: set[str] = field(default_factory=set)  # fields that hold something and that no stage reads
    types: Counter[str] = field(default_factory=Counter)
    unformatted: int = 0
    stored: Counter[tuple[str, str]] = field(default_factory=Counter)  # images by format of file, and mode
    lengths: Lengths = field(default_factory=Lengths)
    first: Sample | None = None
    digests: array[int] = field(default_factory=lambda: array("Q"))
    numbers: array[int] = field(default_factory=lambda: array("q"))  # of the good records, among all
    images: array[int] = field(default_factory=lambda: array("Q"))  # their digests
    sizes: array[int] = field(default_factory=lambda: array("i"))  # width, height, ...
    ends: array[int] = field(default_factory=lambda: array("q"))  # of each record's images
    steps: dict[str, Steps] = field(default_factory=dict)  # by model, in packs
    misfit: str | None = None  # why there are none

    def add(self, number: int, judged: Judged) -> None:
        self.records += 1
        self.numbers.append(number)
        self.digests.append(judged.digest)
        for digest, look in judged.pictures:
            self.images.append(digest)
            self.sizes.extend(look.size)
            self.stored[look.format, look.mode] += 1
        self.ends.append(len(self.images))
        if judged.tree is not None:
            self.lengths.add(judged.tree)
        self.types[judged.question_type] += 1
        self.unformatted += judged.unformatted

    def refuse(self, place: str, problem: str, row_group: int | None) -> None:
        self.bad += 1
        if len(self.first_bad) < KEPT_BAD:
            told = Bad(place=place, problem=problem)
            self.first_bad.append(told if row_group is None else Bad(told, row_group=row_group))

    def pictures(self, record: int) -> list[tuple[int, tuple[int, int]]]:
        """(digest, (width, height)) of the images of a good record, by its number among them."""
        start = self.ends[record - 1] if record else 0
        sizes = self.sizes
        return [(self.images[i], (sizes[2 * i], sizes[2 * i + 1])) for i in range(start, self.ends[record])]

    def distinct_images(self) -> int:
        """By what their files hold."""
        return len(np.unique(np.array(self.images, dtype=np.uint64)))

    def repeats(self) -> tuple[int, list[tuple[int, int]]]:
        """(how many records repeat an earlier one; (number, number of the first one like it) of a few of them)."""
        digests = np.array(self.digests, dtype=np.uint64)
        places = np.argsort(digests, kind="stable")
        again = np.flatnonzero(digests[places][1:] == digests[places][:-1]) + 1
        some = np.sort(places[again])[:SHOWN_REPEATS]
        firsts = [int(np.flatnonzero(digests == digests[one])[0]) for one in some]
        return len(again), [(self.numbers[int(one)], self.numbers[first]) for one, first in zip(some, firsts)]

    def image_figures(self) -> dict[str, Any]:
        """Number, sizes, formats and modes of the images."""
        sizes = np.array(self.sizes, dtype=np.int64).reshape(-1, 2)
        if not len(sizes):
            return {"count": 0}
        common, counts = np.unique(sizes, axis=0, return_counts=True)
        most = np.argsort(-counts, kind="stable")[:SHOWN_SIZES]
        return {
            "count": len(sizes),
            "distinct": self.distinct_images(),
            "width": _spread(sizes[:, 0]),
            "height": _spread(sizes[:, 1]),
            "pixels": _spread(sizes.prod(axis=1)),
            "sizes": len(common),
            "most_common": [[*map(int, common[i]), int(counts[i])] for i in most],
            "stored_as": {f"{format} {mode}": count for (format, mode), count in self.stored.most_common()},
        }


def _spread(values: np.ndarray[Any, Any]) -> dict[str, int]:
    return {"min": int(values.min()), "median": int(np.median(values)), "max": int(values.max())}


def as_json(found: Findings, place: Place, packing: Packing) -> dict[str, Any]:
    """For machines; the names are kept."""
    repeated, some = found.repeats()
    return {
        "path": found.path,
        "format": found.kind,
        "files": found.files,
        "records": found.records,
        "bad": found.bad,
        "bad_records": found.first_bad,
        "images": found.image_figures(),
        "repeated_records": repeated,
        "repeats": [{"place": place(one), "first": place(first)} for one, first in some],
        "not_read": sorted(found.unread),
        "question_types": dict(found.types.most_common()),
        "responses_without_format": found.unformatted,
        "tokens": found.lengths.figures() if len(found.lengths) else None,
        "packing": {model: figures(steps, packing) for model, steps in found.steps.items()} or None,
        "does_not_fit": found.misfit,
        "limits": found.limits,
    }


def show(found: Findings, place: Place, packing: Packing, console: Console) -> None:
    """For a person."""
    for line in _lines(found, place):
        console.print(line, highlight=False, soft_wrap=True)
    if found.bad:
        console.print(f"[yellow]{found.bad} bad records skipped:[/]", highlight=False, soft_wrap=True)
        for bad in found.first_bad[:SHOWN_BAD]:
            console.print(f"  {printable(str(bad))}", markup=False, highlight=False, soft_wrap=True)
        if found.bad > SHOWN_BAD:
            console.print(f"  and {found.bad - SHOWN_BAD} more", highlight=False)
    if found.first is not None:
        title = escape(printable(found.first.place))
        console.print(Panel(escape(printable(render(found.first))), title=title, title_align="left"))
    if len(found.lengths):
        for line in (*found.lengths.lines(), *lines(found.kind, found.steps, found.misfit, packing)):
            console.print(printable(line), markup=False, highlight=False, soft_wrap=True)
    console.print(found.limits, highlight=False, soft_wrap=True)


def _lines(found: Findings, place: Place) -> Iterator[str]:
    images = found.image_figures()
    files = f" of {found.files} files" if found.files > 1 else ""
    counts = f"{found.records} records, {images['count']} images"
    yield f"[bold]{escape(printable(found.path))}[/]  {found.kind}: {counts}{files}"
    if images["count"]:
        width, height = images["width"], images["height"]
        yield (
            f"image sizes: {width['min']}x{height['min']} to {width['max']}x{height['max']} pixels, median "
            f"{width['median']}x{height['median']}; {images['sizes']} sizes, the most common: "
            + ", ".join(f"{w}x{h} {count}" for w, h, count in images["most_common"])
        )
        yield "images by format and mode: " + ", ".join(
            f"{name} {count}" for name, count in images["stored_as"].items()
        )
        if images["distinct"] < images["count"]:
            yield f"{images['distinct']} images are distinct by what their files hold"
    repeated, some = found.repeats()
    if repeated:
        shown = "; ".join(f"{place(one)} as {place(first)}" for one, first in some)
        yield f"[yellow]{repeated} records repeat an earlier one,[/] texts and images alike: {escape(printable(shown))}"
    if found.unread:
        yield f"not read: {escape(printable(named(found.unread)))}"
    if found.kind in ("alignment", "rlvr") and found.types:
        types = (f"{escape(printable(name))} {count}" for name, count in found.types.most_common(12))
        yield "question types: " + ", ".join(types)
    if found.unformatted:
        yield f"[yellow]{found.unformatted} responses lack the format caption, think, answer:[/] sft trains on them,"
        yield "  and the stages after it count such responses as invalid"


def render(sample: Sample) -> str:
    """A record as a person reads it: turns, then what the format adds."""
    lines = [f"[{m.role}] {m.content}" for m in sample.messages]
    for name, label in (
        ("response", "assistant"),
        ("teacher_caption", "teacher caption"),
        ("teacher_reasoning", "teacher reasoning"),
        ("student_caption", "student caption"),
        ("student_reasoning", "student reasoning"),
        ("gold", "gold answer"),
    ):
        value = getattr(sample, name)
        if value is not None:
            lines.append(f"[{label}] {value}")
    if sample.equivalents:
        lines.append(f"[equivalent answers] {'; '.join(sample.equivalents)}")
    text = "\n".join(lines)
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + " ..."
