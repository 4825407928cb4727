"""Numbers with their units, ratios and ranges."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from prism_fast.reward.answer import exact_number, units
from prism_fast.reward.answer.words import roman, share, spelled_number


@dataclass(frozen=True)
class Quantity:
    value: exact_number.Number
    unit: units.Unit | units.Noun | None
    needs_unit: bool = False  # "1990s": seconds, or ten years, but not the year 1990; "5K": kelvin, but not 5


@dataclass(frozen=True)
class Pair:
    """A ratio, a range, or ("3 to 4") either."""

    numbers: tuple[Fraction, ...]
    kinds: frozenset[str]  # "ratio", "range"


_MONEY = re.compile(
    r"(?P<sign>[-+]?) ?(?P<unit>US\$|[$€£¥₹]|(?:USD|EUR|GBP|JPY|INR|Rs)\.?(?= ?[0-9])) ?", re.IGNORECASE
)
_MAGNITUDE = re.compile(
    r" ?(hundred|thousand|million|billion|trillion|dozen|lakh|crore|mn|bn)\b| ?(?-i:(k))(?![A-Za-z])"
)
_UNIT_OR_MAGNITUDE = re.compile(r"([KMB])(?![A-Za-z])")  # 5K: 5000, or 5 kelvin
_MONEY_MAGNITUDE = re.compile(r" ?([kKmMbB])(?![A-Za-z])")
_MAGNITUDES = {"hundred": 100, "dozen": 12, "lakh": 10**5, "crore": 10**7, "billion": 10**9, "trillion": 10**12}
_MAGNITUDES |= {"thousand": 1000, "k": 1000, "million": 10**6, "m": 10**6, "mn": 10**6, "b": 10**9, "bn": 10**9}
_PERCENT = re.compile(r" ?(?:(?P<mille>‰)|%|percent\b|per cent\b|pct\b)(?: ?age points?\b| points?\b)?", re.IGNORECASE)
_DECADE = re.compile(r"[1-9][0-9]{2}0'?s", re.IGNORECASE)
_DECIMAL_COMMA = re.compile(r"(?<![0-9,.(\[{])((?:[0-9]{1,3}(?:\.[0-9]{3})+|[0-9]+)),([0-9]+)(?![0-9,.])")


def read_quantities(body: str) -> tuple[Quantity, ...]:
    """Readings of ``body`` as a number with or without a unit; raises `exact_number.TooBig`."""
    texts = [body, *(text for text in (spelled_number(body), share(body), roman(body)) if text)]
    if alone := _ALONE.fullmatch(body):
        texts.append(alone[1])
    comma = _DECIMAL_COMMA.search(body)
    if comma and body.count(",") == 1 and (len(comma[2]) != 3 or comma[1] == "0" or "." in comma[1]):
        texts.append(body[: comma.start()] + comma[1].replace(".", "") + "." + comma[2] + body[comma.end() :])
    return tuple(quantity for text in texts for quantity in _read_quantity(text))


_ALONE = re.compile(r"[\[{]([^\[\]{},;|]+)[\]}]")  # one value in the brackets of a list
# A value and what it is about: "25pi = 78.5", "25pi (~ 78.5)", "25pi or about 78.5"; or the same: "five (5)".
_ABOUT = r"(?:~|=|about|approximately|approx\.?|roughly|or about|or approximately|or roughly)"
_RESTATED = re.compile(
    rf"(?P<exact>[^=~]+?),? ?(?:{_ABOUT} ?(?P<rounded>[^=~]+)|\({_ABOUT} ?(?P<within>[^=~]+)\)|\((?P<same>[^=~()]+)\))"
)


def read_restated(text: str) -> tuple[Quantity, ...]:
    """Both values of a text that states one twice, where the second is the first or rounds it; else ()."""
    match = _RESTATED.fullmatch(text)
    if match is None:
        return ()
    exact, rounded = (
        [q for text in (part, spelled_number(part)) if text for q in _read_quantity(text)]
        for part in (match["exact"].strip(), (match["rounded"] or match["within"] or match["same"]).strip())
    )
    for a in exact:
        for b in rounded:
            above = abs(Fraction(b.value.approx)) - abs(Fraction(a.value.approx))
            step = b.value.step or Fraction(b.value.exact is not None and b.value.exact % 1 == 0)
            rounds = b.value.step is not None or a.value.exact is None or a.value.exact % 1 != 0
            if (
                ((-step < above <= step / 2 and rounds and not match["same"]) or above == 0)
                and a.value.approx * b.value.approx >= 0
                and (a.unit is None or a.unit == b.unit)
            ):
                return (*(Quantity(e.value, e.unit or b.unit) for e in exact), *rounded)
    return ()


def _read_quantity(text: str) -> tuple[Quantity, ...]:
    text = re.sub(r" an? (?=(?:hour|second|minute|day|week|month|year)$)", " per ", text)
    money = _MONEY.match(text)
    if money:
        text = money["sign"] + text[money.end() :]
    try:
        value, end = exact_number.parse(text)
    except exact_number.NoNumber:
        return ()
    rest = text[end:]
    rest = re.sub(r"^(?:st|nd|rd|th)(?![A-Za-z])", "", rest)
    either = None if money or text[end - 1 : end] == " " else _UNIT_OR_MAGNITUDE.match(rest)
    if either:
        large = value.scaled(Fraction(_MAGNITUDES[either[1].lower()]))
        counted = [Quantity(large, unit) for unit in units.parse(rest[1:])]
        return (*counted, *(Quantity(value, unit, needs_unit=True) for unit in units.parse(rest)))
    magnitude = _MAGNITUDE.match(rest) or (money and _MONEY_MAGNITUDE.match(rest))
    if magnitude:
        value, rest = value.scaled(Fraction(_MAGNITUDES[magnitude.group().strip().lower()])), rest[magnitude.end() :]
    if percent := _PERCENT.match(rest):
        value, rest = value.scaled(Fraction(1, 1000 if percent["mille"] else 100)), rest[percent.end() :]
        # "10% of the students", "10% salt": what it is a share of is no unit.
        return (Quantity(value, None),) if units.parse(re.sub(r"^ of ", " ", rest)) else ()
    rest = rest.strip(" ,")
    if rest.startswith("(") and rest.endswith(")"):
        rest = rest[1:-1]
    if money:
        return _money(value, money["unit"].rstrip(".").lower(), rest)
    decade = _DECADE.fullmatch(text) is not None
    readings = tuple(Quantity(value, unit, decade) for unit in units.parse(rest))
    return readings or _compound(value, rest)


def _money(value: exact_number.Number, symbol: str, rest: str) -> tuple[Quantity, ...]:
    currency = units.parse(symbol.replace("us$", "$"))
    if not rest:
        return (Quantity(value, currency[0]),)
    after = units.parse(rest)
    if rest.startswith(("per ", "/")):
        after = units.parse(f"{symbol} {rest}")
    if not after:
        return ()
    named = isinstance(after[0], units.Unit)
    return (Quantity(value, after[0] if named else currency[0]),)


_FIRST_UNIT = re.compile(r"(?P<unit>[A-Za-z°'\"]+),? ?(?:and )?(?=[0-9])")


def _compound(value: exact_number.Number, rest: str) -> tuple[Quantity, ...]:
    """ "2 h 30 min", "5 ft 3 in": a sum of units of one dimension, each smaller than the one before."""
    first = _FIRST_UNIT.match(rest)
    large = units.parse(first["unit"]) if first else ()
    readings = []
    for small in _read_quantity(rest[first.end() :]) if large else ():
        for unit in large:
            if not isinstance(unit, units.Unit) or not isinstance(small.unit, units.Unit) or value.exact is None:
                continue
            if unit.dimension == small.unit.dimension and unit.factor > small.unit.factor and not unit.offset:
                total = small.value.scaled(small.unit.factor).plus(value.exact * unit.factor)
                readings.append(Quantity(total, units.Unit(Fraction(1), unit.dimension)))
    return tuple(readings)


_PAIR_NUMBER = r"-?[0-9]{1,12}(?:\.[0-9]{1,12})?"
_PAIR = re.compile(
    rf"(?:(?:from|between) )?(?P<first>{_PAIR_NUMBER})(?P<mark> ?: ?| to | ?- ?)(?P<second>{_PAIR_NUMBER})"
    rf"(?P<more>(?: ?: ?{_PAIR_NUMBER}){{0,6}})"
)


def read_pair(body: str) -> Pair | None:
    match = _PAIR.fullmatch(re.sub(r"^between (.{1,26}) and ", r"\1 to ", body))
    if match is None:
        return None
    kinds = {":": {"ratio"}, "to": {"ratio", "range"}, "-": {"range"}}[match["mark"].strip()]
    rest = [number for number in match["more"].replace(" ", "").split(":") if number]
    if rest and kinds != {"ratio"}:
        return None
    return Pair(tuple(Fraction(number) for number in (match["first"], match["second"], *rest)), frozenset(kinds))
