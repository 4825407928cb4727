"""Units of measure: what stands after (or, for money, before) the number of an answer.

A unit is a factor to base units and a dimension, so "1 m" = "100 cm" and "5 N*m" = "5 J", while "5 kg" and "5 lb" are
different masses and "5 kg" and "5 m" cannot be compared. Words that are no unit of measure ("apples") are a noun.
"""

# ruff: noqa: SIM905 (a table of words reads best as words)
from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from prism_fast.reward.answer.exact_number import PI
from prism_fast.reward.answer.plain import FUNCTIONS

Dimension = tuple[tuple[str, int], ...]  # (base, exponent), sorted, without zeros


@dataclass(frozen=True)
class Unit:
    """``value * factor + offset`` is the value in base units (only temperatures have an offset)."""

    factor: Fraction
    dimension: Dimension
    offset: Fraction = Fraction(0)


@dataclass(frozen=True)
class Noun:
    """Things that are counted: "red apples" -> {"red", "apple"}."""

    words: frozenset[str]


def agree(a: Unit | Noun | None, b: Unit | Noun | None) -> bool:
    """Whether values with these units can be compared: one is missing, or both measure or count the same thing."""
    if a is None or b is None:
        return True
    if isinstance(a, Noun) and isinstance(b, Noun):
        return a.words <= b.words or b.words <= a.words
    return isinstance(a, Unit) and isinstance(b, Unit) and a.dimension == b.dimension


# Spellings | factor to base units | dimension. A spelling of one or two letters or with a capital is a symbol and keeps
# its case; the others are names: any case, plural or not. Two entries for one spelling are two meanings.
_PREFIXED = """
    m meter metre      | 1      | m
    g gram gramme      | 0.001  | kg
    s second           | 1      | s
    A ampere           | 1      | A
    amp                | 1      | A
    mol mole           | 1      | mol
    M molar            | 1000   | mol m-3
    L l liter litre    | 0.001  | m3
    N newton           | 1      | kg m s-2
    G gauss            | 0.0001 | kg s-2 A-1
    Pa pascal          | 1      | kg m-1 s-2
    J joule            | 1      | kg m2 s-2
    W watt             | 1      | kg m2 s-3
    Wh watt-hour       | 3600   | kg m2 s-2
    V volt             | 1      | kg m2 s-3 A-1
    Ω ohm              | 1      | kg m2 s-3 A-2
    C coulomb          | 1      | A s
    F farad            | 1      | kg-1 m-2 s4 A2
    T tesla            | 1      | kg s-2 A-1
    Hz hertz           | 1      | s-1
    eV electronvolt    | 1.602176634e-19 | kg m2 s-2
    cal calorie        | 4.184  | kg m2 s-2
    bar                | 100000 | kg m-1 s-2
    H henry henrie     | 1      | kg m2 s-2 A-2
    S siemens siemen   | 1      | kg-1 m-2 s3 A2
    Wb weber           | 1      | kg m2 s-2 A-1
    Bq becquerel       | 1      | s-1
    Gy gray            | 1      | m2 s-2
    Sv sievert         | 1      | m2 s-2
    kat katal          | 1      | mol s-1
    cd candela         | 1      | cd
    lm lumen           | 1      | cd sr
    lx lux             | 1      | cd sr m-2
    sr steradian       | 1      | sr
    Da dalton          | 1.66053906660e-27 | kg
"""
_BINARY = """
    B byte | 8 | bit
    b bit  | 1 | bit
"""
_PLAIN = """
    t ton tonne              | 1000            | kg
    lb lbs pound             | 0.45359237      | kg
    oz ounce                 | 0.028349523125  | kg
    in inch inches "         | 0.0254          | m
    ft foot feet '           | 0.3048          | m
    yd yard                  | 0.9144          | m
    mi mile                  | 1609.344        | m
    Å angstrom ångström ångstrom | 1e-10           | m
    ly light-year            | 9460730472580800 | m
    sec                      | 1               | s
    msec                     | 0.001           | s
    mcg                      | 0.000000001     | kg
    mbar                     | 100             | kg m-1 s-2
    dyn dyne                 | 0.00001         | kg m s-2
    erg                      | 0.0000001       | kg m2 s-2
    min minute               | 60              | s
    h hr hour                | 3600            | s
    d day                    | 86400           | s
    wk week                  | 604800          | s
    month                    | 1               | month
    yr year                  | 12              | month
    decade                   | 120             | month
    century                  | 1200            | month
    ha hectare               | 10000           | m2
    acre                     | 4046.8564224    | m2
    cc                       | 0.000001        | m3
    gal gallon               | 0.003785411784  | m3
    qt quart                 | 0.000946352946  | m3
    pint                     | 0.000473176473  | m3
    cup                      | 0.0002365882365 | m3
    atm atmosphere           | 101325          | kg m-1 s-2
    mmHg torr                | 133.322387415   | kg m-1 s-2
    psi                      | 6894.757293168  | kg m-1 s-2
    hp horsepower            | 745.6998715822702 | kg m2 s-3
    kn kt knot               | 1852/3600       | m s-1
    rpm RPM                  | 6               | degree s-1
    dB decibel               | 1               | decibel
    ppm                      | 0.000001        | share
    au AU                    | 149597870700    | m
    mph                      | 0.44704         | m s-1
    kph kmh kmph             | 5/18            | m s-1
    K kelvin                 | 1               | kelvin
    ° deg degree             | 1               | degree
    rev revolution           | 360             | degree
    arcmin arcminute         | 1/60            | degree
    arcsec arcsecond         | 1/3600          | degree
    $ US$ usd dollar buck    | 1               | usd
    ¢ cent                   | 0.01            | usd
    € eur euro               | 1               | eur
    £ gbp pound              | 1               | gbp
    ¥ jpy yen                | 1               | jpy
    ₹ rs inr rupee           | 1               | inr
"""
_PREFIXES = [
    ("p", "pico", -12),
    ("n", "nano", -9),
    ("μ", "micro", -6),
    ("u", "micro", -6),
    ("m", "milli", -3),
    ("c", "centi", -2),
]
_PREFIXES += [("d", "deci", -1), ("k", "kilo", 3), ("M", "mega", 6), ("G", "giga", 9), ("T", "tera", 12)]
_PREFIXES += [("f", "femto", -15), ("h", "hecto", 2), ("P", "peta", 15)]

