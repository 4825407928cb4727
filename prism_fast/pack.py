"""Trees -> PackedTree: the one batch format of every stage.

A tree is a prompt (with its images) and the branches that follow it: responses for a policy, captions and reasonings
for a discriminator. Everything here is on the host, before the pack is moved to its device.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prism_fast.records import DataError, PackedTree, Prompt
from prism_kernels import PackCost, QueryRows, TreeLayout, pack_trees

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


@dataclass(frozen=True)
class Rates:
    """What a pack costs, by what it is made of, in any unit; `prism_fast.balance.rates` has a model's operations."""

    token: float
    pair: float  # (query, key) pairs that tree attention visits
    predicted: float  # tokens of branches, besides ``token``
    patch: float
    patch_pair: float  # patches of one image see each other

    def images(self, patches: Iterable[int]) -> float:
        return sum(self.patch * n + self.patch_pair * n * n for n in patches)


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


class Outline(NamedTuple):
    """A pack's segments by their lengths, and its images by their sizes: what it costs, before it is built.

    Of a root of 3 tokens with an image, and two questions of 2 and 1 about it, each with an answer of 4:

    >>> Outline(lengths=[3, 2, 4, 1, 4], prefix=[-1, 0, 1, 0, 3], branch=[False, False, True, False, True], images=[8])
    """

    lengths: list[int]  # tokens
    prefix: list[int]  # the segment that each one continues, -1 for a root
    branch: list[bool]  # whether its tokens are predicted, and its last one is read out
    images: list[int]  # patches, of each image once


class _Root(NamedTuple):
    """Parts of a pack that follow one root: the first ``length`` tokens of all their prompts."""

    length: int
    parts: list[tuple[int, Sequence[int]]]  # [(index into trees, [branch, ...]), ...]


def _roots(trees: Sequence[Tree], parts: Parts, image: ImageTokens, share: bool) -> list[_Root]:
    """Of a pack's parts, in order; where ``share``, neighbours with equal images have one root."""
    found = []
    for key, several in groupby(parts, lambda part: _images_of(trees[part[0]].prompt, image) if share else None):
        members = list(several)
        for together in [members] if key else [[part] for part in members]:
            found.append(_Root(_common([trees[t].prompt.input_ids for t, _ in together]), together))
    return found


def _images_of(prompt: Prompt, image: ImageTokens) -> tuple | None:
    """Equal for prompts that have the same images behind the same tokens; None without images."""
    if not prompt.image_keys:
        return None
    end = int((prompt.input_ids == image.token_id).nonzero()[-1]) + 1
    return prompt.image_keys, prompt.input_ids[:end].numpy().tobytes()


def _common(several: Sequence[Tensor]) -> int:
    """How many tokens all of these begin with."""
    first, length = several[0], len(several[0])
    for other in several[1:]:
        length = min(length, len(other))
        differs = (first[:length] != other[:length]).nonzero()
        length = int(differs[0]) if len(differs) else length
    return length


def _each_once(prompts: Sequence[Prompt]) -> tuple[list[tuple[Prompt, int]], list[int]]:
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


def _opened(prompts: Sequence[Prompt]) -> Prompt:
    """Of prompts with equal images one whose pixels are there, if any."""
    return next((prompt for prompt in prompts if prompt.pixel_values is not None), prompts[0])


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
    roots = _roots(trees, parts, image, share)
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


def _outline(trees: Sequence[Tree], parts: Parts, image: ImageTokens, share: bool) -> Outline:
    made = Outline([], [], [], [])

    def add(length: int, parent: int, branch: bool = False) -> int:
        made.lengths.append(length)
        made.prefix.append(parent)
        made.branch.append(branch)
        return len(made.lengths) - 1

    roots = _roots(trees, parts, image, share)
    for length, members in roots:
        root = add(length, -1)
        for t, chosen in members:
            rest = len(trees[t].prompt) - length
            above = add(rest, root) if rest else root
            for b in chosen:
                add(trees[t].branches[b].numel(), above, True)
    images, _ = _each_once([trees[members[0][0]].prompt for _, members in roots])
    made.images.extend(_patches(prompt)[i] for prompt, i in images)
    return made


