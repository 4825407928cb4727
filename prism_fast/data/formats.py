"""The four published file formats (docs/method.md 6): readers, writers and the check behind ``prism-fast data check``.

Every reader returns a ``Dataset`` of ``Sample``: all records are validated when the file is opened (images are only
looked for, and opened on use), parsed again on access, and never held in memory together. A file may be a JSON list,
JSON lines or parquet, whatever its format's usual container. Bad input raises DataError with one line that names file,
record (counted from 1; the line in JSON lines), field and remedy.

Perception and reasoning parts always carry their tags in a Sample. Where a file has them without:

    teacher_caption / student_caption   text                      -> <caption>text</caption>
    teacher_cot / student_cot           text                      -> <think>text</think><answer></answer>
                                        text <answer>x</answer>   -> <think>text</think><answer>x</answer>
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prism_fast.data.bad_records import BadRecords
from prism_fast.data.images import image_ref, open_image
from prism_fast.data.source import Source, open_source
from prism_fast.data.writers import write_align, write_rlvr, write_sft, write_warmup
from prism_fast.records import DataError, Message, Sample
from prism_fast.response_format import Parts, split_parts

__all__ = [
    "Dataset",
    "open_image",
    "read_align",
    "read_rlvr",
    "read_sft",
    "read_warmup",
    "require_parts",
    "write_align",
    "write_rlvr",
    "write_sft",
    "write_warmup",
]

IMAGE = "<image>"
VIDEO = "<video>"
Paths = str | Path | Sequence[str | Path]
Skip = int | BadRecords  # how many bad records are allowed, or the account of a command that reads other files too
Convert = Callable[["Fields"], Sample]


class Dataset(Sequence[Sample]):
    """Validated records of one or more files, parsed when indexed.

    ``bad`` is the account of the bad records that were passed over; more than ``skip_bad`` of them raise. A stage that
    finds a bad record later (an image that does not open) reports it through ``skip`` to the same account.
    """

    def __init__(self, paths: Paths, convert: Convert, skip_bad: Skip = 0, system_prompt: str | None = None):
        paths = [paths] if isinstance(paths, (str, Path)) else list(paths)
        if not paths:
            raise DataError("no data file given; name at least one")
        self.bad = skip_bad if isinstance(skip_bad, BadRecords) else BadRecords(skip_bad)
        self._convert = convert
        self._system_prompt = system_prompt
        self._sources: list[Source] = [open_source(path) for path in paths]
        good = []
        for file, source in enumerate(self._sources):
            for record in range(len(source)):
                try:
                    self._read(file, record)
                except DataError as error:
                    self.bad.add(source.place(record), error)
                else:
                    good.append((file, record))
        self._index = np.array(good, dtype=np.int64).reshape(-1, 2)
        if not good:
            first = self.bad.messages[0]
            raise DataError(f"{paths[0]}: no valid record is left, {len(self.bad)} are bad; correct the file ({first})")

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> Sample:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is outside a dataset of {len(self)} records")
        file, record = self._index[index]
        return self._read(int(file), int(record))

    def _read(self, file: int, record: int) -> Sample:
        source = self._sources[file]
        fields = Fields(source[record], source.place(record), source.path.parent, self._system_prompt)
        return self._convert(fields)

    def skip(self, index: int, error: DataError) -> None:
        """Count record ``index`` as bad; raises once there are more than are allowed (at once by default)."""
        file, record = self._index[index]
        self.bad.add(self._sources[file].place(int(record)), error)


class Fields:
    """One raw record and where it stands: typed access to its fields, with errors that name place and field."""

    def __init__(self, record: dict[str, Any], place: str, folder: Path, system_prompt: str | None):
        self.record, self.place, self.folder, self.system_prompt = record, place, folder, system_prompt
        for key in ("video", "videos", "audio", "audios"):
            if record.get(key):
                raise self.error(key, f"{key.rstrip('s')} is not supported", "remove the record")

    def error(self, field: str, problem: str, remedy: str) -> DataError:
        return DataError(f"{self.place}: {field}: {problem}; {remedy}")

    def has(self, key: str) -> bool:
        return self.record.get(key) is not None

    def text(self, key: str) -> str:
        """A field that must be there and hold some text."""
        value = self.record.get(key)
        if value is None:
            raise self.error(key, "the field is missing", f"add it (the record has {', '.join(self.record) or 'none'})")
        if not isinstance(value, str):
            raise self.error(key, f"expected a text, got {type(value).__name__}", "write it as a string")
        if not value.strip():
            raise self.error(key, "the text is empty", "fill it in or remove the record")
        return value

    def struct(self, key: str) -> dict[str, Any]:
        value = self.record.get(key)
        if value is not None and not isinstance(value, dict):
            raise self.error(key, f"expected named fields, got {type(value).__name__}", "write it as an object")
        return value or {}

    def messages(self, key: str) -> list[Message]:
        """Turns with the roles [system], user, assistant, user, ...; a text is one user turn."""
        value = self.record.get(key)
        if isinstance(value, str):
            value = [{"role": "user", "content": self.text(key)}]
        if value is None:
            self.text(key)
        if not isinstance(value, list) or not value:
            raise self.error(key, "expected a list of turns", 'write [{"role": ..., "content": ...}]')
        turns = []
        for number, turn in enumerate(value):
            name = f"{key}[{number}]"
            if not isinstance(turn, dict) or not {"role", "content"} <= turn.keys():
                raise self.error(name, "expected an object with role and content", "rename its fields")
            if not isinstance(turn["content"], str):
                raise self.error(
                    f"{name}.content", f"expected a text, got {type(turn['content']).__name__}", "use a string"
                )
            if VIDEO in turn["content"]:
                raise self.error(f"{name}.content", "video is not supported", "remove the record")
            turns.append(Message(str(turn["role"]), turn["content"]))
        roles = [turn.role for turn in turns]
        start = int(roles[0] == "system")
        if roles[start:] != [("user", "assistant")[i % 2] for i in range(len(roles) - start)] or len(roles) == start:
            raise self.error(
                key, f"expected the roles [system,] user, assistant, ..., got {', '.join(roles)}", "correct them"
            )
        if self.system_prompt is not None and not start:
            turns.insert(0, Message("system", self.system_prompt))
        return turns

    def prompt(self, key: str, image_key: str = "images") -> dict[str, Any]:
        """The Sample fields ``messages`` and ``images`` of a prompt that ends with the user's turn."""
        turns = self.messages(key)
        if turns[-1].role != "user":
            raise self.error(
                key, f"a prompt ends with the user's turn, this one with {turns[-1].role}", "remove the last turn"
            )
        return {"messages": tuple(turns), "images": self.images(turns, key, image_key)}

    def images(self, turns: Sequence[Message], key: str, image_key: str) -> tuple[Any, ...]:
        value = self.record.get(image_key)
        if value is None:
            value = []
        if not isinstance(value, list):
            raise self.error(image_key, f"expected a list, got {type(value).__name__}", "write [image, ...]")
        refs = tuple(image_ref(v, self.place, f"{image_key}[{i}]", self.folder) for i, v in enumerate(value))
        placeholders = sum(turn.content.count(IMAGE) for turn in turns if turn.role == "user")
        stray = [turn.role for turn in turns if turn.role != "user" and IMAGE in turn.content]
        if stray:
            raise self.error(key, f"{IMAGE} in a turn of the {stray[0]}, images belong to the user's", "move it")
        if placeholders != len(refs):
            problem = f"{placeholders} {IMAGE} placeholders but {len(refs)} images"
            raise self.error(key, problem, f"write one {IMAGE} for each image")
        return refs


