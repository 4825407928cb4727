"""Which of the four formats a file has: from its first record, or at a glance."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from itertools import islice
from pathlib import Path

from pyarrow import ArrowException, parquet

from prism_fast.data.cache import Cache
from prism_fast.data.dataset import Records, renamed
from prism_fast.data.fields import is_read, missing
from prism_fast.data.formats import FORMATS
from prism_fast.data.held import Held
from prism_fast.data.shards import open_sources
from prism_fast.data.source import Source
from prism_fast.files import shards
from prism_fast.records import DataError

# By the fields of a record that it is known by, in this order: alignment's records have RLVR's fields too.
KIND_FIELDS = {
    "sft": {"messages", "conversations"},
    "warm-up": {"student_caption", "student_cot", "student_response"},
    "alignment": {"teacher_caption", "teacher_cot", "teacher_response"},
    "rlvr": {"reward_model"},
}
LOOKED_AT = 1000  # records among which the first that belongs to a format tells it
GLANCE = 1 << 20  # bytes of a file that a glance reads


def kind_of(path: Path, columns: Mapping[str, str] | None = None) -> str:
    """Which of the four formats a file has, or the files of a folder or a pattern, by the first record that tells,
    and our names."""
    theirs = {*(columns or {}).values()}
    return _kind_in(path, open_sources(path, lambda name: name in theirs or is_read(name)), columns or {})


def opened(
    path: Path,
    columns: Mapping[str, str] | None = None,
    image_folders: Sequence[Path] = (),
    held: Held | None = None,
    cache: Cache | None = None,
) -> tuple[Records, str]:
    """(all records of a file, folder or pattern, good and bad; which of the formats they have)."""
    records = Records(path, FORMATS["sft"], columns=columns, cache=cache, image_folders=image_folders, held=held)
    kind = _kind_in(path, records.sources, columns or {})
    records.convert = FORMATS[kind]
    return records, kind


def _kind_in(path: Path, sources: Sequence[Source], columns: Mapping[str, str]) -> str:
    fault = None
    every = ((source, index) for source in sources for index in range(len(source)))
    for one, index in islice(every, LOOKED_AT):
        try:
            record = renamed(one[index], columns, one.place(index))
            fields = {name for name, value in record.items() if not missing(value)}
            if (kind := _kind(fields)) is not None:
                return kind
            raise _of_none(one.place(index), fields, record)
        except DataError as error:
            fault = fault or error
    raise fault or DataError(f"{path}: holds no record; write at least one")


def _of_none(place: str, fields: Collection[str], record: Mapping[str, object]) -> DataError:
    shown = ", ".join(name[:40] for name in sorted(fields)[:12]) or "none"
    inside = next((name for name in fields if len(fields) == 1 and isinstance(record[name], list)), None)
    return DataError(
        f"{place}: fields {shown} belong to none of the formats; expected messages (SFT), student_caption (warm-up), "
        "teacher_response (alignment) or reward_model (RLVR); "
        + (
            "name what stands for them, as --column reward_model.ground_truth=answer (of a stage data.columns)"
            if inside is None
            else f"if {inside[:40]} holds the records, write that list alone"
        )
    )


def _kind(fields: Collection[str]) -> str | None:
    """The format that fields of these names, which are ours, belong to."""
    return next((kind for kind, names in KIND_FIELDS.items() if names & {*fields}), None)


def glance(path: Path, columns: Mapping[str, str] | None = None) -> str | None:
    """As `kind_of`, from the first record or a parquet file's columns alone, whatever the file's size; writes nothing.

    None where they do not tell. Raises DataError where the file cannot be read.
    """
    if found := shards(path):
        return glance(found[0], columns)
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
