"""References to images in records, and opening them as a person sees them. Nothing is opened before it is needed.

Upright (orientation of EXIF or XMP), in colours as `prism_fast/data/colours.py` has them. Of animations and files of
several pages: the first.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import io
import logging
import os
import re
import stat
import struct
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from prism_fast.data.colours import Refusal, on_white
from prism_fast.records import DataError, ImageRef

T = TypeVar("T")

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "PPM", "AVIF")  # none of them starts a program
MAX_BYTES = 2**28  # of a file: 268 MB
MAX_PIXELS = 2**26  # 67 million: 8,192 x 8,192
MAX_SIDE = 65_535
MAX_SCANS = 2**31  # of a progressive JPEG, times its pixels: 32 at the most pixels
MAX_ASPECT = 200  # of the longer side to the shorter; the image processor has the same limit

_VIDEO_SUFFIXES = {".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg"}
# How PNG, JPEG, GIF, WebP, BMP, TIFF, JPEG 2000 and AVIF begin; a path of the same letters has a suffix.
_BASE64 = re.compile(r"(iVBOR|/9j/|R0lGOD|UklGR|Qk|SUkq|TU0A|AAAA)[A-Za-z0-9+/_=\s-]*")
_OTHERS = {  # what is found in place of an image, by its first bytes
    b"version https://git-lfs": "a git-lfs pointer: run git lfs pull",
    b"<!DOCTYPE": "an HTML page",
    b"<html": "an HTML page",
    b"<svg": "SVG",
    b"<?xml": "SVG or XML",
    b"%PDF": "PDF",
    b"%!PS": "PostScript",
    b"8BPS": "Photoshop",
    b"\0\0\1\0": "an icon",
    b"DDS ": "DDS",
    b"qoif": "QOI",
    b"\xff\x0a": "JPEG XL",
    b"\0\0\0\x0cJXL ": "JPEG XL",
    b"\x1aE\xdf\xa3": "a video",
    b"PK\3\4": "a zip archive",
    b"\x1f\x8b": "gzip",
    b"{": "JSON",
    b"iVBORw0KGgo": "base64",
    b"/9j/": "base64",
}
_TURNS = {  # EXIF orientation -> what makes it upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_PILLOW = r"PIL\."  # its modules
logging.getLogger("PIL").addHandler(logging.NullHandler())  # else its errors reach stderr beside the exception
with contextlib.suppress(OSError, AttributeError):  # libtiff's too, wherever Pillow's has a symbol for it
    ctypes.CDLL(Image.core.__file__).TIFFSetErrorHandler(None)


def image_ref(value: Any, place: str, field: str, folder: Path, others: Sequence[Path] = ()) -> ImageRef:
    """An image as the published files hold it: bytes, a {bytes, path} struct, or a path relative to ``folder``, or,
    where it is not there, to the first of ``others`` that has it.

    With all links followed it must lie in ``folder`` or in one of ``others``: data from elsewhere must not choose which
    files of this machine are read.
    """
    if isinstance(value, dict):
        if not {"bytes", "path"} & value.keys():
            raise DataError(
                f"{place}: {field}: expected the fields bytes and path, got {str(sorted(value))[:160]}; rename them"
            )
        if isinstance(value.get("bytes"), str) and value["bytes"]:
            raise DataError(f"{place}: {field}: bytes is a text, perhaps base64; store the image as a file or as bytes")
        value = value.get("bytes") or value.get("path")
    if isinstance(value, (bytes, bytearray, memoryview)) and len(value):
        return ImageRef(data=bytes(value))
    if not isinstance(value, str) or not value:
        kind = "nothing" if value is None or value in ("", b"") else type(value).__name__
        raise DataError(f"{place}: {field}: expected bytes, a bytes/path struct or a path, got {kind}; give the image")
    if "://" in value or value[:5].lower() in ("data:", "file:"):
        raise DataError(f"{place}: {field}: {value[:80]!r} is a URL; store the image as a file or as bytes")
    if len(value) > 80 and _BASE64.fullmatch(value):
        raise DataError(f"{place}: {field}: {value[:20]!r}... is base64; store the image as a file or as bytes")
    path = folder / value
    if others and not os.path.exists(path):
        path = next((there for other in others if os.path.exists(there := other / value)), path)
    if path.suffix.lower() in _VIDEO_SUFFIXES:
        raise DataError(f"{place}: {field}: {value[:200]!r} is a video, which is not supported; remove the record")
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        why = "" if isinstance(error, FileNotFoundError) else f" ({getattr(error, 'strerror', error)})"
        why = " (a path of Windows; write /)" if "\\" in value[:200] else why
        raise DataError(
            f"{place}: {field}: no such image file {str(path)[:200]!r}{why}; correct the path or remove the record"
        ) from error
    if not stat.S_ISREG(mode):
        raise DataError(f"{place}: {field}: {str(path)!r} is {_kind(mode)}; give the path of an image file")
    real = real_path(path)
    if not any(real.is_relative_to(real_folder(allowed)) for allowed in (folder, *others)):
        raise DataError(
            f"{place}: {field}: {str(real)[:200]!r} is outside the data's folder {str(folder)!r}; move it there, or "
            f"allow its own: data.image_folders={str(real.parent)[:200]!r}, of data commands --image-folder"
        )
    return ImageRef(path=path)


def real_path(path: Path) -> Path:
    """Of an image's file, as `real_folder`."""
    return Path(os.path.realpath(path)) if path.is_symlink() else real_folder(path.parent) / path.name