_SYMBOLS: dict[str, tuple[Unit, ...]] = {}  # case sensitive
_NAMES: dict[str, tuple[Unit, ...]] = {}  # lower case, singular


def _is_symbol(spelling: str) -> bool:
    return len(spelling) <= 2 or not spelling.islower()


def _add(spelling: str, unit: Unit) -> None:
    table = _SYMBOLS if _is_symbol(spelling) else _NAMES
    table[spelling] = (*table.get(spelling, ()), unit)


def _rows(table: str) -> list[tuple[list[str], Fraction, Dimension]]:
    rows = []
    for line in table.strip().splitlines():
        spellings, factor, dimension = line.split("|")
        powers = [re.fullmatch(r"([a-zA-Z]+)(-?\d*)", power).groups() for power in dimension.split()]
        exponents = sorted((base, int(power or 1)) for base, power in powers)
        rows.append((spellings.split(), Fraction(factor.strip()), tuple(exponents)))
    return rows


def _fill_tables() -> None:
    for spellings, factor, dimension in _rows(_PLAIN):
        for spelling in spellings:
            _add(spelling, Unit(factor, dimension))
    large = [prefix for prefix in _PREFIXES if prefix[2] >= 3]
    for table, prefixes in ((_PREFIXED, _PREFIXES), (_BINARY, large)):
        for spellings, factor, dimension in _rows(table):
            for spelling in spellings:
                for short, long, exponent in [("", "", 0), *prefixes]:
                    name = (
                        short if len(spelling) <= 3 and spelling not in ("bar", "bit", "ohm", "amp", "lux") else long
                    ) + spelling
                    _add(name, Unit(factor * Fraction(10) ** exponent, dimension))
    _add("rad", Unit(180 / Fraction(PI), (("degree", 1),)))
    _add("radian", Unit(180 / Fraction(PI), (("degree", 1),)))
    celsius = Unit(Fraction(1), (("kelvin", 1),), Fraction("273.15"))
    fahrenheit = Unit(Fraction(5, 9), (("kelvin", 1),), Fraction("459.67") * Fraction(5, 9))
    for spelling in ("°C", "C", "celsius", "centigrade", "°", "degree"):
        _add(spelling, celsius)
    for spelling in ("°F", "F", "fahrenheit", "°", "degree"):
        _add(spelling, fahrenheit)


_fill_tables()
_DEGREES = re.compile(r"(?:degrees?|deg|°) ?(c(?:elsius|entigrade)?|f(?:ahrenheit)?)(?![a-z])", re.IGNORECASE)
_LEFT = re.compile(r" (?:(?:is|are|was|were) )?(?:left|remain|remains|remaining|needed)$")
_UNITS = re.compile(r"u(?:nits?)? ?(?:\^\(?[23]\)?|squared|cubed)")
_US_DOLLARS = re.compile(r"u\.?s\.? dollars?", re.IGNORECASE)
_TOKEN = re.compile(
    r"(?P<name>°[CF]\b|US\$|[A-Za-zμΩÅ]+(?:-(?:hours?|years?))?\.?|[°'\"$€£¥₹¢])"
    r"|(?P<power>\^\(?-?[1-9]\)?|[1-9](?![0-9]))|(?P<mark>[*/()]|-(?=[A-Za-z]))| "
)
# Words that make a sentence or a list of what follows a number, so that the number alone is not the answer.
_FORBIDDEN = frozenset(
    "and or to not but if is are was plus minus times divided than versus vs inf sqrt pi nor squared cubed factorial "
    "wrong incorrect false bc bce half zero one two three four five six seven eight nine ten eleven "
    "twelve twenty".split()
) | frozenset(FUNCTIONS)
_SMALL_WORDS = frozenset(
    "a an the of in total unit square cubic altogether each per exactly only left more ad ce pcs pts".split()
)


