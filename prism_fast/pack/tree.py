"""What a pack is made of: prompts with their images, and the branches that follow them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prism_fast.records import DataError, Prompt

# Kinds of token, for per-kind routing statistics.
KIND_PROMPT, KIND_IMAGE, KIND_RESPONSE = 0, 1, 2
KIND_STUDENT_CAPTION, KIND_STUDENT_REASONING, KIND_TEACHER_CAPTION, KIND_TEACHER_REASONING = 3, 4, 5, 6
KIND_NAMES = (
    "prompt",
    "image",
    "response",
    "student_caption",
    "student_reasoning",
    "teacher_caption",
    "teacher_reasoning",
)

Parts = Sequence[tuple[int, Sequence[int]]]  # [(index into trees, [branch, ...]), ...]


@dataclass(frozen=True)
class ImageTokens:
    """How a model lays images into its token stream: the placeholder's id, patches per token side, numbers a patch."""

    token_id: int
    merge_size: int
    patch_dim: int = 0  # channels * temporal patch * patch * patch


@dataclass(frozen=True)
class Tree:
    """A prompt and what follows it.

    >>> Tree(prompt, [ids_of_response_4, ids_of_response_5], [KIND_RESPONSE] * 2, labels=[4, 5])
    """

    prompt: Prompt
    branches: Sequence[Tensor]  # each (L,) int64, L >= 1
    kinds: Sequence[int]  # KIND_* per branch
    labels: Sequence[int] | None = None  # the caller's number of each branch; None: its index in this tree
    together: tuple[int, ...] = ()  # indices of the branches that every part of a split tree must hold

    def __post_init__(self):
        if self.labels is not None and len(self.labels) != len(self.branches):
            raise ValueError(f"labels: {len(self.labels)} for {len(self.branches)} branches; give one for each")


def check_image_tokens(prompt: Prompt, image: ImageTokens) -> None:
    """Raises DataError where a prompt has not as many image tokens as its images' sizes ask for."""
    found = int((prompt.input_ids == image.token_id).sum())
    grid = prompt.image_grid_thw
    expected = 0 if grid is None else int(grid.prod(-1).sum()) // image.merge_size**2
    if found != expected:
        raise DataError(
            f"{prompt.place or 'prompt'}: {found} image tokens, expected {expected} from its images' "
            "sizes; use the checkpoint's own tokenizer and image processor"
        )


def mrope_positions(prompt: Prompt, image: ImageTokens) -> tuple[Tensor, int]:
    """Multimodal rotary positions of a prompt: ((3, P) int64 rows t, h, w; the position of the next token).

    Text advances all three rows by one a token. An image of (t, h, w) patches spans t x h/merge x w/merge tokens on a
    grid from the current position; the text after it goes on at the largest of the three + 1 (Qwen3-VL).
    """
    check_image_tokens(prompt, image)
    ids = prompt.input_ids
    is_image = ids == image.token_id
    columns, position, row = [], 0, 0
    starts = is_image.nonzero().flatten().tolist()
    taken = 0
    for t, h, w in [] if prompt.image_grid_thw is None else prompt.image_grid_thw.tolist():
        first = starts[taken]
        columns.append((torch.arange(first - row) + position).expand(3, -1))
        position += first - row
        h, w = h // image.merge_size, w // image.merge_size
        grid = torch.meshgrid(torch.arange(t), torch.arange(h), torch.arange(w), indexing="ij")
        columns.append(torch.stack(grid).reshape(3, -1) + position)
        position, row, taken = position + max(t, h, w), first + t * h * w, taken + t * h * w
    columns.append((torch.arange(len(ids) - row) + position).expand(3, -1))
    return torch.cat(columns, dim=1), position + len(ids) - row


def merge_prompts(prompts: Sequence[Prompt]) -> tuple[list[Prompt], list[int]]:
    """Distinct prompts (token ids and pixels equal), and for every input the index of its prompt among them."""
    index: dict[bytes, int] = {}
    distinct, which = [], []
    for prompt in prompts:
        if prompt.key not in index:
            index[prompt.key] = len(distinct)
            distinct.append(prompt)
        which.append(index[prompt.key])
    return distinct, which
