"""What a teacher wrote -> caption, reasoning, answer, in the response format. Tolerant of wrapping, not of content.

Mended, and counted by kind: a Markdown fence around all of it, words before the caption, thoughts that end in </think>
before the caption (of models that show them), tags in other cases or called thinking or reasoning, a last </answer>
that a stop sequence took, headings in place of tags, and one JSON object of the three parts. Anything else is refused:
where an element is missing, stands twice or out of order, or anything stands between or after the elements, nobody can
tell what belongs where. Linear time, whatever the text holds.
"""

from __future__ import annotations

import json
import re
from typing import NamedTuple

from prism_fast.reward import Parts, split_parts

MARKS = ("<caption>", "</caption>", "<think>", "</think>", "<answer>", "</answer>")
_ALIASES = {"thinking": "think", "reasoning": "think"}
_TAG = re.compile(r"<[ \t]{0,8}(/?)[ \t]{0,8}(caption|thinking|think|reasoning|answer)[ \t]{0,8}>", re.IGNORECASE)
_FENCE = re.compile(r"```[ \t]*\w{0,12}[ \t]*\n")
# "**Caption:** ...", "## Reasoning", "Final answer: 7": a mark of Markdown or a colon, or it is a word like others.
_HEADING = re.compile(
    r"[ \t]{0,3}(?P<mark>\#{1,6}[ \t]+|\*\*)?(?P<name>caption|thinking|think|reasoning|(?:final[ \t])?answer)"
    r"[ \t]*(?P<end>:\*\*|\*\*:|\*\*|:)?[ \t]*",
    re.IGNORECASE,
)
_NAMES = ("caption", "think", "answer")


class Split(NamedTuple):
    """``parts`` None: ``how`` says why not. Else ``how`` says what was mended, "" for nothing.

    >>> split("Sure!\\n<caption>3; 7</caption><think>3+7=10</think><answer>10</answer>").how
    'words before'
    """

    parts: Parts | None
    how: str


def split(text: str) -> Split:
    """The parts of a whole answer, or why it has none."""
    if (parts := split_parts(text)) is not None:
        return _checked(parts, "")
    bare, mended = _unwrapped(text), []
    if bare != text.strip():
        mended.append("fence")
    if (found := _from_json(bare)) is not None or (found := _from_headings(bare)) is not None:
        parts, how = split_parts(found[0]), found[1]
        return _checked(parts, how) if parts is not None else Split(None, "a part that holds tags")
    tagged = _TAG.sub(_canonical, bare)
    if tagged != bare:
        mended.append("tags")
    return _from_tags(tagged, mended)


def _from_tags(text: str, mended: list[str]) -> Split:
    thoughts, closed, rest = text.partition("</think>")
    rest = _unwrapped(rest)
    if closed and rest.startswith("<caption>") and "<think>" in rest and not thoughts.startswith("<caption>"):
        text = rest  # thoughts may name any tag, and templates that open them leave out the first
        mended.append("thoughts before")
    start = text.find("<caption>")
    if start < 0:
        return Split(None, "no caption element")
    before, text = text[:start].strip(), text[start:]
    if before:
        if any(mark in before for mark in MARKS):
            return Split(None, "elements before the caption")
        mended.append("words before")
    if all(text.count(mark) == 1 for mark in MARKS[:-1]) and MARKS[-1] not in text:
        text += MARKS[-1]
        mended.append("end of the answer")
    if (parts := split_parts(text)) is None:
        return Split(None, _why(text))
    return _checked(parts, ", ".join(mended))


def _checked(parts: Parts, how: str) -> Split:
    """What is valid, and yet nothing to learn from."""
    caption = parts.caption[len("<caption>") : -len("</caption>")]
    thought = parts.reasoning[len("<think>") : parts.reasoning.index("</think>")]
    for name, inner in zip(_NAMES, (caption, thought, parts.answer)):
        if not inner.strip():
            return Split(None, f"an empty {name} element")
    return Split(parts, how)


def _why(text: str) -> str:
    for name, opens, closes in zip(_NAMES, MARKS[::2], MARKS[1::2]):
        counts = text.count(opens), text.count(closes)
        if 0 in counts:
            return f"no {name} element"
        if counts != (1, 1):
            return f"tags of {name} twice"
    return "something between, after or inside the elements"


def _unwrapped(text: str) -> str:
    """Without a fence of Markdown that is around all of it."""
    bare = text.strip()
    begin = _FENCE.match(bare)
    if begin is None or not bare.endswith("```") or bare.count("```") != 2:
        return bare
    return bare[begin.end() : -len("```")].strip()


def _canonical(tag: re.Match[str]) -> str:
    name = tag[2].lower()
    return f"<{tag[1]}{_ALIASES.get(name, name)}>"


def _from_json(text: str) -> tuple[str, str] | None:
    if not text.startswith("{"):
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or len(found) != 3:
        return None
    named = {_ALIASES.get(key.lower(), key.lower()): value for key, value in found.items()}
    if {*named} != {*_NAMES} or not all(isinstance(value, str) for value in named.values()):
        return None
    return _tagged([named[name] for name in _NAMES]), "JSON"


def _from_headings(text: str) -> tuple[str, str] | None:
    """Three headings, each on its line and once, in order, the first at the very start; no tag in the text."""
    if _TAG.search(text):
        return None
    found, at = [], 0
    for line in text.splitlines(keepends=True):
        heading = _HEADING.match(line)
        if heading and (heading["mark"] or heading["end"]) and (heading["end"] or heading.end() >= len(line.rstrip())):
            name = heading["name"].lower().split()[-1]
            found.append((_ALIASES.get(name, name), at, at + heading.end()))
        at += len(line)
    if [name for name, _, _ in found] != [*_NAMES] or found[0][1] != 0:
        return None
    stops = [start for _, start, _ in found[1:]] + [len(text)]
    return _tagged([text[begin:stop] for (_, _, begin), stop in zip(found, stops)]), "headings"


def _tagged(inner: list[str]) -> str:
    return "".join(f"<{name}>{part.strip()}</{name}>" for name, part in zip(_NAMES, inner))
