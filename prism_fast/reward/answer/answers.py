"""An answer as a person reads it: every reading that its text allows, found once and cached.

"1,234" is a number, and also the list 1, 234; "5 m" is a length; "(B) 12 cm" is choice B and its text. The judge calls
two answers equal if one reading of each agrees.
"""

# ruff: noqa: SIM905 (a table of words reads best as words)
from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import lru_cache

from prism_fast.reward.answer import exact_number
from prism_fast.reward.answer.frame import label_of, without_opening
from prism_fast.reward.answer.moments import Clock, Date, read_clock, read_date
from prism_fast.reward.answer.plain import FUNCTIONS, GREEK_COMMANDS, Unreadable, to_latex, to_plain
from prism_fast.reward.answer.quantities import Pair, Quantity, read_pair, read_quantities, read_restated

MAX_ITEMS = 64
MAX_LIST_DEPTH = 4
MAX_SYMBOLIC = 300  # characters that a symbolic comparison may be asked about


@dataclass(frozen=True)
class Listing:
    """``brackets`` is "" for a bare list, else the outer pair: "()", "[]", "{}", "[)", "(]"."""

    items: tuple[Answer, ...]
    brackets: str
    unordered: bool  # a set, "and", "or", "±", a union
    interval: bool = False  # of an inequality: 0 < x < 1
    unknown: str = ""  # of an inequality
    roots: bool = False  # x_1 = 1, x_2 = 2, read as roots of one x


@dataclass(frozen=True)
class Answer:
    text: str  # as written, stripped
    plain: str = ""  # without LaTeX, delimiters and opening phrases; "" where the text is unreadable
    label: str = ""  # "x" of "x = 5"
    stated: str = ""  # the key of what stands after the label
    choice: tuple[str, str] | None = None  # (letter, text after it)
    quantities: tuple[Quantity, ...] = ()
    listings: tuple[Listing, ...] = ()
    pair: Pair | None = None
    clock: Clock | None = None
    date: Date | None = None
    truth: bool | None = None  # yes / no / true / false
    compact: str = ""  # plain, without spaces and needless signs of multiplication
    key: str = ""  # for a comparison of texts
    latex: str | None = None  # for a symbolic comparison, where the text looks like mathematics
    too_big: bool = False  # a number beyond all bounds stands in it


# Spaces that part neither two words nor two numbers, and signs of multiplication beside what is no digit.
_SPARE = re.compile(
    r" (?![A-Za-z0-9])|(?<![A-Za-z0-9]) |(?<=[A-Za-z]) (?=[0-9])|(?<=[0-9]) (?=[A-Za-z])"
    r"|(?<![0-9 ]) ?\*(?=.)|\*(?! ?[0-9])(?=.)"
)


@lru_cache(maxsize=4096)
def read(text: str, depth: int = 0) -> Answer:
    """All readings of ``text`` (at most a few thousand characters)."""
    text = text.strip()
    try:
        plain = re.sub(r"(?<=[0-9]0)'(?=s$)", "", without_opening(to_plain(text)))  # the 1990's
    except Unreadable:
        return Answer(text, too_big=True)
    label, body = label_of(plain)
    answer = Answer(
        text,
        plain,
        label,
        choice=read_choice(plain),
        pair=read_pair(body),
        clock=read_clock(body),
        date=read_date(body),
        truth=_truth(body),
        compact=re.sub(r"(?<=[A-Za-z)])_", "", _SPARE.sub("", plain)),
        stated=text_key(body),
        key=text_key(plain),
    )
    try:
        both = read_restated(plain) or read_restated(body)
        answer = replace(answer, quantities=both or read_quantities(body))
    except exact_number.TooBig:
        answer = replace(answer, too_big=True)
    if depth < MAX_LIST_DEPTH and " begin " not in f" {plain}":
        answer = replace(answer, listings=_listings(body, depth))
        if not label and re.fullmatch(r"[A-H]{2,8}", body) and list(body) == sorted(set(body)):  # choices: "AC"
            letters = tuple(read(letter, depth + 1) for letter in body)
            answer = replace(answer, listings=(*answer.listings, Listing(letters, "", True)))
    if not answer.quantities and re.fullmatch(r"[0-9 ./-]+", body):  # a date, a range, not mathematics
        return answer
    return replace(answer, latex=_symbolic(text))


