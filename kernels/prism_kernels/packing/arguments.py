"""What the public functions accept, turned into what the implementations receive, with every check on the way."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from operator import index
from typing import Any, NamedTuple

from prism_kernels.checks import items, number, plain, shown, wrong

MAX_LENGTH = 1 << 40  # tokens; a sum of many stays far from the end of int64 and is exact in a double


@dataclass(frozen=True)
class PackCost:
    """What a pack costs, in any unit (FLOPs, seconds): a sum over its parts, a part being a root with branches.

    cost(part of tree i) = token * (r + sum_b b) + attention * (r (r + 1) / 2 + sum_b (b r + b (b + 1) / 2)) + vision[i]
                           + predicted * sum_b b

    with root length r and branch lengths b. ``token``: linear work per token. ``attention``: work per visited (query,
    key) pair of tree attention. ``vision``: one figure per tree for encoding the images of its root, paid again by
    every part of a tree that is split; None = no images. ``predicted``: work per token of a branch besides ``token``,
    such as the LM head's: the tokens of branches are predicted, those of roots are not. A transformer of N active
    non-embedding parameters, L layers and Hq query heads of dimension D costs about token = 2 N and
    attention = 4 L Hq D FLOPs forward.

    >>> cost = PackCost(token=2 * 4.0e9, attention=4 * 36 * 32 * 128, vision=[2.1e12, 0.0])
    """

    token: float = 1.0
    attention: float = 0.0
    vision: Sequence[float] | None = None
    predicted: float = 0.0

    def __post_init__(self) -> None:
        number("cost.token", self.token, at_least=0)
        number("cost.attention", self.attention, at_least=0)
        number("cost.predicted", self.predicted, at_least=0)


@dataclass(frozen=True)
class Trees:
    """Validated trees, flat: tree i has root ``root[i]`` and branches ``branch[start[i]:start[i + 1]]``.

    ``kept`` (one byte per branch, or None): 1 where every part of the tree must hold the branch.
    """

    root: array  # int64 (trees,)
    branch: array  # int64 (branches,)
    start: array  # int64 (trees + 1,)
    kept: bytearray | None

    def __len__(self) -> int:
        return len(self.root)

    def is_kept(self, tree: int, branch: int) -> bool:
        return self.kept is not None and bool(self.kept[self.start[tree] + branch])


class Coefficients(NamedTuple):
    """A :class:`PackCost`, checked; csrc/packing.h has the same record."""

    token: float
    attention: float
    predicted: float
    vision: array  # double (trees,)


class PackOptions(NamedTuple):
    """The numbers and switches of :func:`prism_kernels.pack_trees`, checked; csrc/packing.h has the same record."""

    capacity: int
    multiple: int  # the number of packs is a multiple of it
    split_for_multiple: bool  # where that adds packs, trees that fit are split too, to fill them evenly
    cost_given: bool  # packs are evened out by cost


def read_trees(trees: Any, together: Any) -> Trees:
    trees = items("trees", trees, "a sequence of (root_length, [branch_length, ...])")
    try:
        root = array("q", [length for length, _ in trees])
        branches = [lengths for _, lengths in trees]
        start = array("q", accumulate(map(len, branches), initial=0))
        branch = array("q", chain.from_iterable(branches))
    except (TypeError, ValueError, OverflowError) as error:
        raise _first_bad_tree(trees, str(error)) from None
    if min(root, default=0) < 0 or min(branch, default=0) < 0:
        raise _first_bad_tree(trees, "a negative length")
    return Trees(root, branch, start, None if together is None else _read_together(together, start))


def _first_bad_tree(trees: list[Any], otherwise: str) -> ValueError:
    """The error for the first tree that is not (length, [length, ...]); slow, so only on the way out."""
    expected = "(root_length, [branch_length, ...]) with integer lengths >= 0"
    for i, entry in enumerate(trees):
        try:
            root, branches = entry
            lengths = [index(root), *map(index, plain(branches))]
        except (TypeError, ValueError):
            return wrong(f"trees[{i}]", expected, shown(entry))
        if any(not 0 <= length < 1 << 63 for length in lengths):
            return wrong(f"trees[{i}]", expected, shown(entry))
    return wrong("trees", expected, otherwise)


def _read_together(together: Any, start: array) -> bytearray:
    rows = items("together", together, "one list of branch indices per tree")
    if len(rows) != len(start) - 1:
        raise wrong("together", f"one list of branch indices per tree ({len(start) - 1})", f"{len(rows)} entries")
    kept = bytearray(start[-1])
    for tree, branches in enumerate(rows):
        first, count = start[tree], start[tree + 1] - start[tree]
        for branch in () if branches is None else items(f"together[{tree}]", branches, "a list of branch indices"):
            try:
                inside = 0 <= index(branch) < count
            except TypeError:
                inside = False
            if not inside:
                raise wrong(f"together[{tree}]", f"branches of the tree, 0 to {count - 1}", repr(branch))
            kept[first + index(branch)] = 1
    return kept


def does_not_fit(trees: Trees, tree: int, capacity: int) -> ValueError:
    """The error for a tree of which not even one branch fits beside its root and the branches kept with it."""
    lengths = trees.branch[trees.start[tree] : trees.start[tree + 1]]
    kept = [length for j, length in enumerate(lengths) if trees.is_kept(tree, j)]
    free = [(length, j) for j, length in enumerate(lengths) if not trees.is_kept(tree, j)]
    longest, at = max(free, key=lambda item: item[0], default=(0, -1))
    need = [f"root {trees.root[tree]}"]
    if kept:
        need.append(f"branches kept together {sum(kept)}")
    if free:
        need.append(f"branch {at} of {longest}")
    total = trees.root[tree] + sum(kept) + longest
    return ValueError(
        f"trees: tree {tree} does not fit: {' + '.join(need)} = {total} tokens, capacity {capacity}; "
        "raise capacity or shorten the sequences"
    )


def read_cost(cost: Any, num_trees: int) -> Coefficients:
    """Tokens are counted where ``cost`` is None."""
    cost = PackCost() if cost is None else cost
    if not isinstance(cost, PackCost):
        raise wrong("cost", "None or prism_kernels.PackCost", type(cost).__name__)
    vision = array("d", bytes(8 * num_trees)) if cost.vision is None else read_numbers("cost.vision", cost.vision)
    if len(vision) != num_trees:
        raise wrong("cost.vision", f"one value per tree ({num_trees})", f"{len(vision)} values")
    return Coefficients(float(cost.token), float(cost.attention), float(cost.predicted), vision)


def read_numbers(name: str, values: Any) -> array:
    """``values`` as doubles, or ValueError naming the argument and the first that is negative or not finite."""
    try:
        numbers = array("d", items(name, values, "a one-dimensional sequence of numbers"))
    except (TypeError, ValueError):
        raise wrong(name, "a one-dimensional sequence of numbers", shown(values)) from None
    # `not >=` is also true for NaN, which min() may step over: the sum finds NaN and infinity
    if not (min(numbers, default=0.0) >= 0 and math.isfinite(sum(numbers))):
        for i, value in enumerate(numbers):
            number(f"{name}[{i}]", value, at_least=0)
        raise wrong(name, "numbers of a finite sum", f"a sum of {sum(numbers)}")
    return numbers


def read_groups(groups: Any, count: int) -> list[list[int]]:
    """The groups as lists of item indices, by first item; an item outside all groups is a group of its own."""
    rows = items("groups", groups, "one label per item, or lists of item indices")
    if rows and all(hasattr(row, "__len__") and not isinstance(row, (str, bytes)) for row in rows):
        return _groups_of_lists(rows, count)
    if len(rows) != count:
        raise wrong("groups", f"one label per item ({count}), or lists of item indices", f"{len(rows)} labels")
    found: dict[Any, list[int]] = {}
    for i, label in enumerate(rows):
        found.setdefault(label, []).append(i)
    return list(found.values())


def _groups_of_lists(rows: list[Any], count: int) -> list[list[int]]:
    owner: dict[int, int] = {}
    for group, row in enumerate(rows):
        for item in items(f"groups[{group}]", row, "a list of item indices"):
            if not isinstance(item, int) or not 0 <= item < count:
                raise wrong(f"groups[{group}]", f"item indices in [0, {count})", repr(item))
            if item in owner:
                raise wrong(f"groups[{group}]", "items of no other group", f"item {item} of group {owner[item]}")
            owner[item] = group
    found: dict[Any, list[int]] = {}
    for i in range(count):
        found.setdefault(owner.get(i, (i,)), []).append(i)
    return list(found.values())
