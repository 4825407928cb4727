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
    """Adds up the counts of a step's packs; ``fractions()`` reports and clears them."""

    def __init__(self):
        self._counts: list[Tensor] = []

    def add(self, stats: Sequence[RoutingStats], *, counted: bool = True) -> None:
        """``counted``: false for a pack that is no part of the batch, from which only the shape is taken."""
        counts = [s.counts.detach() * counted for s in stats]
        self._counts = counts if not self._counts else [a + b for a, b in zip(self._counts, counts)]

    def fractions(self) -> dict[str, float]:
        """``expert_load/<layer>/<kind>/<expert>``: the expert's share of the kind's slots, for kinds that are there."""
        own = torch.stack(self._counts).tolist() if self._counts else None  # none where a process had no pack
        parts = [torch.tensor(part, dtype=torch.float64) for part in ranks.gather(own) if part is not None]
        if not parts:
            return {}
        counts = torch.stack(parts).sum(0)  # (layers, kinds, E)
        totals = counts.sum(-1, keepdim=True)
        shares = (counts / totals.clamp(min=1)).tolist()
        present = (totals[..., 0] > 0).tolist()
        self._counts = []
        return {
            expert_load(layer, KIND_NAMES[kind], expert): share
            for layer, kinds in enumerate(shares)
            for kind, experts in enumerate(kinds)
            if present[layer][kind]
            for expert, share in enumerate(experts)
        }


def balance_share(stats: Sequence[RoutingStats], top_k: int, packs: int, *, counted: bool) -> Tensor:
    """One pack's share of the load-balancing loss, which is averaged over packs. Where the pack is not ``counted``: 0,
    of the outputs that have gradients in every other process too."""
    if not counted:
        return torch.stack([each.prob_sum[:0].sum() for each in stats]).sum()
    return load_balancing_loss(stats, top_k) / packs