def require_parts(response: str, place: str, field: str) -> Parts:
    """Perception and reasoning part of a response; DataError where its format is invalid (docs/method.md 2, fixed)."""
    parts = split_parts(response)
    if parts is None:
        raise DataError(
            f"{place}: {field}: not in the format <caption>..</caption><think>..</think><answer>..</answer>,"
            " each tag once; correct the response or remove the record"
        )
    return parts


def _caption(text: str) -> str:
    return text.strip() if "<caption>" in text else f"<caption>{text.strip()}</caption>"


def _reasoning(text: str) -> str:
    if "<think>" in text:
        return text.strip()
    thought, tag, rest = text.partition("<answer>")
    return f"<think>{thought.strip()}</think>" + (tag + rest.strip() if tag else "<answer></answer>")


def _parts(fields: Fields, voice: str) -> Parts:
    """The two parts of ``voice`` from its caption and cot fields, or else from its whole response."""
    if fields.has(f"{voice}_caption") and fields.has(f"{voice}_cot"):
        caption, cot = fields.text(f"{voice}_caption"), fields.text(f"{voice}_cot")
        return require_parts(_caption(caption) + _reasoning(cot), fields.place, f"{voice}_caption, {voice}_cot")
    if not fields.has(f"{voice}_response"):
        missing = f"{voice}_cot" if fields.has(f"{voice}_caption") else f"{voice}_caption"
        raise fields.error(missing, "the field is missing", f"add {voice}_caption and {voice}_cot, or {voice}_response")
    return require_parts(fields.text(f"{voice}_response"), fields.place, f"{voice}_response")


