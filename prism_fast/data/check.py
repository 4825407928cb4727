"""``prism-fast data check``: the stages' own verdicts on every record of a file, counts, and one record as read."""

from __future__ import annotations

import json
import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pyarrow import ArrowException, parquet
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from prism_fast import printable
from prism_fast.data.bad_records import BadRecords
from prism_fast.data.dataset import Dataset, renamed
from prism_fast.data.fields import is_read, missing
from prism_fast.data.formats import FORMATS
from prism_fast.data.images import content, open_image
from prism_fast.data.lengths import Lengths, Tree, duplicates, tree_of
from prism_fast.data.source import open_source
from prism_fast.records import DataError, Sample
from prism_fast.response_format import is_valid

if TYPE_CHECKING:
    from prism_fast.data.chat import Chat

SHOWN_CHARACTERS = 1200
SHOWN_BAD = 20
AT_ONCE = 128  # records that are parsed before their images are opened side by side
# Those of the Qwen-VL tokenizers; with a model, its own decide.
_CONTROL = re.compile(
    r"<\|(im_start|im_end|endoftext|(object_ref|box|quad|vision)_(start|end)|(vision|image|video|fim)_pad"
    r"|fim_(prefix|middle|suffix)|repo_name|file_sep)\|>"
)


# By the fields of a record that it is known by, in this order: alignment's records have RLVR's fields too.
KIND_FIELDS = {
    "sft": {"messages", "conversations"},
    "warm-up": {"student_caption", "student_cot", "student_response"},
    "alignment": {"teacher_caption", "teacher_cot", "teacher_response"},
    "rlvr": {"reward_model"},
}
GLANCE = 1 << 20  # bytes of a file that a glance reads


class Judged(NamedTuple):
    """Of a good record."""

    sizes: list[tuple[int, int]]  # of its images
    digest: bytes  # of its texts and the files of its images
    tree: Tree | None = None  # with a model


Verdict = Callable[[Sample], Judged]  # DataError where the record is bad


class Packing(NamedTuple):
    """What a stage would pack by."""

    max_prompt_tokens: int = 2048
    tokens_per_pack: int = 16384
    batch_size: int = 16
    histogram: Path | None = None


PACKING = Packing()


@dataclass
class Counts:
    """What the good records of a file hold."""

    records: int = 0
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    types: Counter[str] = field(default_factory=Counter)
    unformatted: int = 0  # demonstrations without the three tags, which the SFT stage takes
    first: Sample | None = None
    digests: list[bytes] = field(default_factory=list)
    lengths: Lengths = field(default_factory=Lengths)

    def add(self, sample: Sample, judged: Judged) -> None:
        self.records += 1
        self.sizes.update(judged.sizes)
        self.digests.append(judged.digest)
        if judged.tree is not None:
            self.lengths.trees.append(judged.tree)
        self.types[sample.question_type] += 1
        self.unformatted += sample.response is not None and not is_valid(sample.response)
        self.first = self.first or sample


def kind_of(path: Path, columns: Mapping[str, str] | None = None) -> str:
    """Which of the four formats a file has, from the fields of its first record that parses, by our names."""
    columns = columns or {}
    source, fault = open_source(path, lambda name: name in columns.values() or is_read(name)), None
    for index in range(len(source)):
        try:
            record = renamed(source[index], columns, source.place(index))
        except DataError as error:
            fault = fault or error
            continue
        fields = {name for name, value in record.items() if not missing(value)}
        if (kind := _kind(fields)) is not None:
            return kind
        raise DataError(
            f"{source.place(index)}: fields {_listed(fields) or 'none'} belong to none of the formats; "
            "expected messages (SFT), student_caption (warm-up), teacher_response (alignment) or reward_model (RLVR)"
        )
    raise fault or DataError(f"{path}: holds no record; write at least one")


def _listed(fields: Collection[str]) -> str:
    return ", ".join(name[:40] for name in sorted(fields)[:12])


def _kind(fields: Collection[str]) -> str | None:
    """The format that fields of these names, which are ours, belong to."""
    return next((kind for kind, names in KIND_FIELDS.items() if names & {*fields}), None)


def glance(path: Path, columns: Mapping[str, str] | None = None) -> str | None:
    """As `kind_of`, from the first record or a parquet file's columns alone, whatever the file's size; writes nothing.

    None where they do not tell. Raises DataError where the file cannot be read.
    """
    if path.is_dir():  # a saved data set
        return None
    try:
        with open(path, "rb") as file:
            head = file.read(GLANCE)
        if head.startswith(b"PAR1"):
            fields = set(parquet.read_schema(path).names)
        else:
            text = head.decode("utf-8-sig", errors="ignore").lstrip().removeprefix("[").lstrip()
            record, _ = json.JSONDecoder().raw_decode(text)
            fields = {name for name, value in record.items() if not missing(value)} if isinstance(record, dict) else ()
    except (OSError, ArrowException) as error:
        raise DataError(f"{path}: cannot be read ({' '.join(str(error).split())[:160]}); write it again") from None
    except (ValueError, RecursionError):  # no JSON, or a record longer than a glance
        return None
    ours = {our.split(".")[0] for our, their in (columns or {}).items() if their.split(".")[0] in fields}
    return _kind({*fields, *ours})