@lru_cache(maxsize=4096)
def real_folder(folder: Path) -> Path:
    """With all links followed."""
    return Path(os.path.realpath(folder))


def open_image(ref: ImageRef, place: str, read: bytes | None = None) -> Image.Image:
    """The image as a person sees it, as RGB; ``read``: what `content` gave of it, if it was asked. Raises DataError,
    naming ``place``, whatever the decoder raises."""
    return _looked_at(ref, place, _seen, read)


class Look(NamedTuple):
    """What there is to say of an image that opens."""

    size: tuple[int, int]  # upright: width, height
    format: str  # "PNG"
    mode: str  # as it is stored, by Pillow's name: "RGB", "L", "P", "I;16", "CMYK", ...


def look_at(ref: ImageRef, place: str) -> Look:
    """Decodes the image, as `open_image`, and says how it is stored. Raises DataError as `open_image` does."""

    def look(file: IO[bytes]) -> Look:
        with _recognised(file) as image:
            format, mode = str(image.format), image.mode
        file.seek(0)
        return Look(_seen(file).size, format, mode)

    return _looked_at(ref, place, look)


def pixels_of(ref: ImageRef, place: str) -> int:
    """Width times height by the header alone: nothing is decoded. Raises DataError as `open_image` does."""
    return _looked_at(ref, place, _pixels)


def content(ref: ImageRef) -> bytes | None:
    """The encoded image; None for what `open_image` refuses before it reads it."""
    if ref.data is not None:
        return ref.data
    try:
        with _open(ref) as file:
            return file.read()
    except (Refusal, OSError, ValueError):
        return None


def image_key(read: bytes) -> bytes:
    """What tells images apart, 16 bytes: a hash of the encoded image, of which everything else is made."""
    return blake2b(read, digest_size=16).digest()


def _looked_at(ref: ImageRef, place: str, look: Callable[[IO[bytes]], T], read: bytes | None = None) -> T:
    name = f"{len(ref.data)} bytes" if ref.data is not None else repr(str(ref.path))[1:-1]
    try:
        with _open(ref if read is None else ImageRef(data=read)) as file:
            return look(file)
    except Refusal as error:
        raise DataError(f"{place}: images: {name} {error}") from error
    except Exception as error:  # decoders of damaged files raise any type
        detail = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        raise DataError(f"{place}: images: {name} does not open ({detail}); replace the image or remove it") from error


def _kind(mode: int) -> str:
    names = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return names.get(stat.S_IFMT(mode), "a device")


def _open(ref: ImageRef) -> IO[bytes]:
    """The encoded image as an open file. A path is examined first: to open a pipe or a device may wait for ever."""
    if ref.data is not None:
        size = len(ref.data)
    else:
        status = os.stat(str(ref.path))
        if not stat.S_ISREG(status.st_mode):
            raise Refusal(f"does not open: it is {_kind(status.st_mode)}; give the path of an image file")
        size = status.st_size
    if size == 0:
        raise Refusal("does not open: it is empty; replace the image or remove it")
    if size > MAX_BYTES:
        raise Refusal(f"has {size:,} bytes, over the limit of {MAX_BYTES:,}; make it smaller or remove it")
    return open(ref.path, "rb") if ref.data is None else io.BytesIO(ref.data)


def _pixels(file: IO[bytes]) -> int:
    with _recognised(file) as image:
        return image.width * image.height


