"""The table of sampled responses: the same held-out prompts, stage by stage.

Responses, questions and images are untrusted: text is escaped, an image is shown only where it is a base64 data URI of
a raster format, and a large one is made smaller.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
from collections.abc import Mapping
from typing import Any

from PIL import Image

from prism_fast.report.data import JUDGED, LABEL, Run, finite
from prism_fast.report.page import Markup, absent, escape, join, table, tag

MAX_PROMPTS = 12
MAX_CHARACTERS = 4000  # of a response
MAX_IMAGE_BYTES = 40_000  # a larger one is shown smaller
MAX_PIXELS = 64_000_000
SIDE = 320  # pixels, of an image made smaller
_IMAGE = re.compile(r"data:image/(?:png|jpeg|gif|webp);base64,([A-Za-z0-9+/]+={0,2})")
_TAGS = re.compile(r"&lt;/?(?:caption|think|answer)&gt;")


def samples_table(run: Run) -> Markup:
    """Prompts as rows, the policy after each stage as columns, the teacher last."""
    names = [name for name in (*JUDGED, "teacher") if _responses(run, name)]
    if not names:
        return absent(join(["no file ", tag("code", "evaluations/<name>.json"), " with responses"]))
    found = {name: _responses(run, name) for name in names}
    chosen = _chosen(found)
    rows = []
    for index in chosen:
        entries = {name: found[name][index] for name in names if index in found[name]}
        rows.append([_prompt(list(entries.values())), *(_cell(entries.get(name)) for name in names)])
    return table(["Prompt", *(LABEL[name] for name in names)], rows, text_columns=len(names) + 1, class_="samples")


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


def _prompt(entries: list[Mapping[str, Any]]) -> Markup:
    source = next((entry["image"] for entry in entries if entry.get("image")), None)
    return join(
        [
            shown_image(source),
            tag("div", _clip(str(entries[0].get("question", ""))), class_="question"),
            tag("div", join(["gold: ", tag("code", _clip(str(entries[0].get("gold", ""))))]), class_="soft"),
        ]
    )


def _cell(entry: Mapping[str, Any] | None) -> object:
    if entry is None:
        return None
    accuracy = finite(entry.get("accuracy"))
    badges = []
    if entry.get("format_valid") is False:
        badges.append(tag("span", "invalid format", class_="badge warn"))
    if accuracy is not None:
        badges.append(
            tag(
                "span",
                "correct" if accuracy >= 0.5 else "wrong",
                class_=f"badge {'good' if accuracy >= 0.5 else 'bad'}",
            )
        )
    text = escape(_clip(str(entry.get("response", ""))))
    marked = Markup(_TAGS.sub(lambda found: f'<span class="mark">{found.group()}</span>', text))
    return join([*badges, tag("div", marked, class_="response")])


def _clip(text: str) -> str:
    more = len(text) - MAX_CHARACTERS
    return text if more <= 0 else f"{text[:MAX_CHARACTERS]}\n[... {more:,} more characters]"


def shown_image(source: Any) -> Markup:
    """An <img> for a data URI of a raster image, made smaller where it is large; a remark for anything else."""
    if source is None:
        return Markup("")
    found = _IMAGE.fullmatch(source) if isinstance(source, str) else None
    if found is None:
        return absent("the image is not a base64 data URI of a PNG, JPEG, GIF or WebP")
    if len(source) > MAX_IMAGE_BYTES:
        try:
            source = _smaller(found.group(1))
        except (OSError, ValueError, binascii.Error, Image.DecompressionBombError) as error:
            return absent(f"the image does not open ({error})")
    return Markup(f'<img src="{source}" alt="the image of the prompt">')


def _smaller(encoded: str) -> str:
    with Image.open(io.BytesIO(base64.b64decode(encoded))) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels are too many")
        reduced = image.convert("RGB")
    reduced.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    reduced.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
