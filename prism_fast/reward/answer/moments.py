"""Times of the day and dates."""

# ruff: noqa: SIM905 (a table of words reads best as words)
from __future__ import annotations

import re
from dataclasses import dataclass

_CLOCK = re.compile(
    r"(?P<hour>[0-9]{1,2}):(?P<minute>[0-5][0-9])(?::(?P<second>[0-5][0-9]))? ?(?P<half>[ap]\.?m\.?)?"
    r"|(?P<full>[0-9]{1,2}) ?(?P<full_half>[ap]\.?m\.?)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Clock:
    """``half`` is "a", "p", or "" where the text leaves it open (or counts 24 hours)."""

    hour: int
    minute: int
    second: int
    half: str

    def same(self, other: Clock) -> bool:
        """Whether both name one time; where one leaves the half of the day open, its face decides."""
        if (self.minute, self.second) != (other.minute, other.second):
            return False
        if bool(self.half) == bool(other.half):
            return self._of_day() == other._of_day()
        marked, bare = (self, other) if self.half else (other, self)
        return bare.hour in (marked.hour, marked._of_day())

    def _of_day(self) -> int:
        return self.hour if not self.half else self.hour % 12 + (12 if self.half == "p" else 0)


def read_clock(text: str) -> Clock | None:
    """The time that ``text`` is: "3:30", "03:30 pm", "15:30:00", "3 p.m."."""
    match = _CLOCK.fullmatch(text)
    if match is None:
        return None
    half = (match["half"] or match["full_half"] or "")[:1].lower()
    clock = Clock(int(match["hour"] or match["full"]), int(match["minute"] or 0), int(match["second"] or 0), half)
    return clock if clock.hour <= (12 if half else 24) else None


_MONTHS = "january february march april may june july august september october november december".split()
_ISO = re.compile(r"([0-9]{4})[-/]([0-9]{1,2})[-/]([0-9]{1,2})")


@dataclass(frozen=True)
class Date:
    """0 stands for what the text does not say."""

    year: int
    month: int
    day: int


def read_date(text: str) -> Date | None:
    """The date that ``text`` is: "5 January 2020", "Jan 5th, 2020", "March 2021", "2020-01-05"."""
    if len(text) > 40:
        return None
    if iso := _ISO.fullmatch(text):
        return Date(int(iso[1]), int(iso[2]), int(iso[3]))
    year = month = day = 0
    for word in re.findall(r"[a-z0-9]+|[^a-z0-9\s,.]", text.lower()):
        number = re.fullmatch(r"([0-9]{1,2})(?:st|nd|rd|th)?|([0-9]{4})", word)
        if number and number[2] and not year:
            year = int(number[2])
        elif number and number[1] and not day and 1 <= int(number[1]) <= 31:
            day = int(number[1])
        elif not number and not month and len(word) >= 3 and (named := [m for m in _MONTHS if m.startswith(word[:4])]):
            if named[0] != word and named[0][:3] != word and word != "sept":
                return None
            month = _MONTHS.index(named[0]) + 1
        elif word not in ("of", "the"):
            return None
    return Date(year, month, day) if month and (year or day) else None
