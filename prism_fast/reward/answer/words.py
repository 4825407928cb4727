"""Numbers that are written in words."""

# ruff: noqa: SIM905 (a table of words reads best as words)
from __future__ import annotations

import re

_SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_VALUES = {word: value for value, word in enumerate(_SMALL)} | {word: 10 * (2 + at) for at, word in enumerate(_TENS)}
_SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth".split()
_PARTS = {"half": 2, "halves": 2, "quarter": 4, "quarters": 4}
_PARTS |= {word + plural: at + 1 for at, word in enumerate(_ORDINALS) if at >= 2 for plural in ("", "s")}
_WORD = re.compile(r"[ -]?([a-z]+)", re.IGNORECASE)


def spelled_number(text: str) -> str | None:
    """``text`` with the number words that it starts with in digits; None where it starts with none.

    >>> spelled_number("Twenty-one apples"), spelled_number("two thirds"), spelled_number("third")
    ('21 apples', '2/3', '3')
    """
    lower = text.lower()
    sign = "-" if lower.startswith(("minus ", "negative ")) else ""
    if sign:
        text = text[text.index(" ") + 1 :]
        if text[:1].isdigit():
            return "-" + text
    elif lower in _ORDINALS:
        return str(_ORDINALS.index(lower) + 1)
    fraction = re.match(r"(?:(an?|[a-z]+)[ -])?([a-z]+)(?: (?:of )?an?)?(?![a-z])", text, re.IGNORECASE)
    if fraction and fraction[2].lower() in _PARTS:
        above = {"": 1, "a": 1, "an": 1}.get((fraction[1] or "").lower(), _VALUES.get((fraction[1] or "").lower()))
        if above is not None and (fraction[1] or fraction[2].lower() == "half"):
            return f"{sign}{above}/{_PARTS[fraction[2].lower()]}{text[fraction.end() :]}"
    article = re.match(r"an? (?=(?:dozen|hundred|thousand|million|billion)\b)", lower)
    if article:
        return f"{sign}1 {text[article.end() :]}"
    value, end = _cardinal(text)
    return f"{sign}{value}{text[end:]}" if end else None


def _cardinal(text: str) -> tuple[int, int]:
    """(value, index after it) of the number words at the start of ``text``; (0, 0) where there are none."""
    total = group = at = end = 0
    last = 1000  # the worth of the last word of this group: "twenty one" grows, "one two" does not
    while match := _WORD.match(text, at):
        word = match[1].lower()
        if word in _VALUES and (last > 9 if _VALUES[word] < 10 else last >= 100):
            group, last = group + _VALUES[word], _VALUES[word]
            last = 100 if last == 0 else last
        elif word == "hundred" and 0 < group < 10:
            group, last = group * 100, 100
        elif word in _SCALES and group and (not total or total % (_SCALES[word] * 1000) == 0):
            total, group, last = total + group * _SCALES[word], 0, 1000
        elif word != "and" or not end:
            break
        at = match.end()
        if word != "and":
            end = at
    return total + group, end
