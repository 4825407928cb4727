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

from dataclasses import replace
from pathlib import Path
from typing import Any

from prism_fast.data.dataset import Convert, Dataset, Paths
from prism_fast.data.fields import IMAGE, Fields, missing
from prism_fast.data.images import open_image
from prism_fast.data.writers import write_align, write_rlvr, write_sft, write_warmup
from prism_fast.records import DataError, Message, Sample
from prism_fast.response_format import Parts, split_parts

__all__ = [
    "Dataset",
    "open_image",
    "question",
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
    whole = f"{voice}_response"
    if not fields.has(whole) and not isinstance(fields.record.get(whole), str):
        missing = f"{voice}_cot" if fields.has(f"{voice}_caption") else f"{voice}_caption"
        raise fields.error(missing, "the field is missing", f"add {voice}_caption and {voice}_cot, or {voice}_response")
    return require_parts(fields.text(whole), fields.place, whole)


def _sft(fields: Fields) -> Sample:
    key = fields.first("messages", "conversations")
    turns = fields.messages(key)
    if turns[-1].role != "assistant":
        raise fields.error(key, f"the last turn is the {turns[-1].role}'s", "end with the assistant's turn")
    images = fields.images(turns, key)
    return Sample(fields.place, tuple(turns[:-1]), images, response=turns[-1].content)


def _warmup(fields: Fields) -> Sample:
    key = fields.first("prompt", "question")
    turns = fields.messages(key)
    _, images = fields.listed_images()
    if images and not any(IMAGE in turn.content for turn in turns):  # this format names the image beside the question
        user = next(i for i, turn in enumerate(turns) if turn.role == "user")
        turns[user] = Message("user", IMAGE * len(images) + turns[user].content)
    teacher, student = _parts(fields, "teacher"), _parts(fields, "student")
    untold = [fields.has(f"{v}_cot") and "<answer>" not in fields.text(f"{v}_cot") for v in ("teacher", "student")]
    if untold[0] != untold[1]:
        voice = "teacher" if untold[0] else "student"
        raise fields.error(
            f"{voice}_cot", "no answer, the other voice has one: tags alone would tell them apart", "add it"
        )
    return Sample(
        fields.place,
        **fields.prompt(key, turns),
        teacher_caption=teacher.caption,
        teacher_reasoning=teacher.reasoning,
        student_caption=student.caption,
        student_reasoning=student.reasoning,
    )


def _gold(fields: Fields, required: bool) -> dict[str, Any]:
    """The Sample fields that come from reward_model, extra_info and data_source."""
    reward, extra = fields.struct("reward_model"), fields.struct("extra_info")
    gold = fields.answer(reward.get("ground_truth"), "reward_model.ground_truth")
    if gold is None and required:
        empty = isinstance(reward.get("ground_truth"), str)
        problem = "the answer is empty" if empty else "the field is missing"
        raise fields.error("reward_model.ground_truth", problem, "give the answer as a text, or remove the record")
    listed = reward.get("equivalent_answers")
    listed = [] if missing(listed) else listed
    if not isinstance(listed, list):
        raise fields.error("reward_model.equivalent_answers", "expected a list of texts", "write a list of strings")
    answers = [fields.answer(answer, "reward_model.equivalent_answers") for answer in listed]
    equivalents = tuple(answer for answer in answers if answer is not None)
    fields.refuse_other_answers(gold, equivalents)
    source = fields.label(fields.value("data_source"), "data_source")
    question_type = fields.label(extra.get("question_type"), "extra_info.question_type")
    return {
        "gold": gold,
        "equivalents": equivalents,
        "question_type": question_type or source or "all",
        "data_source": source or "",
        "pass_rate": _share(fields, extra.get("pass_rate"), "extra_info.pass_rate"),
    }


def _share(fields: Fields, value: Any, field: str) -> float | None:
    """A number from 0 to 1, None where it is missing."""
    if missing(value):
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise fields.error(field, f"expected a number from 0 to 1, got {value!r}", "correct it, or remove it")
    return float(value)


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


def question(record: dict[str, Any], place: str, system_prompt: str | None = None) -> Sample:
    """One record of the alignment format whose teacher may be absent, its images as bytes. Raises DataError."""
    fields = Fields(record, place, Path(), system_prompt)
    sample = Sample(place, **fields.prompt("prompt"))
    if not any(fields.has(f"teacher_{part}") for part in ("caption", "cot", "response")):
        return sample
    teacher = _parts(fields, "teacher")
    return replace(sample, teacher_caption=teacher.caption, teacher_reasoning=teacher.reasoning)


FORMATS: dict[str, Convert] = {"sft": _sft, "warm-up": _warmup, "alignment": _align, "rlvr": _rlvr}


def read_sft(paths: Paths, **options: Any) -> Dataset:
    """LLaMA-Factory sharegpt demonstrations: ``messages`` and ``images``; the last assistant turn is the response.

    Options are `Dataset`'s: skip_bad, system_prompt, columns, cache, progress.
    """
    return Dataset(paths, _sft, **options)


def read_warmup(paths: Paths, **options: Any) -> Dataset:
    """Teacher/student pairs: ``prompt`` or ``question``, ``image`` (a path, null, or a list), captions and cots or
    whole responses. A question without a placeholder gets its image in front. Options as in ``read_sft``."""
    return Dataset(paths, _warmup, **options)


def read_align(paths: Paths, **options: Any) -> Dataset:
    """Prompts with a teacher's response; the gold answer may be absent. Options as in ``read_sft``."""
    return Dataset(paths, _align, **options)


def read_rlvr(paths: Paths, **options: Any) -> Dataset:
    """Prompts with a gold answer; teacher fields, if any, are ignored. Options as in ``read_sft``."""
    return Dataset(paths, _rlvr, **options)
