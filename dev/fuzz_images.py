"""Mutated images: each is a picture or one DataError in one line; no crash, no hang, and nothing on stderr.

    python -m dev.fuzz_images [--count 5000] [--seed 0] [--only PNG] [--case 17] [--jobs 2]

Images of every format in every mode are flipped, cut, spliced and stretched, and their numbers set to extremes,
declared sizes too; each is opened within fuzzing.SECONDS and MEMORY. `make fuzz` runs it whole,
tests/trainer/data/test_images.py a sample.
"""

from __future__ import annotations

import io
import random
import sys
import zlib
from functools import partial

import numpy as np
from PIL import Image, ImageCms

from dev.fuzzing import Judge, damaged, main
from prism_fast.data.images import open_image
from prism_fast.records import DataError, ImageRef

COUNT = 5000
MEMORY = 3 << 30  # address space beside the process's own: the largest images take 0.3 GB a copy
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "PPM", "AVIF")
PLACE = "data.json:1"
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I", "I;16", "I;16B", "F")


def picture(mode: str, size: tuple[int, int] = (24, 16)) -> Image.Image:
    """A gradient with a half-transparent and a fully transparent corner, as ``mode``."""
    width, height = size
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    rgba = np.stack([x, y, 1 - x, np.where(x + y < 0.5, 0, np.where(x > 0.7, 0.5, 1))], axis=-1)
    image = Image.fromarray((rgba * 255).round().astype(np.uint8))
    if mode.startswith("I;16"):
        return Image.frombytes(mode, size, (x * 65535).astype(">u2" if mode.endswith("B") else "<u2").tobytes())
    if mode in ("I", "F"):
        return Image.fromarray((x * 65535).astype(np.int32 if mode == "I" else np.float32))
    image = image if mode == "RGBA" else image.convert(mode if mode == "LA" else "RGB").convert(mode)
    image.info.clear()  # LAB's profile holds the time: a seed would name other files each day
    return image


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def profile() -> bytes:
    """An ICC profile whose red is sRGB's green, and the other way round."""
    srgb = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    srgb[24:36] = bytes(12)  # when it was made
    return bytes(srgb).replace(b"rXYZ", b"?XYZ").replace(b"gXYZ", b"rXYZ").replace(b"?XYZ", b"gXYZ")


def corpus() -> dict[str, bytes]:
    """Small images by name: every format with every mode that it can be written in, and its ways to store them."""
    rgb, rgba, exif, files = picture("RGB"), picture("RGBA"), Image.Exif(), {}
    exif[0x0112], exif[0x010E] = 6, "a description"
    for kind in FORMATS:
        for mode in MODES:
            try:
                files[f"{kind} {mode}"] = encoded(picture(mode), kind)
            except (OSError, ValueError, KeyError):
                continue  # this format does not hold this mode
        if kind in ("PNG", "JPEG", "WEBP", "TIFF", "AVIF"):
            files[f"{kind} turned"] = encoded(rgb, kind, exif=exif)
    for kind in ("PNG", "WEBP", "GIF", "TIFF", "MPO"):  # AVIF's frames hold the time too
        frames = [rgb.rotate(180 * turn) for turn in (1, 2)]
        files[f"{kind} of 3 frames"] = encoded(rgb, kind, save_all=True, append_images=frames)
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"):
        files[f"TIFF {compression}"] = encoded(rgb, "TIFF", compression=compression)
    files["TIFF group4"] = encoded(picture("1"), "TIFF", compression="group4")
    files["JPEG progressive"] = encoded(rgb, "JPEG", progressive=True, quality=95, subsampling=0)
    files["WEBP lossless"] = encoded(rgba, "WEBP", lossless=True)
    files["PNG palette key"] = encoded(picture("P"), "PNG", transparency=3)
    for kind in ("PNG", "JPEG", "WEBP", "TIFF"):
        files[f"{kind} profile"] = encoded(rgb, kind, icc_profile=profile())
    files["PNG grey key"] = encoded(picture("L"), "PNG", transparency=255)
    files["PNG colour key"] = encoded(rgb, "PNG", transparency=(0, 0, 255))
    return files


def resealed(data: bytes) -> bytes:
    """A PNG whose chunks have the checksums of what they hold now: so that damage is not seen at the gate."""
    made, at = bytearray(data[:8]), 8
    while at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        if end + 4 > len(data):
            break
        made += data[at:end] + zlib.crc32(data[at + 4 : end]).to_bytes(4, "big")
        at = end + 4
    return bytes(made) + data[at:]


def mutated(files: list[bytes], rng: random.Random) -> bytes:
    """One of the files, damaged; of PNGs half with checksums that fit."""
    data = damaged(files, rng)
    return resealed(data) if data.startswith(b"\x89PNG") and rng.random() < 0.5 else data


def verdict(data: bytes) -> str:
    """ "picture" or the cause of the one error that is allowed; whatever else happens is raised."""
    try:
        image = open_image(ImageRef(data=data), PLACE)
    except DataError as error:
        text = str(error)
        if not (text.startswith(f"{PLACE}: images: ") and text.isprintable() and len(text) < 400):
            raise AssertionError(f"not one plain line: {text!r}") from error
        return type(error.__cause__).__name__
    if image.mode != "RGB" or min(image.size) < 1:
        raise AssertionError(f"no picture: {image.mode} {image.size}")
    image.tobytes()
    return "picture"


def judge_of(kind: str) -> Judge:
    files = {name: data for name, data in corpus().items() if name.split()[0] == kind}
    files |= {name: data for name, data in corpus().items() if name.startswith("MPO") and kind == "JPEG"}
    broken = [name for name, data in files.items() if verdict(data) not in ("picture", "Refusal")]
    if broken:
        raise SystemExit(f"do not open undamaged: {', '.join(broken)}")
    held = list(files.values())
    return lambda rng, _: {"picture": "pictures"}.get(verdict(mutated(held, rng)), "DataErrors")


if __name__ == "__main__":
    sys.exit(main(__doc__, COUNT, {kind: partial(judge_of, kind) for kind in FORMATS}, MEMORY))
