"""Which packs of a batch this process computes, in which order.

Every process holds the plan of the whole batch, so that denominators are those of one process by construction. Packs
are dealt by their true cost. Where an engine shards weights or gradients, its processes call their model equally often,
and run every submodule in each call: one that has no pack left takes a spare one, and a pack without images a blank
image, whose gradients are exactly 0 (not 0 times something, which would let a NaN through).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from prism_fast import ranks
from prism_fast.balance import SPARE, Dimensions, Work, deal, pack_cost, rates
from prism_fast.pack import ImageTokens, Packs, Tree, pack, spare_pack, with_blank_image
from prism_fast.records import PackedTree
from prism_fast.steps.backprop import Backprop


@dataclass(frozen=True)
class OwnPack:
    """What a process computes at once: a pack of the batch, half of one that did not fit in memory, or a spare one."""

    number: int  # of the pack in the batch's plan; SPARE
    half: int | None  # which half of that pack; None: all of it
    packed: PackedTree  # on the host

    @property
    def counts(self) -> bool:
        """Whether it is a part of the batch: a spare one is of none."""
        return self.number != SPARE

    @property
    def place(self) -> tuple[int, ...]:
        """(number,), or of a half (number, half): by it, parts of the batch are in its order."""
        return (self.number,) if self.half is None else (self.number, self.half)


class Reader(Protocol):
    """What packing asks of the model that reads the packs, a TreeModel or its `Shape`."""

    @property
    def image(self) -> ImageTokens: ...

    @property
    def dimensions(self) -> Any: ...


def packs_for_all(
    trees: Sequence[Tree], capacity: int, model: Reader, *, share: bool = False, world: int | None = None
) -> Packs:
    """The packs of a batch: of several processes as many as go evenly into them, of even cost. ``model`` reads them;
    ``world``: of how many processes, null: of this run's."""
    world = ranks.world() if world is None else world
    even = rates(model.dimensions) if world > 1 else None
    return pack(trees, capacity, model.image, multiple=world, share=share, rates=even)


def own_numbers(updater: Backprop, packs: Packs) -> list[int]:
    """Of the packs that this process computes, in its order; SPARE stands for a spare one."""
    world = ranks.world()
    if world == 1:
        return list(range(len(packs)))
    own = [turn[ranks.rank()] for turn in deal(_costs(packs, updater.module.dimensions), world)]
    return own if updater.lockstep else [number for number in own if number != SPARE]


def unevenness(packs: Packs, dimensions: Dimensions, world: int) -> float:
    """What the costliest of ``world`` processes has to compute, over the mean of them."""
    costs = _costs(packs, dimensions)
    shares = zip(*([0.0 if number == SPARE else costs[number] for number in turn] for turn in deal(costs, world)))
    return max(map(sum, shares)) * world / sum(costs)


def _costs(packs: Packs, dimensions: Dimensions) -> list[float]:
    return [pack_cost(work, dimensions) for work in Work.of_packs(packs)]


def own_pack(updater: Backprop, packs: Packs, number: int) -> PackedTree:
    """Pack ``number`` of the plan, or a spare one, as this process computes it; on the host."""
    packed = packs[number] if number != SPARE else spare_pack(packs.image)
    blank = updater.lockstep and ranks.world() > 1 and (updater.every_module or packs.has_image)
    return with_blank_image(packed, packs.image) if blank else packed
