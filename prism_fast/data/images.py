"""References to images in records, and opening them. Nothing is opened before it is needed."""

from __future__ import annotations

import base64
import io
from hashlib import blake2b
from pathlib import Path
from typing import Any

from PIL import Image

from prism_fast.files import replacing
from prism_fast.records import DataError, ImageRef

_VIDEO_SUFFIXES = {".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg"}


def image_ref(value: Any, place: str, field: str, folder: Path) -> ImageRef:
    """An image as the published files hold it: bytes, a {bytes, path} struct, or a path relative to ``folder``."""
    if isinstance(value, dict):
        if not {"bytes", "path"} & value.keys():
            raise DataError(f"{place}: {field}: expected the fields bytes and path, got {sorted(value)}; rename them")
        value = value.get("bytes") or value.get("path")
    if isinstance(value, (bytes, bytearray, memoryview)) and len(value):
        return ImageRef(data=bytes(value))
    if not isinstance(value, str) or not value:
        kind = "nothing" if not value else type(value).__name__
        raise DataError(f"{place}: {field}: expected bytes, a bytes/path struct or a path, got {kind}; give the image")
    if "://" in value or value.startswith("data:"):
        raise DataError(f"{place}: {field}: {value[:80]!r} is a URL; store the image as a file or as bytes")
    path = folder / value
    if path.suffix.lower() in _VIDEO_SUFFIXES:
        raise DataError(f"{place}: {field}: {value!r} is a video, which is not supported; remove the record")
    if not path.is_file():
        raise DataError(f"{place}: {field}: no such image file {str(path)!r}; correct the path or remove the record")
    return ImageRef(path=path)


def open_image(ref: ImageRef, place: str) -> Image.Image:
    """The decoded image as RGB. Raises DataError, naming ``place``, where it does not open."""
    try:
        with Image.open(ref.path if ref.data is None else io.BytesIO(ref.data)) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        name = str(ref.path) if ref.data is None else f"{len(ref.data)} bytes"
        detail = " ".join(str(error).split())[:160]
        raise DataError(f"{place}: images: {name} does not open ({detail}); replace the image or remove it") from error


def image_uri(ref: ImageRef, place: str) -> str:
    """The image as a PNG data URI, at most 320 pixels wide and high."""
    image = open_image(ref, place)
    image.thumbnail((320, 320))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def store_image(ref: ImageRef, folder: Path, subfolder: str) -> str:
    """The path of an image relative to ``folder``; bytes are written once to ``folder/subfolder`` under their hash."""
    if ref.data is None:
        path = ref.path.resolve()
        root = folder.resolve()
        return str(path.relative_to(root) if path.is_relative_to(root) else path)
    suffix = ".png" if ref.data.startswith(b"\x89PNG") else ".jpg" if ref.data.startswith(b"\xff\xd8") else ".img"
    relative = Path(subfolder) / (blake2b(ref.data, digest_size=12).hexdigest() + suffix)
    target = folder / relative
    if not target.exists():
        with replacing(target) as aside:
            aside.write_bytes(ref.data)
    return str(relative)