def _grid(prompt: Prompt) -> Tensor:
    """(images, 3), of a prompt without images too."""
    return torch.zeros(0, 3, dtype=torch.int64) if prompt.image_grid_thw is None else prompt.image_grid_thw


def _patches(prompt: Prompt) -> list[int]:
    """Of each image."""
    return _grid(prompt).prod(-1).tolist()


def _images(prompts: Sequence[Prompt], image: ImageTokens) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """pixel_values, image_grid_thw and image_feature of a pack with these roots."""
    images, which = _each_once(prompts)
    if not images:
        return None, None, None
    grid = torch.stack([_grid(prompt)[i] for prompt, i in images])
    opened: dict[int, tuple[Tensor, ...]] = {}  # pixels by prompt, cut into its images
    for prompt, _ in images:
        if id(prompt) not in opened:
            of_prompt = prompt.pixels()
            assert of_prompt is not None  # it has images
            opened[id(prompt)] = of_prompt.split(_patches(prompt))
    pixels = torch.cat([opened[id(prompt)][i] for prompt, i in images])
    if len(images) == len(which):
        return pixels, grid, None
    sizes = (grid.prod(-1) // image.merge_size**2).tolist()  # tokens
    features = torch.arange(sum(sizes)).split(sizes)
    return pixels, grid, torch.cat([features[number] for number in which])


class Packs:
    """The packs of a batch: planned at once, from lengths alone, and each built when it is asked for.

    ``parts[i]`` of pack i: [(index into trees, [branch, ...]), ...]; ``capacity``: tokens that a pack may have;
    ``share``: see `pack`.
    """

    def __init__(
        self,
        trees: Sequence[Tree],
        parts: Sequence[Parts],
        image: ImageTokens,
        capacity: int | None = None,
        share: bool = False,
    ):
        self.trees, self.parts, self.image, self.capacity, self.share = trees, parts, image, capacity, share
        self._outlines: dict[int, Outline] = {}

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, index: int) -> PackedTree:
        return build_pack(self.trees, self.parts[index], self.image, share=self.share)

    def __iter__(self) -> Iterator[PackedTree]:
        return (self[index] for index in range(len(self)))

    @property
    def num_tokens(self) -> int:
        """Tokens in all packs; a split tree's root counts in each of its parts."""
        return sum(map(self.tokens, range(len(self))))

    @property
    def num_targets(self) -> int:
        """Predicted tokens in all packs: those of branches."""
        return sum(self.trees[t].branches[b].numel() for part in self.parts for t, chosen in part for b in chosen)

    @property
    def has_image(self) -> bool:
        return any(self.trees[t].prompt.image_grid_thw is not None for part in self.parts for t, _ in part)

    def tokens(self, index: int) -> int:
        """Of one pack."""
        return sum(self.outline(index).lengths)

    def outline(self, index: int) -> Outline:
        """Of one pack."""
        if index not in self._outlines:
            self._outlines[index] = _outline(self.trees, self.parts[index], self.image, self.share)
        return self._outlines[index]

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
        whole = self.tokens(index)
        for split in (False, True):
            dealt = _dealt(self, self.parts[index], whole, multiple=2, split=split)
            halves = Packs(self.trees, dealt, self.image, self.capacity, self.share)
            if len(halves) == 2 and (split or max(map(halves.tokens, range(2))) <= LOPSIDED * whole):
                return halves
        return None


