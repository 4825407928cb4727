"""Trees -> PackedTree: the one batch format of every stage.

A tree is a prompt (with its images) and the branches that follow it: responses for a policy, captions and reasonings
for a discriminator. Everything here is on the host, before the pack is moved to its device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from prism_fast.records import DataError, PackedTree, Prompt
from prism_kernels import QueryRows, TreeLayout, pack_trees

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

LOPSIDED = 0.75  # of a pack's tokens: a half with more is not half of it


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


def build_pack(trees: Sequence[Tree], parts: Sequence[tuple[int, Sequence[int]]], image: ImageTokens) -> PackedTree:
    """One pack out of ``parts``: [(index into trees, [branch, ...]), ...]."""
    ids, positions, kinds, lengths, prefix = [], [], [], [], []
    pixels, grids, image_rows = [], [], []
    targets, predicts, starts, readouts, labels = [], [], [0], [], []
    row = 0
    for tree_index, chosen in parts:
        tree = trees[tree_index]
        root, root_segment = tree.prompt, len(lengths)
        root_positions, next_position = mrope_positions(root, image)
        is_image = root.input_ids == image.token_id
        ids.append(root.input_ids)
        positions.append(root_positions)
        kinds.append(torch.where(is_image, KIND_IMAGE, KIND_PROMPT).to(torch.int32))
        if root.image_grid_thw is not None:
            pixels.append(root.pixels())
            grids.append(root.image_grid_thw)
            image_rows.append(is_image.nonzero().flatten() + row)
        lengths.append(len(root))
        prefix.append(-1)
        row += len(root)
        last_of_root = row - 1
        for b in chosen:
            branch = tree.branches[b]
            length = branch.numel()
            ids.append(branch)
            positions.append((torch.arange(length) + next_position).expand(3, -1))
            kinds.append(torch.full((length,), tree.kinds[b], dtype=torch.int32))
            targets.append(torch.arange(row, row + length))
            predicts.append(torch.cat([torch.tensor([last_of_root]), torch.arange(row, row + length - 1)]))
            starts.append(starts[-1] + length)
            readouts.append(row + length - 1)
            labels.append(b if tree.labels is None else tree.labels[b])
            lengths.append(length)
            prefix.append(root_segment)
            row += length
    empty = torch.zeros(0, dtype=torch.int64)
    return PackedTree(
        input_ids=torch.cat(ids),
        position_ids=torch.cat(positions, dim=1),
        layout=TreeLayout.build(lengths, prefix),
        segment_kind=torch.cat(kinds),
        pixel_values=torch.cat(pixels) if pixels else None,
        image_grid_thw=torch.cat(grids) if grids else None,
        image_row=torch.cat(image_rows) if image_rows else empty,
        target_row=torch.cat(targets) if targets else empty,
        predict_row=torch.cat(predicts) if predicts else empty,
        sequence_start=torch.tensor(starts, dtype=torch.int32),
        readout=QueryRows.build(torch.tensor(readouts, dtype=torch.int64)),
        label=torch.tensor(labels, dtype=torch.int64),
    )


class Packs:
    """The packs of a batch: planned at once, from lengths alone, and each built when it is asked for.

    ``parts[i]`` of pack i: [(index into trees, [branch, ...]), ...]; ``capacity``: tokens that a pack may have.
    """

    def __init__(
        self,
        trees: Sequence[Tree],
        parts: Sequence[Sequence[tuple[int, Sequence[int]]]],
        image: ImageTokens,
        capacity: int | None = None,
    ):
        self.trees, self.parts, self.image, self.capacity = trees, parts, image, capacity

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, index: int) -> PackedTree:
        return build_pack(self.trees, self.parts[index], self.image)

    def __iter__(self) -> Iterator[PackedTree]:
        return (self[index] for index in range(len(self)))

    @property
    def num_tokens(self) -> int:
        """Tokens in all packs; a split tree's root counts in each of its parts."""
        roots = sum(len(self.trees[t].prompt) for part in self.parts for t, _ in part)
        return roots + self.num_targets

    @property
    def num_targets(self) -> int:
        """Predicted tokens in all packs: those of branches."""
        return sum(self.trees[t].branches[b].numel() for part in self.parts for t, chosen in part for b in chosen)

    @property
    def has_image(self) -> bool:
        return any(self.trees[t].prompt.image_grid_thw is not None for part in self.parts for t, _ in part)

    def tokens(self, index: int) -> int:
        """Of one pack."""
        return sum(sum(self._lengths(t, chosen)) for t, chosen in self.parts[index])

    def labels(self, index: int, half: int | None = None) -> Tensor:
        """(branches,) int64: ``PackedTree.label`` of a pack, or of one of its halves."""
        if half is not None:
            halves = self.halves(index)
            assert halves is not None
            return halves.labels(half)
        found = [(self.trees[t], b) for t, chosen in self.parts[index] for b in chosen]
        return torch.tensor([b if tree.labels is None else tree.labels[b] for tree, b in found], dtype=torch.int64)

    def halves(self, index: int) -> Packs | None:
        """Two packs that hold together what one does; None where a single branch is all that could be divided.

        Trees are dealt whole where the larger pack then has at most `LOPSIDED` of the tokens. Else they are split
        between branches, which repeats a root (and the branches of ``together``). The same in every process.
        """
        parts, whole = self.parts[index], self.tokens(index)
        sizes = [(root, branches) for root, *branches in (self._lengths(t, chosen) for t, chosen in parts)]
        together = [[i for i, b in enumerate(chosen) if b in self.trees[t].together] for t, chosen in parts]
        for split in (False, True):
            found = pack_trees(sizes, whole, together=together, num_packs_multiple=2, split_for_multiple=split)
            dealt = [[(parts[i][0], [parts[i][1][j] for j in chosen]) for i, chosen in half] for half in found if half]
            halves = Packs(self.trees, dealt, self.image, self.capacity)
            if len(halves) == 2 and (split or max(map(halves.tokens, range(2))) <= LOPSIDED * whole):
                return halves
        return None

    def _lengths(self, tree: int, chosen: Sequence[int]) -> list[int]:
        """Of a root, then of the branches that are chosen of it."""
        return [len(self.trees[tree].prompt), *(self.trees[tree].branches[b].numel() for b in chosen)]


def pack(trees: Sequence[Tree], capacity: int, image: ImageTokens, *, multiple: int = 1) -> Packs:
    """Packs of at most ``capacity`` tokens that hold every branch of every tree (a split tree repeats its root).

    ``multiple``: of how many their number is, as far as there are branches: for processes that take equally many. Trees
    are then split more often, which costs their roots again and leaves no process idle.

    Raises DataError, naming the prompt's file and record, where one root with one branch does not fit.
    """
    for tree in trees:
        check_image_tokens(tree.prompt, image)
    sizes = [(len(tree.prompt), [b.numel() for b in tree.branches]) for tree in trees]
    for i, (root, branches) in enumerate(sizes):
        kept = sum(branches[b] for b in trees[i].together)
        longest = max((length for b, length in enumerate(branches) if b not in trees[i].together), default=0)
        if root + kept + longest > capacity:
            raise DataError(
                f"{trees[i].prompt.place or f'tree {i}'}: prompt of {root} tokens and branches of {kept + longest} do "
                f"not fit in a pack of {capacity}; raise run.tokens_per_pack, lower the limits of lengths, or remove "
                "the record"
            )
    together = [tree.together for tree in trees]
    parts = pack_trees(sizes, capacity, together=together, num_packs_multiple=multiple, split_for_multiple=multiple > 1)
    return Packs(trees, [part for part in parts if part], image, capacity)


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
