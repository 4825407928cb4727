"""Images as a model reads them, worked out once while they are used again: patches, by what an image's file holds."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from threading import Lock
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from prism_fast.data.images import content, image_key, open_image
from prism_fast.records import ImageRef

HELD_BYTES = 512 << 20  # of patches; 24 bytes a pixel, so some 700 images of 175 x 175


class Patches(NamedTuple):
    """Of one image, or of all images of a prompt, one after the other."""

    pixels: Tensor  # (patches, D) fp32
    grid: Tensor  # (images, 3) int64, in patches
    keys: tuple[bytes, ...]  # `image_key` of each image


class ProcessedImages:
    """What ``process`` makes of an image, kept by what its file holds, the latest used within ``held_bytes``.

    Equal images of a batch and those of a second epoch are decoded once, whatever their files are called; a file that
    was replaced is another image. Safe to call from several threads.
    """

    def __init__(self, process: Callable[[Image.Image], tuple[Tensor, Tensor]]):
        self.held_bytes = HELD_BYTES
        self.decoded = 0  # images, since the beginning
        self._process, self._lock = process, Lock()
        self._held: OrderedDict[bytes, Patches] = OrderedDict()
        self._bytes = 0

    def keep(self, mebibytes: int) -> None:
        """Sets what is kept from now on."""
        self.held_bytes = mebibytes << 20

    def __call__(self, refs: Sequence[ImageRef], place: str) -> Patches:
        """All images of one prompt, one after the other. Raises DataError, naming ``place``."""
        found = [self._one(ref, place) for ref in refs]
        if len(found) == 1:
            return found[0]
        pixels, grids, keys = zip(*found)
        return Patches(torch.cat(pixels), torch.cat(grids), sum(keys, ()))

    def _one(self, ref: ImageRef, place: str) -> Patches:
        read = content(ref)
        if read is None:
            open_image(ref, place)  # says why
            return self._one(ref, place)  # it has come back meanwhile
        key = image_key(read)
        with self._lock:
            if key in self._held:
                self._held.move_to_end(key)
                return self._held[key]
        made = Patches(*self._process(open_image(ref, place, read)), (key,))
        with self._lock:
            self.decoded += 1
            if key not in self._held:
                self._held[key] = made
                self._bytes += made.pixels.nbytes
            while self._bytes > self.held_bytes:
                _, old = self._held.popitem(last=False)
                self._bytes -= old.pixels.nbytes
        return made
