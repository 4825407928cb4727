"""One raw record: typed access to its fields. A shape is read as it is meant, or refused; never as something else.

Missing are null, NaN, empty text, an empty list or object, and an image whose bytes and path are both missing.
"""

from __future__ import annotations

import ast
import difflib
import json
import math
import re
import string
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
UNSUPPORTED = re.compile(r"(video|audio)s?([_ -]?(paths?|urls?|files?|bytes|data))?")
_PICTURE = re.compile(  # input_image, but not image_id, num_images, ...: those hold numbers
    r"((?!(n|no|num|total|has|is|with)[_ -])[a-z]+[_ -])?"
    r"(images?|imgs?|pictures?|photos?|figures?|screenshots?|diagrams?|frames?|media|jpe?g|png|webp)"
    r"([_ -]?(paths?|urls?|files?|(file)?_?names?|bytes|data|base64|b64|\d+))?"
    r"|(multi_?modal|mm)_?(data|inputs?)|pixel_values|file_?(name|path)s?"
)
_FILE = re.compile(r"file_?(name|path)s?")
_IMAGE_FILE = re.compile(r"\.(png|jpe?g|webp|gif|bmp|tiff?|jp2|avif|ppm)\b", re.IGNORECASE)
_CONTENT = re.compile(
    r"sys|system|(system|user|developer|assistant)[_ -]?(prompts?|messages?|contents?)"
    r"|messages?|conversations?|dialogs?|dialogues?|turns|chats?|history"
    r"|prompts?|questions?|query|problem|instructions?|inputs?|texts?|contents?|context|passage|hints?|options|choices"
    r"|responses?|outputs?|completions?|chosen|rejected|tools|tool_calls|captions?|cot|thoughts?|thinking|reasoning(_content)?|rationale"
)
_ANSWER = re.compile(
    r"((final|correct|gold)_?)?answers?|solutions?|ground_?truths?|golds?|equivalent_?answers?|equivalents"
    r"|gts?|targets?|expected(_?(answer|output))?|reference_?answers?|answer_?keys?|correct_?(option|choice)"
)
_ORIGIN = re.compile(
    r"([a-z]+[_ -])?(image|img|file)s?[_ -]?(paths?|urls?|files?|names?)"
)  # where an image that was read came from
# What a text is that spells a structure: dressed (b'..', ```json, array(..)), in brackets, or a call; its keys.
_BRACKETS = re.compile(r"""(b?["'\\]{1,8}|`{3}\w{0,8}\s{0,8})?(\w{1,20}\(|[\[({])""")
_TURN_KEYS = [
    re.compile(rf"""\b(({names})\\{{0,4}}["']\s{{0,8}}[:,]|({names})=["'\[])""")
    for names in ("role|from|messages|conversations", "content|value|messages|conversations")
]
_PARTS_AS_TEXT = re.compile(r"""[\[{][\s{]{0,40}["'](type|text|image|image_url)["']\s?:""")
_IMAGE_TAG = r"(!\[[^\]\n]{0,200}\]\([^)\n]{1,4000}\)|<img\s[^>]{0,400}\bsrc\s?=[^>]{0,4000}>)"  # Markdown, HTML
_IMAGE_IN_TEXT = (
    re.compile(  # in a placeholder's place, or Qwen-VL's older tags; amid a text it may be what is asked about
        rf"\A\s*{_IMAGE_TAG}|{_IMAGE_TAG}\s*\Z|<img>[^<]{{1,400}}</img>", re.IGNORECASE
    )
)
_PLACEHOLDER = re.compile(
    r"</?\|?(image|img|im)s?[ _-]?(\d+|here|pad|token|placeholder|patch|context)?\s?/?\|?>", re.IGNORECASE
)
_NO_PLACEHOLDER = {IMAGE, "<img>", "</img>", "<im>", "</im>"}  # the placeholder itself, and what HTML questions hold
_OTHER_MEDIA = re.compile(r"<\|?(video|audio)[ _-]?(\d+|here|placeholder)?\s?/?\|?>", re.IGNORECASE)
_NOT_A_NUMBER = {"nan", "<na>", "nat"}
_INVISIBLE = "\0\u200b\u200c\u200d\u2060\ufeff"


