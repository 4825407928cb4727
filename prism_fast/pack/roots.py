"""What the prompts of a pack have in common: the tokens that they begin with, and their images."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prism_fast.pack.tree import ImageTokens, Parts, Tree
from prism_fast.records import Prompt


class Root(NamedTuple):
    """Parts of a pack that follow one root: the first ``length`` tokens of all their prompts."""

    length: int
    parts: list[tuple[int, Sequence[int]]]  # [(index into trees, [branch, ...]), ...]


def roots_of(trees: Sequence[Tree], parts: Parts, image: ImageTokens, share: bool) -> list[Root]:
    """Of a pack's parts, in order; where ``share``, neighbours with equal images have one root."""
    found = []
    for key, several in groupby(parts, lambda part: images_of(trees[part[0]].prompt, image) if share else None):
        members = list(several)
        for together in [members] if key else [[part] for part in members]:
            found.append(Root(common_length([trees[t].prompt.input_ids for t, _ in together]), together))
    return found


def images_of(prompt: Prompt, image: ImageTokens) -> tuple | None:
    """Equal for prompts that have the same images behind the same tokens; None without images."""
    if not prompt.image_keys:
        return None
    end = int((prompt.input_ids == image.token_id).nonzero()[-1]) + 1
    return prompt.image_keys, prompt.input_ids[:end].numpy().tobytes()


def common_length(several: Sequence[Tensor]) -> int:
    """How many tokens all of these begin with."""
    first, length = several[0], len(several[0])
    for other in several[1:]:
        length = min(length, len(other))
        differs = (first[:length] != other[:length]).nonzero()
        length = int(differs[0]) if len(differs) else length
    return length


def each_once(prompts: Sequence[Prompt]) -> tuple[list[tuple[Prompt, int]], list[int]]:
    """(every distinct image, as a prompt and the image's number there; for each of the prompts' images, which it is).

    Of prompts with equal images one whose pixels are there is taken, if any.
    """
    number: dict[Any, int] = {}
    images: list[tuple[Prompt, int]] = []
    which = []
    for prompt in prompts:
        for i in range(0 if prompt.image_grid_thw is None else len(prompt.image_grid_thw)):
            key = prompt.image_keys[i] if prompt.image_keys else len(number)  # a number is no bytes
            which.append(number.setdefault(key, len(images)))
            if which[-1] == len(images):
                images.append((prompt, i))
            elif images[which[-1]][0].pixel_values is None:
                images[which[-1]] = prompt, i
    return images, which


def grid_of(prompt: Prompt) -> Tensor:
    """(images, 3), of a prompt without images too."""
    return torch.zeros(0, 3, dtype=torch.int64) if prompt.image_grid_thw is None else prompt.image_grid_thw


def patches_of(prompt: Prompt) -> list[int]:
    """Of each image."""
    return grid_of(prompt).prod(-1).tolist()
