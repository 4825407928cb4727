"""Records that the loader's benchmark encodes: small scenes as PNG files, or photos in parquet."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from prism_fast.data.chat import Chat
from prism_fast.data.dataset import Dataset
from prism_fast.data.encode import demonstration
from prism_fast.data.formats import read_sft
from prism_fast.data.order import order
from prism_fast.data.writers import write_as
from prism_fast.demo.digits import DemoSizes, write_demo_data
from prism_fast.demo.tiny import image_processor, make_tiny_model
from prism_fast.records import ImageRef, Message, Prompt, Sample

SEED = 3
Record = tuple[Prompt, Tensor]
Encode = Callable[[Sample], Record]


@dataclass(frozen=True)
class Load:
    kind: str
    records: int
    batch: int
    workers: int = 2
    cached: bool = True  # a second epoch, of what the first left in the cache
    trains: bool = True


LOADS = {
    "digits": Load("digits", 2048, 32),
    "photos": Load("photos", 160, 8, cached=False, trains=False),
    "tiny": Load("digits", 24, 4),
}
DEFAULT = ("digits", "photos")


@dataclass
class Case:
    """Records on disk, and what encodes them. ``chat`` keeps processed images: empty at every epoch that is the first
    of its workers."""

    load: Load
    chat: Chat
    base: Path  # of the tiny model
    data: Dataset
    parquet: list[Path]  # the same records, in as many files as workers

    @classmethod
    def made(cls, load: Load, folder: Path) -> Case:
        source = write_demo_data(folder / "digits", 0, DemoSizes(sft=load.records, align=1, rlvr=1, eval=1)).sft
        drawn = list(read_sft(source))
        base = make_tiny_model(
            folder / "base", [t for s in drawn for t in (*(m.content for m in s.messages), s.response)]
        )
        chat, samples = Chat.load(base), drawn
        if load.kind == "photos":
            samples = [_with_photo(sample, number) for number, sample in enumerate(drawn)]
            source = write_as("sft", folder / "photos.parquet", samples)
            chat = Chat(chat.tokenizer, image_processor(min_pixels=4096, max_pixels=1 << 20))
            chat.image_processor.patch_size = 16
        data, parquet = read_sft(source), []
        for number in range(load.workers):
            part = [_with_bytes(sample) for sample in list(data)[number :: load.workers]]
            parquet.append(write_as("sft", folder / f"part{number}.parquet", part))
        return cls(load, chat, base, data, parquet)

    @property
    def encode(self) -> Encode:
        return partial(demonstration, chat=self.chat, max_prompt_tokens=4096, max_tokens=8192)

    def fresh(self) -> Encode:
        """With no image processed."""
        self.chat = Chat(self.chat.tokenizer, self.chat.image_processor)
        return self.encode

    def picked(self) -> list[list[int]]:
        """Records of an epoch's batches."""
        picked = order(len(self.data), SEED, 0, len(self.data))
        return [picked[i : i + self.load.batch] for i in range(0, len(picked), self.load.batch)]


def _with_photo(sample: Sample, number: int) -> Sample:
    coarse = np.random.default_rng(number).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize((1000, 1000), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return Sample(sample.place, sample.messages, (ImageRef(data=file.getvalue()),), response=sample.response)


def _with_bytes(sample: Sample) -> Sample:
    images = tuple(ref if ref.data else ImageRef(data=Path(str(ref.path)).read_bytes()) for ref in sample.images)
    messages = tuple(Message(message.role, message.content) for message in sample.messages)
    return Sample(sample.place, messages, images, response=sample.response)