def _sft(fields: Fields) -> Sample:
    turns = fields.messages("messages")
    if turns[-1].role != "assistant":
        raise fields.error("messages", f"the last turn is the {turns[-1].role}'s", "end with the assistant's turn")
    if not turns[-1].content.strip():
        raise fields.error("messages", "the assistant's turn is empty", "fill it in or remove the record")
    images = fields.images(turns, "messages", "images")
    return Sample(fields.place, tuple(turns[:-1]), images, response=turns[-1].content)


def _warmup(fields: Fields) -> Sample:
    key = "prompt" if fields.has("prompt") else "question"
    if not fields.has(key):
        raise fields.error("prompt", "the field is missing", "add prompt (or question)")
    image = fields.record.get("image", fields.record.get("images"))
    images = image if isinstance(image, list) else [] if image is None else [image]
    turns = fields.messages(key)
    if images and not any(IMAGE in turn.content for turn in turns):  # this format names the image beside the question
        user = next(i for i, turn in enumerate(turns) if turn.role == "user")
        turns[user] = Message("user", IMAGE * len(images) + turns[user].content)
    fields.record = {**fields.record, key: [vars(turn) for turn in turns], "image": images}
    teacher, student = _parts(fields, "teacher"), _parts(fields, "student")
    untold = [fields.has(f"{v}_cot") and "<answer>" not in fields.text(f"{v}_cot") for v in ("teacher", "student")]
    if untold[0] != untold[1]:
        voice = "teacher" if untold[0] else "student"
        raise fields.error(
            f"{voice}_cot", "no answer, the other voice has one: tags alone would tell them apart", "add it"
        )
    return Sample(
        fields.place,
        **fields.prompt(key, "image"),
        teacher_caption=teacher.caption,
        teacher_reasoning=teacher.reasoning,
        student_caption=student.caption,
        student_reasoning=student.reasoning,
    )


def _gold(fields: Fields, required: bool) -> dict[str, Any]:
    """The Sample fields that come from reward_model, extra_info and data_source."""
    reward, extra = fields.struct("reward_model"), fields.struct("extra_info")
    gold, equivalents = reward.get("ground_truth"), reward.get("equivalent_answers")
    if isinstance(gold, (int, float)) and not isinstance(gold, bool):
        gold = str(gold)
    if (gold is None and required) or (gold is not None and not isinstance(gold, str)):
        problem = "the field is missing" if gold is None else f"expected a text, got {type(gold).__name__}"
        raise fields.error("reward_model.ground_truth", problem, "give the answer as a text")
    if gold is not None and not gold.strip():
        raise fields.error("reward_model.ground_truth", "the answer is empty", "fill it in or remove the record")
    equivalents = [] if equivalents is None else equivalents
    if not isinstance(equivalents, list) or not all(isinstance(text, str) for text in equivalents):
        raise fields.error("reward_model.equivalent_answers", "expected a list of texts", "write a list of strings")
    source = fields.record.get("data_source") or ""
    return {
        "gold": gold,
        "equivalents": tuple(equivalents),
        "question_type": str(extra.get("question_type") or source or "all"),
        "data_source": str(source),
    }


def _align(fields: Fields) -> Sample:
    teacher = _parts(fields, "teacher")
    return Sample(
        fields.place,
        **fields.prompt("prompt"),
        **_gold(fields, required=False),
        teacher_caption=teacher.caption,
        teacher_reasoning=teacher.reasoning,
    )


def _rlvr(fields: Fields) -> Sample:
    return Sample(fields.place, **fields.prompt("prompt"), **_gold(fields, required=True))


def read_sft(paths: Paths, *, skip_bad: Skip = 0, system_prompt: str | None = None) -> Dataset:
    """LLaMA-Factory sharegpt demonstrations: ``messages`` and ``images``; the last assistant turn is the response.

    skip_bad: how many bad records may be passed over, or the account that counts them. system_prompt: for records
    without one.
    """
    return Dataset(paths, _sft, skip_bad, system_prompt)


def read_warmup(paths: Paths, *, skip_bad: Skip = 0, system_prompt: str | None = None) -> Dataset:
    """Teacher/student pairs: ``prompt`` or ``question``, ``image`` (a path, null, or a list), captions and cots or
    whole responses. A question without a placeholder gets its image in front. Options as in ``read_sft``."""
    return Dataset(paths, _warmup, skip_bad, system_prompt)


def read_align(paths: Paths, *, skip_bad: Skip = 0, system_prompt: str | None = None) -> Dataset:
    """Prompts with a teacher's response; the gold answer may be absent. Options as in ``read_sft``."""
    return Dataset(paths, _align, skip_bad, system_prompt)


def read_rlvr(paths: Paths, *, skip_bad: Skip = 0, system_prompt: str | None = None) -> Dataset:
    """Prompts with a gold answer; teacher fields, if any, are ignored. Options as in ``read_sft``."""
    return Dataset(paths, _rlvr, skip_bad, system_prompt)
