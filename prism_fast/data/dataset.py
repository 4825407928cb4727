"""Records of one or more files, validated when they are opened, parsed when they are used."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache as once
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from prism_fast.data.bad_records import BadRecords
from prism_fast.data.cache import Cache
from prism_fast.data.fields import Fields, is_read
from prism_fast.data.source import Source, open_source
from prism_fast.records import DataError, Sample

PROGRESS_EVERY = 256  # records
JUDGED_ONCE = 20_000  # records of a file; smaller ones are judged at every start
Paths = str | Path | Sequence[str | Path]
Skip = int | BadRecords  # how many bad records are allowed, or the account of a command that reads other files too
Convert = Callable[[Fields], Sample]
Progress = Callable[[int, int], None]  # is told (good records, records) while files are read


class Dataset(Sequence[Sample]):
    """Validated records of one or more files, parsed when indexed.

    ``convert``: what makes a record of one of the formats. ``columns``: our name -> what the files call it; a name with
    a dot is a field within a field ("reward_model.ground_truth": "answer"). ``cache``: a folder where what is made of a
    large file stays, as the verdicts on its records, so that it is judged once. ``image_folders``: where images may lie
    beside their file's own folder.

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
        paths = [paths] if isinstance(paths, (str, Path)) else list(paths)
        if not paths:
            raise DataError("no data file given; name at least one")
        self.bad = skip_bad if isinstance(skip_bad, BadRecords) else BadRecords(skip_bad)
        self._skipped: set[int] = set()
        self._convert, self._system_prompt, self._columns = convert, system_prompt, dict(columns or {})
        self._image_folders = tuple(image_folders)
        theirs, kept = set(self._columns.values()), Cache(cache)
        self._sources: list[Source] = [
            open_source(path, lambda name: name in theirs or is_read(name), kept) for path in paths
        ]
        good, self._total, self._done = [], sum(map(len, self._sources)), 0
        for file in range(len(self._sources)):
            numbers = self._good(file, kept, progress)
            good.append(np.stack([np.full_like(numbers, file), numbers], axis=1))
        self._index = np.concatenate(good)
        if not len(self._index):
            bad = f"{self._total} are bad; correct the file ({self.bad.messages[-1]})"
            raise DataError(f"{paths[0]}: no valid record is left, {bad}")

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> Sample:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is outside a dataset of {len(self)} records")
        file, record = self._index[index]
        return self._read(int(file), int(record))

    def _read(self, file: int, record: int) -> Sample:
        source = self._sources[file]
        held = renamed(source[record], self._columns, source.place(record))
        fields = Fields(held, source.place(record), source.path.parent, self._system_prompt, self._image_folders)
        try:
            sample = self._convert(fields)
            fields.refuse_dropped(sample)
        except RecursionError as error:
            raise DataError(f"{fields.place}: lists in lists a thousand deep; remove the record") from error
        return sample

    def _good(self, file: int, cache: Cache, progress: Progress | None) -> np.ndarray[Any, Any]:
        """Numbers of a file's good records; the others are in the account of bad ones."""
        source = self._sources[file]
        if len(source) < JUDGED_ONCE or not cache.is_kept:
            bad = self._judge(file, progress)
        else:
            asked = [
                self._convert.__name__,
                self._system_prompt,
                self._columns,
                list(map(str, self._image_folders)),
                _code(),
            ]
            now: dict[str, list[int]] = {}

            def make() -> bytes:
                now["bad"] = self._judge(file, progress)
                return json.dumps(now["bad"]).encode()

            said = f"{source.path}: {len(source):,} records are read, once"
            known = cache.content(source.path, "bad", asked, make, said)
            # What was bad may have been mended since, as where an image was missing.
            bad = now["bad"] if now else self._judge(file, None, json.loads(known))
        self._done += len(source) - len(bad)
        return np.delete(np.arange(len(source)), bad)

    def _judge(self, file: int, progress: Progress | None, numbers: Iterable[int] | None = None) -> list[int]:
        """Which of the numbered records of a file are bad (null: of all)."""
        bad: list[int] = []
        source = self._sources[file]
        for number in range(len(source)) if numbers is None else numbers:
            if progress is not None and number % PROGRESS_EVERY == 0:
                progress(self._done + number - len(bad), self._total)
            try:
                self._read(file, number)
            except DataError as error:
                self.bad.add(source.place(number), error)
                bad.append(number)
        return bad

    def skip(self, index: int, error: DataError) -> None:
        """Count record ``index`` as bad; raises once there are more than are allowed (at once by default), or no other
        record is left."""
        file, record = self._index[index]
        self.bad.add(self._sources[file].place(int(record)), error)
        self._skipped.add(index % len(self))
        if len(self._skipped) == len(self):
            raise DataError(f"{self._sources[0].path}: each of {len(self)} records is bad ({error}); correct the file")


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
