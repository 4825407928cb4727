"""The body of a request -> records and responses, every one of its limits checked before anything is worked out."""

from __future__ import annotations

import base64
import binascii
import os
import stat
from collections.abc import Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from prism_fast.config import ServeConfig
from prism_fast.data.formats import question
from prism_fast.data.images import pixels_of
from prism_fast.records import DataError, ImageRef, Sample


class Refused(Exception):
    """What a client is told in place of an answer: a status and one line."""

    def __init__(self, status: HTTPStatus, text: str):
        super().__init__(text)
        self.status = status


class Asked(NamedTuple):
    """One record of a request."""

    sample: Sample
    responses: list[str]


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class _Turn(_Body):
    role: str
    content: str


class _Image(_Body):
    path: str | None = None
    base64: str | None = None


class _Record(_Body):
    prompt: str | list[_Turn]
    images: list[_Image] = []
    teacher_caption: str | None = None
    teacher_cot: str | None = None
    teacher_response: str | None = None
    responses: list[str] = Field(min_length=1)


class _Request(_Body):
    records: list[_Record] = Field(min_length=1)


def read_request(body: bytes, config: ServeConfig) -> list[Asked]:
    """Raises Refused: 400 for what is no such request, 413 for what is over a limit."""
    try:
        request = _Request.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = "".join(f"[{at}]" if isinstance(at, int) else f".{at}" for at in first["loc"])[1:]
        raise Refused(HTTPStatus.BAD_REQUEST, f"{place or 'body'}: {first['msg']}") from None
    _limited("responses", sum(len(record.responses) for record in request.records), config.max_responses)
    _limited("images", sum(len(record.images) for record in request.records), config.max_images)
    for record in request.records:
        turns = [record.prompt] if isinstance(record.prompt, str) else [turn.content for turn in record.prompt]
        teacher = (record.teacher_caption, record.teacher_cot, record.teacher_response)
        for text in (*turns, *record.responses, *filter(None, teacher)):
            _limited("characters in a text", len(text), config.max_characters)
    return [_asked(record, f"records[{number}]", config) for number, record in enumerate(request.records)]


def _limited(what: str, found: int, most: int) -> None:
    if found > most:
        raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"{found:,} {what}, at most {most:,} are taken; send fewer")


def _asked(record: _Record, place: str, config: ServeConfig) -> Asked:
    fields: dict[str, Any] = record.model_dump(exclude_none=True)
    responses = fields.pop("responses")
    fields["images"] = _images(record.images, place, config)
    try:
        return Asked(question(fields, place, config.system_prompt), responses)
    except DataError as error:
        raise Refused(HTTPStatus.BAD_REQUEST, str(error)) from None


def _images(images: Sequence[_Image], place: str, config: ServeConfig) -> list[bytes]:
    found = []
    for number, image in enumerate(images):
        name = f"{place}.images[{number}]"
        if (image.path is None) == (image.base64 is None):
            raise Refused(HTTPStatus.BAD_REQUEST, f"{name}: expected either path or base64")
        data = _from_text(image.base64, name) if image.path is None else _from_folder(image.path, name, config)
        try:
            pixels = pixels_of(ImageRef(data=data), name)
        except DataError as error:
            raise Refused(HTTPStatus.BAD_REQUEST, str(error)) from None
        if pixels > config.max_pixels:
            told = f"{name}: more than max_pixels = {config.max_pixels:,} pixels; make it smaller"
            raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, told)
        found.append(data)
    return found


def _from_text(text: str | None, name: str) -> bytes:
    try:
        return base64.b64decode((text or "").encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError):
        raise Refused(HTTPStatus.BAD_REQUEST, f"{name}: not base64") from None


def _from_folder(path: str, name: str, config: ServeConfig) -> bytes:
    """A file's content. What lies outside the folder and what is not there get the same answer."""
    if config.image_folder is None:
        raise Refused(HTTPStatus.BAD_REQUEST, f"{name}: paths are not taken; send base64, or start with image_folder")
    absent = Refused(HTTPStatus.BAD_REQUEST, f"{name}: no such image file in image_folder")
    folder = config.image_folder.resolve()
    try:
        place = Path(folder, path).resolve(strict=True)
        if not place.is_relative_to(folder):
            raise absent
        # What the path names now is looked at once it is open: a link that was put there since is not followed, and a
        # pipe is not waited for.
        with open(os.open(place, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise absent
            _limited("bytes of an image", status.st_size, config.max_body_mib << 20)
            return file.read(config.max_body_mib << 20)
    except (OSError, ValueError, RuntimeError):  # a zero byte in the path; a circle of links
        raise absent from None
