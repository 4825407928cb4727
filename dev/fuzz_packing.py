"""Random trees into packs, and costs onto ranks: no pack over its capacity, each item once, C++ as the reference.

    python -m dev.fuzz_packing [--count 10000] [--seed 0] [--only trees] [--case 17] [--jobs 2]

Instances of up to 300 trees, lengths from tokens to whole packs, with and without branches kept together, costs, ranks
and splitting for them; every fourth is small and is also packed by the definition in Python, which must agree.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

from dev.fuzzing import Judge, main
from prism_kernels import PackCost, balance, pack_trees

COUNT = 10_000


def problem(rng: random.Random, most: int) -> dict[str, Any]:
    """Arguments of pack_trees, in which every tree can be packed."""
    capacity = rng.choice((rng.randrange(1, 64), 2048, 16384, rng.randrange(1, 1 << 20)))
    trees, together = [], []
    for _ in range(rng.randrange(most)):
        root = min(capacity, int(rng.lognormvariate(4, 1.5)) if rng.random() < 0.8 else rng.randrange(capacity + 1))
        lengths = [int(rng.lognormvariate(5, 1)) % (capacity + 1) for _ in range(rng.choice((0, 1, 1, 2, 8)))]
        kept, room = [j for j in range(len(lengths)) if rng.random() < 0.2], capacity - root
        for j in kept:
            lengths[j] = min(lengths[j], room // 2)
            room -= lengths[j]
        trees.append((root, [n if j in kept else min(n, room) for j, n in enumerate(lengths)]))
        together.append(kept)
    vision = [rng.random() * 1e4 for _ in trees] if rng.random() < 0.5 else None
    return {
        "trees": trees,
        "capacity": capacity,
        "together": together if rng.random() < 0.5 else None,
        "cost": PackCost(rng.random(), rng.random() * 1e-3, vision, predicted=rng.choice((0.0, rng.random())))
        if rng.random() < 0.5
        else None,
        "num_packs_multiple": rng.choice((1, 1, 2, 8, 64)),
        "split_for_multiple": rng.random() < 0.3,
    }


def faults(asked: dict[str, Any], packs: list[list[tuple[int, list[int]]]]) -> list[str]:
    """What is wrong with the packs of a problem."""
    trees, together, found = asked["trees"], asked["together"] or [[] for _ in asked["trees"]], []
    parts: list[list[list[int]]] = [[] for _ in trees]
    if len(packs) % asked["num_packs_multiple"]:
        found.append(f"{len(packs)} packs for {asked['num_packs_multiple']} ranks")
    for number, pack in enumerate(packs):
        tokens = sum(trees[tree][0] + sum(trees[tree][1][j] for j in held) for tree, held in pack)
        if tokens > asked["capacity"]:
            found.append(f"pack {number} has {tokens} tokens")
        for tree, held in pack:
            parts[tree].append(held)
    for tree, held in enumerate(parts):
        loose = sorted(j for part in held for j in part if j not in together[tree])
        if loose != [j for j in range(len(trees[tree][1])) if j not in together[tree]]:
            found.append(f"tree {tree}: branches {loose}")
        if not held or any(not set(together[tree]) <= set(part) for part in held):
            found.append(f"tree {tree}: parts {held}")
    return found


def trees() -> Judge:
    def judge(rng: random.Random, _: Path) -> str:
        is_small = rng.random() < 0.25
        asked = problem(rng, 12 if is_small else 300)
        packs = pack_trees(**asked, impl="native")
        if found := faults(asked, packs):
            raise AssertionError(f"{found[:3]} of {asked}")
        if is_small and pack_trees(**asked, impl="reference") != packs:
            raise AssertionError(f"native and reference differ: {asked}")
        return "held and equal to the reference" if is_small else "held"

    return judge


def ranks() -> Judge:
    def judge(rng: random.Random, _: Path) -> str:
        costs = [rng.lognormvariate(5, rng.choice((0.1, 1, 3))) for _ in range(rng.randrange(200))]
        number, equal = rng.choice((1, 2, 7, 64)), rng.random() < 0.5
        dealt = balance(costs, number, equal_count=equal, impl="native")
        if sorted(item for rank in dealt for item in rank) != list(range(len(costs))):
            raise AssertionError(f"not every item once: {dealt}")
        if equal and max(map(len, dealt)) - min(map(len, dealt)) > 1:
            raise AssertionError(f"counts {list(map(len, dealt))}")
        if len(costs) < 40 and balance(costs, number, equal_count=equal, impl="reference") != dealt:
            raise AssertionError(f"native and reference differ: {costs}, {number}, {equal}")
        return "held"

    return judge


if __name__ == "__main__":
    sys.exit(main(__doc__, COUNT, {"trees": trees, "ranks": ranks}))
