"""What a stage says of one record, and what there is to count of a good one: the work of `prism-fast data check`."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, NamedTuple

from prism_fast.data.images import Look, content, image_key, look_at
from prism_fast.data.lengths import Tree, tree_of
from prism_fast.records import DataError, ImageRef, Sample, Seen
from prism_fast.response_format import is_valid

if TYPE_CHECKING:
    from prism_fast.data.chat import Chat

LOOKS = 1 << 16  # images whose looks are kept, by content: equal ones are decoded once
# Those of the Qwen-VL tokenizers; with a model, its own decide.
_CONTROL = re.compile(
    r"<\|(im_start|im_end|endoftext|(object_ref|box|quad|vision)_(start|end)|(vision|image|video|fim)_pad"
    r"|fim_(prefix|middle|suffix)|repo_name|file_sep)\|>"
)


class Picture(NamedTuple):
    """One image of a record."""

    digest: int  # 64 bits of a hash of its file
    look: Look


class Judged(NamedTuple):
    """Of a good record. Digests are 64 bits: of a million records, two differing ones agree once in 40 million data
    sets."""

    digest: int  # of its texts and the files of its images
    pictures: list[Picture]
    question_type: str
    unformatted: bool  # a demonstration without the three tags, which the SFT stage takes
    tree: Tree | None = None  # with a model


Encode = Callable[[Sample], object]  # as a stage encodes a record; raises DataError


class Judge:
    """Called with a record; DataError where it is bad.

    Without ``encode`` it says what every stage refuses, whatever its model. With it, what that stage says, in its
    words: images are decoded once, as an encoding needs no more than their sizes.
    """

    def __init__(self, encode: Encode | None = None, chat: Chat | None = None):
        self._encode, self._chat = encode, chat
        self._looks: OrderedDict[bytes, Look] = OrderedDict()

    def __call__(self, sample: Sample) -> Judged:
        tree = None
        if self._encode is None:
            _refuse_control_tokens(sample)
            pictures = [self._picture(ref, sample.place) for ref in sample.images]
        else:
            try:
                pictures = [self._picture(ref, sample.place) for ref in sample.images]
                made = self.encode(sample, [(picture.digest, picture.look.size) for picture in pictures])
            except (DataError, ValueError):
                self._encode(sample)  # says so itself, but for what comes first
                raise
            tree = tree_of(made)
        unformatted = sample.response is not None and not is_valid(sample.response)
        return Judged(_digest(sample, pictures), pictures, sample.question_type, unformatted, tree)

    def encode(self, sample: Sample, pictures: Sequence[tuple[int, tuple[int, int]]]) -> object:
        """As the stage does, by the images' digests and sizes alone: equal images have one key. With a model."""
        assert self._encode is not None and self._chat is not None
        grid = [_grid(self._chat.image_processor, size) for _, size in pictures]
        keys = tuple(digest.to_bytes(8, "big") for digest, _ in pictures)
        return self._encode(replace(sample, seen=Seen(grid, keys) if grid else None))

    def _picture(self, ref: ImageRef, place: str) -> Picture:
        read = content(ref)
        key = image_key(read or b"")
        look = self._looks.pop(key, None) or look_at(ref, place)
        if read is not None:  # else it has come back meanwhile
            self._looks[key] = look
        if len(self._looks) > LOOKS:
            self._looks.popitem(last=False)
        return Picture(int.from_bytes(key[:8], "big"), look)


def _grid(processor: Any, size: tuple[int, int]) -> list[int]:
    """Patches that an image of this width and height becomes. Raises ValueError where the processor refuses it."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    least, most = processor.size["shortest_edge"], processor.size["longest_edge"]
    height, width = smart_resize(size[1], size[0], processor.patch_size * processor.merge_size, least, most)
    return [1, height // processor.patch_size, width // processor.patch_size]


def _digest(sample: Sample, pictures: list[Picture]) -> int:
    told: list[object] = [(message.role, message.content) for message in sample.messages]
    told += [sample.response, sample.teacher_caption, sample.teacher_reasoning]
    told += [sample.student_caption, sample.student_reasoning, sample.gold]
    told += [picture.digest for picture in pictures]
    return int.from_bytes(blake2b(repr(told).encode(), digest_size=8).digest(), "big")


def _refuse_control_tokens(sample: Sample) -> None:
    for number, message in enumerate(sample.messages):
        if found := _CONTROL.search(message.content):
            problem = f"holds the control token {found.group()}; remove it or write it differently"
            raise DataError(f"{sample.place}: messages[{number}].content: {problem}")


def judge_of(kind: str, chat: Chat | None, max_prompt_tokens: int) -> tuple[Judge, str]:
    """The judge of the stage that reads this kind, and the limits by which it judges: its defaults."""
    if chat is None:
        return Judge(), "lengths were not looked at: they need a stage's --model"
    from prism_fast.config import AlignConfig, SFTConfig, WarmupConfig
    from prism_fast.data.encode import demonstration, lesson, pair_record, question

    sft, pairs, align = SFTConfig.model_construct(), WarmupConfig.model_construct(), AlignConfig.model_construct()
    encode, limit = {
        "sft": (partial(demonstration, max_tokens=sft.max_tokens), f", max_tokens = {sft.max_tokens}"),
        "warm-up": (partial(pair_record, max_tokens=pairs.max_tokens), f", max_tokens = {pairs.max_tokens}"),
        "alignment": (partial(lesson, config=align), f", max_part_tokens = {align.max_part_tokens}"),
        "rlvr": (question, ""),
    }[kind]
    encode = partial(encode, chat=chat, max_prompt_tokens=max_prompt_tokens)
    return Judge(encode, chat), f"lengths by the stage's defaults: max_prompt_tokens = {max_prompt_tokens}{limit}"
