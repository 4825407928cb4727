"""Which packs of a batch this process computes, in which order.

Every process holds the plan of the whole batch, so that denominators are those of one process by construction. Packs
are dealt by their true cost. Where an engine shards weights or gradients, its processes call their model equally often,
and run every submodule in each call: one that has no pack left takes a spare one, and a pack without images a blank
image, whose gradients are exactly 0 (not 0 times something, which would let a NaN through).
"""

from __future__ import annotations

from collections.abc import Iterator

from prism_fast import ranks
from prism_fast.balance import SPARE, Work, deal, pack_cost
from prism_fast.pack import Packs, spare_pack, with_blank_image
from prism_fast.records import PackedTree
from prism_fast.steps.update import Backprop


def own_packs(updater: Backprop, packs: Packs) -> Iterator[tuple[int, PackedTree]]:
    """(number, pack) of this process's packs; a spare one, which counts nowhere, has the number SPARE."""
    world = ranks.world()
    if world == 1:
        yield from enumerate(packs)
        return
    costs = [pack_cost(work, updater.module.dimensions) for work in Work.of_packs(packs)]
    blank = updater.lockstep and (updater.every_module or packs.has_image)
    for turn in deal(costs, world):
        number = turn[ranks.rank()]
        if number == SPARE and not updater.lockstep:
            continue
        packed = packs[number] if number != SPARE else spare_pack(packs.image)
        yield number, with_blank_image(packed, packs.image) if blank else packed
