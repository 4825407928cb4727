"""The packs of a batch: which trees, or branches of them, lie in which."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from prism_fast.pack.build import build_pack
from prism_fast.pack.outline import Outline, Rates, outline_of
from prism_fast.pack.roots import Root, common_length, each_once, images_of, patches_of
from prism_fast.pack.tree import ImageTokens, Parts, Tree, check_image_tokens
from prism_fast.records import DataError, PackedTree
from prism_kernels import PackCost, pack_trees

LOPSIDED = 0.75  # of a pack's tokens: a half with more is not half of it


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
            self._outlines[index] = outline_of(self.trees, self.parts[index], self.image, self.share)
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
        images.append([patches_of(prompt)[i] for prompt, i in each_once([tree.prompt])[0]])
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


def _members(bundle: Root, chosen: set[int]) -> list[tuple[int, list[int]]]:
    """Of a bundle of one tree these branches; of several, these."""
    if len(bundle.parts) > 1:
        return [(t, list(branches)) for i, (t, branches) in enumerate(bundle.parts) if i in chosen]
    tree, branches = bundle.parts[0]
    return [(tree, [branches[j] for j in sorted(chosen)])]


def _bundles(packs: Packs, parts: Parts, capacity: int) -> list[Root]:
    """The parts, those together that may share a root; one that has no room in a pack as a whole stays alone."""
    found: dict[Any, list[tuple[int, Sequence[int]]]] = {}
    for number, (t, chosen) in enumerate(parts):
        tree = packs.trees[t]
        fits = len(tree.prompt) + sum(tree.branches[b].numel() for b in chosen) <= capacity
        key = images_of(tree.prompt, packs.image) if packs.share and fits else None
        found.setdefault(number if key is None else key, []).append((t, chosen))
    return [
        Root(common_length([packs.trees[t].prompt.input_ids for t, _ in members]), members)
        for members in found.values()
    ]
