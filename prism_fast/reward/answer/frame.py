"""The frame of an answer: opening phrases, the subject of a sentence, labels ("x = 5")."""

# ruff: noqa: SIM905 (a table of words reads best as words)
from __future__ import annotations

import re
from fractions import Fraction

from prism_fast.reward.answer import exact_number
from prism_fast.reward.answer.quantities import read_quantities

_OPENING = re.compile(
    r"(?:(?:so|thus|hence|therefore|then),? )?(?:the |my )?(?:(?:final|correct|right|best) )*"
    r"(?:answer|result|solution|option|choice)(?: is|'s| was| would be| should be|:| =)+ ?:? ?"
    r"|(?:so|thus|hence|therefore),? (?=\S)|i(?:'d| would)? (?:choose|chose|pick|select|go with|say|get|got|found) "
    r"|答案(?:是|为)?[::]? ?|选(?:择|项)?[::]? ?|positive (?=inf)|(?:no\. ?|number |#|№ ?)(?=[0-9])|ad (?=[0-9])"
    r"|ans(?:\. ?[:=]?| ?[:=]) ?|[=⇒→] ?> ?|(?:i think|both|options?(?= [A-Z],? and)) "
    r"|(?:it is|it's|this is|that is|that's|there is|there are|they are|we get|we have) "
    r"|(?:in |in the year |year |the year )(?=[0-9]{4}\.?$)|the (?=[0-9]{2,4}s$)"
    r"|(?:ca\.?|circa|about|approximately|approx\.?|roughly|around|exactly|only|~|=|:) ?(?=[-+.$€£¥]?[0-9])",
    re.IGNORECASE,
)
_SENTENCE = re.compile(
    r"(?P<subject>[A-Za-z∠][A-Za-z∠' ]{0,60}) "
    r"(?:is|are|was|were|equals|has|have|costs?|takes?|needs?|weighs?|shows?|gets?|got|makes?|made|contains?|gives)"
    r"(?: equal to| about| approximately)? "
    r"(?=[-+$€£¥(]?[0-9.])",
)
_REVERSING = frozenset(
    "not no never neither nor less more fewer than least most over under above below nearly if doubt cannot hardly "
    "wrong incorrect false unless except without".split()
)
_SYMBOL_LABEL = re.compile(
    r"(?!(?:sqrt|cbrt|ln|log|exp|abs)\()(?P<label>[A-Za-zΑ-Ωα-ω](?:[A-Za-z0-9_']{0,7})(?:\([A-Za-z0-9]{1,3}\))?) ?"
    r"[=~∈] ?"
)
_WORD_LABEL = re.compile(
    r"(?!(?:ln|log|exp|sqrt|cbrt|lim)\b)[A-Za-z∠△Α-Ωα-ω][A-Za-z0-9_'∠ ]{0,40} ?[=~] ?"
    r"|\|[A-Z]{2}\| ?= ?|P ?\([^()]{1,20}\) ?= ?|(?:sin|cos|tan|cot|sec|csc) ?\(?[A-Za-z0-9α-ω∠°^ ]{1,8}\)? ?= ?"
)
_HEADED = re.compile(
    r"(?!(?:option|choice|step|question|part|case|lambda)\b)(?P<subject>[A-Za-z][A-Za-z ]{2,40}) ?: ?"
    r"(?=[-+$€£¥(]?[0-9.])",
    re.IGNORECASE,
)  # Total: 5
# The cat is black; its colour is red.
_STATEMENT = re.compile(
    r"(?P<subject>(?:the|its|his|her|their|this|that)(?: [A-Za-z']{1,20}){0,6}?|it) (?:is|are|was|were) "
    r"(?P<rest>[^\s].*)",
    re.IGNORECASE,
)
_POINT = re.compile(r"(?P<label>[A-Z]'?) ?(?=\([^()]*,[^()]*\)$)")


def without_opening(plain: str) -> str:
    if re.fullmatch(r"<[^<>]*>", plain):  # <1, 2>
        plain = f"({plain[1:-1]})"
    for _ in range(4):
        match = _OPENING.match(plain)
        if match is None or match.end() == len(plain):
            break
        plain = plain[match.end() :].strip()
    sentence = _SENTENCE.match(plain) or _HEADED.match(plain)
    if sentence and not _reverses(sentence["subject"]):
        plain = plain[sentence.end() :]
    plain = (plain if plain.endswith("...") else plain.rstrip(" .,;:")) or plain
    return re.sub(r"(?<=[A-Za-z0-9)]) only$", "", plain)


def _reverses(words: str) -> bool:
    return not _REVERSING.isdisjoint(words.lower().replace("n't", " not").split())


def label_of(plain: str) -> tuple[str, str]:
    """("x", "5") for "x = 5", "5 = x" and "x = 2+3 = 5"; ("", "5") for "2+3 = 5"."""
    statement = _STATEMENT.fullmatch(plain)
    if (
        statement
        and not _reverses(statement["subject"])
        and not _reverses(re.sub("^(?:false|incorrect|wrong)$", "", statement["rest"].split()[0]))
    ):
        return statement["subject"].lower(), statement["rest"]
    match = _SYMBOL_LABEL.match(plain) or _POINT.match(plain)
    label, body = (match["label"], plain[match.end() :]) if match else ("", plain)
    if match is None and (words := _WORD_LABEL.match(plain)):
        body = plain[words.end() :]
    left, equals, right = body.rpartition("=")
    if not equals:
        return (label, body.strip()) if "<" not in body and ">" not in body else ("", plain)
    if left[-1:] not in ("<", ">", "!"):
        if re.fullmatch(r" ?[A-Za-z]", right) and _is_constant(left):
            return right.strip(), left.strip()
        parts = left.split("=")
        if any(_is_constant(part) and _contradict(part, right) for part in parts):
            return "", plain
        if all(_is_constant(part) for part in parts) or (
            label and _is_constant(right) and not re.search(r"[,;±]| or | and ", left)
        ):
            return label, right.strip()
    return "", plain


def _contradict(left: str, right: str) -> bool:
    """Whether a chain of equations says what is false: 5 = 6, but not 1/3 = 0.33 or 1/2 = 50 cents."""
    try:
        values = [quantity.value for quantity in read_quantities(right.strip()) if quantity.unit is None]
        value = Fraction(exact_number.parse(left.strip())[0].approx)
    except (exact_number.NoNumber, exact_number.TooBig):
        return False
    for other in values:
        above = abs(Fraction(other.approx)) - abs(value)
        step, noise = other.step or 0, abs(value) / 10**9
        if -step - noise < above <= step / 2 + noise and value * Fraction(other.approx) >= 0:
            return False
    return bool(values)


def _is_constant(text: str) -> bool:
    text = text.strip()
    try:
        return exact_number.parse(text)[1] == len(text)
    except (exact_number.NoNumber, exact_number.TooBig):
        return False
