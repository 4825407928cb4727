"""Images as a person sees them, or one line that says why not."""

import io
import os
import random
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageFile

from dev import fuzz_images
from dev.fuzz_images import encoded
from prism_fast.data import images
from prism_fast.data.formats import read_align, read_rlvr, read_sft, read_warmup
from prism_fast.data.images import image_ref, image_uri, open_image
from prism_fast.data.writers import write_align, write_rlvr, write_sft, write_warmup
from prism_fast.records import DataError, ImageRef, Message, Sample

WHITE, BLACK = (255, 255, 255), (0, 0, 0)
FILES = fuzz_images.corpus()


def seen(data: bytes) -> np.ndarray:
    image = open_image(ImageRef(data=data), "d.json:1")
    assert image.mode == "RGB" and image.info == {}
    return np.asarray(image)


def refusal(source, *words: str) -> str:
    """Opening raises DataError: one printable line that names the place and holds all ``words``."""
    with pytest.raises(DataError) as caught:
        open_image(source if isinstance(source, ImageRef) else ImageRef(data=source), "d.json:1")
    message = str(caught.value)
    assert message.startswith("d.json:1: images: ") and message.isprintable()
    for word in words:
        assert word in message, message
    return message


def png(width: int, height: int, depth: int, colour: int, rows: bytes, **chunks: bytes) -> bytes:
    """A PNG written by hand, for what Pillow does not write: ``rows`` as packed samples, without filter bytes."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    stride = len(rows) // height if height and rows else 0
    lines = b"".join(b"\0" + rows[at : at + stride] for at in range(0, len(rows), stride or 1))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    extra = b"".join(chunk(name.encode(), data) for name, data in chunks.items())
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def tiff(order: str, width: int, pixels: bytes, **tags: int | tuple[int, ...]) -> bytes:
    """An uncompressed TIFF of one row written by hand; ``tags`` as t258=(8, 8)."""
    values = {256: width, 257: 1, 259: 1, 273: 8, 278: 1, 279: len(pixels)}
    values.update({int(name[1:]): value for name, value in tags.items()})
    pixels += b"\0" * (len(pixels) % 2)
    count, late = len(values), b""
    start = 8 + len(pixels) + 2 + 12 * count + 4
    entries = b""
    for tag, value in sorted(values.items()):
        numbers = value if isinstance(value, tuple) else (value,)
        packed = struct.pack(f"{order}{len(numbers)}H", *numbers)
        if len(packed) > 4:
            late, packed = late + packed, struct.pack(f"{order}I", start + len(late))
        entries += struct.pack(f"{order}HHI", tag, 3, len(numbers)) + packed.ljust(4, b"\0")
    mark = b"II" if order == "<" else b"MM"
    head = mark + struct.pack(f"{order}HI", 42, 8 + len(pixels))
    return head + pixels + struct.pack(f"{order}H", count) + entries + b"\0" * 4 + late


# ---- upright


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "MPO"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_made_upright(kind, orientation):
    upright = np.zeros((16, 24, 3), np.uint8)
    upright[:8, :12], upright[:8, 12:], upright[8:, :12] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    # What a camera stores for each orientation: TIFF 6.0, tag 274: where row 0 and column 0 of the file belong.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: np.rot90(upright, 2).transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    lossless = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95}, "MPO": {"quality": 95}}.get(kind, {})
    picture = seen(encoded(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=exif, **lossless))
    assert picture.shape == upright.shape
    middles = (slice(4, None, 8), slice(6, None, 12))  # of the quarters
    assert np.abs(picture[middles].astype(int) - upright[middles]).max() < 24  # lossy formats


def test_orientation_in_xmp_and_damaged_or_strange_exif(recwarn):
    wide = Image.new("RGB", (24, 8))
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="6"/></x:xmpmeta>'
    assert seen(encoded(wide, "JPEG", xmp=xmp)).shape == (24, 8, 3)
    whole = Image.Exif()
    whole[0x0112] = 6
    for exif in (b"Exif\0\0junk", b"Exif\0\0", whole.tobytes()[:14], b"Exif\0\0II*\0\xff\xff\xff\xff"):
        assert seen(encoded(wide, "JPEG", exif=exif)).shape == (8, 24, 3)
    for number in (0, 9, 65535):
        whole[0x0112] = number
        assert seen(encoded(wide, "PNG", exif=whole)).shape == (8, 24, 3)
    assert not recwarn.list


# ---- on white


def drawing(mode: str) -> Image.Image:
    """Black on transparent, whose hidden colour is black: what vanishes where alpha is dropped."""
    image = Image.new("RGBA", (8, 4), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (4, 0, 8, 4))
    return image if mode == "RGBA" else image.convert(mode)


@pytest.mark.parametrize(
    "kind, mode",
    [kind.split() for kind in ("PNG RGBA", "PNG LA", "TIFF RGBA", "TIFF LA", "TIFF PA", "GIF RGBA", "WEBP RGBA")]
    + [["JPEG2000", "RGBA"], ["JPEG2000", "LA"], ["AVIF", "RGBA"]],
)
def test_what_is_transparent_is_white(kind, mode):
    picture = seen(encoded(drawing(mode), kind, **({"lossless": True} if kind == "WEBP" else {})))
    assert np.abs(picture[:, :4].astype(int) - 255).max() <= 2 and picture[:, 4:].max() <= 2


def test_half_transparent_is_mixed_with_white_and_opaque_alpha_changes_nothing():
    half = Image.merge("RGBA", [Image.new("L", (2, 2), value) for value in (200, 100, 0, 51)])
    assert seen(encoded(half, "PNG"))[0, 0].tolist() == [244, 224, 204]  # 255 - (255 - v) / 5
    half.putalpha(255)
    assert seen(encoded(half, "PNG"))[0, 0].tolist() == [200, 100, 0]


@pytest.mark.parametrize(
    "depth, colour, rows, chunks, expected",
    [
        # Grey of every depth: the key is in the file's units; 2 bits are 0, 85, 170, 255.
        (1, 0, b"\x40", {"tRNS": b"\0\0"}, [255, 255]),
        (1, 0, b"\x40", {"tRNS": b"\0\1"}, [0, 255]),
        (2, 0, b"\x90", {"tRNS": b"\0\2"}, [255, 85]),
        (2, 0, b"\x10", {"tRNS": b"\0\0"}, [255, 85]),
        (4, 0, b"\x05", {"tRNS": b"\0\0"}, [255, 85]),
        (8, 0, b"\x00\x55", {"tRNS": b"\0\0"}, [255, 85]),
        (16, 0, b"\x00\x00\x00\x01", {"tRNS": b"\0\0"}, [255, 0]),
        (16, 0, b"\x55\x55\xaa\xaa", {}, [85, 170]),
        # Colour.
        (8, 2, b"\0\0\0\0\0\1", {"tRNS": b"\0\0\0\0\0\0"}, [WHITE, (0, 0, 1)]),
        (16, 2, b"\0" * 11 + b"\1", {"tRNS": b"\0\0\0\0\0\0"}, [WHITE, BLACK]),
        (16, 2, b"\x12\x34" * 3 + b"\x12\x35" * 3, {"tRNS": b"\x12\x34" * 3}, [WHITE, (18, 18, 18)]),
        # Palette: one entry transparent, two partly.
        (1, 3, b"\x40", {"PLTE": bytes(6), "tRNS": b"\0\xff"}, [255, 0]),
        (8, 3, b"\0\1", {"PLTE": bytes(6), "tRNS": b"\0\x33"}, [255, 204]),
        (2, 3, b"\x10", {"PLTE": bytes(6), "tRNS": b"\0"}, [255, 0]),
        # Grey and alpha, colour and alpha, 16 bits.
        (16, 4, b"\0\0\0\0\0\0\xff\xff", {}, [255, 0]),
        (16, 6, b"\0" * 8 + b"\x80\0\x40\0\0\0\xff\xff", {}, [WHITE, (128, 64, 0)]),
    ],
)
def test_png_depths_and_transparent_colours(depth, colour, rows, chunks, expected):
    picture = seen(png(2, 1, depth, colour, rows, **chunks))[0]
    assert picture.tolist() == [[value] * 3 if isinstance(value, int) else list(value) for value in expected]


def test_bitmap_whose_alpha_is_unused_and_gif_whose_first_frame_is_small():
    bitmap = bytearray(encoded(Image.new("RGBA", (2, 2), (10, 20, 30, 0)), "BMP"))
    assert seen(bytes(bitmap)).tolist() == [[[10, 20, 30]] * 2] * 2
    # A screen of 4 x 4, on it a frame of 2 x 2 at (1, 1); what it leaves out is empty.
    gif = bytearray(encoded(Image.new("P", (2, 2), 0), "GIF"))
    gif[6:10] = struct.pack("<HH", 4, 4)
    at = gif.index(b",\0\0\0\0")
    gif[at + 1 : at + 5] = struct.pack("<HH", 1, 1)
    picture = seen(bytes(gif))
    assert (picture[1:3, 1:3] == 0).all() and picture.sum() == 12 * 3 * 255


# ---- colour profiles

SWAPPED = fuzz_images.profile()  # red is sRGB's green


def header(profile: bytes, space: bytes) -> bytes:
    return profile[:16] + space + profile[20:]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize(
    "profile, right",
    [
        (SWAPPED, (100, 200, 50)),
        (ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(), (200, 100, 50)),
        (header(SWAPPED, b"GRAY"), (200, 100, 50)),  # of another colour space
        (SWAPPED[:300], (200, 100, 50)),
        (b"junk", (200, 100, 50)),
    ],
    ids=("swapped", "srgb", "grey", "cut", "junk"),
)
def test_colours_are_those_of_the_profile(kind, profile, right):
    exact = {"WEBP": {"lossless": True}, "AVIF": {"quality": 100}, "JPEG": {"quality": 100}}.get(kind, {})
    colours = seen(encoded(Image.new("RGB", (16, 16), (200, 100, 50)), kind, icc_profile=profile, **exact))
    assert np.abs(colours[8, 8].astype(int) - right).max() <= 4


def test_profiles_of_palettes_transparent_pictures_and_greys():
    palette, clear = Image.new("P", (1, 1)), Image.new("RGBA", (1, 1), (200, 100, 50, 51))
    palette.putpalette([200, 100, 50])
    for image, right in ((palette, (100, 200, 50)), (clear, (224, 244, 214))):  # 255 - (255 - v) / 5
        assert np.abs(seen(encoded(image, "PNG", icc_profile=SWAPPED)) - np.array(right)).max() <= 2
    linear = header(SWAPPED, b"GRAY").replace(b"rTRC", b"kTRC").replace(bytes.fromhex("00026666"), b"\0\1\0\0")
    light = 100 / 255 / 1.055 + 0.055 / 1.055  # the curve of sRGB with the exponent 1
    right = round(255 * (1.055 * light ** (1 / 2.4) - 0.055))
    for mode in ("L", "LA"):
        grey = Image.new("RGBA", (1, 1), (100, 100, 100, 255)).convert(mode)
        assert np.abs(seen(encoded(grey, "PNG", icc_profile=linear)) - np.array(right)).max() <= 2


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_is_printed_by_its_profile(kind):
    # Lab of the 16 corners of C, M, Y, K: cyan alone darkens. Without a profile, cyan is (0, 255, 255).
    corners = b"".join(b"\xff\x80\x80" if corner < 8 else b"\0\x80\x80" for corner in range(16))
    unit = struct.pack(">9i", *(65536 * (i % 4 == 0) for i in range(9)))
    table = b"mft1" + bytes(4) + bytes((4, 3, 2, 0)) + unit + bytes(range(256)) * 4 + corners + bytes(range(256)) * 3
    size = 128 + 4 + 12 + len(table)
    head = struct.pack(">I4xI4s4s4s", size, 0x02100000, b"prtr", b"CMYK", b"Lab ") + bytes(12) + b"acsp" + bytes(28)
    head = (head + struct.pack(">3i", 63190, 65536, 54061)).ljust(128, b"\0")
    profile = head + struct.pack(">I4sII", 1, b"A2B0", 144, len(table)) + table
    for ink, plain, printed in (((255, 0, 0, 0), (0, 255, 255), 0), ((0, 255, 255, 0), (255, 0, 0), 255)):
        image = Image.new("CMYK", (8, 8), ink)
        assert np.abs(seen(encoded(image, kind))[4, 4] - np.array(plain)).max() <= 3
        assert np.abs(seen(encoded(image, kind, icc_profile=profile))[4, 4].astype(int) - printed).max() <= 3


# ---- modes and depths


@pytest.mark.parametrize("name", [name for name in FILES if name.split()[-1] in fuzz_images.MODES])
def test_every_mode_of_every_format_shows_its_picture(name):
    kind, mode = name.split()
    if name in ("TIFF I", "TIFF F", "PPM F"):
        refusal(FILES[name], "32 bits", "8 or 16 bits")
        return
    picture = seen(FILES[name]).astype(float)
    assert picture.shape == (16, 24, 3)
    # The others store it clipped; JPEG 2000's writer swaps the bytes of I;16B.
    if mode.startswith("I") and kind in ("PNG", "TIFF", "JPEG2000", "PPM") and name != "JPEG2000 I;16B":
        expected = np.linspace(0, 255, 24)[None, :, None] * np.ones((16, 1, 3))
    elif mode in ("I", "I;16", "I;16B", "F", "1"):
        return
    else:
        colours = np.asarray(fuzz_images.picture("RGBA"), dtype=float)
        expected, alpha = colours[..., :3], colours[..., 3:] / 255
        if mode in ("L", "LA"):
            expected = expected @ [[0.299], [0.587], [0.114]] * np.ones(3)
        if mode in ("RGBA", "LA") and kind not in ("JPEG", "BMP", "PPM"):  # those store no alpha
            opaque = alpha[..., 0] > 0.5 if kind == "GIF" else np.full(alpha.shape[:2], True)
            expected, picture = (expected * alpha + 255 * (1 - alpha))[opaque], picture[opaque]
    limit = 40 if mode in ("P", "PA") or kind == "GIF" else 12  # 216 colours; lossy formats
    assert np.abs(picture - expected).mean() < limit


@pytest.mark.parametrize(
    "kind, mode",
    [(kind, "I;16") for kind in ("PNG", "TIFF", "JPEG2000", "PPM")] + [("PNG", "I;16B"), ("TIFF", "I;16B")],
)
def test_grey_of_16_bits_is_scaled_by_its_whole_range(kind, mode):
    levels = np.arange(256) * 257
    data = levels.astype("<u2" if mode == "I;16" else ">u2").tobytes()
    stored = encoded(Image.frombytes(mode, (16, 16), data), kind)
    assert seen(stored)[..., 1].ravel().tolist() == list(range(256))


@pytest.mark.parametrize(
    "name, data, expected",
    [
        ("white is zero, 16 bits", tiff("<", 2, b"\0\0\xff\xff", t258=16, t262=0), [255, 0]),
        ("white is zero, 8 bits", tiff("<", 2, b"\0\xff", t258=8, t262=0), [255, 0]),
        ("16 bits, big-endian", tiff(">", 2, b"\x55\x55\xaa\xaa", t258=16, t262=1), [85, 170]),
        ("12 bits", tiff("<", 2, b"\x55\x5a\xaa", t258=12, t262=1), [85, 170]),
        ("premultiplied grey", tiff("<", 2, b"\0\0\x64\xff", t258=(8, 8), t262=1, t277=2, t338=1), [255, 100]),
        ("unused second band", tiff("<", 2, b"\0\0\x64\xff", t258=(8, 8), t262=1, t277=2, t338=0), [0, 100]),
        (
            "premultiplied colour",
            tiff("<", 2, b"\0\0\0\0\x0a\x14\x1e\xff", t258=(8,) * 4, t262=2, t277=4, t338=1),
            [WHITE, (10, 20, 30)],
        ),
        (
            "alpha, 16 bits",
            tiff(">", 2, b"\0" * 8 + b"\x0a\0\x14\0\x1e\0\xff\xff", t258=(16,) * 4, t262=2, t277=4, t338=2),
            [WHITE, (10, 20, 30)],
        ),
        ("PGM of 10 bits", b"P5 2 1 1023\n\x01\x55\x03\xff", [85, 255]),
        ("PGM of 100 levels", b"P5 2 1 100\n\x32\x64", [128, 255]),
        ("PBM", b"P4 2 1\n\x40", [255, 0]),
    ],
)
def test_depths_that_pillow_does_not_write(name, data, expected):
    got = seen(data)[0].tolist()
    assert got == [[value] * 3 if isinstance(value, int) else list(value) for value in expected]


def test_signed_and_wide_grey_are_refused():
    refusal(tiff("<", 2, b"\0\0\xff\x7f", t258=16, t262=1, t339=2), "mode I", "8 or 16 bits")
    refusal(tiff("<", 2, bytes(8), t258=32, t262=1, t339=3), "mode F", "8 or 16 bits")


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "TIFF", "AVIF", "MPO"])
def test_of_several_frames_the_first(kind):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime", "blue")]
    colour = seen(encoded(frames[0], kind, save_all=True, append_images=frames[1:]))[8, 8].astype(int)
    assert colour[0] > 245 and max(colour[1:]) < 10


# ---- limits


def test_limits_are_read_off_the_header_before_anything_is_decoded(monkeypatch):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    refusal(png(13_000, 13_000, 8, 0, b""), "13000 x 13000 pixels, over the limit of 67,108,864 pixels")
    refusal(png(9_000, 8_000, 8, 0, b""), "9000 x 8000 pixels", "make it smaller")
    refusal(png(70_000, 500, 8, 0, b""), "65,535 a side")
    refusal(png(402, 2, 8, 0, b""), "402 x 2 pixels, an aspect ratio over the limit of 200")
    refusal(png(1, 201, 8, 0, b""), "aspect ratio")
    for beyond_pillow in (b"P5 70000 70000 255\n", png(2**31 - 1, 2**31 - 1, 8, 0, b"")):
        refusal(beyond_pillow, "over the limit of 67,108,864 pixels; make it smaller")


def test_tiles_and_scans_are_limited_too(monkeypatch):
    refusal(tiff("<", 8, bytes(64), t258=8, t259=8, t262=1, t322=60_000, t323=60_000), "tiles of 60000 x 60000 pixels")
    progressive = encoded(fuzz_images.picture("RGB"), "JPEG", progressive=True)
    assert progressive.count(b"\xff\xda") == 10
    monkeypatch.setattr(images, "MAX_SCANS", 24 * 16 * 10)
    assert seen(progressive).shape == (16, 24, 3)
    monkeypatch.setattr(images, "MAX_SCANS", 24 * 16 * 10 - 1)
    refusal(progressive, "24 x 16 pixels in 10 scans, which is too much")


def test_libtiff_writes_nothing_beside_the_error(capfd):
    data = FILES["TIFF tiff_lzw"]
    refusal(data.replace(data[8:40], b"\xff" * 32), "does not open")
    assert capfd.readouterr() == ("", "")


def test_what_is_within_the_limits_opens():
    assert seen(encoded(Image.new("L", (200, 1)), "PNG")).shape == (1, 200, 3)
    assert seen(encoded(Image.new("L", (1, 1)), "PNG")).shape == (1, 1, 3)


def test_places_that_are_no_files_are_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "empty.png").touch()
    with open(tmp_path / "huge.png", "wb") as file:
        file.truncate(images.MAX_BYTES + 1)
    cases = (("pipe", "is a pipe"), ("folder.png", "is a directory"), ("/dev/zero", "is a device"))
    for name, word in (*cases, ("empty.png", "is empty"), ("huge.png", "268,435,457 bytes, over"), ("no", "No such")):
        refusal(ImageRef(path=tmp_path / name), word)
    refusal(ImageRef(path=tmp_path / "two\nlines\x1b[31m"), r"two\nlines\x1b[31m does not open")
    for name, word in (*cases, ("no", "no such image"), ("a" * 300, "too long"), ("a\0b", "null byte")):
        with pytest.raises(DataError, match=f"^p: images\\[0\\]: .*{word}") as caught:
            image_ref(name, "p", "images[0]", tmp_path)
        assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="is base64; store the image as a file or as bytes"):
        image_ref("iVBORw0KGgo" + "A" * 6000, "p", "images[0]", tmp_path)


# ---- where an image may lie


@pytest.fixture
def places(tmp_path):
    """data/ with in.png and a folder of images, other/ with out.png, and links from one to the other."""
    data, other = tmp_path / "data", tmp_path / "other"
    for path in (data / "in.png", data / "deep" / "in.png", other / "out.png", other / "deep" / "out.png"):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(path)
    (data / "link.png").symlink_to(other / "out.png")
    (data / "linked").symlink_to(other / "deep")
    (data / "round.png").symlink_to(data / "deep" / "in.png")
    (tmp_path / "same").symlink_to(data)
    return data, other


OUTSIDE = ("{other}/out.png", "../other/out.png", "link.png", "linked/out.png", "deep/../../other/out.png")


@pytest.mark.parametrize("value", OUTSIDE)
def test_an_image_outside_the_datas_folder_needs_leave(value, places):
    data, other = places
    name = value.format(other=other)
    for wrapped in (name, {"path": name, "bytes": None}):
        with pytest.raises(
            DataError, match=r"^p: images: '.*/other/.*out.png' is outside .*: data.image_folders='.*/other"
        ):
            image_ref(wrapped, "p", "images", data)
        with pytest.raises(DataError, match="outside"):
            image_ref(wrapped, "p", "images", data, [other.with_name("othe"), other / "out.pn"])
        assert open_image(image_ref(wrapped, "p", "images", data, [other]), "p").size == (4, 4)
        assert image_ref(wrapped, "p", "images", data, [Path("/")]).path is not None


@pytest.mark.parametrize("value", ["in.png", "{data}/in.png", "deep/../in.png", "round.png", "../data/in.png"])
def test_an_image_inside_the_datas_folder_needs_none(value, places):
    data, _ = places
    for folder in (data, data.with_name("same")):  # a folder that is a link itself
        assert image_ref(value.format(data=data), "p", "images", folder).path is not None


def test_a_relative_path_is_looked_for_where_images_may_lie(places):
    data, other = places
    with pytest.raises(DataError, match=r"no such image file '.*/data/deep/out.png'"):
        image_ref("deep/out.png", "p", "images", data)
    assert image_ref("deep/out.png", "p", "images", data, [data / "deep", other]).path == other / "deep" / "out.png"
    assert image_ref("deep/in.png", "p", "images", data, [other]).path == data / "deep" / "in.png"  # first of all
    Image.new("RGB", (4, 4)).save(other / "deep" / "in.png")
    assert (
        image_ref("in.png", "p", "images", data / "deep" / "none", [other / "deep", data]).path.parent.parent == other
    )
    for value in ("nowhere.png", "../other/none.png", "x\0.png", "a" * 300 + ".png"):
        with pytest.raises(DataError, match=f"no such image file '{data}/"):
            image_ref(value, "p", "images", data, [other])
    with pytest.raises(DataError, match="outside"):  # found from there, and not in it
        image_ref("../out.png", "p", "images", data, [other / "deep"])


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "file:in.png", "http://h/a.png", "https://h/a.png", "s3://b/a.png"]
)
def test_nothing_is_fetched(url, places):
    data, _ = places
    with pytest.raises(DataError, match="is a URL; store the image as a file or as bytes"):
        image_ref(url, "p", "images", data, [Path("/")])


def test_bytes_lie_nowhere(places):
    data, other = places
    held = (other / "out.png").read_bytes()
    assert image_ref({"bytes": held, "path": "/etc/passwd"}, "p", "images", data) == ImageRef(data=held)


# ---- what does not open


@pytest.mark.parametrize(
    "data, words",
    [
        (b"", "is empty"),
        (b"junk", "damaged, or none of PNG, JPEG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "looks like PostScript"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>404</html>", "HTML"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        (b"\0\0\0\x18ftypisom", "a video"),
        (b"\xef\xbb\xbf\n<!doctype HTML>", "HTML"),
        (b'{"error": 404}', "JSON"),
        (encoded(Image.new("RGB", (4, 4)), "TGA"), "none of PNG"),
        (encoded(Image.new("RGB", (4, 4)), "PDF"), "PDF"),
        (encoded(Image.new("RGB", (16, 16)), "ICO"), "an icon"),
    ],
    ids=(
        "empty",
        "junk",
        "eps",
        "lfs",
        "html",
        "svg",
        "heic",
        "mp4",
        "html2",
        "json",
        "tga",
        "pdf",
        "ico",
    ),  # a PDF's bytes hold the time
)
def test_other_formats_are_refused_with_their_name(data, words):
    refusal(data, words)


ERRORS = (OSError, SyntaxError, ValueError, struct.error, EOFError, zlib.error, MemoryError, RecursionError, KeyError)
ERRORS += (OverflowError, IndexError, TypeError, ZeroDivisionError, AttributeError, NotImplementedError, AssertionError)


@pytest.mark.parametrize("error", [*ERRORS, UnicodeError, StopIteration, BufferError])
@pytest.mark.parametrize("where", ["open", "load"])
def test_whatever_a_decoder_raises_is_one_line(monkeypatch, error, where):
    def fail(*_, **__):
        raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "two\nlines") if error is UnicodeError else error("two\nlines")

    monkeypatch.setattr(*((Image, "open", fail) if where == "open" else (ImageFile.ImageFile, "load", fail)))
    refusal(encoded(Image.new("RGB", (4, 4)), "BMP"), "does not open (", "replace the image or remove it")


def test_a_stop_is_no_damaged_image(monkeypatch):
    monkeypatch.setattr(Image, "open", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        open_image(ImageRef(data=b"x"), "p")


@pytest.mark.parametrize("name", [name for name in FILES if not name.startswith(("TIFF", "PPM F"))])
def test_a_cut_image_is_an_error_or_whole(name, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # as other libraries set it
    data = FILES[name]
    whole = seen(data)
    tile = data.find(b"\xff\x93") + 2  # of JPEG 2000: where the first tile's data begin
    for cut in (tile, *(int(len(data) * share) for share in (0.3, 0.5, 0.7, 0.9))):
        try:
            assert np.array_equal(seen(data[:cut]), whole)
        except DataError:
            continue


def test_no_warning_of_pillow_is_heard():
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 1, "a long description of a picture"
    damaged = encoded(Image.new("RGB", (8, 8)), "JPEG", exif=exif.tobytes()[:-20])
    keyed = encoded(fuzz_images.picture("P"), "PNG", transparency=bytes(range(200)))
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        seen(damaged)
        seen(keyed)
        refusal(png(10_000, 10_000, 8, 0, b""), "pixels")  # 100 million: Pillow only warns
    assert [str(warning.message) for warning in heard] == []


def test_warnings_of_others_are_heard_and_not_repeated():
    def speak() -> None:
        seen(FILES["PNG RGB"])
        warnings.warn("of another", UserWarning, stacklevel=1)

    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("default")
        speak()
        speak()
    assert [str(warning.message) for warning in heard] == ["of another"]


# ---- written and read again


HARD = (
    "JPEG turned",
    "PNG RGBA",
    "PNG I;16",
    "PNG grey key",
    "GIF RGBA",
    "WEBP RGBA",
    "TIFF CMYK",
    "BMP RGB",
    "AVIF RGBA",
)
WRITERS = {write_sft: read_sft, write_warmup: read_warmup, write_align: read_align, write_rlvr: read_rlvr}


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
@pytest.mark.parametrize("held", ["bytes", "path"])
def test_images_that_are_written_and_read_again_show_the_same(tmp_path, write, held):
    refs = [ImageRef(data=FILES[name]) for name in HARD]
    if held == "path":
        for number, ref in enumerate(refs):
            (tmp_path / f"{number}.bin").write_bytes(ref.data)
        refs = [ImageRef(path=tmp_path / f"{number}.bin") for number in range(len(refs))]
    parts = {"caption": "<caption>a</caption>", "reasoning": "<think>b</think><answer>1</answer>"}
    sample = Sample(
        "p",
        (Message("user", "<image>" * len(refs) + "x"),),
        tuple(refs),
        response=parts["caption"] + parts["reasoning"],
        gold="1",
        **{f"{who}_{part}": text for who in ("teacher", "student") for part, text in parts.items()},
    )
    path = write(tmp_path / "out" / ("d.parquet" if "parquet" in write.__doc__ else "d.jsonl"), [sample])
    (back,) = WRITERS[write](path, image_folders=[tmp_path])
    for name, ref in zip(HARD, back.images, strict=True):
        assert np.array_equal(np.asarray(open_image(ref, "p")), seen(FILES[name])), name


def test_image_for_the_report_shows_what_the_model_sees():
    import base64

    for name in HARD:
        uri = image_uri(ImageRef(data=FILES[name]), "p")
        with Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))) as image:
            assert image.mode == "RGB" and image.info == {} and np.array_equal(np.asarray(image), seen(FILES[name]))


# ---- damage of every kind


def test_mutated_images_are_pictures_or_one_line():
    files, rng = list(FILES.values()), random.Random(7)
    verdicts = [fuzz_images.verdict(fuzz_images.mutated(files, rng)) for _ in range(150)]
    assert len(verdicts) == 150 and 10 < verdicts.count("picture") < 100


def test_the_fuzzer_runs_by_itself():
    asked = ["--count", "20", "--seed", "3", "--only", "GIF"]
    done = subprocess.run([sys.executable, "-m", "dev.fuzz_images", *asked], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("GIF: 20 cases:"), done.stdout + done.stderr
