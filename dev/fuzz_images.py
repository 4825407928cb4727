"""Mutated images: each is a picture or one DataError in one line; no crash, no hang, and nothing on stderr.

    python dev/fuzz_images.py [COUNT] [SEED]

Images of every format and mode are flipped, cut, spliced and stretched; each is opened within MAX_SECONDS, all within
MAX_MEMORY. `make fuzz` runs it whole, tests/trainer/data/test_images.py a sample.
"""

from __future__ import annotations

import io
import os
import random
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms

from prism_fast.data.images import open_image
from prism_fast.records import DataError, ImageRef

COUNT = 5000
MAX_SECONDS = 10
MAX_MEMORY = 4 << 30  # address space of the process
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
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "PPM", "AVIF"):
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


def mutations(files: list[bytes], seed: int) -> Iterator[bytes]:
    """Damaged files without end: bits flipped, cut, spliced with another, bytes repeated, numbers set to extremes."""
    rng = random.Random(seed)
    while True:
        data = bytearray(rng.choice(files))
        for _ in range(rng.choice((1, 1, 2, 4))):
            # Half of all damage is in the first 128 bytes, where the headers are.
            at = rng.randrange(min(len(data), 128) if rng.random() < 0.5 else len(data))
            way = rng.randrange(6)
            if way == 0:
                for _ in range(rng.choice((1, 2, 8, 32))):
                    data[rng.randrange(at, len(data))] ^= 1 << rng.randrange(8)
            elif way == 1:
                del data[max(at, 1) :]
            elif way == 2:
                other = rng.choice(files)
                data[at:] = other[rng.randrange(len(other)) :]
            elif way == 3:
                data[at:at] = data[at : at + rng.randrange(1, 64)] * rng.choice((1, 2, 16))
            elif way == 4:
                number = rng.choice((0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF))
                data[at : at + 4] = number.to_bytes(4, rng.choice(("little", "big")))
            else:
                del data[at : at + rng.randrange(1, 32)]
            if not data:
                data = bytearray(b"\0")
        yield bytes(data)


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


def _too_long(*_: object) -> None:
    raise SystemExit(f"an image took over {MAX_SECONDS} s")


def main(count: int = COUNT, seed: int = 0) -> int:
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    signal.signal(signal.SIGALRM, _too_long)
    files = corpus()
    broken = [name for name, data in files.items() if verdict(data) not in ("picture", "_Refusal")]
    if broken:
        raise SystemExit(f"do not open undamaged: {', '.join(broken)}")
    results, slowest = Counter(), 0.0
    stderr, last = os.dup(2), Path(tempfile.gettempdir()) / f"fuzz_images.{os.getpid()}"
    with tempfile.TemporaryFile() as words:
        os.dup2(words.fileno(), 2)  # C libraries write there too
        for _, data in zip(range(count), mutations(list(files.values()), seed)):
            last.write_bytes(data)  # what stays in it after a crash is the cause
            started = time.process_time()
            signal.alarm(MAX_SECONDS)
            results[verdict(data)] += 1
            signal.alarm(0)
            slowest = max(slowest, time.process_time() - started)
        os.dup2(stderr, 2)
        spoken = words.tell()
    last.unlink()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{count} damaged images from {len(files)} sound ones, seed {seed}: {results['picture']} pictures,", end=" ")
    print(f"{count - results['picture']} DataErrors; slowest {slowest:.2f} s, peak memory {memory:.0f} MB")
    print("causes: " + ", ".join(f"{name} {number}" for name, number in results.most_common()))
    print(f"bytes on stderr: {spoken}, where 0 are expected")
    return int(spoken > 0)


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