def missing(value: Any) -> bool:
    if value is None or (isinstance(value, (str, bytes)) and not value.strip()):
        return True
    if isinstance(value, str) and value[0] in _INVISIBLE:
        return not value.strip(string.whitespace + _INVISIBLE)
    if isinstance(value, (float, Decimal)):
        return math.isnan(value)
    return isinstance(value, (list, tuple, dict)) and not value


def is_read(name: str) -> bool:
    """Whether a field of this name must be looked at: some format reads it, or it looks as if it held content."""
    return (
        name in BESIDE
        or UNSUPPORTED.fullmatch(name) is not None
        or VOICE.fullmatch(name) is not None
        or looks_like_content(name)
    )


@lru_cache(maxsize=4096)
def looks_like_content(name: str) -> bool:
    """A name for something that a model reads or writes, or one close to a name that some format reads."""
    plain = name.strip().lower()
    return any(kind.fullmatch(plain) for kind in (_CONTENT, _PICTURE, _ANSWER)) or bool(_like(name))


def _like(name: str) -> list[str]:
    return difflib.get_close_matches(name.strip().lower(), READ, cutoff=0.85)


def spells_turns(text: str) -> bool:
    """Whether a text is the JSON or the Python spelling of turns, whole or cut, or of anything around an image."""
    text = text.strip(string.whitespace + _INVISIBLE)
    if not text or text[-1] not in "]})\"'`" or _BRACKETS.match(text) is None:
        return text[:2] in ("b'", 'b"') and text[-1:] == text[1] and IMAGE in text
    return all(key.search(text) for key in _TURN_KEYS) or (IMAGE in text and spells_texts(text))


def spells_parts(text: str) -> bool:
    """Whether a text is the JSON or the Python spelling of a list of parts, or of one of them."""
    text = text.strip()
    return text[-1:] in ("]", "}", '"', "'") and _PARTS_AS_TEXT.match(text) is not None


