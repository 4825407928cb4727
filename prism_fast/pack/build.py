"""One pack out of parts of trees, segment by segment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from prism_fast.pack.roots import each_once, grid_of, patches_of, roots_of
from prism_fast.pack.tree import KIND_IMAGE, KIND_PROMPT, ImageTokens, Parts, Tree, mrope_positions
from prism_fast.records import PackedTree, Prompt
from prism_kernels import QueryRows, TreeLayout


class _Stream:
    """A pack under construction, segment by segment."""

    def __init__(self) -> None:
        self.ids: list[Tensor] = []
        self.positions: list[Tensor] = []
        self.kinds: list[Tensor] = []
        self.lengths: list[int] = []
        self.prefix: list[int] = []
        self.rows = 0

    def add(self, ids: Tensor, positions: Tensor, kind: Tensor, parent: int) -> int:
        """The number of the new segment: ids (L,), positions (3, L), kind (L,) or ()."""
        self.ids.append(ids)
        self.positions.append(positions)
        self.kinds.append(kind.to(torch.int32).expand(len(ids)))
        self.lengths.append(len(ids))
        self.prefix.append(parent)
        self.rows += len(ids)
        return len(self.lengths) - 1


def build_pack(trees: Sequence[Tree], parts: Parts, image: ImageTokens, *, share: bool = False) -> PackedTree:
    """One pack out of ``parts``: [(index into trees, [branch, ...]), ...].

    An image is there once, wherever it occurs. ``share``: see `pack`.
    """
    stream, image_rows = _Stream(), []
    targets, predicts, starts, readouts, labels = [], [], [0], [], []
    roots = roots_of(trees, parts, image, share)
    for length, members in roots:
        for tree, chosen in ((trees[t], chosen) for t, chosen in members):
            ids = tree.prompt.input_ids
            positions, next_position = mrope_positions(tree.prompt, image)
            if tree is trees[members[0][0]]:
                is_image = ids == image.token_id
                image_rows.append(is_image.nonzero().flatten() + stream.rows)
                kinds = torch.where(is_image, KIND_IMAGE, KIND_PROMPT)
                root = stream.add(ids[:length], positions[:, :length], kinds[:length], -1)
                last_of_root = stream.rows - 1
            above, last = root, last_of_root
            if length < len(ids):
                above = stream.add(ids[length:], positions[:, length:], torch.tensor(KIND_PROMPT), root)
                last = stream.rows - 1
            for b in chosen:
                row, n = stream.rows, tree.branches[b].numel()
                position = (torch.arange(n) + next_position).expand(3, -1)
                stream.add(tree.branches[b], position, torch.tensor(tree.kinds[b]), above)
                targets.append(torch.arange(row, row + n))
                predicts.append(torch.cat([torch.tensor([last]), torch.arange(row, row + n - 1)]))
                starts.append(starts[-1] + n)
                readouts.append(row + n - 1)
                labels.append(b if tree.labels is None else tree.labels[b])
    empty = torch.zeros(0, dtype=torch.int64)
    pixels, grid, feature = _images([_opened([trees[t].prompt for t, _ in members]) for _, members in roots], image)
    return PackedTree(
        input_ids=torch.cat(stream.ids),
        position_ids=torch.cat(stream.positions, dim=1),
        layout=TreeLayout.build(stream.lengths, stream.prefix),
        segment_kind=torch.cat(stream.kinds),
        pixel_values=pixels,
        image_grid_thw=grid,
        image_row=torch.cat(image_rows),
        target_row=torch.cat(targets) if targets else empty,
        predict_row=torch.cat(predicts) if predicts else empty,
        sequence_start=torch.tensor(starts, dtype=torch.int32),
        readout=QueryRows.build(torch.tensor(readouts, dtype=torch.int64)),
        label=torch.tensor(labels, dtype=torch.int64),
        image_feature=feature,
    )


def _images(prompts: Sequence[Prompt], image: ImageTokens) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """pixel_values, image_grid_thw and image_feature of a pack with these roots."""
    images, which = each_once(prompts)
    if not images:
        return None, None, None
    grid = torch.stack([grid_of(prompt)[i] for prompt, i in images])
    opened: dict[int, tuple[Tensor, ...]] = {}  # pixels by prompt, cut into its images
    for prompt, _ in images:
        if id(prompt) not in opened:
            of_prompt = prompt.pixels()
            assert of_prompt is not None  # it has images
            opened[id(prompt)] = of_prompt.split(patches_of(prompt))
    pixels = torch.cat([opened[id(prompt)][i] for prompt, i in images])
    if len(images) == len(which):
        return pixels, grid, None
    sizes = (grid.prod(-1) // image.merge_size**2).tolist()  # tokens
    features = torch.arange(sum(sizes)).split(sizes)
    return pixels, grid, torch.cat([features[number] for number in which])


def _opened(prompts: Sequence[Prompt]) -> Prompt:
    """Of prompts with equal images one whose pixels are there, if any."""
    return next((prompt for prompt in prompts if prompt.pixel_values is not None), prompts[0])


def spare_pack(image: ImageTokens) -> PackedTree:
    """A pack without branches: nothing is predicted, and the one row that is read out is nobody's.

    For a process that has no pack where the others have one, and whose model must be called as often as theirs: every
    gradient that it gives is exactly 0.
    """
    prompt = Prompt(torch.tensor([0 if image.token_id else 1]), None, None)
    return replace(build_pack([Tree(prompt, (), ())], [(0, ())], image), readout=QueryRows.build(torch.tensor([0])))


def with_blank_image(packed: PackedTree, image: ImageTokens) -> PackedTree:
    """A pack without images with one of one token, black, whose features no row takes: a gradient of exactly 0.

    For a process whose model must run its vision tower because the others' do.
    """
    if packed.pixel_values is not None:
        return packed
    side = image.merge_size
    return replace(
        packed,
        pixel_values=torch.zeros(side * side, image.patch_dim),
        image_grid_thw=torch.tensor([[1, side, side]]),
    )
