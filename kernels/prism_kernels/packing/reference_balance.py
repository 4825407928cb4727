"""balance in plain Python: the definition, which the native implementation equals exactly."""

from __future__ import annotations

from array import array
from bisect import bisect_left, insort
from heapq import heapify, heapreplace

NEAR = 1e-4  # the heaviest rank is near enough to the mean
MAX_EXCHANGES = 64  # per rank


def balance(costs: array, num_ranks: int, equal_count: bool) -> list[list[int]]:
    """Items by rank, ascending. Starts longest first, then exchanges items with the heaviest rank."""
    order = sorted(range(len(costs)), key=lambda i: -costs[i])
    ranks = _deal_in_rounds(costs, order, num_ranks) if equal_count else _to_the_lightest(costs, order, num_ranks)
    if num_ranks > 1:
        _exchange(costs, ranks, equal_count)
    return [sorted(rank) for rank in ranks]


def _to_the_lightest(costs: array, order: list[int], num_ranks: int) -> list[list[int]]:
    ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    lightest = [(0.0, rank) for rank in range(num_ranks)]
    heapify(lightest)
    for item in order:
        load, rank = lightest[0]
        ranks[rank].append(item)
        heapreplace(lightest, (load + costs[item], rank))
    return ranks


def _deal_in_rounds(costs: array, order: list[int], num_ranks: int) -> list[list[int]]:
    """Each round gives every rank one item, the costliest to the lightest rank (ties: lower rank)."""
    ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [0.0] * num_ranks
    for begin in range(0, len(order), num_ranks):
        by_load = sorted(range(num_ranks), key=loads.__getitem__)
        for item, rank in zip(order[begin : begin + num_ranks], by_load):
            ranks[rank].append(item)
            loads[rank] += costs[item]
    return ranks


def _exchange(costs: array, ranks: list[list[int]], equal_count: bool) -> None:
    """Repeats: the heaviest rank (ties: lower) gives an item to the lightest rank with which that lowers the larger of
    their loads, for a cheaper item or, where counts allow, for nothing."""
    rows = [sorted((costs[item], item) for item in rank) for rank in ranks]
    loads = [_sum(row) for row in rows]
    mean = _sum([(load, 0) for load in loads]) / len(loads)
    for _ in range(MAX_EXCHANGES * len(ranks)):
        heavy = max(range(len(loads)), key=lambda r: (loads[r], -r))
        if loads[heavy] - mean <= NEAR * mean:
            break
        best, light = None, heavy
        for light in sorted(range(len(loads)), key=loads.__getitem__):
            if loads[light] >= loads[heavy]:
                break
            may_move = not equal_count or len(rows[heavy]) > len(rows[light])
            best = _best_exchange(rows[heavy], rows[light], loads[heavy], loads[light], may_move)
            if best is not None:
                break
        if best is None:
            break  # nothing helps
        given, taken, difference = best
        rows[heavy].remove(given)
        insort(rows[light], given)
        if taken is not None:
            rows[light].remove(taken)
            insort(rows[heavy], taken)
        loads[heavy] -= difference
        loads[light] += difference
    ranks[:] = [[item for _, item in row] for row in rows]


def _best_exchange(heavy, light, heavy_load: float, light_load: float, may_move: bool):
    """(item given, item taken or None, difference of their costs) with the difference nearest to half of the gap (ties:
    the first found), or None. Both rows are sorted by (cost, item)."""
    half = 0.5 * (heavy_load - light_load)
    best, miss = None, 0.0
    for given in heavy:
        at = bisect_left(light, (given[0] - half, -1))
        candidates = [light[i] for i in (at - 1, at) if 0 <= i < len(light)]
        for taken in [*candidates, *([None] if may_move else [])]:
            difference = given[0] - (taken[0] if taken is not None else 0.0)
            helps = heavy_load - difference < heavy_load and light_load + difference < heavy_load
            if helps and (best is None or abs(difference - half) < miss):
                best, miss = (given, taken, difference), abs(difference - half)
    return best


def _sum(row: list[tuple[float, int]]) -> float:
    total = 0.0
    for cost, _ in row:
        total += cost
    return total