def parse(text: str) -> tuple[Unit | Noun | None, ...]:
    """Every reading of ``text`` as a unit, possibly followed by words ("kg of rice"); () where it has none.

    >>> parse("km/h")
    (Unit(factor=Fraction(5, 18), dimension=(('m', 1), ('s', -1)), offset=Fraction(0, 1)),)
    """
    text = text.strip().rstrip(".")
    if len(text) > 80:
        return ()
    if not text:
        return (None,)
    text = _DEGREES.sub(lambda match: "°" + match[1][0].upper(), text)
    text = _LEFT.sub("", _US_DOLLARS.sub("usd", text))
    if _UNITS.fullmatch(text):
        return (None,)
    readings = _measure(text)
    if readings:
        return readings
    words = re.fullmatch(r"[A-Za-z][A-Za-z' -]*", text) and re.findall(r"[a-z']+", text.lower())
    if not words or not _FORBIDDEN.isdisjoint(words):
        return ()
    # "kg of rice", "cm long"; "in total" is no inch.
    pieces = text.split()
    for count in range(min(3, len(pieces) - 1), 0, -1):
        if pieces[count - 1] != "in" and (readings := _measure(" ".join(pieces[:count]))):
            return readings
    counted = frozenset(_singular(word) for word in words) - _SMALL_WORDS
    if not counted:
        return (None,)
    # A letter or two are variables, not a thing.
    return (Noun(counted),) if any(len(word) > 2 and re.search("[aeiouy]", word) for word in counted) else ()


_IRREGULAR = {
    "people": "person",
    "men": "man",
    "women": "woman",
    "children": "child",
    "mice": "mouse",
    "teeth": "tooth",
}


def _singular(word: str) -> str:
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if len(word) > 4 and word.endswith(("ches", "shes", "xes", "sses")):
        return word[:-2]
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word


def _lookup(name: str) -> tuple[Unit, ...]:
    """Every meaning of one unit's spelling."""
    lower = name.lower()
    if name in _SYMBOLS:
        return _SYMBOLS[name]
    singular = lower[:-1] if lower.endswith("s") and len(lower) > 2 else lower
    if lower.endswith("ies"):
        singular = lower[:-3] + "y"
    for spelling in (lower, singular):
        if spelling in _NAMES:
            return _NAMES[spelling]
    if len(singular) > 1 and singular != lower and singular in _SYMBOLS:  # kgs, hrs
        return _SYMBOLS[singular]
    if (
        len(name) == 1 or name in ("ma", "mv") or not (name.islower() or name.isupper() or name.istitle())
    ):  # pA is not Pa
        return ()
    # "KG" is kg; "mb" may be MB or Mb.
    return tuple(unit for symbol, units in _SYMBOLS.items() if symbol.lower() == lower for unit in units)


def _measure(text: str) -> tuple[Unit, ...]:
    """Every meaning of "kg", or the one meaning of a product: "kg*m^2/s^2", "meters per second", "square cm", "cm2"."""
    if units := _lookup(text):
        return units
    powers = _powers(text)
    if not powers:
        return ()
    factor, dimension = Fraction(1), dict[str, int]()
    for unit, exponent in powers:
        factor *= unit.factor**exponent
        for base, power in unit.dimension:
            dimension[base] = dimension.get(base, 0) + power * exponent
    return (Unit(factor, tuple(sorted((base, power) for base, power in dimension.items() if power))),)


def _powers(text: str) -> list[tuple[Unit, int]] | None:
    """The factors of a product of units with their exponents; None where something else stands in the text."""
    powers: list[tuple[Unit, int]] = []
    side = announced = 1  # numerator or denominator; the power that "square" announces
    at, inside, fresh = 0, False, False  # fresh: a power would belong to the last factor
    while at < len(text):
        token = _TOKEN.match(text, at)
        if token is None or len(powers) > 8:
            return None
        at = token.end()
        name, mark = (token["name"] or "").lower().rstrip("."), token["mark"]
        if token["power"] or name in ("squared", "cubed"):
            if not fresh:
                return None
            if token["power"] and token["power"].isdecimal() and not text[token.start() - 1].isalpha():  # cm2, not 5'3
                return None
            raised = {"squared": 2, "cubed": 3}.get(name) or int(token["power"].strip("^()"))
            powers[-1] = (powers[-1][0], powers[-1][1] * raised)
            fresh = False
        elif name in ("square", "sq", "cubic", "cu"):
            announced = 3 if name[0] == "c" else 2
        elif name == "per" or mark == "/":
            side = -1
        elif name:
            units = _lookup(token["name"].rstrip("."))
            if not units or units[0].offset:
                return None
            powers.append((units[0], side * announced))
            announced, fresh = 1, True
        elif mark:
            inside = mark == "(" if mark in "()" else inside
            side = 1 if mark == "*" and not inside else side
    return powers