def spells_texts(text: str) -> bool:
    """Whether a text is the JSON or the Python spelling of a list or an object that holds texts."""
    text = text.strip()
    if text[:1] + text[-1:] not in ("[]", "{}", "()") or len(text) > 10_000:
        return False
    for parse in (json.loads, ast.literal_eval):
        try:
            value = parse(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
        return _holds_text(value)
    return False


def _holds_text(value: Any) -> bool:
    """Whether a text or a name stands somewhere in it: numbers alone are vectors, intervals, matrices."""
    return isinstance(value, (str, dict)) or (isinstance(value, (list, tuple)) and any(map(_holds_text, value)))


def is_image(value: Any) -> bool:
    """Whether a value is an image, or a list of them, as data sets hold it, whatever its name."""
    if isinstance(value, list) and value:
        return is_image(value[0])
    return isinstance(value, dict) and {"bytes", "path"} <= value.keys() and not all(map(missing, value.values()))


class Fields:
    """One raw record and where it stands, with errors that name place and field."""

    def __init__(
        self,
        record: dict[str, Any],
        place: str,
        folder: Path,
        system_prompt: str | None,
        image_folders: Sequence[Path] = (),
    ):
        self.record, self.place, self.folder, self.system_prompt = record, place, folder, system_prompt
        self._image_folders = image_folders
        self.used: set[str] = set()
        for key, value in record.items():
            media = UNSUPPORTED.fullmatch(key)
            if media and not missing(value) and not (isinstance(value, list) and all(map(missing, value))):
                raise self.error(key, f"{media[1]} is not supported", "remove the record")

    def error(self, field: str, problem: str, remedy: str) -> DataError:
        return DataError(f"{self.place}: {field[:80]}: {problem[:200]}; {remedy}")

    def value(self, key: str) -> Any:
        """The field, None where it is missing."""
        self.used.add(key)
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
        names = [str(name)[:40] for name in self.record]
        if len(names) == 1 and isinstance(next(iter(self.record.values())), list):
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
            if not isinstance(value, int) and not math.isfinite(value):
                raise self.error(field, f"{value} is no answer", "give the answer as a text")
            return str(value)
        if not isinstance(value, str):
            raise self.error(field, f"expected a text, got {type(value).__name__}", "give the answer as a text")
        if value.strip().lower() in _NOT_A_NUMBER:
            raise self.error(field, f"{value!r} is how a missing value was written", "give the answer as a text")
        if spells_texts(value):
            raise self.error(
                field,
                f"the text {value[:60]!r} spells a list or an object",
                "write the answer, others in equivalent_answers",
            )
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
            if spells_turns(value):
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
        if media := _OTHER_MEDIA.search(text):
            raise self.error(f"{name}.{content}", f"{media[1].lower()} is not supported", "remove the record")
        if not text.strip():
            raise self.error(f"{name}.{content}", "the text is empty", "fill it in, or remove the turn or the record")
        return Message(ROLES.get(str(turn[role]), str(turn[role])), text)

    def _content(self, value: Any, field: str) -> str:
        """A text, or parts of the types text and image, the latter without the image itself."""
        if isinstance(value, str):
            if spells_parts(value):
                raise self.error(field, "the text spells a list of parts", "write the list itself, not its text")
            return value
        if not isinstance(value, list):
            raise self.error(field, f"expected a text, got {type(value).__name__}", "use a string")
        pieces = []
        for number, part in enumerate(value):
            name = f"{field}[{number}]"
            given = {k for k, v in part.items() if v is not None} if isinstance(part, dict) else set()
            part_type = part.get("type") if given else None
            if given in ({"type", "text"}, {"text"}) and part_type in ("text", None):
                if not isinstance(part["text"], str):
                    raise self.error(name, f"expected a text, got {type(part['text']).__name__}", "use a string")
                pieces.append(part["text"])
            elif part_type == "image" and all(missing(part[k]) for k in given - {"type"}):
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
                refs.append(image_ref(value, self.place, f"{name}[{number}]", self.folder, self._image_folders))
            except DataError:
                raise
            except (OSError, ValueError) as error:  # a text that no path can be
                problem = f"no path ({type(error).__name__} for a text of {len(str(value))} characters)"
                raise self.error(f"{name}[{number}]", problem, "give a path, or the image as bytes") from error
        asked = [turn.content for turn in turns if turn.role == "user"]
        stray = [turn.role for turn in turns if turn.role != "user" and IMAGE in turn.content]
        if stray:
            raise self.error(key, f"{IMAGE} in a turn of the {stray[0]}, images belong to the user's", "move it")
        odd = [match.group() for text in asked for match in _PLACEHOLDER.finditer(text)]
        odd = [mark for mark in odd if mark not in _NO_PLACEHOLDER]
        if odd:
            raise self.error(key, f"{odd[0]} is no placeholder of an image", f"write {IMAGE}")
        named = [match.group() for text in asked for match in _IMAGE_IN_TEXT.finditer(text)]
        if named:
            raise self.error(
                key, f"{named[0].strip()[:60]!r} in the text names an image", f"put it into images, {IMAGE} here"
            )
        placeholders = sum(text.count(IMAGE) for text in asked)
        if placeholders != len(refs):
            problem = f"{placeholders} {IMAGE} placeholders but {len(refs)} images"
            raise self.error(key, problem, f"write one {IMAGE} for each image")
        return tuple(refs)

    def refuse_dropped(self, sample: Sample) -> None:
        """Raises where a field that looks like content was not read and does not stand in what was."""
        for key, value in self.record.items():
            if key in self.used or key in BESIDE or VOICE.fullmatch(key) or missing(value):
                continue
            if not (looks_like_content(key) or is_image(value)) or (sample.images and _ORIGIN.fullmatch(key.lower())):
                continue
            picture = is_image(value) or _PICTURE.fullmatch(key.strip().lower()) is not None
            if (picture and isinstance(value, (bool, int, float))) or value in ("[]", "{}", "null"):  # has_image, empty
                continue
            if _FILE.fullmatch(key.lower()) and not _IMAGE_FILE.search(str(value)):  # where a text came from
                continue
            if picture or not _stands_in(value, sample):
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
