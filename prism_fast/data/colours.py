"""An image's colours as a person sees them: 8 bits of sRGB, on white where it is transparent.

An embedded ICC profile of the image's own colour space is applied, others are passed over, as viewers do. Grey of 16
bits is scaled by the whole range of its format; grey of 32 bits and floats, which have no agreed black and white, are
refused.
"""

from __future__ import annotations

import io
from functools import lru_cache
from typing import IO

import numpy as np
from PIL import Image, ImageCms


class Refusal(Exception):
    """Why an image is not taken and what to do, to go on after its name."""


def on_white(image: Image.Image, file: IO[bytes]) -> Image.Image:
    """A loaded image of any mode as RGB, what is transparent in it on white."""
    premultiplied, profile = {"La": "LA", "RGBa": "RGBA"}, image.info.get("icc_profile")
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        image = _grey_of_16_bits(image)
    elif image.mode in ("I", "F"):
        raise Refusal(
            f"has grey of 32 bits, signed or floating (mode {image.mode}), with no agreed black and white;"
            " save it with 8 or 16 bits"
        )
    elif image.mode in premultiplied:
        image = image.convert(premultiplied[image.mode])
    elif image.format == "PNG" and image.mode in ("L", "RGB") and "transparency" in image.info:
        image = _with_key_as_alpha(image, file)
    if not image.has_transparency_data:
        return _in_srgb(image, profile)
    rgba = image.convert("RGBA")
    alpha = rgba.getchannel("A")
    rgb = _in_srgb(image.getchannel("L") if image.mode == "LA" else rgba, profile)
    if image.format == "BMP" and alpha.getextrema() == (0, 0):  # an unused channel, as browsers take it
        return rgb
    white = Image.new("RGB", image.size, "white")
    white.paste(rgb, mask=alpha)
    return white


def _in_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Opaque colours by their profile; as they are where there is none, or it is damaged or of another space."""
    space = {"L": "GRAY", "CMYK": "CMYK"}.get(image.mode, "RGB ")
    plain = image.convert("RGB")
    transform = _to_srgb(profile, space) if profile else None
    if transform is None:
        return plain
    return transform.apply(plain if space == "RGB " else image)


@lru_cache(maxsize=16)
def _to_srgb(profile: bytes, space: str) -> ImageCms.ImageCmsTransform | None:
    """None for what is not a profile of this space, and for sRGB, told by what it does: at most 2 of 255."""
    mode = {"GRAY": "L", "CMYK": "CMYK"}.get(space, "RGB")
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space != space:
            return None
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None
    if mode == "CMYK":
        return transform
    levels = np.linspace(0, 255, 6).astype(np.uint8)
    colours = (
        np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3) if mode == "RGB" else levels[None]
    )
    trial = Image.fromarray(np.ascontiguousarray(colours))
    change = np.asarray(transform.apply(trial)).astype(int) - np.asarray(trial.convert("RGB"))
    return transform if np.abs(change).max() > 2 else None


def _grey_of_16_bits(image: Image.Image) -> Image.Image:
    """As L, or as LA where a PNG names a transparent grey. PPM's grey is 16 bits in Pillow's mode I."""
    tags = getattr(image, "tag_v2", {})  # of TIFF
    top = 4095 if tuple(np.atleast_1d(tags.get(258, 16))) == (12,) else 65535
    table = (np.minimum(np.arange(65536), top) * 255 + top // 2) // top
    if tags.get(262) == 0:  # white is zero
        table = 255 - table
    values = np.asarray(image)
    grey = Image.fromarray(table.astype(np.uint8)[values])
    if "transparency" not in image.info:
        return grey
    alpha = np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)
    return Image.merge("LA", (grey, Image.fromarray(alpha)))


def _with_key_as_alpha(image: Image.Image, file: IO[bytes]) -> Image.Image:
    """A PNG with its transparent colour, written in the file's depth, as alpha: Pillow compares it with 8 bits."""
    file.seek(24)
    depth = file.read(1)[0]
    key = np.atleast_1d(image.info["transparency"]) & (2**depth - 1)
    pixels = np.asarray(image).reshape(image.height, image.width, -1)
    if depth == 16:
        low = Image.open(file, formats=("PNG",))
        low.tile = [low.tile[0]._replace(args="RGB;16L")]  # the lower byte of each value, which Pillow drops
        hidden = (pixels == key >> 8).all(-1) & (np.asarray(low) == (key & 255)).all(-1)
    else:
        hidden = (pixels == key * 255 // (2**depth - 1)).all(-1)
    del image.info["transparency"]
    image = image.convert("RGB")
    image.putalpha(Image.fromarray(np.where(hidden, 0, 255).astype(np.uint8)))
    return image
