"""The table of sampled responses: the same held-out prompts, stage by stage.

Responses, questions and images are untrusted: the page escapes text, an image is shown only where it is a base64 data
URI of a raster format, and a large one is made smaller.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

from prism_fast.report.data import JUDGED, LABEL, Run, finite

MAX_PROMPTS = 12
MAX_CHARACTERS = 4000  # of a response
MAX_IMAGE_BYTES = 40_000  # a larger one is shown smaller
MAX_PIXELS = 64_000_000
SIDE = 320  # pixels, of an image made smaller
_IMAGE = re.compile(r"data:image/(?:png|jpeg|gif|webp);base64,([A-Za-z0-9+/]+={0,2})")
_TAGS = re.compile(r"(</?(?:caption|think|answer)>)")
_BETWEEN = re.compile(r"(</(?:caption|think)>)\s*(<(?:think|answer)>)")


@dataclass(frozen=True)
class Response:
    """One cell: ``pieces`` are the response's text, each with whether it is one of the format's tags."""

    pieces: tuple[tuple[str, bool], ...]
    correct: bool | None
    format_valid: bool | None


@dataclass(frozen=True)
class Row:
    """One prompt: its image (a data URI), or a remark on why there is none; None for both: it has no image."""

    image: str | None
    remark: str | None
    question: str
    gold: str
    responses: tuple[Response | None, ...]  # one per column


@dataclass(frozen=True)
class Samples:
    columns: tuple[str, ...] = ()
    rows: tuple[Row, ...] = ()


def samples_of(run: Run) -> Samples:
    """Prompts as rows, the policy after each stage as columns, the teacher last; empty without responses."""
    found = {name: responses for name in (*JUDGED, "teacher") if (responses := _responses(run, name))}
    rows = [_row([responses.get(index) for responses in found.values()]) for index in _chosen(found)]
    return Samples(tuple(LABEL[name] for name in found), tuple(rows))


def _responses(run: Run, name: str) -> dict[Any, Mapping[str, Any]]:
    """The first response to every prompt, by the prompt's index."""
    entries = run.evaluations.get(name, {}).get("responses")
    found: dict[Any, Mapping[str, Any]] = {}
    for entry in entries if isinstance(entries, list) else []:
        if isinstance(entry, Mapping) and isinstance(entry.get("index"), (int, str)):
            found.setdefault(entry["index"], entry)
    return found


def _chosen(found: Mapping[str, Mapping[Any, Any]]) -> list[Any]:
    """Prompts that most stages answered, in their order."""
    order = list(dict.fromkeys(index for responses in found.values() for index in responses))
    ranked = sorted(order, key=lambda index: -sum(index in responses for responses in found.values()))
    kept = set(ranked[:MAX_PROMPTS])
    return [index for index in order if index in kept]


def _row(cells: list[Mapping[str, Any] | None]) -> Row:
    known = [cell for cell in cells if cell is not None]
    source = next((cell["image"] for cell in known if cell.get("image")), None)
    try:
        image, remark = None if source is None else shown_image(source), None
    except ValueError as error:
        image, remark = None, str(error)
    question, gold = (_clip(str(known[0].get(name, ""))) for name in ("question", "gold"))
    return Row(image, remark, question, gold, tuple(None if cell is None else _response(cell) for cell in cells))


def _response(cell: Mapping[str, Any]) -> Response:
    accuracy, valid = finite(cell.get("accuracy")), cell.get("format_valid")
    # Every element on a line of its own, however its writer has joined them.
    apart = _BETWEEN.sub(r"\1\n\2", str(cell.get("response", "")).strip())
    texts = _TAGS.split(_clip(apart))  # every second one is a tag
    return Response(
        tuple((text, at % 2 == 1) for at, text in enumerate(texts)),
        None if accuracy is None else accuracy >= 0.5,
        valid if isinstance(valid, bool) else None,
    )


def _clip(text: str) -> str:
    more = len(text) - MAX_CHARACTERS
    return text if more <= 0 else f"{text[:MAX_CHARACTERS]}\n[... {more:,} more characters]"


def shown_image(source: Any) -> str:
    """A data URI of a raster image, made smaller where it is large. Raises ValueError for anything else."""
    found = _IMAGE.fullmatch(source) if isinstance(source, str) else None
    if found is None:
        raise ValueError("the image is not a base64 data URI of a PNG, JPEG, GIF or WebP")
    if len(source) <= MAX_IMAGE_BYTES:
        return source
    try:
        return _smaller(found.group(1))
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"the image does not open ({error})") from error


def _smaller(encoded: str) -> str:
    with Image.open(io.BytesIO(base64.b64decode(encoded))) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels are too many")
        reduced = image.convert("RGB")
    reduced.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    reduced.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
