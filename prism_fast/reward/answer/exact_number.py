"""Numbers as a text states them (with fractions, powers, roots, pi, e): exact where rational, else to 60 digits.

A recursive-descent parser over plain text; every step is bounded in depth, in bits and in digits, so that
``9**9**9**9`` costs microseconds. Nothing is evaluated by Python's ``eval`` or by sympy.
"""

from __future__ import annotations

import decimal
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from decimal import Decimal
from fractions import Fraction

MAX_BITS = 8192  # of a numerator or denominator
MAX_MAGNITUDE = 3000  # decimal exponent of a value; units scale it without an overflow of `_CONTEXT`
MAX_EXPONENT = 2000  # of scientific notation
MAX_DEPTH = 40  # nested parentheses and towers of powers

_CONTEXT = decimal.Context(
    prec=60,
    Emin=-10_000,
    Emax=10_000,
    traps=[decimal.Overflow, decimal.InvalidOperation, decimal.DivisionByZero],
)
PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459")
_E = Decimal("2.71828182845904523536028747135266249775724709369995957496696763")
# Two constants that agree to 40 of 60 digits are the same constant.
_SAME = Decimal("1e-40")


class NoNumber(ValueError):
    """The text at this place states no number."""


class TooBig(ValueError):
    """A constant expression whose value no answer needs: more than `MAX_BITS` bits, or nested too deeply."""


@dataclass(frozen=True)
class Number:
    """A real constant.

    >>> parse("12.50")[0]
    Number(exact=Fraction(25, 2), approx=Decimal('12.5'), step=Fraction(1, 100), digits=4, decimals=2, pending=False)
    """

    exact: Fraction | None  # None where the value is irrational (or came from an irrational step)
    approx: Decimal  # 60 digits
    step: Fraction | None = None  # of a decimal literal: the worth of its last digit; None for everything else
    digits: int = 0  # of a decimal literal: significant digits
    decimals: int = 0  # of a decimal literal: digits after the point, as written
    pending: bool = False  # holds a sum or product of rationals that is not carried out, such as 3+7

    def scaled(self, factor: Fraction) -> Number:
        """This value times ``factor``, still a literal if it was one."""
        step = None if self.step is None else abs(self.step * factor)
        if self.exact is None:
            return replace(self, approx=_CONTEXT.multiply(self.approx, _decimal(factor)), step=step)
        value = _rational(self.exact * factor, self.pending)
        return replace(value, step=step, digits=self.digits, decimals=self.decimals)

    def plus(self, offset: Fraction) -> Number:
        """This value plus ``offset`` (of a temperature scale), still a literal if it was one."""
        if self.exact is None:
            return replace(self, approx=_CONTEXT.add(self.approx, _decimal(offset)))
        value = _rational(self.exact + offset, self.pending)
        return replace(value, step=self.step, digits=self.digits, decimals=self.decimals)


def same_number(answer: Number, gold: Number) -> bool:
    """Whether ``answer`` states the value of ``gold``.

    Rationals are compared exactly, irrationals to 40 digits. Rounding is admitted where a person would:

    - a gold with at least two decimals and two significant digits may be a rounded value: an answer that is finer
      (1/3, sqrt(2), more decimals) is right if it rounds to the gold (0.33 accepts 1/3; 0.5 does not accept 0.52), or,
      where the gold has six digits, if it is cut to the gold;
    - an answer written as a decimal of at least six significant digits is right if it is the gold rounded or cut to
      its last digit (1/3 accepts 0.333333, not 0.333), or differs by float noise (1e-9 relative).

    Arithmetic that is left to the reader ("3+7" for "10") does not state the value.
    """
    if answer.pending and not gold.pending:
        return False
    if answer.exact is not None and gold.exact is not None:
        difference = abs(answer.exact - gold.exact)
        if difference == 0:
            return True
    else:
        gap = abs(_CONTEXT.subtract(answer.approx, gold.approx))
        if gap <= _CONTEXT.multiply(_SAME, max(abs(answer.approx), abs(gold.approx))):
            return True
        difference = Fraction(gap)
    if gold.step is not None and gold.decimals >= 2 and gold.digits >= 2:
        finer = answer.step < gold.step if answer.step is not None else answer.exact is None or answer.exact % 1 != 0
        if finer and (difference <= gold.step / 2 or (gold.digits >= 6 and difference < gold.step)):
            return True
    if answer.step is None or answer.digits < 6:
        return False
    if gold.step is None or gold.step < answer.step:
        whole = gold.exact is not None and gold.exact % 1 == 0
        if not whole and difference < answer.step:
            return True
    return answer.digits >= 9 and difference <= abs(Fraction(gold.approx)) / 10**9