# ---- choices, truth and plain text

_CHOICE = re.compile(
    r"(?:(?:the )?(?:option|choice|letter|alternative|answer|figure|image|picture|graph|panel)s? ?:? ?)?"
    r"(?P<open>[(\[{\"']?)(?P<letter>[A-Za-z])(?P<close>[)\]}\"']?)(?P<rest>.*)",
    re.IGNORECASE | re.DOTALL,
)
_WITHIN = re.compile(r"[,:]? [(\[](?![A-Za-z]?[)\]])([^()\[\]]+)[)\]]")
_CHOICE_MARK = re.compile(r"(?:^|[\s,;])\(?(?:[A-Za-z]|[ivx]{2,4})(?:[.:](?:\s|$)|\))")
_VERDICT = re.compile(
    r" (?:is|seems|looks) (?:the )?(?:correct|right|best|true|answer)[a-z ]*|,? (?:because|since|as)\b.*", re.DOTALL
)


def read_choice(plain: str) -> tuple[str, str] | None:
    """(letter, text) of a multiple-choice answer: "B", "(B)", "B.", "option B", "B) 12 cm", "B, because ..."."""
    match = _CHOICE.fullmatch(plain)
    if match is None or (match["close"] in ("'", '"') and match["close"] != match["open"]):  # f'
        return None
    letter, rest = match["letter"].upper(), match["rest"]
    if match.start("letter") == 0 and match["letter"] not in "abcdefghABCDEFGHIJ":  # a symbol: r is not R
        return None
    if (within := _WITHIN.fullmatch(rest)) and letter == match["letter"] and not match["open"]:  # B (12 cm)
        rest = ". " + within[1]
    if re.match(r"[^A-Za-z]*(?:or|and|not|maybe|wrong|incorrect)\b", rest):
        return None
    if rest.strip(" .):") == "" or _VERDICT.fullmatch(rest):
        return letter, ""
    mark = re.match(r"[.:] (?=\S)|\) ?(?=\S)" if not match["close"] else r"[.:]? ", rest)
    if mark is None and letter == match["letter"]:
        mark = re.match(r" - (?=[A-Za-z]{2}|[0-9.]+ ?(?:[A-Za-z]{2}|[%°]))|,? (?=[$]?[0-9])", rest)
    if mark is None:
        return None
    text = rest[mark.end() :].strip()
    if not text or text[0] in "+*/^=<>,-&" or (len(text) == 1 and text.isalpha()) or _CHOICE_MARK.search(text):
        return None
    return letter, text


_TRUTH = re.compile(r"(yes|true|correct|no|false|incorrect)(?:[.,;:!]| -|$)", re.IGNORECASE)


def _truth(body: str) -> bool | None:
    match = _TRUTH.match(body)
    words = set(re.findall(r"[a-z]+", body.lower()))
    if match is None or (words & _TRUE and words & {"no", "false", "incorrect"}):
        return None
    return match[1].lower() in _TRUE


_TRUE = frozenset(("yes", "true", "correct"))


_SAME_TEXT = {
    **dict.fromkeys(
        ("no solution", "no solutions", "no real solution", "no real solutions", "∅", "{}", "empty set", "none"), "∅"
    ),
    **dict.fromkeys(("does not exist", "dne", "undefined"), "does not exist"),
    **dict.fromkeys(("+inf", "infinity", "inf", "+infinity", "+ inf", "positive infinity", "infinite"), "inf"),
    **dict.fromkeys(("-infinity", "-inf", "- inf", "negative infinity", "minus infinity", "negative inf"), "-inf"),
    **dict.fromkeys(("all real numbers", "all reals", "real numbers", "any real number", "R", "(- inf inf )"), "reals"),
}


