"""The files of a data set: each one named, or all of a folder or a pattern in the order of their names."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

from prism_fast import ranks
from prism_fast.data.cache import Cache
from prism_fast.data.held import Held
from prism_fast.data.parquet import Parquet, Wanted
from prism_fast.data.source import Source, open_source, opened_source
from prism_fast.files import shards
from prism_fast.records import DataError


def open_sources(
    path: Path, wanted: Wanted | None = None, cache: Cache | None = None, held: Held | None = None
) -> list[Source]:
    """The records of a file, of a saved data set, or of every shard that a folder or a pattern stands for.

    A shard without a record is passed over, and said. Raises DataError for shards of several kinds or columns, and
    where processes of a run find others; else as `open_source`.
    """
    cache, held = cache or Cache(), held or Held()
    files = shards(path)
    if not files:
        return [open_source(path, wanted, cache, held)]
    kinds = sorted({file.suffix for file in files})
    if len(kinds) > 1:
        one = str((path if path.is_dir() else path.parent) / f"*{kinds[0]}")
        raise DataError(f"{path}: holds {' and '.join(kinds)} files; name one kind, as {one!r}")
    _refuse_other_ranks(path, files)
    sources = [opened_source(file, wanted, cache, held) for file in files]
    filled = [source for source in sources if len(source)]
    empty = [source.path for source in sources if not len(source)]
    if not filled:
        raise DataError(f"{path}: none of {len(files)} files holds a record; write at least one")
    if empty and ranks.is_first():
        told = f"{path}: {len(empty)} of {len(files)} files hold no record and are passed over, as {empty[0]}"
        print(told, file=sys.stderr, flush=True)
    _refuse_other_columns(path, filled)
    return filled


def _refuse_other_columns(path: Path, sources: Sequence[Source]) -> None:
    """Shards are alike, or a column that some lack would be missing in their records without a word."""
    tables = [source for source in sources if isinstance(source, Parquet)]
    for other in tables[1:]:
        if differ := sorted({*tables[0].columns} ^ {*other.columns}):
            has, lacks = (tables[0], other) if differ[0] in tables[0].columns else (other, tables[0])
            raise DataError(
                f"{path}: {has.path.name} has the column {differ[0]}, {lacks.path.name} has not; write all files alike,"
                " or name them one by one"
            )


def _refuse_other_ranks(path: Path, files: Sequence[Path]) -> None:
    """All processes of a run plan with the same records: a folder may be another on another host."""
    if ranks.world() == 1:
        return
    told = [f"{file.name}:{file.stat().st_size}" for file in files]
    found = ranks.gather([len(told), blake2b("\n".join(told).encode(), digest_size=8).hexdigest()])
    for rank, theirs in enumerate(found):
        if theirs != found[0]:
            raise DataError(
                f"{path}: process 0 finds {found[0][0]} files, process {rank} {theirs[0]} or of other sizes; give all "
                "hosts the same files"
            )
