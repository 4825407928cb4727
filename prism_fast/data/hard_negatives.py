"""Hard negatives: a teacher's own text with something in it made wrong, so that its form gives nothing away.

A policy's answers differ from the teacher's in style first, and a discriminator that is warmed up on them alone learns
style alone. Here a caption names another number, object, colour or place, or is that of another image; a reasoning
slips from one step on, or takes a word for its opposite. What is put in comes from other texts of the same teacher, or
is as common a word. Every text differs from the teacher's own by what it says, not by white space.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from decimal import Decimal
from itertools import product
from typing import NamedTuple

from prism_fast.config import HardNegativesConfig

NUMBER = re.compile(r"(?<![\w.,])-?\d+(?:,\d{3})*(?:\.\d+)?(?!\w|[.,]\d)")
LABEL = re.compile(r"^(?:<\w+>)?[ \t]*(?:[Ss]tep[ \t]+)?\(?\d{1,3}[.):](?=[ \t]+\S)", re.MULTILINE)  # of a list's item
REASONING = re.compile(r"(?P<steps>.*?)(?P<between></think>.*<answer>)(?P<answer>.*)</answer>", re.DOTALL)
WORD = re.compile(r"[A-Za-z]+")
# A noun: what ends a phrase that begins with an article or a number, before punctuation or a word that begins another.
OBJECT = re.compile(
    r"\b(?:an?|the|\d+|two|three|four|five|six|several|many)\s+(?:[a-z]+\s+){0,2}?(?P<noun>[a-z]{3,})"
    r"(?=\s*(?:[.,;:)\n<]|$)|\s+(?:of|in|on|at|with|and|or|is|are|was|were|has|have|to|from|above|below|near|next|that)\b)"
)
# Words of which one for another makes a statement wrong.
EXCHANGED = (
    ("left", "right"), ("top", "bottom"), ("above", "below"), ("over", "under"), ("inside", "outside"),
    ("front", "back"), ("up", "down"), ("upper", "lower"), ("north", "south"), ("east", "west"),
    ("horizontal", "vertical"), ("clockwise", "counterclockwise"), ("parallel", "perpendicular"),
    ("larger", "smaller"), ("largest", "smallest"), ("longer", "shorter"), ("higher", "lower"), ("highest", "lowest"),
    ("more", "fewer"), ("most", "least"), ("greater", "less"), ("maximum", "minimum"), ("first", "last"),
    ("before", "after"), ("increase", "decrease"), ("increases", "decreases"), ("increasing", "decreasing"),
    ("rises", "falls"), ("positive", "negative"), ("even", "odd"), ("true", "false"), ("yes", "no"), ("open", "closed"),
    ("add", "subtract"), ("plus", "minus"), ("multiply", "divide"), ("empty", "full"), ("light", "dark"),
    ("red", "blue", "green", "yellow", "orange", "purple", "brown", "pink"), ("black", "white", "grey"),
    ("circle", "square", "triangle", "rectangle", "hexagon"), ("one", "two", "three", "four", "five", "six", "seven"),
)  # fmt: skip
INSTEAD = {word: tuple(other for other in words if other != word) for words in EXCHANGED for word in words}
TRIES = 20  # draws for one text before another rule is taken
ROUNDS = 100  # draws for one record
SLIPS = (1, -1, 2, -2, 3, -3)


class Negative(NamedTuple):
    """Both parts of a response, each wrong.

    >>> Negative("<caption>3; 5</caption>", "<think>3 + 7 = 11</think><answer>11</answer>")
    """

    caption: str
    reasoning: str


class HardNegatives:
    """Makes wrong texts of a teacher's; ``texts``: (caption, reasoning) of all its records, tags included."""

    def __init__(self, texts: Sequence[tuple[str, str]], config: HardNegativesConfig, seed: int = 0):
        self._texts, self._seed = texts, seed
        self._rules = [kind for kind in config.kinds if kind != "image"]
        self._other_image = "image" in config.kinds
        self._numbers = [sorted({m[0] for text in side for m in _numbers(_inside(text))}) for side in zip(*texts)]
        self._nouns = sorted({match["noun"] for text, _ in texts for match in OBJECT.finditer(_inside(text))})

    def of(self, index: int, number: int) -> Negative | None:
        """The ``number``-th of record ``index``: the same for the same arguments. None where no rule finds anything."""
        rng = random.Random(f"{self._seed}:{index}:{number}")
        caption, reasoning = self._caption(index, rng), self._reasoning(index, rng)
        return None if caption is None or reasoning is None else Negative(caption, reasoning)

    def several(self, wanted: int) -> list[tuple[int, Negative]]:
        """(record, negative) of all records in turn, none twice; fewer than ``wanted`` where the rules find no more."""
        found: dict[tuple[int, Negative], None] = {}
        for number, index in product(range(ROUNDS), range(len(self._texts))):
            if len(found) == wanted:
                break
            if (negative := self.of(index, number)) is not None:
                found[index, negative] = None
        return list(found)

    def _caption(self, index: int, rng: random.Random) -> str | None:
        text, ways = self._texts[index][0], [*self._rules, *(["image"] if self._other_image else [])]
        for kind in rng.sample(ways, len(ways)):
            made = self._others(index, 0, rng) if kind == "image" else self._changed(text, kind, 0, rng)
            if made is not None:
                return made
        return None

    def _reasoning(self, index: int, rng: random.Random) -> str | None:
        text = self._texts[index][1]
        for kind in rng.sample(self._rules, len(self._rules)):
            made = self._slipped(text, rng) if kind == "number" else self._changed(text, kind, 1, rng)
            if made is not None:
                return made
        return self._others(index, 1, rng) if self._other_image else None

    def _changed(self, text: str, kind: str, side: int, rng: random.Random) -> str | None:
        """One number, object or word of ``text`` replaced by another."""
        found = _numbers(text) if kind == "number" else list({"object": OBJECT, "word": WORD}[kind].finditer(text))
        for match in rng.sample(found, len(found)):
            old = match["noun"] if kind == "object" else match[0]
            new = self._instead(old, kind, side, rng)
            if new is not None:
                start, end = match.span("noun") if kind == "object" else match.span()
                made = text[:start] + new + text[end:]
                if not _says_the_same(made, text):
                    return made
        return None

    def _instead(self, old: str, kind: str, side: int, rng: random.Random) -> str | None:
        if kind == "number":
            fit = [n for n in self._numbers[side] if _shape(n) == _shape(old) and _value(n) != _value(old)]
        elif kind == "object":
            fit = [n for n in self._nouns if n != old and _ending(n) == _ending(old)]
        else:
            fit = [word for word in INSTEAD.get(old.lower(), ()) if _vowel(word) == _vowel(old.lower())]  # "a", "an"
        if not fit:
            return None
        new = rng.choice(fit)
        return new.capitalize() if kind == "word" and old[:1].isupper() else new

    def _slipped(self, text: str, rng: random.Random) -> str | None:
        """From one step on, the results are off by one amount, and so is an answer that was the last of them."""
        parts = REASONING.match(text)
        lines = parts["steps"].split("\n") if parts else []
        results = [(i, found[-1]) for i, line in enumerate(lines) if (found := _numbers(line))]
        if parts is None or not results:
            return None
        known, answer = set(self._numbers[1]), parts["answer"].strip()
        follows = NUMBER.fullmatch(answer) and _value(answer) == _value(results[-1][1][0])
        for attempt in range(TRIES):
            slip, wrong = Decimal(rng.choice(SLIPS)), results[rng.randrange(len(results)) :]
            moved = {i: _moved(match[0], slip) for i, match in wrong}
            if attempt < TRIES // 2 and not known.issuperset(moved.values()):
                continue  # a number that this teacher never writes would tell
            steps = list(lines)
            for i, match in wrong:
                steps[i] = steps[i][: match.start()] + moved[i] + steps[i][match.end() :]
            said = parts["answer"].replace(answer, _moved(answer, slip)) if follows else parts["answer"]
            return "\n".join(steps) + parts["between"] + said + text[parts.end("answer") :]
        return None

    def _others(self, index: int, side: int, rng: random.Random) -> str | None:
        """The same part of another record, where it says something else."""
        for _ in range(TRIES):
            made = self._texts[rng.randrange(len(self._texts))][side]
            if not _says_the_same(made, self._texts[index][side]):
                return made
        return None


def _numbers(text: str) -> list[re.Match[str]]:
    """The numbers in a text that are no label of a list's item."""
    labels = [match.span() for match in LABEL.finditer(text)]
    return [m for m in NUMBER.finditer(text) if not any(start <= m.start() < end for start, end in labels)]


def _inside(text: str) -> str:
    return re.sub(r"</?(?:caption|think|answer)>", "\n", text)


def _says_the_same(one: str, other: str) -> bool:
    return one.split() == other.split()


def _value(number: str) -> Decimal:
    return Decimal(number.replace(",", ""))


def _shape(number: str) -> tuple[int, int]:
    """Digits before and behind the point: another number of this shape looks as likely."""
    whole, _, rest = number.lstrip("-").partition(".")
    return len(whole), len(rest)


def _moved(number: str, by: Decimal) -> str:
    moved = _value(number) + by
    return f"{moved:,}" if "," in number else f"{moved}"


def _ending(noun: str) -> tuple[bool, bool]:
    """(plural, begins with a vowel): what the words around a noun agree with."""
    return noun.endswith("s"), _vowel(noun)


def _vowel(word: str) -> bool:
    return word[0] in "aeiou"