def text_key(plain: str) -> str:
    """``plain`` without case, articles, quotes and the punctuation of sentences; signs and operators stay.

    Where no word stands in it, its letters are symbols, and keep their case and marks: r is not R, Co not CO, x! not x.
    """
    if bracketed := re.fullmatch(r"\(([A-Za-z]{2,12})\)", plain):  # (iii)
        plain = bracketed[1]
    if _ORBITALS.fullmatch(plain):
        plain = re.sub(r"[\^()]", "", plain)
    if (
        not any(not _SYMBOLS.fullmatch(word) for word in _RUNS.findall(plain) if _WORD.match(word))
        and not (plain.lower() in _SHORT_WORDS and plain[1:].islower())
        and not _FORMULA.fullmatch(plain)
    ):
        key = re.sub(r"(?<=[A-Za-z])[.](?=[A-Za-z]|\s|$)", "", re.sub(r"(?<=[A-Za-z)])_", "", plain))
        key = re.sub(r"(?<![A-Za-z])[A-Z]{2,}(?![A-Za-z])", lambda match: match.group().lower(), key)  # TV, tv
        key = re.sub(r"\^\(?([0-9]?[+-])\)?(?=\s|$)", r"\1", re.sub(r",(?![0-9])", " ", key))
        return _SAME_TEXT.get(" ".join(key.split()), " ".join(key.split()))
    key = re.sub(r"[\"`“”]|(?<=[^\W\d_])'(?=[a-z])|(?<=[^\W\d_])[.](?=[a-z]|\s|$)", "", plain.casefold())
    key = re.sub(
        r",(?![0-9])|(?<=[^\W\d_])[;:!?]+(?=\s|$)|(?<=[a-z])-(?=[a-z]{3})|(?<=[a-z]{2})-(?=[a-z]{2})", " ", key
    )
    key = re.sub(r"\^\(?([0-9]?[+-])\)?(?=\s|$)", r"\1", re.sub(r"(?<=[a-z)])_", "", key))  # Ca^{2+}, CO_2
    key = re.sub(r"\b(?:the\b(?= \S)|an?\b(?= [a-z]{2}))", " ", key)
    key = re.sub(r"(?<=[0-9] )bce\b", "bc", key)
    key = " ".join(key.split())
    return _SAME_TEXT.get(key, key)


_WORD = re.compile(
    r"(?!(?:" + "|".join([*FUNCTIONS, "sqrt", "cbrt", "inf"]) + r")(?![^\W\d_]))(?<![^\W\d_])[^\W\d_]{3}"
)
_RUNS = re.compile(r"[^\W\d_]{3,}")
_SYMBOLS = re.compile(r"(?=.*[A-Z])[b-df-hj-np-tv-xz][b-df-hj-np-tv-xzB-DF-HJ-NP-TV-XZ]*")  # mgH is no word
_ORBITALS = re.compile(r"sp\^?[23]|(?:[1-7][spdf]\^?\(?[0-9]{1,2}\)? ?)+")
_SHORT_WORDS = frozenset("no it is in on at up us we he me my to or of if by do go so am pm as be ok ox pi".split())
_FORMULA = re.compile(  # h2o, H2O; but t_1 is not T_1
    r"(?=.*[a-z].*[a-z])[a-z0-9_^()+-]*[a-z]_?[0-9][a-z0-9_^()+-]*|(?=.*[A-Z]_?[0-9])(?=.*[A-Z].*[A-Z])[A-Z0-9_^()+-]+"
)


# ---- lists

