"""How others pack and deal, written anew from what they publish: algorithms, not their code."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from heapq import heapify, heappop, heappush

Packs = list[list[int]]  # items of every pack
BLOCK = 1000  # items that are packed together: both are called by `datasets.map`, whose batches are of 1,000


def in_blocks(pack: Callable[[Sequence[int], int], Packs], lengths: Sequence[int], capacity: int) -> Packs:
    """As a data set's map calls it."""
    packs: Packs = []
    for start in range(0, len(lengths), BLOCK):
        packs += [[start + i for i in items] for items in pack(lengths[start : start + BLOCK], capacity)]
    return packs


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> Packs:
    """TRL's strategy "bfd": longest first, each into the pack with the least room that holds it, found by a segment
    tree over rooms."""
    leaves = 1 << (capacity - 1).bit_length()
    tree = [0] * (2 * leaves)  # of a node: the largest room below it that a pack has; a leaf's room is its place + 1

    def set_room(room: int, value: int) -> None:
        node = leaves + room - 1
        tree[node] = value
        while node > 1:
            node >>= 1
            tree[node] = max(tree[2 * node], tree[2 * node + 1])

    def least_room(length: int) -> int:
        node = 1
        while node < leaves:
            node = 2 * node + (tree[2 * node] < length)
        return tree[node]

    set_room(capacity, capacity)  # of a new pack
    packs: Packs = []
    of_room: dict[int, deque[list[int]]] = defaultdict(deque)
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[item]
        room = least_room(max(length, 1))
        if room < capacity:
            pack = of_room[room].popleft()
            if not of_room[room]:
                set_room(room, 0)
        else:
            pack = []
            packs.append(pack)
        pack.append(item)
        left = room - length
        if left:
            of_room[left].append(pack)
            if left < capacity:
                set_room(left, left)
    return packs


def greedy_knapsack(lengths: Sequence[int], capacity: int) -> Packs:
    """LLaMA-Factory's: a pack takes the longest item that fits until none does, then the next pack."""
    items = sorted(range(len(lengths)), key=lambda i: lengths[i])
    sizes = [lengths[i] for i in items]
    packs: Packs = []
    while items:
        pack, room = [], capacity
        while found := bisect_right(sizes, room):
            room -= sizes.pop(found - 1)
            pack.append(items.pop(found - 1))
        packs.append(pack)
    return packs


def wrapped(lengths: Sequence[int], capacity: int) -> list[list[tuple[int, int]]]:
    """TRL's strategy "wrapped": all items in a row, cut every ``capacity`` tokens: [(item, tokens of it), ...]."""
    packs: list[list[tuple[int, int]]] = [[]]
    room = capacity
    for item, length in enumerate(lengths):
        while length:
            if not room:
                packs.append([])
                room = capacity
            taken = min(length, room)
            packs[-1].append((item, taken))
            length, room = length - taken, room - taken
    return packs


def karmarkar_karp(costs: Sequence[float], parts: int, *, equal_count: bool) -> Packs:
    """verl's balancing: the largest differencing method, with as many items in every part where ``equal_count``.

    A state is a way to divide some items; the two of the largest spread become one, the heaviest part of the one with
    the lightest of the other, until one is left.
    """
    order = sorted(range(len(costs)), key=lambda i: costs[i])
    if equal_count:
        starts = [order[i : i + parts] for i in range(0, len(order), parts)]
    else:
        starts = [[i] for i in order]
    states = []
    for number, items in enumerate(starts):
        sets = sorted(((costs[i], [i]) for i in items), key=lambda each: -each[0])
        sets += [(0.0, []) for _ in range(parts - len(sets))]
        states.append((sets[-1][0] - sets[0][0], number, sets))
    heapify(states)
    number = len(states)
    while len(states) > 1:
        _, _, one = heappop(states)
        _, _, other = heappop(states)
        sets = [(a[0] + b[0], a[1] + b[1]) for a, b in zip(one, reversed(other))]
        sets.sort(key=lambda each: -each[0])
        heappush(states, (sets[-1][0] - sets[0][0], number, sets))
        number += 1
    return [items for _, items in states[0][2]]


def micro_batches(lengths: Sequence[int], capacity: int, ranks: int) -> list[Packs]:
    """verl's way with a batch, by rank: its sequences dealt to ranks evenly, then each rank's to as many micro-batches
    as the fullest rank needs by its number of tokens. Nothing holds a micro-batch to ``capacity``."""
    shares = karmarkar_karp(lengths, ranks, equal_count=True)
    count = max(-(-sum(lengths[i] for i in share) // capacity) for share in shares)
    found = []
    for share in shares:
        parts = karmarkar_karp([lengths[i] for i in share], count, equal_count=False)
        found.append([[share[i] for i in part] for part in parts])
    return found
