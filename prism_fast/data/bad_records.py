"""The account of bad records: a command has one, and each record is counted once, however often it is drawn."""

from __future__ import annotations

from prism_fast.records import DataError


class BadRecords:
    """Records that were passed over, by place; more than ``allowed`` of them raise, with 0 the first does.

    A part of a checkpoint: what an interrupted run had found still counts after it is resumed.
    """

    def __init__(self, allowed: int = 0):
        self.allowed = allowed
        self.found: dict[str, str] = {}  # "file:record" -> what is wrong with it

    def __len__(self) -> int:
        return len(self.found)

    @property
    def messages(self) -> list[str]:
        return list(self.found.values())

    def add(self, place: str, error: DataError) -> None:
        """Counts the record at ``place``, once; raises where that is one too many."""
        if self.allowed == 0:
            raise error
        if place in self.found:
            return
        self.found[place] = str(error)
        if len(self) > self.allowed:
            raise DataError(
                f"{error} (more than skip_bad_records={self.allowed} bad records, the first: {self.messages[0]})"
            ) from error

    def state(self) -> dict[str, str]:
        return self.found

    def load(self, state: dict[str, str]) -> None:
        if len({**state, **self.found}) > self.allowed:
            raise ValueError(f"{len({**state, **self.found})} bad records, more than skip_bad_records={self.allowed}")
        self.found = {**state, **self.found}
