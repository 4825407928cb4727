"""One raw record: typed access to its fields. A shape is read as it is meant, or refused; never as something else.

Missing are null, NaN, empty text, an empty list or object, and an image whose bytes and path are both missing.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Sequence
from decimal import Decimal
from functools import lru_cache
from pathlib import Path
from typing import Any

from prism_fast.data.images import image_ref
from prism_fast.records import DataError, ImageRef, Message, Sample

IMAGE = "<image>"
ROLES = {"human": "user", "gpt": "assistant"}  # sharegpt's names

# What some format reads, and what may stand beside it in every format (docs/method.md 6).
READ = ("messages", "conversations", "system", "prompt", "question", "image", "images", "reward_model")
BESIDE = frozenset({"data_source", "extra_info", "reward_model"})
REWARD = ("style", "ground_truth", "equivalent_answers")
VOICE = re.compile(r"(teacher|student)_(caption|cot|response)")  # a format without them passes over them
UNSUPPORTED = ("video", "videos", "audio", "audios")
_PICTURE = re.compile(r"(images?|imgs?|pictures?|photos?|figures?)([_ -]?(paths?|urls?|files?|bytes|data|base64|\d+))?")
_CONTENT = re.compile(
    r"system|(system|user|developer|assistant)[_ -]?(prompts?|messages?|contents?)"
    r"|messages?|conversations?|dialogs?|dialogues?|turns|chats?|history"
    r"|prompts?|questions?|query|problem|instructions?|inputs?|texts?|contents?|context|passage|hints?|options|choices"
    r"|responses?|outputs?|completions?|chosen|rejected|tools|tool_calls|captions?|cot|thoughts?|reasoning|rationale"
)
_ANSWER = re.compile(
    r"((final|correct|gold)_?)?answers?|solutions?|ground_?truths?|golds?|equivalent_?answers?|equivalents"
)
_ORIGIN = re.compile(r"(image|img)s?[_ -]?(paths?|urls?|files?)")  # beside an image that was read: where it came from
_TURNS_AS_TEXT = re.compile(
    r"""["'\\]{0,8}(array\()?[\[({][\[({\s]{0,40}\\{0,4}["'](role|content|from|messages|conversations)\\{0,4}["']\s?:"""
)
_PARTS_AS_TEXT = re.compile(r"""\[\s{0,40}\{\s{0,40}["'](type|text|image|image_url)["']\s?:""")
_PLACEHOLDER = re.compile(r"<\|?image[ _-]?(\d+|here|pad)?\|?>", re.IGNORECASE)
_NOT_A_NUMBER = {"nan", "<na>", "nat"}


def missing(value: Any) -> bool:
    if value is None or (isinstance(value, (str, bytes)) and not value.strip()):
        return True
    if isinstance(value, (float, Decimal)):
        return math.isnan(value)
    return isinstance(value, (list, tuple, dict)) and not value


def is_read(name: str) -> bool:
    """Whether a field of this name must be looked at: some format reads it, or it looks as if it held content."""
    return name in BESIDE or name in UNSUPPORTED or VOICE.fullmatch(name) is not None or looks_like_content(name)


@lru_cache(maxsize=4096)
def looks_like_content(name: str) -> bool:
    """A name for something that a model reads or writes, or one close to a name that some format reads."""
    plain = name.strip().lower()
    return any(kind.fullmatch(plain) for kind in (_CONTENT, _PICTURE, _ANSWER)) or bool(_like(name))


def _like(name: str) -> list[str]:
    return difflib.get_close_matches(name.strip().lower(), READ, cutoff=0.85)


def _spells(shape: re.Pattern[str], text: str) -> bool:
    """Whether a text is the JSON or the Python spelling of what should have been a list."""
    text = text.strip()
    return text[-1:] in ("]", "}", ")", '"', "'") and shape.match(text) is not None


class Fields:
    """One raw record and where it stands, with errors that name place and field."""

    def __init__(self, record: dict[str, Any], place: str, folder: Path, system_prompt: str | None):
        self.record, self.place, self.folder, self.system_prompt = record, place, folder, system_prompt
        self._used: set[str] = set()
        for key in UNSUPPORTED:
            if self.has(key):
                raise self.error(key, f"{key.rstrip('s')} is not supported", "remove the record")

    def error(self, field: str, problem: str, remedy: str) -> DataError:
        return DataError(f"{self.place}: {field[:80]}: {problem[:200]}; {remedy}")

    def value(self, key: str) -> Any:
        """The field, None where it is missing."""
        self._used.add(key)
        value = self.record.get(key)
        return None if missing(value) else value

    def has(self, key: str) -> bool:
        return self.value(key) is not None

    def first(self, *keys: str) -> str:
        """The first of these fields that is there, or else the first name."""
        return next((key for key in keys if self.has(key)), keys[0])

    def text(self, key: str) -> str:
        """A field that must be there and hold some text."""
        value = self.value(key)
        if value is None:
            raise self._absent(key)
        if not isinstance(value, str):
            raise self.error(key, f"expected a text, got {type(value).__name__}", "write it as a string")
        return value

    def _absent(self, key: str) -> DataError:
        if isinstance(self.record.get(key), str):
            return self.error(key, "the text is empty", "fill it in or remove the record")
        names = [str(name) for name in self.record]
        if len(names) == 1 and isinstance(self.record[names[0]], list):
            return self.error(key, "the field is missing", f"if {names[0]} holds the records, write that list alone")
        shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "") or "none"
        return self.error(key, "the field is missing", f"add it or rename what stands for it (the record has {shown})")

    def struct(self, key: str) -> dict[str, Any]:
        value = self.value(key)
        if value is not None and not isinstance(value, dict):
            raise self.error(key, f"expected named fields, got {type(value).__name__}", "write it as an object")
        return value or {}

    def answer(self, value: Any, field: str) -> str | None:
        """An answer as text, None where it is missing. Numbers are taken as Python writes them."""
        if missing(value):
            return None
        if isinstance(value, (int, float, Decimal)) and not isinstance(value, bool):
            if not math.isfinite(value):
                raise self.error(field, f"{value} is no answer", "give the answer as a text")
            return str(value)
        if not isinstance(value, str):
            raise self.error(field, f"expected a text, got {type(value).__name__}", "give the answer as a text")
        if value.strip().lower() in _NOT_A_NUMBER:
            raise self.error(field, f"{value!r} is how a missing value was written", "give the answer as a text")
        return value

    def label(self, value: Any, field: str) -> str | None:
        """A name that groups records, None where it is missing."""
        if missing(value):
            return None
        if not isinstance(value, (str, int)):
            raise self.error(field, f"expected a text, got {type(value).__name__}", "write a name, or remove it")
        return str(value)

    def refuse_other_answers(self, gold: str | None, equivalents: Sequence[str]) -> None:
        """Raises where an answer stands elsewhere than where it is read, and is another than the one that is."""
        read = {text.strip() for text in (gold, *equivalents) if text is not None}
        reward = self.struct("reward_model")
        unread = {f"reward_model.{key}": value for key, value in reward.items() if key not in REWARD}
        unread = {key: value for key, value in unread.items() if gold is None or looks_like_content(key[13:])}
        unread |= {key: value for key, value in self.record.items() if _ANSWER.fullmatch(key.strip().lower())}
        for key, value in unread.items():
            if not all(leaf in read for leaf in _leaves(value)):
                remedy = "move it to reward_model.ground_truth or equivalent_answers, or remove it"
                raise self.error(key, "an answer is not read from here", remedy)

    def messages(self, key: str) -> list[Message]:
        """Turns with the roles [system], user, assistant, user, ...; a text is one user turn. A field ``system`` is the
        system turn."""
        value = self.value(key)
        if value is None and (self.record.get(key) is None or not isinstance(self.record[key], list)):
            raise self._absent(key)
        if isinstance(value, str):
            if _spells(_TURNS_AS_TEXT, value):
                raise self.error(key, "the text spells a list of turns", "write the list itself, not its text")
            value = [{"role": "user", "content": value}]
        if not isinstance(value, list):
            raise self.error(key, "expected a list of turns", 'write [{"role": ..., "content": ...}]')
        turns = [self._turn(turn, f"{key}[{number}]") for number, turn in enumerate(value)]
        roles = [turn.role for turn in turns]
        start = int(roles[0] == "system")
        if roles[start:] != [("user", "assistant")[i % 2] for i in range(len(roles) - start)] or len(roles) == start:
            shown = ", ".join(roles[:12]) + (", ..." if len(roles) > 12 else "")
            raise self.error(key, f"expected the roles [system,] user, assistant, ..., got {shown}", "correct them")
        system = self.text("system") if self.has("system") else self.system_prompt
        if self.has("system") and start and turns[0].content != system:
            raise self.error("system", f"{key} begins with a system turn of its own", "keep one of them")
        if system is not None and not start:
            turns.insert(0, Message("system", system))
        return turns

    def _turn(self, turn: Any, name: str) -> Message:
        sharegpt = isinstance(turn, dict) and not missing(turn.get("from")) and missing(turn.get("role"))
        role, content = ("from", "value") if sharegpt else ("role", "content")
        if not isinstance(turn, dict) or not {role, content} <= turn.keys():
            raise self.error(name, "expected an object with role and content", "rename its fields (or from and value)")
        dropped = [key for key, value in turn.items() if key not in (role, content) and not missing(value)]
        if dropped:
            raise self.error(f"{name}.{dropped[0]}", f"is not read beside {role} and {content}", "remove it")
        text = self._content(turn[content], f"{name}.{content}")
        for mark in ("video", "audio"):
            if f"<{mark}>" in text:
                raise self.error(f"{name}.{content}", f"{mark} is not supported", "remove the record")
        if not text.strip():
            raise self.error(f"{name}.{content}", "the text is empty", "fill it in, or remove the turn or the record")
        return Message(ROLES.get(str(turn[role]), str(turn[role])), text)

    def _content(self, value: Any, field: str) -> str:
        """A text, or parts of the types text and image, the latter without the image itself."""
        if isinstance(value, str):
            if _spells(_PARTS_AS_TEXT, value):
                raise self.error(field, "the text spells a list of parts", "write the list itself, not its text")
            return value
        if not isinstance(value, list):
            raise self.error(field, f"expected a text, got {type(value).__name__}", "use a string")
        pieces = []
        for number, part in enumerate(value):
            name = f"{field}[{number}]"
            given = {k for k, v in part.items() if v is not None} if isinstance(part, dict) else set()
            if given in ({"type", "text"}, {"text"}) and part.get("type", "text") in ("text", None):
                if not isinstance(part["text"], str):
                    raise self.error(name, f"expected a text, got {type(part['text']).__name__}", "use a string")
                pieces.append(part["text"])
            elif given == {"type"} and part["type"] == "image":
                pieces.append(IMAGE)
            elif given & {"image", "image_url", "url", "path", "bytes", "data"}:
                raise self.error(name, "an image inside a turn is not read", f"put it into images, {IMAGE} here")
            else:
                raise self.error(name, 'expected {"type": "text", "text": ...} or {"type": "image"}', "write a text")
        return "".join(pieces)

    def prompt(self, key: str, turns: Sequence[Message] | None = None) -> dict[str, Any]:
        """The Sample fields ``messages`` and ``images`` of a prompt that ends with the user's turn."""
        turns = self.messages(key) if turns is None else turns
        if turns[-1].role != "user":
            raise self.error(
                key, f"a prompt ends with the user's turn, this one with {turns[-1].role}", "remove the last turn"
            )
        return {"messages": tuple(turns), "images": self.images(turns, key)}

    def listed_images(self) -> tuple[str, list[Any]]:
        """The field that holds the images, and them: a list, or one image as bytes, struct or path."""
        key = self.first("images", "image")
        value = self.value(key)
        if key == "images" and self.has("image"):
            raise self.error("image", "the record has images too", "keep one of them")
        if value is None or (isinstance(value, dict) and all(missing(entry) for entry in value.values())):
            return key, []
        return key, value if isinstance(value, list) else [value]

    def images(self, turns: Sequence[Message], key: str) -> tuple[ImageRef, ...]:
        name, listed = self.listed_images()
        refs = []
        for number, value in enumerate(listed):
            try:
                refs.append(image_ref(value, self.place, f"{name}[{number}]", self.folder))
            except DataError:
                raise
            except (OSError, ValueError) as error:  # a text that no path can be
                problem = f"no path ({type(error).__name__} for a text of {len(str(value))} characters)"
                raise self.error(f"{name}[{number}]", problem, "give a path, or the image as bytes") from error
        asked = [turn.content for turn in turns if turn.role == "user"]
        stray = [turn.role for turn in turns if turn.role != "user" and IMAGE in turn.content]
        if stray:
            raise self.error(key, f"{IMAGE} in a turn of the {stray[0]}, images belong to the user's", "move it")
        odd = [match.group() for text in asked for match in _PLACEHOLDER.finditer(text) if match.group() != IMAGE]
        if odd:
            raise self.error(key, f"{odd[0]} is no placeholder of an image", f"write {IMAGE}")
        placeholders = sum(text.count(IMAGE) for text in asked)
        if placeholders != len(refs):
            problem = f"{placeholders} {IMAGE} placeholders but {len(refs)} images"
            raise self.error(key, problem, f"write one {IMAGE} for each image")
        return tuple(refs)

    def refuse_dropped(self, sample: Sample) -> None:
        """Raises where a field that looks like content was not read and does not stand in what was."""
        for key, value in self.record.items():
            if key in self._used or key in BESIDE or VOICE.fullmatch(key) or missing(value):
                continue
            if not looks_like_content(key) or (sample.images and _ORIGIN.fullmatch(key.lower())):
                continue
            if _PICTURE.fullmatch(key.strip().lower()) or not _stands_in(value, sample):
                near = [name for name in _like(key) if name != key]
                remedy = f"rename it to {near[0]}, or remove it" if near else "move it into what is read, or remove it"
                raise self.error(key, "the field is not read in this format", remedy)


def _stands_in(value: Any, sample: Sample) -> bool:
    """Whether every text and number inside a value is among the words of what was read."""
    texts = (
        *(message.content for message in sample.messages),
        *(sample.response, sample.teacher_caption, sample.teacher_reasoning),
        *(sample.student_caption, sample.student_reasoning, sample.gold, *sample.equivalents),
    )
    text = "\n".join(text for text in texts if text)
    return all(
        leaf is not None and re.search(rf"(?<!\w){re.escape(leaf)}(?!\w)", text) is not None for leaf in _leaves(value)
    )


def _leaves(value: Any) -> Iterator[str | None]:
    """The texts and numbers inside a value; None for what is neither."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for inner in value:
            yield from _leaves(inner)
    elif not missing(value):
        yield str(value).strip() if isinstance(value, (str, int, float)) else None