def pack(
    trees: Sequence[Tree],
    capacity: int,
    image: ImageTokens,
    *,
    multiple: int = 1,
    share: bool = False,
    rates: Rates | None = None,
) -> Packs:
    """Packs of at most ``capacity`` tokens that hold every branch of every tree (a split tree repeats its root).

    ``multiple``: of how many their number is, as far as there are branches: for processes that take equally many. Trees
    are then split more often, which costs their roots again and leaves no process idle. ``rates``: packs are made to
    cost as much as each other by them, as far as trees go.

    ``share``: trees with equal images behind equal tokens lie in one pack as far as they fit, where the tokens with
    which all their prompts begin are one root; the rest of a prompt is a segment below it, and its branches follow
    that. A tree is then not split, but where it alone is larger than a pack.

    Raises DataError, naming the prompt's file and record, where one root with one branch does not fit.
    """
    for i, tree in enumerate(trees):
        check_image_tokens(tree.prompt, image)
        lengths = [b.numel() for b in tree.branches]
        root, kept = len(tree.prompt), sum(lengths[b] for b in tree.together)
        longest = max((length for b, length in enumerate(lengths) if b not in tree.together), default=0)
        if root + kept + longest > capacity:
            raise DataError(
                f"{tree.prompt.place or f'tree {i}'}: prompt of {root} tokens and branches of {kept + longest} do "
                f"not fit in a pack of {capacity}; raise run.tokens_per_pack, lower the limits of lengths, or remove "
                "the record"
            )
    packs = Packs(trees, [], image, capacity, share)
    whole = [(i, range(len(tree.branches))) for i, tree in enumerate(trees)]
    packs.parts = _dealt(packs, whole, capacity, multiple=multiple, split=multiple > 1, rates=rates)
    return packs


def _dealt(
    packs: Packs, parts: Parts, capacity: int, *, multiple: int, split: bool, rates: Rates | None = None
) -> list[Parts]:
    """``parts`` of the trees of ``packs``, dealt into packs of at most ``capacity`` tokens."""
    bundles = _bundles(packs, parts, capacity)
    sizes, together, images = [], [], []
    for length, members in bundles:
        of = [[packs.trees[t].branches[b].numel() for b in chosen] for t, chosen in members]
        tree, chosen = packs.trees[members[0][0]], members[0][1]
        images.append([_patches(prompt)[i] for prompt, i in _each_once([tree.prompt])[0]])
        if len(members) == 1:
            sizes.append((length, of[0]))
            together.append([j for j, b in enumerate(chosen) if b in tree.together])
        else:  # a member with all its branches is what such a bundle is split into
            rest = [len(packs.trees[t].prompt) - length for t, _ in members]
            sizes.append((length, [n + sum(branches) for n, branches in zip(rest, of)]))
            together.append([])
    cost = None
    if rates is not None:
        seen = [rates.images(patches) for patches in images]
        cost = PackCost(rates.token, rates.pair, seen, rates.predicted)
    options = {"num_packs_multiple": multiple, "split_for_multiple": split}
    dealt = []
    for found in pack_trees(sizes, capacity, cost=cost, together=together, **options):
        held: dict[int, set[int]] = {}  # two parts of one bundle may have come together
        for number, chosen in found:
            held.setdefault(number, set()).update(chosen)
        dealt.append([part for number, chosen in held.items() for part in _members(bundles[number], chosen)])
    return [several for several in dealt if several]


def _members(bundle: _Root, chosen: set[int]) -> list[tuple[int, list[int]]]:
    """Of a bundle of one tree these branches; of several, these."""
    if len(bundle.parts) > 1:
        return [(t, list(branches)) for i, (t, branches) in enumerate(bundle.parts) if i in chosen]
    tree, branches = bundle.parts[0]
    return [(tree, [branches[j] for j in sorted(chosen)])]


def _bundles(packs: Packs, parts: Parts, capacity: int) -> list[_Root]:
    """The parts, those together that may share a root; one that has no room in a pack as a whole stays alone."""
    found: dict[Any, list[tuple[int, Sequence[int]]]] = {}
    for number, (t, chosen) in enumerate(parts):
        tree = packs.trees[t]
        fits = len(tree.prompt) + sum(tree.branches[b].numel() for b in chosen) <= capacity
        key = _images_of(tree.prompt, packs.image) if packs.share and fits else None
        found.setdefault(number if key is None else key, []).append((t, chosen))
    return [
        _Root(_common([packs.trees[t].prompt.input_ids for t, _ in members]), members) for members in found.values()
    ]


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
