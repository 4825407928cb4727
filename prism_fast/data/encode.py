"""Records -> what a step trains on."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from prism_fast.data.formats import Dataset
from prism_fast.records import DataError, Sample

T = TypeVar("T")


def encode_all(data: Dataset, picked: list[int], encode: Callable[[Sample], T]) -> list[T]:
    """``encode`` of the picked records. A bad one raises, or is counted where skip_bad_records allows it."""
    made = []
    for index in picked:
        try:
            made.append(encode(data[index]))
        except DataError as error:
            data.skip(error)
    return made
