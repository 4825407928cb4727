"""Fields that stand in a file and that nothing reads: they are named once, so that none is lost without a word."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any

import pyarrow as pa

from prism_fast import printable
from prism_fast.data.fields import REWARD, VOICE, Fields, missing
from prism_fast.data.parquet import EXTRA
from prism_fast.records import Sample

INDEX = "extra_info.index"  # a record's number in its file, which is written anew
RULE = "rule"  # the one style of reward_model that is written
SHOWN = 20
MOST = 1000  # names; records of a machine's making may have a new one each


def unread_columns(schema: pa.Schema, columns: Collection[str]) -> list[str]:
    """Of a table of which these are read, as `parquet.columns_of` names them."""
    read = {name.split(".")[0] for name in columns}
    found = [name for name in schema.names if name not in read and name != "extra_info"]
    extra = schema.field("extra_info").type if schema.names.count("extra_info") == 1 else None
    if extra is not None and "extra_info" not in columns and pa.types.is_struct(extra):
        inner = [f"extra_info.{field.name}" for field in extra]
        found += [name for name in inner if name not in columns and name != INDEX]
    return found


def unread(fields: Fields, sample: Sample) -> Iterator[str]:
    """Of a record and what was made of it, the fields that hold something and were not read."""
    for key, value in fields.record.items():
        if key not in fields.used:
            if not missing(value) and not (VOICE.fullmatch(key) and _says(value, sample)):
                yield key
        elif isinstance(value, dict) and key == "extra_info":
            yield from _inside(key, [value], (*EXTRA, "index"))
        elif isinstance(value, dict) and key == "reward_model":
            known = REWARD if value.get("style") in (None, RULE) else REWARD[1:]
            yield from _inside(key, [value], known)
        elif key in ("images", "image"):
            yield from _inside(key, value if isinstance(value, list) else [value], ("bytes", "path"))


def differing(fields: Fields, sample: Sample) -> Iterator[str]:
    """Whole responses that stand beside the parts that were read, and say something else."""
    for voice in ("teacher", "student"):
        value = fields.record.get(whole := f"{voice}_response")
        if f"{voice}_cot" not in fields.used or whole in fields.used or missing(value):
            continue
        parts = "".join(getattr(sample, f"{voice}_{part}") or "" for part in ("caption", "reasoning"))
        if not _alike(value, parts):
            yield whole


def _inside(key: str, values: Iterable[Any], known: Collection[str]) -> Iterator[str]:
    for value in values:
        if isinstance(value, dict):
            yield from (f"{key}.{name}" for name, held in value.items() if name not in known and not missing(held))


def _says(value: Any, sample: Sample) -> bool:
    """Whether a voice's text, as its whole response, is what was read of its parts."""
    whole = ((sample.teacher_caption, sample.teacher_reasoning), (sample.student_caption, sample.student_reasoning))
    return any(_alike(value, (caption or "") + (reasoning or "")) for caption, reasoning in whole)


def _alike(value: Any, text: str) -> bool:
    """But for white space."""
    return value == text or "".join(str(value).split()) == "".join(text.split())


def not_written(names: Iterable[str]) -> str:
    """For a person, of fields of records that were written anew."""
    return f"not written, as the format has no place for them: {printable(named(names))}"


def named(names: Iterable[str]) -> str:
    """For a person, in the order of the alphabet; a field within one that is named too is not."""
    found = {*names}
    shown = sorted(name[:80] for name in found if name.split(".")[0] == name or name.split(".")[0] not in found)
    return ", ".join(shown[:SHOWN]) + (f" and {len(shown) - SHOWN} more" if len(shown) > SHOWN else "")
