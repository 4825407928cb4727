"""The response format ``<caption>..</caption> <think>..</think> <answer>..</answer>`` (docs/method.md 2).

Every function here takes time linear in the length of the text, whatever the text holds.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

TAGS = ("caption", "think", "answer")
# White space between the elements is ASCII, as in `prism_kernels.find_tag_spans`: what a C isspace() accepts.
ASCII_SPACE = " \t\n\r\f\v"
# Vision placeholders stand for pixels that a response does not have; one that arrives from outside is invalid format.
PLACEHOLDERS = ("<|image_pad|>", "<|video_pad|>")

_MARKS = tuple(mark for tag in TAGS for mark in (f"<{tag}>", f"</{tag}>"))
_CAPTION_THINK = re.compile(r"</caption>\s*<think>")
_THINK_ANSWER = re.compile(r"</think>\s*<answer>")


@dataclass(frozen=True)
class Parts:
    """The parts of a valid response.

    >>> split_parts("<caption>3; 7</caption><think>3+7=10</think> <answer> 10 </answer>")
    Parts(caption='<caption>3; 7</caption>', reasoning='<think>3+7=10</think> <answer> 10 </answer>', answer='10')
    """

    caption: str  # perception part: the caption element, tags included
    reasoning: str  # reasoning part: from <think> to </answer>, tags included
    answer: str  # the text inside the answer element, stripped


def split_parts(text: str, mode: Literal["fixed", "compat"] = "fixed") -> Parts | None:
    """The parts of ``text``, or None where its format is invalid. Linear time.

    ``fixed``: each of the six tags occurs exactly once, in order, only ASCII white space stands outside the three
    elements, and no vision placeholder token occurs. ``compat``: the texts that
    ``^\\s*<caption>.*?</caption>\\s*<think>.*?</think>\\s*<answer>.*?</answer>\\s*$`` matches (dot matches newlines),
    with the parts that this expression captures: where tags repeat, the caption and the think element end at the first
    place that allows a match, and the answer runs to the last ``</answer>``, so it holds whatever stands between two
    answers. Raises ValueError for another mode.
    """
    if mode == "fixed":
        return _split_fixed(text)
    if mode == "compat":
        return _split_compat(text)
    raise ValueError(f'mode: expected "fixed" or "compat", got {mode!r}')


def is_valid(text: str, mode: Literal["fixed", "compat"] = "fixed") -> bool:
    """Whether ``text`` has the response format; see `split_parts`."""
    return split_parts(text, mode) is not None


def answer_element(text: str) -> str | None:
    """What the answer element of ``text`` holds, stripped, whatever stands around it; None where there is not exactly
    one. Linear time.

    Other benchmarks' prompts and other models leave out the caption, so `split_parts` would find no answer of theirs.
    An answer that is opened and not closed, closed before it is opened, given twice or nested is none.
    """
    if text.count("<answer>") != 1 or text.count("</answer>") != 1:
        return None
    inner, closed, _ = text.partition("<answer>")[2].partition("</answer>")
    return inner.strip() if closed else None


def _split_fixed(text: str) -> Parts | None:
    if any(text.count(mark) != 1 for mark in _MARKS) or any(mark in text for mark in PLACEHOLDERS):
        return None
    at = [text.index(mark) for mark in _MARKS]
    if at != sorted(at):
        return None
    caption, caption_end, think, think_end, answer, answer_end = at
    caption_stop, think_stop, answer_stop = (
        start + len(mark) for start, mark in zip((caption_end, think_end, answer_end), _MARKS[1::2])
    )
    outside = (text[:caption], text[caption_stop:think], text[think_stop:answer], text[answer_stop:])
    if any(piece.strip(ASCII_SPACE) for piece in outside):
        return None
    inner = text[answer + len("<answer>") : answer_end]
    return Parts(text[caption:caption_stop], text[think:answer_stop], inner.strip())


def _split_compat(text: str) -> Parts | None:
    # An earlier end of the caption leaves more text for the rest, so if the first one fails, all fail: the first
    # occurrence of each seam decides, and nothing is ever tried twice.
    start = len(text) - len(text.lstrip())
    stop = len(text.rstrip())
    if not text.startswith("<caption>", start) or not text.endswith("</answer>", start, stop):
        return None
    first = _CAPTION_THINK.search(text, start + len("<caption>"), stop)
    second = first and _THINK_ANSWER.search(text, first.end(), stop)
    last = stop - len("</answer>")
    if first is None or second is None or second.end() > last:
        return None
    caption = text[start : first.start() + len("</caption>")]
    reasoning = text[first.end() - len("<think>") : stop]
    return Parts(caption, reasoning, text[second.end() : last].strip())


# A line that opens an item: "- ", "* ", "• ", "1. ", "1) ", "(1) ", "a) ", "Step 3: ", "**Step 3**: ".
_BULLET = re.compile(
    r"[ \t]*(?:[-*+•‣◦–][ \t]+|\(?(?:\d{1,3}|[a-zA-Z])[.)][ \t]+"
    r"|[*#_ \t]{0,6}[Ss]tep[ \t]+\d{1,3}[*_]{0,3}[ \t]*[:.)-])(?P<item>.*)"
)
_SENTENCE_END = re.compile(r"[.!?](?=[\s*\"')\]]|$)|[;\n]")
_LONE_NUMBER = re.compile(r"[\s(]*(?:\d{1,3}|[a-zA-Z])[\s]*$")


def count_caption_items(text: str) -> int:
    """How many things the caption of a response names; 0 for an invalid response.

    Two or more bulleted or numbered lines ("- ", "* ", "1. ", "a) "): the number of such lines that hold something,
    however long. Otherwise: the pieces between line ends, semicolons and sentence ends that hold a letter or a digit.

    >>> count_caption_items("<caption>3; 7; 2; 9</caption><think>3+7=10</think><answer>10</answer>")
    4
    """
    parts = split_parts(text)
    return 0 if parts is None else _count_items(parts.caption[len("<caption>") : -len("</caption>")])


def count_reasoning_steps(text: str) -> int:
    """How many steps the think element of a response takes; 0 for an invalid response.

    The rule is that of `count_caption_items`; "Step 1: " opens a numbered line too, and a numbered step of several
    sentences counts once.

    >>> count_reasoning_steps("<caption>3; 7</caption><think>3+7=10; 10+2=12.</think><answer>12</answer>")
    2
    """
    parts = split_parts(text)
    if parts is None:
        return 0
    return _count_items(parts.reasoning[len("<think>") : parts.reasoning.index("</think>")])


def _count_items(body: str) -> int:
    bulleted = [match["item"] for line in body.splitlines() if (match := _BULLET.match(line))]
    if len(bulleted) > 1:
        return sum(_says_something(item) for item in bulleted)
    count = start = 0
    for end in _SENTENCE_END.finditer(body):
        piece = body[start : end.start()]
        # "1. Add 3 and 7. 2. Add 2." on one line: the number belongs to what follows it.
        if end.group() == "." and _LONE_NUMBER.match(piece):
            continue
        count += _says_something(piece)
        start = end.end()
    return count + _says_something(body[start:])


def _says_something(piece: str) -> bool:
    return any(character.isalnum() for character in piece)
