"""Whether an answer is right, as a person would judge it.

Our own rules read both texts (`answers.py`) and compare what they say: choices, numbers with units, lists, ratios,
times, texts. Only where both look like mathematics that these rules do not cover is math-verify asked, in a process
with limits (`symbolic.py`). No text is ever evaluated as code.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from prism_fast.reward.answer import symbolic, units
from prism_fast.reward.answer.answers import Answer, Listing, needs_algebra, read
from prism_fast.reward.answer.exact_number import TooBig, same_number
from prism_fast.reward.answer.plain import GREEK_NAMES
from prism_fast.reward.answer.quantities import Quantity

MAX_ANSWER = 1024  # an answer of so many characters, or more, is wrong (docs/method.md 5)


class Verdict(NamedTuple):
    """``late`` and ``costly`` say why an answer is not right though it might be: see `symbolic.Allowance`."""

    right: bool
    late: bool = False
    costly: bool = False


def is_right(answer: str, gold: str, equivalents: Sequence[str] = ()) -> bool:
    """The verdict of `judge` alone."""
    return judge(answer, gold, equivalents).right


def judge(answer: str, gold: str, equivalents: Sequence[str] = ()) -> Verdict:
    """Whether ``answer`` means the same as ``gold`` or as one of ``equivalents``.

    README.md shows what counts as the same, `tests/trainer/reward/judged_pairs.py` all of it. An empty answer and one
    of `MAX_ANSWER` characters or more is wrong. Takes microseconds where numbers, choices and texts are compared, and
    at most `symbolic.SECONDS` of CPU time plus the start of math-verify's process, once, where expressions are. The
    verdict is the same on a busy machine. Raises `symbolic.JudgeError` where math-verify is needed and not there.
    """
    answer = answer.strip()
    if not 0 < len(answer) < MAX_ANSWER:
        return Verdict(False)
    golds = [gold.strip(), *(text.strip() for text in equivalents)]
    if answer in golds:
        return Verdict(True)
    allowance = symbolic.Allowance()
    given = read(answer)
    right = any(_same(given, read(text), allowance) for text in golds if 0 < len(text) < MAX_ANSWER)
    return Verdict(right, allowance.late and not right, allowance.costly and not right)


def _same(answer: Answer, gold: Answer, allowance: symbolic.Allowance) -> bool:
    if answer.text == gold.text or answer.compact == gold.compact != "":
        return True
    if not answer.plain or not gold.plain or _other_elements(answer.plain, gold.plain):
        return False
    if gold.choice and (verdict := _same_choice(answer, gold, allowance)) is not None:
        return verdict
    if answer.choice and answer.choice[1] and _same(read(answer.choice[1], 1), gold, allowance):
        return True
    if _other_unknown(answer, gold):
        return False
    verdicts = [_same_quantity(answer, gold), _same_listing(answer, gold, allowance), _same_other(answer, gold)]
    if True in verdicts:
        return True
    if False in verdicts:
        return False
    if _same_text(answer.key, gold.key) or (
        _same_text(answer.stated, gold.stated) and "" in (answer.label, gold.label)
    ):
        return True
    return _same_expression(answer, gold, allowance)


def _same_text(a: str, b: str) -> bool:
    """Whether two keys (`text_key`) are the same, "" never; names of Greek letters are letters, an accent may lack."""
    if a == b or _greek(a) == _greek(b):
        return a != ""
    if a.isascii() == b.isascii() or not re.search(r"[^\W\d_]{3}", a):
        return False
    return _unaccented(a) == _unaccented(b)


def _greek(key: str) -> str:
    return _GREEK_NAME.sub(lambda match: GREEK_NAMES[match.group()], key)


def _unaccented(key: str) -> str:
    return "".join(c for c in unicodedata.normalize("NFD", key) if not unicodedata.combining(c))


def _other_elements(answer: str, gold: str) -> bool:
    """COCl2 is not CoCl2; but nacl is NaCl."""
    return (
        answer != gold
        and answer.lower() == gold.lower()
        and all(_ELEMENTS.fullmatch(text) and len(re.findall("[A-Z]", text)) > 1 for text in (answer, gold))
    )


_GREEK_NAME = re.compile(r"(?<![^\W\d_])(?:" + "|".join(GREEK_NAMES) + r")(?![^\W\d_])")
_ELEMENTS = re.compile(r"(?=.*[a-z])(?:[A-Z][a-z]?[0-9_^()+-]*)+")
_UNKNOWN = re.compile(r"[A-Za-zΑ-Ωα-ω]{1,2}(?:_[A-Za-z0-9]{1,2}|[0-9]{1,2})?'?(?:\(.*\))?")


def _other_unknown(answer: Answer, gold: Answer) -> bool:
    """x = 5 says nothing about y; but "area = 5" and "A = 5" may say the same, and y = x the same as x = y."""
    if answer.label == gold.label or not (_UNKNOWN.fullmatch(answer.label) and _UNKNOWN.fullmatch(gold.label)):
        return False
    return bool((answer.quantities or answer.listings) and (gold.quantities or gold.listings))


def _same_choice(answer: Answer, gold: Answer, allowance: symbolic.Allowance) -> bool | None:
    """The verdict of a multiple-choice question; None where the gold may be something else ("e", "x")."""
    letter, text = gold.choice
    if answer.choice is None:
        return (text and _same(answer, read(text, 1), allowance)) or None
    given_letter, given_text = answer.choice
    if given_letter != letter or not text or not given_text:
        return given_letter == letter
    return _same(read(given_text, 1), read(text, 1), allowance)


def _same_quantity(answer: Answer, gold: Answer) -> bool | None:
    """None where one of them is no quantity."""
    if not gold.quantities:
        return None
    if not answer.quantities:
        if answer.plain.lower() == "none" and any(quantity.value.exact == 0 for quantity in gold.quantities):
            return True
        return False if answer.too_big else None
    return any(_agree(a, g) for a in answer.quantities for g in gold.quantities)


def _agree(answer: Quantity, gold: Quantity) -> bool:
    if not units.agree(answer.unit, gold.unit):
        return False
    if (answer.needs_unit and gold.unit is None) or (gold.needs_unit and answer.unit is None):
        return False
    a, g = answer.value, gold.value
    if isinstance(answer.unit, units.Unit) and isinstance(gold.unit, units.Unit) and answer.unit != gold.unit:
        try:
            a = a.scaled(answer.unit.factor).plus(answer.unit.offset)
            g = g.scaled(gold.unit.factor).plus(gold.unit.offset)
        except TooBig:
            return False
    return same_number(a, g)


def _same_listing(answer: Answer, gold: Answer, allowance: symbolic.Allowance) -> bool | None:
    """None where one of them is no list. Some reading of one must equal some reading of the other."""
    if not answer.listings or not gold.listings:
        # A list is not one of its items, and one number is not a list.
        return False if (answer.listings and gold.quantities) or (answer.quantities and gold.listings) else None
    return any(_same_items(a, g, allowance) for a in answer.listings for g in gold.listings)


def _same_items(answer: Listing, gold: Listing, allowance: symbolic.Allowance) -> bool:
    if len(answer.items) != len(gold.items) or not _same_brackets(answer.brackets, gold.brackets):
        return False
    if (answer.interval or gold.interval) and answer.brackets != gold.brackets:
        return False
    if "" not in (answer.unknown, gold.unknown) and answer.unknown != gold.unknown:
        return False
    if answer.roots and gold.roots:  # then which is which has been said
        return False
    ours, theirs = [item.label for item in answer.items], [item.label for item in gold.items]
    if all(ours) and set(ours) == set(theirs) and len(set(ours)) == len(ours):  # x=1, y=2 in any order
        by_label = {item.label: item for item in answer.items}
        return all(_same(by_label[item.label], item, allowance) for item in gold.items)
    if not (gold.unordered or _any_order(gold)):
        return all(_same(a, g, allowance) for a, g in zip(answer.items, gold.items))
    left = list(answer.items)
    for item in gold.items:
        found = next((at for at, other in enumerate(left) if _same(other, item, allowance)), None)
        if found is None:
            return False
        del left[found]
    return True


def _same_brackets(answer: str, gold: str) -> bool:
    """A bare list stands for any brackets but those of a half-open interval; else the brackets must be the same."""
    return answer == gold or (answer == "" and gold not in ("[)", "(]")) or (gold == "" and answer not in ("[)", "(]"))


def _any_order(gold: Listing) -> bool:
    """Several roots of one unknown (x=1, x=2), or several choices in alphabetical order (A, C)."""
    labels = [item.label for item in gold.items]
    if all(labels) and len(set(labels)) == 1:
        return True
    letters = [item.plain for item in gold.items]
    return all(re.fullmatch(r"[A-Z]", letter) for letter in letters) and letters == sorted(set(letters))


def _same_other(answer: Answer, gold: Answer) -> bool | None:
    """Ratios, ranges, times, dates, yes and no; None where neither is any of these."""
    if answer.clock and gold.clock:
        return answer.clock.same(gold.clock)
    if answer.date and gold.date:
        return answer.date == gold.date
    if answer.truth is not None and gold.truth is not None:
        return answer.truth == gold.truth
    if answer.pair and gold.pair:
        kinds = answer.pair.kinds & gold.pair.kinds
        a, g = answer.pair.numbers, gold.pair.numbers
        if "ratio" in kinds and not answer.clock and not gold.clock:
            return _proportional(a, g)
        return bool(kinds) and a == g
    for pair, other in ((answer.pair, gold), (gold.pair, answer)):
        if pair and "ratio" in pair.kinds and len(pair.numbers) == 2 and other.quantities and pair.numbers[1] != 0:
            share = pair.numbers[0] / pair.numbers[1]
            return any(quantity.unit is None and quantity.value.exact == share for quantity in other.quantities)
    return None


def _proportional(a: tuple[Fraction, ...], g: tuple[Fraction, ...]) -> bool:
    return len(a) == len(g) and all(x * g[0] == y * a[0] for x, y in zip(a, g)) and any(a) == any(g)


def _same_expression(answer: Answer, gold: Answer, allowance: symbolic.Allowance) -> bool:
    if answer.latex is None or gold.latex is None:
        return False
    # The answer to numbers states them: neither x+1 nor log_2(8) nor max(3, 7) does (but 0<x<1 states an interval). The
    # other way round, the gold may be a formula whose value the answer gives.
    numbers = gold.quantities or any(all(item.quantities for item in listing.items) for listing in gold.listings)
    if numbers and (gold.quantities or not re.search(r"[<>]|\\[lg]e", answer.latex)):
        return False
    if answer.quantities and not needs_algebra(gold.latex):
        return False
    if {answer.key, gold.key} <= {"inf", "-inf", "∅"}:
        return False
    sets = [any(listing.brackets == "{}" for listing in side.listings) for side in (answer, gold)]
    if sets[0] != sets[1] and (not answer.listings or not gold.listings):  # {1, 1} is not how {1} is written
        return False
    return symbolic.equal(gold.latex, answer.latex, allowance)
