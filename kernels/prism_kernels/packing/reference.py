"""pack_trees in plain Python: the definition, which the native implementation equals exactly.

Sums of floats are written as loops: their order is part of the definition (and Python 3.12's ``sum`` compensates).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from prism_kernels.packing.arguments import Coefficients, PackOptions, Trees, does_not_fit

MAX_ROUNDS = 16  # of exchanges between costly and cheap packs
RARE = 16  # a round that changes at most one pair for so many packs is the last
ALIKE = 1e-3  # packs whose costs differ by less than this fraction are left alone


@dataclass(frozen=True)
class Part:
    """A root with some of its branches (ascending): what a pack holds."""

    tree: int
    branches: tuple[int, ...]
    tokens: int
    cost: float


def pack_trees(trees: Trees, coefficients: Coefficients, options: PackOptions) -> list[list[tuple[int, list[int]]]]:
    capacity, multiple, split_for_multiple, cost_given = options

    def fill(limit: int) -> list[list[Part]]:
        parts = [_part(trees, coefficients, t, held) for t in range(len(trees)) for held in _split(trees, t, limit)]
        return [[parts[i] for i in members] for members in best_fit_decreasing([p.tokens for p in parts], limit)]

    packs = fill(capacity)
    count = len(packs) + -len(packs) % multiple
    added = count > len(packs)
    if added and split_for_multiple:
        capacity = _least_capacity(trees, capacity, lambda limit: len(fill(limit)) <= count)
        packs = fill(capacity)
    while len(packs) < count:
        if not _split_a_pack(packs):
            packs.append([])
    if cost_given or added:
        _even_out(packs, capacity)
    return _in_order(packs, multiple if cost_given else max(1, len(packs)))


def _least_capacity(trees: Trees, high: int, enough: Callable[[int], bool]) -> int:
    """By bisection (best fit is not quite monotone in its capacity); ``high`` is enough."""
    low = 1
    for tree in range(len(trees)):
        lengths = trees.branch[trees.start[tree] : trees.start[tree + 1]]
        least, longest = trees.root[tree], 0
        for j, length in enumerate(lengths):
            if trees.is_kept(tree, j):
                least += length
            else:
                longest = max(longest, length)
        low = max(low, least + longest)
    while low < high:
        middle = (low + high) // 2
        if enough(middle):
            high = middle
        else:
            low = middle + 1
    return high


def _in_order(packs: list[list[Part]], together: int) -> list[list[tuple[int, list[int]]]]:
    """Runs of ``together`` packs of similar cost; inside a run, and among runs, by first tree; empty packs last."""
    costs = [_cost(pack) for pack in packs]
    order = sorted(range(len(packs)), key=lambda i: (not packs[i], -costs[i]))
    named = [sorted((p.tree, list(p.branches)) for p in packs[i]) for i in order]

    def place(pack):
        return not pack, pack[:1]

    runs = [sorted(named[i : i + together], key=place) for i in range(0, len(named), together)]
    runs.sort(key=lambda run: (not run[-1], run[0][:1]))
    return [pack for run in runs for pack in run]


def best_fit_decreasing(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices into ``sizes`` by bin. Longest first (ties: lower index), each into the bin with the least room that
    holds it (ties: the bin filled last), or a new one."""
    bins: list[list[int]] = []
    rooms: list[int] = []  # distinct amounts of room, ascending
    with_room: dict[int, list[int]] = {}  # room -> bins that have it, last filled last
    for item in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        at = bisect_left(rooms, sizes[item])
        if at == len(rooms):
            room, target = capacity, len(bins)
            bins.append([])
        else:
            room = rooms[at]
            target = with_room[room].pop()
            if not with_room[room]:
                del rooms[at], with_room[room]
        bins[target].append(item)
        left = room - sizes[item]
        if left not in with_room:
            insort(rooms, left)
            with_room[left] = []
        with_room[left].append(target)
    return bins