_CHAIN = re.compile(
    r"(?P<a>[^<>=]{1,40}?) ?(?P<low>[<>]=?) ?(?P<unknown>[A-Za-zα-ω](?:_?[0-9])?) ?"
    r"(?P<high>[<>]=?) ?(?P<b>[^<>=]{1,40})"
)
_TUPLE = re.compile(r"\((?P<names>[A-Za-z](?:, ?[A-Za-z]){1,5})\) ?= ?(?=\()")  # (x, y) = (1, 2)
_INDEXED = re.compile(r"([A-Za-zα-ω])_?([1-9])")
_CLOSING = {"(": ")", "[": "]", "{": "}"}
_SEPARATORS = re.compile(r"[()\[\]{}]|, ?(?:and|or)\b ?|,|;| (?:and|or) | ?[&∪] ?")
_THOUSANDS = re.compile(r",(?=[0-9]{3}(?![0-9]))")
_PART = re.compile(r"(?:^|[\s,;])(?:part )?\(?(?P<label>[a-hA-H]|[ivx]{1,4}|[1-9])[).:]+(?=\s)\s*", re.IGNORECASE)
_NUMBERS = re.compile(r"[-+]?[0-9][0-9.,/%]*(?: [-+]?[0-9][0-9.,/%]*)+")


def _listings(body: str, depth: int) -> tuple[Listing, ...]:
    found: list[Listing] = []

    def add(texts: list[str], brackets: str, unordered: bool, labels: list[str] | None = None) -> None:
        if 2 <= len(texts) <= MAX_ITEMS and all(text.strip() for text in texts):
            items = [read(text, depth + 1) for text in texts]
            if labels:
                items = [replace(item, label=label) for item, label in zip(items, labels)]
            found.append(Listing(tuple(items), brackets, unordered))

    if body.count("±") == 1:
        add([body.replace("±", "+").removeprefix("+"), body.replace("±", "-")], "", True)
    parts = list(_PART.finditer(body))
    if len(parts) > 1 and parts[0].start() == 0 and len({part["label"].lower() for part in parts}) == len(parts):
        ends = [*(part.start() for part in parts[1:]), len(body)]
        texts = [body[part.end() : end].strip(" ,;") for part, end in zip(parts, ends)]
        add(texts, "", False, ["part " + part["label"].lower() for part in parts])
        return tuple(found)
    names = _TUPLE.match(body)
    brackets, inside = _outer_brackets(body[names.end() :] if names else _turned(body))
    for thousands in (True, False) if _THOUSANDS.search(inside) else (False,):
        texts, unordered = _split(inside, thousands)
        labels = re.split(", ?", names["names"]) if names else None
        if labels is None or len(labels) == len(texts):
            add(texts, brackets, unordered or brackets == "{}", labels)
    if (chain := _CHAIN.fullmatch(body)) and chain["low"][0] == chain["high"][0]:
        low, high = ("low", "high") if chain["low"][0] == "<" else ("high", "low")
        ends = "(["[len(chain[low]) - 1] + ")]"[len(chain[high]) - 1]
        items = tuple(read(chain[side], depth + 1) for side in ("ab" if low == "low" else "ba"))
        found.append(Listing(items, ends, False, interval=True, unknown=chain["unknown"]))
    for listing in list(found):
        names = [_INDEXED.fullmatch(item.label) for item in listing.items]
        numbers = sorted(int(name[2]) for name in names if name)
        if all(names) and numbers == list(range(1, len(names) + 1)) and len({name[1] for name in names}) == 1:
            items = tuple(replace(item, label=name[1]) for item, name in zip(listing.items, names))
            found.append(Listing(items, listing.brackets, True, roots=True))
    if not brackets and not found and _NUMBERS.fullmatch(body):
        add(body.replace(", ", " ").split(" "), "", False)
    return tuple(found)


def _turned(body: str) -> str:
    """]1, 2[, the interval (1, 2) as some countries write it, in the other way."""
    if not re.fullmatch(r"[][][^][]*[][]", body) or (body[0] == "[" and body[-1] == "]"):
        return body
    return body[0].replace("]", "(") + body[1:-1] + body[-1].replace("[", ")")


