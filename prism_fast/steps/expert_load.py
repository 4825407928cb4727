"""Which experts took which kind of token: per-kind loads of one step, as metrics, and the loss that evens them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prism_fast import ranks
from prism_fast.metric_names import expert_load
from prism_fast.pack import KIND_NAMES
from prism_kernels import RoutingStats, load_balancing_loss


class ExpertLoad:
    """Adds up the counts of a step's packs; ``fractions()`` reports and clears them.

    They are read with the step's other figures: ``row()`` is what there is to read, ``settle`` takes it.
    """

    def __init__(self):
        self._counts: list[Tensor] = []
        self._read: list | None = None

    def add(self, stats: Sequence[RoutingStats], *, counted: bool = True) -> None:
        """``counted``: false for a pack that is no part of the batch, from which only the shape is taken."""
        counts = [s.counts.detach() * counted for s in stats]
        self._counts = counts if not self._counts else [a + b for a, b in zip(self._counts, counts)]

    def row(self) -> Tensor | None:
        """(layers x kinds x E,) counts so far, on their device; None where a process had no pack."""
        return torch.stack(self._counts).flatten() if self._counts else None

    def settle(self, row: Tensor) -> None:
        """The same, on the host."""
        self._read = row.reshape(len(self._counts), *self._counts[0].shape).tolist()

    def fractions(self) -> dict[str, float]:
        """``expert_load/<layer>/<kind>/<expert>``: the expert's share of the kind's slots, for kinds that are there."""
        parts = [torch.tensor(part, dtype=torch.float64) for part in ranks.gather(self._read) if part is not None]
        if not parts:
            return {}
        counts = torch.stack(parts).sum(0)  # (layers, kinds, E)
        totals = counts.sum(-1, keepdim=True)
        shares = (counts / totals.clamp(min=1)).tolist()
        present = (totals[..., 0] > 0).tolist()
        self._counts, self._read = [], None
        return {
            expert_load(layer, KIND_NAMES[kind], expert): share
            for layer, kinds in enumerate(shares)
            for kind, experts in enumerate(kinds)
            if present[layer][kind]
            for expert, share in enumerate(experts)
        }


def balance_share(
    stats: Sequence[RoutingStats], top_k: int, packs: int, *, counted: bool, whole: Sequence[Tensor] | None
) -> Tensor:
    """One pack's share of the load-balancing loss, which is averaged over packs. Where the pack is not ``counted``: 0,
    of the outputs that have gradients in every other process too. ``whole``: of half a pack, by layer, the counts of
    all of it (`over_packs.counts_of_whole`)."""
    if not counted:
        return torch.stack([each.prob_sum[:0].sum() for each in stats]).sum()
    if whole is not None:
        stats = [RoutingStats(counts, half.prob_sum) for counts, half in zip(whole, stats)]
    return load_balancing_loss(stats, top_k) / packs
