"""Images of records that are written: as files beside theirs, or within."""

from __future__ import annotations

import os
import shutil
from hashlib import blake2b
from pathlib import Path
from typing import Any

from prism_fast.data.images import content, open_image
from prism_fast.files import sync
from prism_fast.records import DataError, ImageRef, Sample

_SUFFIXES = {b"\x89PNG": ".png", b"\xff\xd8": ".jpg", b"GIF8": ".gif", b"II*\0": ".tif", b"MM\0*": ".tif"}


class Stored:
    """Images of the records of ``file``. Those in bytes become files in ``<name>_images`` beside it, each once, under
    their hash: written aside, in place at the end of a ``with``, nothing of them where it fails."""

    def __init__(self, file: Path):
        self._root, self._name = file.parent, f"{file.stem}_images"
        self._aside = file.with_name(f".{self._name}.{os.getpid()}.tmp")

    def __enter__(self) -> Stored:
        return self

    def __exit__(self, failed: Any, *_: object) -> None:
        if not self._aside.exists():
            return
        if failed is None:
            sync(self._aside)
            (self._root / self._name).mkdir(exist_ok=True)
            for image in self._aside.iterdir():
                os.replace(image, self._root / self._name / image.name)
        shutil.rmtree(self._aside)

    def paths(self, sample: Sample) -> list[Any]:
        """For JSON, relative to the file's folder where they lie in it."""
        return [self._path(ref) for ref in sample.images]

    def structs(self, sample: Sample) -> list[Any]:
        """For parquet, whose images in bytes stay within."""
        return [{"bytes": ref.data, "path": None if ref.data is not None else self._path(ref)} for ref in sample.images]

    def _path(self, ref: ImageRef) -> str:
        if ref.data is None:
            path, root = Path(str(ref.path)).resolve(), self._root.resolve()
            return str(path.relative_to(root) if path.is_relative_to(root) else path)
        suffix = next((suffix for start, suffix in _SUFFIXES.items() if ref.data.startswith(start)), ".img")
        name = blake2b(ref.data, digest_size=12).hexdigest() + suffix
        if not (self._root / self._name / name).exists() and not (self._aside / name).exists():
            self._aside.mkdir(exist_ok=True)
            (self._aside / name).write_bytes(ref.data)
        return f"{self._name}/{name}"


def within(sample: Sample) -> list[Any]:
    """All images in bytes, for files that are read anywhere."""
    held = [ref.data if ref.data is not None else content(ref) for ref in sample.images]
    for ref, data in zip(sample.images, held):
        if data is None:
            open_image(ref, sample.place)  # says what is wrong with it
            raise DataError(f"{sample.place}: images: {ref.path} cannot be read; replace the image or remove it")
    return [{"bytes": data, "path": None} for data in held]