def _split(trees: Trees, tree: int, capacity: int) -> list[list[int]]:
    """The branches of each part of a tree: one part where it fits."""
    lengths = trees.branch[trees.start[tree] : trees.start[tree + 1]]
    if trees.root[tree] + sum(lengths) <= capacity:
        return [list(range(len(lengths)))]
    kept = [j for j in range(len(lengths)) if trees.is_kept(tree, j)]
    free = [j for j in range(len(lengths)) if not trees.is_kept(tree, j)]
    room = capacity - trees.root[tree] - sum(lengths[j] for j in kept)
    if not free or room < max(lengths[j] for j in free):
        raise does_not_fit(trees, tree, capacity)
    bins = best_fit_decreasing([lengths[j] for j in free], room)
    return [sorted([*kept, *(free[i] for i in members)]) for members in bins]


def _part(trees: Trees, coefficients: Coefficients, tree: int, branches: Sequence[int]) -> Part:
    root, first = trees.root[tree], trees.start[tree]
    token, attention, predicted, vision = coefficients
    tokens = root
    cost = _work(token, attention, root, 0) + vision[tree]
    for branch in branches:
        length = trees.branch[first + branch]
        tokens += length
        cost += _work(token + predicted, attention, length, root)
    return Part(tree, tuple(branches), tokens, cost)


def _work(token: float, attention: float, length: int, prefix: int) -> float:
    """``length`` tokens that follow ``prefix`` others, as PackCost defines it."""
    n, p = float(length), float(prefix)
    return token * n + attention * (n * p + 0.5 * (n * (n + 1.0)))


def _cost(pack: Sequence[Part]) -> float:
    total = 0.0
    for p in pack:
        total += p.cost
    return total


def _halves(costs: Sequence[float], sizes: Sequence[int], capacity: int) -> list[list[int]] | None:
    """Two sets of indices of nearly equal cost: costliest first (ties: lower index), each to the cheaper side (ties:
    the side with fewer, then the first) if it has room, else to the other; None where neither has room."""
    sides: list[list[int]] = [[], []]
    load, used = [0.0, 0.0], [0, 0]
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        side = 1 if (load[1], len(sides[1])) < (load[0], len(sides[0])) else 0
        if used[side] + sizes[i] > capacity:
            side = 1 - side
            if used[side] + sizes[i] > capacity:
                return None
        sides[side].append(i)
        load[side] += costs[i]
        used[side] += sizes[i]
    return sides


def _split_a_pack(packs: list[list[Part]]) -> bool:
    """Splits the costliest pack (ties: lower index) of two parts or more; False where there is none."""
    donors = [i for i, pack in enumerate(packs) if len(pack) > 1]
    if not donors:
        return False
    donor = max(donors, key=lambda i: (_cost(packs[i]), -i))
    pack = packs[donor]
    halves = _halves([p.cost for p in pack], [0] * len(pack), 0)
    assert halves is not None  # parts of no size fit
    packs[donor], added = ([pack[i] for i in side] for side in halves)
    packs.append(added)
    return True


def _even_out(packs: list[list[Part]], capacity: int) -> None:
    """Pairs the costliest pack with the cheapest, the next with the next, and so on; divides the parts of a pair anew
    where that lowers its larger cost; until a round changes hardly anything."""
    for _ in range(MAX_ROUNDS):
        costs = [_cost(pack) for pack in packs]
        order = sorted(range(len(packs)), key=lambda i: -costs[i])
        changes = 0
        for high, low in zip(order[: len(order) // 2], reversed(order)):
            if costs[high] - costs[low] <= ALIKE * costs[high]:
                break
            pair = [*packs[high], *packs[low]]
            halves = _halves([p.cost for p in pair], [p.tokens for p in pair], capacity)
            if halves is None:
                continue
            divided = [[pair[i] for i in side] for side in halves]
            if max(_cost(divided[0]), _cost(divided[1])) < costs[high]:
                packs[high], packs[low] = divided
                changes += 1
        if changes <= len(packs) // RARE:
            return
