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


_SPOKEN = re.compile(
    r"(?:a )?(?P<part>half|quarter) (?P<to>past|to) (?P<hour>1[0-2]|[1-9])|(?P<full>1[0-2]|[1-9]) o'?clock",
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
    if text.lower() in ("noon", "12 noon", "midnight", "12 midnight"):
        return Clock(12, 0, 0, "p" if text.lower().endswith("noon") else "a")
    if spoken := _SPOKEN.fullmatch(text):
        before = (spoken["to"] or "").lower() == "to"
        minute = {"half": 30, "quarter": 15}.get((spoken["part"] or "").lower(), 0)
        hour = int(spoken["hour"] or spoken["full"])
        return Clock((hour - 2) % 12 + 1, 60 - minute, 0, "") if before else Clock(hour, minute, 0, "")
    match = _CLOCK.fullmatch(text)
    if match is None:
        return None
    half = (match["half"] or match["full_half"] or "")[:1].lower()
    clock = Clock(int(match["hour"] or match["full"]), int(match["minute"] or 0), int(match["second"] or 0), half)
    return clock if clock.hour <= (12 if half else 24) else None


_MONTHS = "january february march april may june july august september october november december".split()
_NUMERIC = re.compile(r"([0-9]{1,2})([./-])([0-9]{1,2})\2([0-9]{4})")
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
    if numeric := _NUMERIC.fullmatch(text):  # which is the month must be plain
        first, second, year = (int(number) for number in numeric.group(1, 3, 4))
        day, month = (first, second) if first > 12 or numeric[2] == "." else (second, first)
        known = day > 12 or numeric[2] == "."
        return Date(year, month, day) if known and 1 <= day <= 31 and 1 <= month <= 12 else None
    text = re.sub(r"^on (?=[A-Z0-9])", "", text)
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
