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
_PARTS |= {"hundredth": 100, "hundredths": 100, "thousandth": 1000, "thousandths": 1000}
_ORDINAL = {word: _SMALL[at + 1] for at, word in enumerate(_ORDINALS)}  # first -> one
_ORDINAL |= {word + "th": word for word in [*_SMALL[13:], "hundred", "thousand", "million"]}
_ORDINAL |= {word[:-1] + "ieth": word for word in _TENS}
_DIGIT = "(?:" + "|".join(_SMALL[:10]) + ")"
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
    for rule in (_ordinal, _with_a_part, _with_a_point):
        if found := rule(text.lower()):
            return sign + found
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


def _ordinal(lower: str) -> str | None:
    """ "twenty-first" -> "21", "the third" -> "3"; "one third" is a fraction."""
    words = re.match(r"(?:the )?((?:[a-z]+[ -]){0,5})", lower + " ")
    pieces = re.findall(r"[a-z]+", words[1]) if words else []
    at = next((at for at, word in enumerate(pieces) if word in _ORDINAL), None)
    if at is None or (at and (pieces[at] == "second" or (pieces[at] in _PARTS and pieces[at - 1] not in _TENS))):
        return None
    value = _whole(" ".join([*pieces[:at], _ORDINAL[pieces[at]]])) or {"hundredth": "100"}.get(pieces[at])
    end = re.match(r"(?:the )?" + "[ -]".join(pieces[: at + 1]), lower).end()
    return value and value + lower[end:]


def _with_a_part(lower: str) -> str | None:
    """ "three and a half" -> "3 1/2", "3 and 1/2" -> "3 1/2"."""
    match = re.match(
        r"(?P<whole>[a-z -]{3,60}?|[0-9]{1,9}) and (?P<above>an?|[a-z]+)[ -](?P<part>[a-z]+)(?![a-z])", lower
    )
    if match and match["part"] in _PARTS:
        above = 1 if match["above"] in ("a", "an") else _VALUES.get(match["above"])
        whole = match["whole"] if match["whole"].isdecimal() else _whole(match["whole"])
        return whole and above and f"{whole} {above}/{_PARTS[match['part']]}{lower[match.end() :]}"
    match = re.match(r"([0-9]{1,9}) and (?=[0-9]{1,9}/[0-9])", lower)
    return match and f"{match[1]} {lower[match.end() :]}"


def _with_a_point(lower: str) -> str | None:
    """ "three point one four" -> "3.14"."""
    match = re.match(rf"(?:(?P<whole>[a-z -]{{3,60}}?) )?point (?P<decimals>{_DIGIT}(?: {_DIGIT})*)(?![a-z])", lower)
    whole = match and ("0" if match["whole"] in (None, "zero") else _whole(match["whole"]))
    if not whole:
        return None
    return f"{whole}.{''.join(str(_VALUES[word]) for word in match['decimals'].split())}{lower[match.end() :]}"


def _whole(words: str) -> str | None:
    """The number that ``words`` are as a whole."""
    value, end = _cardinal(words)
    return str(value) if end == len(words) else None


def share(text: str) -> str | None:
    """A part of a whole: "1 in 6", "one out of six", "3 out of 5 students", "3 over 4" -> "1/6" and so on."""
    match = _SHARE.fullmatch(text.lower())
    numbers = match and [match[1], match[2]]
    digits = numbers and [n if n.isdecimal() else _whole(n) for n in numbers]
    return f"{digits[0]}/{digits[1]}" if digits and all(digits) else None


_COUNT = r"([0-9]{1,9}|[a-z-]{3,20})"
_SHARE = re.compile(rf"{_COUNT} (?:in|over|out of|in every|out of every) {_COUNT}(?: [a-z]{{2,20}}){{0,2}}")
_ROMAN = re.compile(r"M{0,3}(?:CM|CD|D?C{0,3})(?:XC|XL|L?X{0,3})(?:IX|IV|V?I{0,3})")
_ROMAN_VALUES = {"I": 1, "V": 5, "X": 10, "L": 50, "C": 100, "D": 500, "M": 1000}


def roman(text: str) -> str | None:
    """The digits of a Roman numeral of two letters or more: those of I, V and X, of four or more with others.

    >>> roman("XIV"), roman("iv"), roman("MCMXC"), roman("CD")
    ('14', '4', '1990', None)
    """
    if not 2 <= len(text) <= 15 or not (text.isupper() or text in ("ii", "iii", "iv", "vi", "vii", "viii", "ix")):
        return None
    if not _ROMAN.fullmatch(text.upper()) or (len(text) < 4 and not set(text.upper()) <= set("IVX")):
        return None
    values = [_ROMAN_VALUES[letter] for letter in text.upper()]
    return str(sum(-a if a < b else a for a, b in zip(values, [*values[1:], 0])))


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