def parse(text: str) -> tuple[Number, int]:
    """The longest constant expression that ``text`` starts with, and the index after it.

    Raises `NoNumber` where there is none, `TooBig` where its value is out of bounds.
    """
    parser = _Parser(text)
    try:
        value = parser.sum()
        if value.approx and not -MAX_MAGNITUDE < value.approx.adjusted() < MAX_MAGNITUDE:
            raise TooBig(f"beyond 10^{MAX_MAGNITUDE} or below its inverse")
    except (decimal.Overflow, decimal.InvalidOperation) as error:
        raise TooBig("a value out of the range of decimals") from error
    except (decimal.DivisionByZero, ZeroDivisionError) as error:
        raise NoNumber("division by zero") from error
    return value, parser.at


def literal_number(literal: str) -> Number:
    """The value of an unsigned literal: digits with thousands separators, decimals and a decimal exponent."""
    mantissa, _, exponent = literal.lower().replace(",", "").replace(" ", "").partition("e")
    power = int(exponent) if exponent and len(exponent) <= 6 else 0
    if len(exponent) > 6 or abs(power) > MAX_EXPONENT:
        raise TooBig(f"an exponent beyond {MAX_EXPONENT}")
    whole, point, decimals = mantissa.partition(".")
    exact = Fraction(int(whole + decimals or "0"), 10 ** len(decimals)) * Fraction(10) ** power
    value = _rational(exact)
    if not point and not exponent:
        return value
    step = Fraction(10) ** (power - len(decimals))
    digits = len((whole + decimals).lstrip("0"))
    return replace(value, step=step, digits=digits, decimals=len(decimals))


_NUMBER = re.compile(
    r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,2}(?:,[0-9]{2})+,[0-9]{3}|[0-9]{1,3}(?: [0-9]{3})+)(?![0-9])(?:\.[0-9]+)?"
    r"|(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+(?![0-9a-zA-Z]))?"
)
_MIXED = re.compile(r"([0-9]{1,9}) ([0-9]{1,9}) ?/ ?([0-9]{1,9})(?![0-9.])")
# 0.1(6...), which is how 0.1\overline{6} arrives, 0.1666... and 0.1212...
_REPEATING = re.compile(
    r"([0-9]{1,9})\.([0-9]{0,9})\(([0-9]{1,9})(?:\.\.\.)?\)|([0-9]{1,9})\.([0-9]{0,9}?)([0-9])\6{2,9}\.\.\."
    r"|([0-9]{1,9})\.([0-9]{0,2}?)([0-9]{2,6})\9{1,4}\.\.\."
)
_NAME = re.compile(r"[A-Za-z]+")
_SPACES = re.compile(r" *")
# A chain of plain numbers joined by "-", or three or more by "/", is a range, a score, a date or a phone number.
_NOT_ARITHMETIC = re.compile(
    r"[0-9.]+(?: ?- ?[0-9.]+)+(?! ?(?:[-0-9.^*/+(]|sqrt|cbrt|pi\b|e\b))|[0-9]+(?: ?/ ?[0-9]+){2,}(?![0-9.^*+(-])"
)


class _Parser:
    """sum = product {(+|-) product}; product = power {(*|/|nothing) power}; power = [sign] atom [^ power]."""

    def __init__(self, text: str):
        self.text, self.at, self.depth = text, 0, 0
        if _NOT_ARITHMETIC.match(text):
            raise NoNumber("a range, a date or the like")

    def sum(self) -> Number:
        value = self.product()
        while self.peek() in ("+", "-"):
            value, done = self.continued(value)
            if done:
                break
        return value

    def continued(self, left: Number) -> tuple[Number, bool]:
        """``left`` with the next "+ b" or "- b"; unchanged where no constant follows the sign."""
        start, sign = self.at, self.peek()
        self.at += 1
        try:
            right = self.product()
        except NoNumber:
            self.at = start
            return left, True
        return _add(left, right if sign == "+" else _negative(right)), False

    def product(self) -> Number:
        value = self.power()
        while True:
            start, operator = self.at, self.peek()
            if operator in ("*", "/"):
                self.at += 1
            elif operator != "(" and not self.names_constant():
                return value
            try:
                right = self.power()
            except NoNumber:
                self.at = start
                return value
            value = _divide(value, right) if operator == "/" else _multiply(value, right)

    def power(self) -> Number:
        sign = self.peek()
        if sign in ("+", "-"):
            self.at += 1
            if self.peek() in ("+", "-"):
                raise NoNumber("two signs in a row")
            value = self.power()
            return _negative(value) if sign == "-" else value
        base = self.atom()
        if self.peek() == "^":
            self.at += 1
            base = _power(base, self.nested(self.power))
        return base

    def nested(self, rule: Callable[[], Number]) -> Number:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise TooBig(f"nested deeper than {MAX_DEPTH}")
        value = rule()
        self.depth -= 1
        return value

    def atom(self) -> Number:
        character = self.peek()
        if character == "(":
            self.at += 1
            value = self.nested(self.sum)
            if self.peek() != ")":
                raise NoNumber("a parenthesis does not close")
            self.at += 1
            return value
        mixed = _MIXED.match(self.text, self.at)
        if mixed and 0 < int(mixed[2]) < int(mixed[3]):
            self.at = mixed.end()
            return _rational(int(mixed[1]) + Fraction(int(mixed[2]), int(mixed[3])))
        repeating = _REPEATING.match(self.text, self.at)
        if repeating:
            self.at = repeating.end()
            return _repeating(*repeating.groups(default=""))
        literal = _NUMBER.match(self.text, self.at)
        if literal:
            self.at = literal.end()
            return literal_number(literal.group())
        name = self.names_constant()
        if not name:
            raise NoNumber("neither a number nor a known constant")
        self.at += len(name)
        if name == "pi":
            return Number(None, PI)
        if name == "e":
            return Number(None, _E)
        return _power(self.nested(self.atom), _rational(Fraction(1, 2 if name == "sqrt" else 3)))

    def peek(self) -> str:
        self.at = _SPACES.match(self.text, self.at).end()
        return self.text[self.at : self.at + 1]

    def names_constant(self) -> str:
        name = _NAME.match(self.text, self.at)
        return name.group() if name and name.group() in ("pi", "e", "sqrt", "cbrt") else ""


