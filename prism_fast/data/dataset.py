"""Records of one or more files, validated when they are opened, parsed when they are used."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache as once
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from prism_fast import ranks
from prism_fast.data.bad_records import BadRecords
from prism_fast.data.cache import Cache
from prism_fast.data.fields import Fields, is_read
from prism_fast.data.held import Held
from prism_fast.data.parquet import Parquet
from prism_fast.data.saved import Saved
from prism_fast.data.shards import open_sources
from prism_fast.data.source import Source
from prism_fast.data.unread import MOST, differing, unread, unread_columns
from prism_fast.records import DataError, Sample

PROGRESS_EVERY = 256  # records
JUDGED_ONCE = 20_000  # records of all files; fewer are judged at every start
Paths = str | Path | Sequence[str | Path]
Skip = int | BadRecords  # how many bad records are allowed, or the account of a command that reads other files too
Convert = Callable[[Fields], Sample]
Progress = Callable[[int, int], None]  # is told (good records, records) while files are read


class Records(Sequence[Sample]):
    """All records of one or more files, good or bad, parsed when indexed: a bad one raises DataError then.

    ``convert``: what makes a record of one of the formats. ``columns``: our name -> what the files call it; a name with
    a dot is a field within a field ("reward_model.ground_truth": "answer"). ``cache``: a folder where what is made of a
    large file stays. ``image_folders``: where images may lie beside their file's own folder. ``held``: what row groups
    and open files are kept by.
    """

    def __init__(
        self,
        paths: Paths,
        convert: Convert,
        system_prompt: str | None = None,
        columns: Mapping[str, str] | None = None,
        cache: Cache | None = None,
        image_folders: Sequence[Path] = (),
        held: Held | None = None,
    ):
        paths = [paths] if isinstance(paths, (str, Path)) else list(paths)
        if not paths:
            raise DataError("no data file given; name at least one")
        self.convert, self.system_prompt, self.columns = convert, system_prompt, dict(columns or {})
        self.image_folders = tuple(image_folders)
        theirs, held, cache = {*self.columns.values()}, held or Held(), cache or Cache()
        self.sources: list[Source] = [
            source
            for path in paths
            for source in open_sources(Path(path), lambda name: name in theirs or is_read(name), cache, held)
        ]
        self._start = np.cumsum([0, *map(len, self.sources)])
        self.unread: set[str] = set()  # fields of what was read so far, and columns, that hold something nobody reads
        self.differing: dict[str, str] = {}  # whole responses that are not their parts, which are read: the first place
        for source in self.sources:
            if isinstance(source, (Parquet, Saved)):
                self.unread.update(unread_columns(source.schema, source.columns))

    def __len__(self) -> int:
        return int(self._start[-1])

    def __getitem__(self, index: int) -> Sample:
        return self.read(*self.at(index))

    def at(self, index: int) -> tuple[int, int]:
        """(number of the file, of the record in it)."""
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside of {len(self)} records")
        file = int(np.searchsorted(self._start, index, side="right")) - 1
        return file, index - int(self._start[file])

    def place(self, index: int) -> str:
        """ "file:record", for messages to a person."""
        file, record = self.at(index)
        return self.sources[file].place(record)

    def read(self, file: int, record: int) -> Sample:
        source = self.sources[file]
        held = renamed(source[record], self.columns, source.place(record))
        fields = Fields(held, source.place(record), source.path.parent, self.system_prompt, self.image_folders)
        try:
            sample = self.convert(fields)
            fields.refuse_dropped(sample)
            for field in differing(fields, sample):
                self.differing.setdefault(field, sample.place)
            if len(self.unread) < MOST:
                self.unread.update(unread(fields, sample))
        except RecursionError as error:
            raise DataError(f"{fields.place}: lists in lists a thousand deep; remove the record") from error
        return sample


class Dataset(Sequence[Sample]):
    """Validated records of one or more files, parsed when indexed.

    ``convert``, ``system_prompt``, ``columns``, ``image_folders``: as of `Records`. ``cache``: a folder where what is
    made of a large file stays, as the verdicts on its records, so that it is judged once.

    ``bad`` is the account of the bad records that were passed over; more than ``skip_bad`` of them raise. A stage that
    finds a bad record later (an image that does not open) reports it through ``skip`` to the same account.
    """

    def __init__(
        self,
        paths: Paths,
        convert: Convert,
        skip_bad: Skip = 0,
        system_prompt: str | None = None,
        columns: Mapping[str, str] | None = None,
        cache: Path | None = None,
        progress: Progress | None = None,
        image_folders: Sequence[Path] = (),
    ):
        kept = Cache(cache)
        self.bad = skip_bad if isinstance(skip_bad, BadRecords) else BadRecords(skip_bad)
        self._skipped: set[int] = set()
        self._all = Records(paths, convert, system_prompt, columns, kept, image_folders)
        good, self._done = [], 0
        for file in range(len(self._all.sources)):
            numbers = self._good(file, kept, progress)
            good.append(np.stack([np.full_like(numbers, file), numbers], axis=1))
        self._index = np.concatenate(good)
        if not len(self._index):
            bad = f"{len(self._all)} are bad; correct the file ({self.bad.messages[-1]})"
            raise DataError(f"{self._all.sources[0].path}: no valid record is left, {bad}")
        for field, place in self._all.differing.items() if ranks.is_first() else ():
            voice = field.partition("_")[0]
            told = f"{place}: {field} is not {voice}_caption and {voice}_cot, which are read, here and maybe in others"
            print(told, file=sys.stderr, flush=True)

    def __len__(self) -> int:
        return len(self._index)

    @property
    def unread(self) -> set[str]:
        """As of `Records`."""
        return self._all.unread

    def __getitem__(self, index: int) -> Sample:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is outside a dataset of {len(self)} records")
        file, record = self._index[index]
        return self._all.read(int(file), int(record))

    def _good(self, file: int, cache: Cache, progress: Progress | None) -> np.ndarray[Any, Any]:
        """Numbers of a file's good records; the others are in the account of bad ones."""
        source = self._all.sources[file]
        if len(self._all) < JUDGED_ONCE or not cache.is_kept:
            bad = self._judge(file, progress)
        else:
            asked = [
                self._all.convert.__name__,
                self._all.system_prompt,
                self._all.columns,
                list(map(str, self._all.image_folders)),
                _code(),
            ]
            now: dict[str, list[int]] = {}

            def make() -> bytes:
                now["bad"] = self._judge(file, progress)
                return json.dumps(now["bad"]).encode()

            shards = len(self._all.sources)
            said = f"{source.path}: {len(source):,} records are read, once"
            if shards > 1:  # a line for all of them
                said = None if file else f"{len(self._all):,} records of {shards} files are read, once"
            known = cache.content(source.path, "bad", asked, make, said)
            # What was bad may have been mended since, as where an image was missing.
            bad = now["bad"] if now else self._judge(file, None, json.loads(known))
        self._done += len(source) - len(bad)
        return np.delete(np.arange(len(source)), bad)

    def _judge(self, file: int, progress: Progress | None, numbers: Iterable[int] | None = None) -> list[int]:
        """Which of the numbered records of a file are bad (null: of all)."""
        bad: list[int] = []
        source = self._all.sources[file]
        for number in range(len(source)) if numbers is None else numbers:
            if progress is not None and number % PROGRESS_EVERY == 0:
                progress(self._done + number - len(bad), len(self._all))
            try:
                self._all.read(file, number)
            except DataError as error:
                self.bad.add(source.place(number), error)
                bad.append(number)
        return bad

    def skip(self, index: int, error: DataError) -> None:
        """Count record ``index`` as bad; raises once there are more than are allowed (at once by default), or no other
        record is left."""
        file, record = self._index[index]
        self.bad.add(self._all.sources[file].place(int(record)), error)
        self._skipped.add(index % len(self))
        if len(self._skipped) == len(self):
            raise DataError(
                f"{self._all.sources[0].path}: each of {len(self)} records is bad ({error}); correct the file"
            )


def renamed(record: dict[str, Any], columns: Mapping[str, str], place: str) -> dict[str, Any]:
    """The record by our names. ``columns``: as of `Dataset`."""
    if not columns:
        return record
    values = {ours: record[theirs] for ours, theirs in columns.items() if theirs in record}
    made = {name: value for name, value in record.items() if name not in columns.values()}
    for ours, value in values.items():
        outer, dot, inner = ours.partition(".")
        if dot:
            held = made.get(outer)
            if held is not None and not isinstance(held, dict):
                raise DataError(f"{place}: {outer}: holds no fields to put {inner} in; correct data.columns")
            made[outer] = {**(held or {}), inner: value}
        else:
            made[ours] = value
    return made


@once
def _code() -> str:
    """A digest of what judges records: a verdict of another version is none of this one's."""
    package = Path(__file__).parent
    files = [*sorted(package.glob("*.py")), package.parent / "response_format.py"]
    return blake2b(b"".join(file.read_bytes() for file in files), digest_size=10).hexdigest()
