"""``prism-fast data check``: validates a data file, opens its images, counts, and shows one record."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel

from prism_fast.data.formats import Dataset, read_align, read_rlvr, read_sft, read_warmup
from prism_fast.data.images import open_image
from prism_fast.data.source import open_source
from prism_fast.records import DataError, Sample

READERS = {"sft": read_sft, "warm-up": read_warmup, "alignment": read_align, "rlvr": read_rlvr}
SHOWN_CHARACTERS = 1200


def kind_of(path: Path) -> str:
    """Which of the four formats a file has, from the fields of its first record."""
    source = open_source(path)
    record = source[0]
    fields = {name for name, value in record.items() if value is not None}
    if "messages" in fields:
        return "sft"
    if fields & {"student_caption", "student_response"}:
        return "warm-up"
    if fields & {"teacher_caption", "teacher_cot", "teacher_response"}:
        return "alignment"
    if "reward_model" in fields:
        return "rlvr"
    raise DataError(
        f"{source.place(0)}: fields {', '.join(sorted(fields)) or 'none'} belong to none of the formats; expected "
        "messages (SFT), student_caption (warm-up), teacher_response (alignment) or reward_model (RLVR)"
    )


def check(path: Path, skip_bad: int, console: Console) -> Dataset:
    """Reads every record and opens every image; prints counts and the first good record. Raises DataError."""
    kind = kind_of(path)
    data = READERS[kind](path, skip_bad=skip_bad)
    images, sizes, types, good = 0, Counter(), Counter(), None
    for index in range(len(data)):
        sample = data[index]
        try:
            opened = [open_image(ref, sample.place) for ref in sample.images]
        except DataError as error:
            data.skip(error)
            continue
        images += len(opened)
        sizes.update(image.size for image in opened)
        types[sample.question_type] += 1
        good = good or sample
    console.print(
        f"[bold]{escape(str(path))}[/]  {kind}: {sum(types.values())} records, {images} images", soft_wrap=True
    )
    if sizes:
        widths, heights = [w for w, _ in sizes], [h for _, h in sizes]
        console.print(f"image sizes: {min(widths)}x{min(heights)} to {max(widths)}x{max(heights)} pixels")
    if kind in ("alignment", "rlvr"):
        console.print(
            "question types: " + ", ".join(f"{escape(name)} {count}" for name, count in types.most_common(12))
        )
    if data.skipped:
        console.print(f"[yellow]{len(data.skipped)} bad records skipped:[/]")
        for line in data.skipped:
            console.print(f"  {line}", markup=False, soft_wrap=True)
    if good is not None:
        console.print(Panel(escape(render(good)), title=escape(good.place), title_align="left"))
    return data


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
