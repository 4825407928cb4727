"""A record -> what a teacher is asked, the most that it may count, and the name by which its answers are kept."""

from __future__ import annotations

import base64
import io
import json
import re
from hashlib import blake2b
from typing import Any

from prism_fast.config import TeacherConfig
from prism_fast.data.images import content, open_image
from prism_fast.records import ImageRef, Sample
from prism_fast.stages.curating.answer import Tokens

PLACEHOLDER = re.compile("(<image>)")
PER_TURN = 16  # tokens that a template puts around a turn, at most
SYSTEM_PROMPT = (
    "You are a careful scientific assistant. Answer from what the image shows. Write exactly three XML elements, each "
    "once, in this order, and nothing outside of them: <caption>what is seen that matters, as a list: the kind of "
    "image, its objects, its texts and numbers</caption> <think>the reasoning, step by step</think> <answer>the final "
    "answer alone</answer>"
)


def key_of(sample: Sample) -> str:
    """Equal prompts with equal images have equal keys, wherever they stand."""
    digest = blake2b(json.dumps([(turn.role, turn.content) for turn in sample.messages]).encode(), digest_size=16)
    for ref in sample.images:
        digest.update(blake2b(content(ref) or b"", digest_size=16).digest())
    return digest.hexdigest()


def settings_of(teacher: TeacherConfig) -> dict[str, Any]:
    """What its answers depend on."""
    kept = ("model", "system_prompt", "temperature", "max_response_tokens", "body")
    return {key: value for key, value in teacher.model_dump(mode="json").items() if key in kept}


def most(sample: Sample, teacher: TeacherConfig) -> Tokens:
    """The most tokens of a request and its answer: a token of a text is a byte or more."""
    texts = [turn.content for turn in sample.messages if turn.role != "system"]
    read = sum(len(text.encode()) + PER_TURN for text in (_system(sample, teacher), *texts))
    return Tokens(read + teacher.image_tokens * len(sample.images), teacher.max_response_tokens)


def body_of(sample: Sample, teacher: TeacherConfig) -> bytes:
    """The request. Raises DataError where an image does not open."""
    images = iter(sample.images)
    turns: list[dict[str, Any]] = [{"role": "system", "content": _system(sample, teacher)}]
    for turn in sample.messages:
        if turn.role == "user":
            parts = [_part(piece, images, sample.place) for piece in PLACEHOLDER.split(turn.content) if piece]
            turns.append({"role": "user", "content": parts})
        elif turn.role != "system":
            turns.append({"role": turn.role, "content": turn.content})
    asked = {"model": teacher.model, "messages": turns, teacher.limit_name: teacher.max_response_tokens}
    if teacher.temperature is not None:
        asked["temperature"] = teacher.temperature
    return json.dumps({**asked, **teacher.body}).encode()


def _system(sample: Sample, teacher: TeacherConfig) -> str:
    return SYSTEM_PROMPT if teacher.system_prompt is None else teacher.system_prompt


def _part(piece: str, images: Any, place: str) -> dict[str, Any]:
    if piece != "<image>":
        return {"type": "text", "text": piece}
    return {"type": "image_url", "image_url": {"url": data_url(next(images), place)}}


def data_url(ref: ImageRef, place: str) -> str:
    """As the stages see it (`data.images.open_image`): what a viewer might turn or colour otherwise is a PNG anew."""
    image, data = open_image(ref, place), content(ref) or b""
    if data.startswith(b"\xff\xd8") and not re.search(rb"Exif\0|ICC_PROFILE\0|Adobe|http://ns\.adobe", data[: 1 << 16]):
        return "data:image/jpeg;base64," + base64.b64encode(data).decode()
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