def _recognised(file: IO[bytes]) -> Image.Image:
    """Of which only the header is read."""
    _silence_pillow()
    ImageFile.LOAD_TRUNCATED_IMAGES = False  # whatever another library asked for
    try:
        return Image.open(file, formats=FORMATS)
    except UnidentifiedImageError as error:
        raise Refusal(
            f"does not open (damaged, or none of {', '.join(FORMATS)}{_looks_like(file)}); convert or remove it"
        ) from error
    except Image.DecompressionBombError as error:  # Pillow's own limit, which is higher
        raise Refusal(f"is over the limit of {MAX_PIXELS:,} pixels; make it smaller or remove it") from error


def _seen(file: IO[bytes]) -> Image.Image:
    with _recognised(file) as image:
        _check_size(*image.size)
        _check_work(image, file)
        box = image.tile[0][1] if image.format == "GIF" and image.tile else None  # of the first frame
        image.load()
        if image.format == "JPEG2000" and not _ends(file):
            raise Refusal("does not open: it is truncated; replace the image or remove it")
        rgb = on_white(image, file)
        if box is not None and box != (0, 0, *image.size):
            white = Image.new("RGB", image.size, "white")
            white.paste(rgb.crop(box), box)
            rgb = white
        turn = _TURNS.get(_orientation(image))
    rgb = rgb if turn is None else rgb.transpose(turn)
    rgb.info.clear()  # a transparency or orientation in it would be applied again by whoever saves the image
    return rgb


def _silence_pillow() -> None:
    """No warnings of damaged EXIF and the like: what matters is raised. Only where they are heard, since each change of
    the filters makes Python repeat every warning that it has shown once. Not undone: threads share the filters."""
    first = warnings.filters[0] if warnings.filters else None
    if first is None or first[0] != "ignore" or getattr(first[3], "pattern", None) != _PILLOW:
        warnings.filterwarnings("ignore", module=_PILLOW)


def _looks_like(file: IO[bytes]) -> str:
    file.seek(0)
    head = file.read(64)
    if head[4:8] == b"ftyp" and not head[8:12].startswith(b"avi"):
        return "; it looks like HEIC" if head[8:11] in (b"hei", b"hev", b"mif", b"msf") else "; it looks like a video"
    head = head.removeprefix(b"\xef\xbb\xbf").lstrip(b" \t\r\n")
    names = [name for start, name in _OTHERS.items() if head[: len(start)].lower() == start.lower()]
    return "".join(f"; it looks like {name}" for name in names[:1])


def _ends(file: IO[bytes]) -> bool:
    """Whether a JPEG 2000 file holds the mark at its end. The decoder misses a cut where a tile begins."""
    file.seek(0)
    return b"\xff\xd9" in file.read()


def _check_size(width: int, height: int) -> None:
    """Refuses by the header alone, before anything is decoded."""
    shorter, longer = sorted((width, height))
    if shorter < 1:
        why = "nothing to see; replace"
    elif width * height > MAX_PIXELS:
        why = f"over the limit of {MAX_PIXELS:,} pixels; make it smaller"
    elif longer > MAX_SIDE:
        why = f"over the limit of {MAX_SIDE:,} a side; make it smaller"
    elif longer > MAX_ASPECT * shorter:
        why = f"an aspect ratio over the limit of {MAX_ASPECT}; crop it"
    else:
        return
    raise Refusal(f"has {width} x {height} pixels, {why} or remove it")


def _check_work(image: Image.Image, file: IO[bytes]) -> None:
    """Refuses what decodes far more than its pixels: tiles larger than the image, a JPEG of very many scans."""
    tile = [int(np.max(getattr(image, "tag_v2", {}).get(tag, 0))) for tag in (322, 323)]
    if tile[0] * tile[1] > MAX_PIXELS:
        raise Refusal(f"has tiles of {tile[0]} x {tile[1]} pixels, over the limit of {MAX_PIXELS:,}; save it again")
    if image.info.get("progressive"):
        position = file.tell()
        file.seek(0)
        scans = file.read().count(b"\xff\xda")
        file.seek(position)
        if scans * image.width * image.height > MAX_SCANS:
            raise Refusal(
                f"has {image.width} x {image.height} pixels in {scans} scans, which is too much; save it again"
            )


def _orientation(image: Image.Image) -> Any:
    """EXIF's number; 1, upright, where the block is damaged, as viewers take it. After ``load``, which may read it."""
    try:
        return image.getexif().get(0x0112, 1)
    except (SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, OSError, EOFError, struct.error):
        return 1


def image_uri(ref: ImageRef, place: str) -> str:
    """The image as a PNG data URI, at most 320 pixels wide and high."""
    image = open_image(ref, place)
    image.thumbnail((320, 320))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
