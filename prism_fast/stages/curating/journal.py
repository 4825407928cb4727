"""OUT/journal.jsonl: every answer that was paid for, written before anything is made of it.

Appended only, a line an answer, each on the disk before the next request of its prompt: a command that was killed asks
nothing again that stands there. A line also says that a request begins, so that one that was under way when the command
was killed counts as lost. The first line holds the settings that answers depend on. Texts stay in the file.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from prism_fast.files import writing
from prism_fast.records import DataError
from prism_fast.stages.curating.answer import Answer, Tokens

FILE_NAME = "journal.jsonl"


class Key(NamedTuple):
    """Of an answer."""

    prompt: str  # digest of what is asked: request.key_of
    number: int  # which of the prompt's answers


class Journal:
    """Raises DataError where the file is of other settings, or is none of ours. ``look``: without writing anything."""

    def __init__(self, file: Path, settings: dict[str, Any], look: bool = False):
        self.file, self._look = file, look
        self.counted = Tokens(0, 0)  # what answers counted, by their usage
        self.assumed = Tokens(0, 0)  # the most that others may have counted: without a usage, or lost on the way
        self.lost = 0  # requests whose answer never came, and may have been paid
        self._place: dict[Key, tuple[int, int]] = {}  # offset and length
        self._begun: dict[Key, Tokens] = {}  # and not ended
        self._size = 0
        self._opened: int | None = None
        self._read_all({"curate": 1, **settings})

    def __contains__(self, key: Key) -> bool:
        return key in self._place

    def __len__(self) -> int:
        return len(self._place)

    def answer(self, key: Key) -> Answer:
        with open(self.file, "rb") as file:
            file.seek(self._place[key][0])
            line = json.loads(file.read(self._place[key][1]))
        return Answer(line["text"], line["finish"], Tokens(*line["usage"]) if line["usage"] else None)

    def begin(self, key: Key, most: Tokens) -> None:
        """A request, that may count so much."""
        self._take(self._append({"what": "begun", **key._asdict(), "most": most}, sync=False))

    def add(self, key: Key, answer: Answer, most: Tokens) -> None:
        """``most``: what it may have counted, where its usage is not told."""
        self._take(self._append({"what": "answer", **key._asdict(), **answer._asdict(), "most": most}))

    def lose(self, key: Key, most: Tokens) -> None:
        """A try of it that was sent and not answered."""
        self._take(self._append({"what": "lost", **key._asdict(), "most": most}))

    def end(self, key: Key) -> None:
        """It is given up."""
        self._take(self._append({"what": "ended", **key._asdict()}, sync=False))

    def close(self) -> None:
        if self._opened is not None:
            os.close(self._opened)
            self._opened = None

    def _append(self, line: dict[str, Any], sync: bool = True) -> tuple[int, int, dict[str, Any]]:
        data = json.dumps(line).encode() + b"\n"
        with writing(self.file):
            if self._opened is None:
                self._opened = os.open(self.file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                if (wrote := os.write(self._opened, data)) < len(data):
                    os.write(self._opened, data[wrote:])  # says why the disk took no more
                if sync:
                    os.fsync(self._opened)
            except OSError:
                os.ftruncate(self._opened, self._size)  # or the next line would stand behind half a one
                raise
        place = self._size, len(data), line
        self._size += len(data)
        return place

    def _take(self, place: tuple[int, int, dict[str, Any]]) -> None:
        offset, length, line = place
        what, key = line["what"], Key(line["prompt"], line["number"])
        if what == "begun":
            self._begun[key] = Tokens(*line["most"])
            return
        if what != "lost":
            self._begun.pop(key, None)
        if what == "ended":
            return
        if what == "answer":
            self._place.setdefault(key, (offset, length))
        else:
            self.lost += 1
        if usage := line.get("usage"):
            self.counted = self.counted.plus(Tokens(*usage))
        else:
            self.assumed = self.assumed.plus(Tokens(*line["most"]))

    def _read_all(self, begins: dict[str, Any]) -> None:
        """What is there; a last line that was being written when the command ended is cut off."""
        if not self.file.exists():
            if not self._look:
                self._append(begins)
            return
        try:
            with open(self.file, "rb") as file:
                for number, data in enumerate(file):
                    if not data.endswith(b"\n"):
                        break
                    line = json.loads(data)
                    if number == 0:
                        self._refuse_others(line, begins)
                    else:
                        self._take((self._size, len(data), line))
                    self._size += len(data)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{self.file}: line {number + 1}: not an answer that was kept ({error}); remove it"
            ) from None
        if self._look:
            return
        if self.file.stat().st_size > self._size:
            with writing(self.file):
                os.truncate(self.file, self._size)
        if not self._size:
            self._append(begins)
        for key, most in [*self._begun.items()]:  # under way when the command was killed
            self.lose(key, most)
            self.end(key)

    def _refuse_others(self, before: dict[str, Any], now: dict[str, Any]) -> None:
        changed = [f"{key}: {before.get(key)!r} -> {now[key]!r}" for key in now if before.get(key) != now[key]]
        if changed:
            raise DataError(
                f"{self.file}: was begun with other settings: {'; '.join(changed)}; set them back, or take another out"
            )