def _outer_brackets(body: str) -> tuple[str, str]:
    """("()", inside) where the first bracket of ``body`` closes with its last character, else ("", body)."""
    if body[:1] not in _CLOSING or body[-1:] not in ")]}" or len(body) < 2:
        return "", body
    depth = 0
    for at, character in enumerate(body):
        depth += (character in "([{") - (character in ")]}")
        if depth == 0:
            return (body[0] + body[-1], body[1:-1].strip()) if at == len(body) - 1 else ("", body)
    return "", body


def _split(body: str, thousands: bool) -> tuple[list[str], bool]:
    """Items at the separators outside brackets (at ";" alone where there is one), and whether order does not matter."""
    cuts: list[tuple[int, int, str]] = []
    depth = 0
    for match in _SEPARATORS.finditer(body):
        mark = match.group().strip(" ,") or match.group().strip()
        if mark in "([{":
            depth += 1
        elif mark in ")]}":
            depth -= 1
        elif depth == 0 and not (thousands and mark == "," and _THOUSANDS.match(body, match.start())):
            cuts.append((match.start(), match.end(), mark))
    if any(mark == ";" for *_, mark in cuts):
        cuts = [cut for cut in cuts if cut[2] == ";"]
    texts, start = [], 0
    for begin, end, _ in cuts:
        texts.append(body[start:begin].strip())
        start = end
    texts.append(body[start:].strip())
    if len(texts) > 1 and not texts[-1]:
        texts.pop()
    return texts, any(mark in ("and", "or", "&", "∪") for *_, mark in cuts)


# ---- mathematics for the symbolic comparison

_SYMBOLIC = re.compile(r"[0-9A-Za-z\\{}()\[\]^_+\-*/=<>|.,!'&;:% ]+")
_RUN = re.compile(r"(?<![\\A-Za-z])[A-Za-z]+")
_NOT_ALGEBRA = re.compile(r"(?<![\\_^A-Za-z])[A-Za-z]+[0-9]")  # CO2, A4: algebra writes 2x, not x2
_ORDINARY = frozenset("frac dfrac tfrac cdot times left right text mathrm div pi sqrt circ degree boxed quad".split())


_GREEK = re.compile("(?:" + "|".join(re.escape(name.strip()) for name in GREEK_COMMANDS.values()) + ")(?![A-Za-z])")


def _symbolic(text: str) -> str | None:
    """``text`` in LaTeX, where it looks like mathematics; None for words and for what is too long."""
    try:
        latex = to_latex(text)
    except Unreadable:
        return None
    if len(latex) > MAX_SYMBOLIC or not _SYMBOLIC.fullmatch(latex) or _NOT_ALGEBRA.search(latex):
        return None
    if not re.search(r"[0-9A-Za-z]", latex) or not re.search(
        r"[0-9+\-*/^=<>\\|!]", re.sub(r"_(?:[0-9A-Za-z]|\{[0-9A-Za-z]*\})", "", _GREEK.sub("x", latex))
    ):  # bare letters, with or without an index
        return None
    brackets, inside = _outer_brackets(latex)
    if brackets == "()" and "," not in inside:  # math-verify's grammar is slow at nested parentheses
        latex = inside
    letters = re.sub(r"\\(?:begin|end|text|mathrm|operatorname)\{[a-z]*\}|\\[A-Za-z]+", " ", latex)
    return latex if all(len(run) <= 3 for run in _RUN.findall(letters)) else None


def needs_algebra(latex: str) -> bool:
    """Whether it takes more than arithmetic, powers and roots to know the value of ``latex``."""
    commands = re.findall(r"\\([A-Za-z]+)", latex)
    return "!" in latex or any(command in FUNCTIONS or command not in _ORDINARY for command in commands)