def opened(sample: Sample) -> Judged:
    """Opens the images. Raises DataError for what every stage refuses, whatever its model."""
    for number, message in enumerate(sample.messages):
        if found := _CONTROL.search(message.content):
            problem = f"holds the control token {found.group()}; remove it or write it differently"
            raise DataError(f"{sample.place}: messages[{number}].content: {problem}")
    told = [(m.role, m.content) for m in sample.messages]
    told += [sample.response, sample.teacher_caption, sample.teacher_reasoning, sample.student_caption, sample.gold]
    digest, sizes = blake2b(repr(told).encode(), digest_size=16), []
    for ref in sample.images:
        sizes.append(open_image(ref, sample.place).size)
        digest.update(blake2b(content(ref) or b"", digest_size=16).digest())
    return Judged(sizes, digest.digest())


def verdict_of(kind: str, chat: Chat, max_prompt_tokens: int) -> tuple[Verdict, str]:
    """What the stage says that reads this kind, and the limits by which it does: its defaults."""
    from prism_fast.config import AlignConfig, SFTConfig, WarmupConfig
    from prism_fast.data.encode import demonstration, lesson, pair_record, question

    sft, pairs, align = SFTConfig.model_construct(), WarmupConfig.model_construct(), AlignConfig.model_construct()
    encode, limit = {
        "sft": (partial(demonstration, max_tokens=sft.max_tokens), f", max_tokens = {sft.max_tokens}"),
        "warm-up": (partial(pair_record, max_tokens=pairs.max_tokens), f", max_tokens = {pairs.max_tokens}"),
        "alignment": (partial(lesson, config=align), f", max_part_tokens = {align.max_part_tokens}"),
        "rlvr": (question, ""),
    }[kind]
    one_at_a_time = threading.Lock()  # a tokenizer has one state

    def verdict(sample: Sample) -> Judged:
        judged = opened(sample)
        with one_at_a_time:
            return judged._replace(tree=tree_of(encode(sample, chat, max_prompt_tokens=max_prompt_tokens)))

    return verdict, f"lengths by the stage's defaults: max_prompt_tokens = {max_prompt_tokens}{limit}"


def check(
    path: Path,
    console: Console,
    bad: BadRecords,
    chat: Chat | None = None,
    packing: Packing = PACKING,
    image_folders: Sequence[Path] = (),
) -> None:
    """Reads every record and opens every image; with a model's ``chat``, also encodes it as its stage would.

    Prints counts, lengths, the bad records and the first good one; ``bad`` counts on over several files.
    """
    kind, before = kind_of(path), len(bad)
    verdict, limits = opened, "lengths were not looked at: they need a stage's --model"
    if chat is not None:
        verdict, limits = verdict_of(kind, chat, packing.max_prompt_tokens)
    counts = Counts()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        name = escape(printable(path.name))
        reading = progress.add_task(f"reading {name}", total=None)
        data = Dataset(
            path,
            FORMATS[kind],
            bad,
            progress=lambda done, total: progress.update(reading, completed=done, total=total),
            image_folders=image_folders,
        )
        for sample, judged in progress.track(_judged(data, verdict), len(data), description=f"opening {name}"):
            if judged is not None:
                counts.add(sample, judged)
    _show(path, kind, counts, bad.messages[before:], console)
    if counts.lengths.trees:
        for line in counts.lengths.lines(packing.tokens_per_pack, packing.batch_size):
            console.print(line, highlight=False, soft_wrap=True)
        if packing.histogram is not None:
            counts.lengths.plot(packing.histogram, printable(path.name))
    console.print(limits, highlight=False, soft_wrap=True)


def _judged(data: Dataset, verdict: Verdict) -> Iterator[tuple[Sample, Judged | None]]:
    """(sample, what was found) of every record, None where it is bad; images are opened side by side."""

    def judge(sample: Sample) -> Judged | DataError:
        try:
            return verdict(sample)
        except DataError as error:
            return error

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for start in range(0, len(data), AT_ONCE):
            samples = [data[index] for index in range(start, min(start + AT_ONCE, len(data)))]
            for sample, judged in zip(samples, pool.map(judge, samples)):
                if isinstance(judged, DataError):
                    data.bad.add(sample.place, judged)
                yield sample, None if isinstance(judged, DataError) else judged


def _show(path: Path, kind: str, counts: Counts, bad: list[str], console: Console) -> None:
    def say(line: str) -> None:
        console.print(line, highlight=False, soft_wrap=True)

    images = sum(counts.sizes.values())
    say(f"[bold]{escape(printable(str(path)))}[/]  {kind}: {counts.records} records, {images} images")
    if counts.sizes:
        widths, heights = zip(*counts.sizes)
        say(f"image sizes: {min(widths)}x{min(heights)} to {max(widths)}x{max(heights)} pixels")
    if repeated := duplicates(counts.digests):
        say(f"[yellow]{repeated} records repeat an earlier one,[/] texts and images alike")
    if kind in ("alignment", "rlvr"):
        types = (f"{escape(printable(name))} {count}" for name, count in counts.types.most_common(12))
        say("question types: " + ", ".join(types))
    if counts.unformatted:
        say(f"[yellow]{counts.unformatted} responses lack the format caption, think, answer:[/] sft trains on them,")
        say("  and the stages after it count such responses as invalid")
    if bad:
        say(f"[yellow]{len(bad)} bad records skipped:[/]")
        for line in bad[:SHOWN_BAD]:
            console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)
        if len(bad) > SHOWN_BAD:
            say(f"  and {len(bad) - SHOWN_BAD} more")
    if counts.first is not None:
        place = escape(printable(counts.first.place))
        console.print(Panel(escape(printable(render(counts.first))), title=place, title_align="left"))


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