def _repeating(*groups: str) -> Number:
    """The value of 12.34(56...): whole "12", decimals "34", period "56"."""
    whole, decimals, period = (a or b or c for a, b, c in zip(groups[:3], groups[3:6], groups[6:]))
    ones = Fraction(int(whole + decimals)) + Fraction(int(period), 10 ** len(period) - 1)
    return _rational(ones / 10 ** len(decimals))


def _decimal(value: Fraction) -> Decimal:
    return _CONTEXT.divide(Decimal(value.numerator), Decimal(value.denominator))


def _rational(value: Fraction | int, pending: bool = False) -> Number:
    value = Fraction(value)
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise TooBig(f"more than {MAX_BITS} bits")
    return Number(value, _decimal(value), pending=pending)


def _negative(value: Number) -> Number:
    return value.scaled(Fraction(-1))


def _add(a: Number, b: Number) -> Number:
    if a.exact is not None and b.exact is not None:
        return _rational(a.exact + b.exact, pending=True)
    return Number(None, _CONTEXT.add(a.approx, b.approx), pending=a.pending or b.pending)


def _multiply(a: Number, b: Number) -> Number:
    if a.exact is None or b.exact is None:
        return Number(None, _CONTEXT.multiply(a.approx, b.approx), pending=a.pending or b.pending)
    if _power_of_ten(b.exact) and a.step is not None:  # 3.0*10^8 is one literal
        return a.scaled(b.exact)
    pending = a.pending or b.pending or not (_power_of_ten(b.exact) or abs(a.exact) == 1)
    return _rational(a.exact * b.exact, pending)


def _divide(a: Number, b: Number) -> Number:
    if b.approx == 0:
        raise NoNumber("division by zero")
    if a.exact is not None and b.exact is not None:
        return _rational(a.exact / b.exact, a.pending or b.pending)
    return Number(None, _CONTEXT.divide(a.approx, b.approx), pending=a.pending or b.pending)


def _power_of_ten(value: Fraction) -> bool:
    large, small = max(value.numerator, value.denominator), min(value.numerator, value.denominator)
    return small == 1 and str(large).strip("0") == "1"


def _power(base: Number, exponent: Number) -> Number:
    pending = base.pending or exponent.pending
    if base.exact is not None and exponent.exact is not None and exponent.exact.denominator == 1:
        power = exponent.exact.numerator
        bits = max(base.exact.numerator.bit_length(), base.exact.denominator.bit_length())
        if abs(power) * (bits - 1) > MAX_BITS:
            raise TooBig(f"more than {MAX_BITS} bits")
        if base.exact == 0 and power < 0:
            raise NoNumber("division by zero")
        return _rational(base.exact**power if abs(base.exact) != 1 else base.exact ** (power % 2), pending)
    if base.exact is not None and exponent.exact == Fraction(1, 2) and base.exact >= 0:
        above, below = math.isqrt(base.exact.numerator), math.isqrt(base.exact.denominator)
        if above**2 == base.exact.numerator and below**2 == base.exact.denominator:
            return _rational(Fraction(above, below), pending)
    negative = base.approx < 0
    if negative and (exponent.exact is None or exponent.exact.denominator % 2 == 0):
        raise NoNumber("a root of a negative number")
    size = _CONTEXT.power(_CONTEXT.abs(base.approx), exponent.approx)
    odd = negative and exponent.exact.numerator % 2 == 1
    return Number(None, _CONTEXT.minus(size) if odd else size, pending=pending)
