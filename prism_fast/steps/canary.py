"""Whether an engine becomes the policy that it is given, shown on one that no rounding hides.

In bf16 an engine's log-probs differ from the trainer's by 1e-3 nats a token, and so does the policy before a step from
the one after it: whether an update arrived cannot be seen. So before the first response that counts, the engine is
given a policy that is far from the trainer's in two ways at once, and its log-probs must be those of that policy, not
of one that is changed in one way alone. The head is stretched, and every forbidden word gets the row of the end of
turn, so that an engine which does not forbid it says it. The image features change their sign, so that an engine which
keeps features or keys of before has others.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from prism_fast.models.policy import Policy

STRETCH = 1.5
TOKENS = 64  # of a response, at most
NEARER = 4.0  # times as near to its own policy as to any other; seen on two tiny models: 45 and more
ROUNDING = 5e-3  # nats a token in the mean: as near as this is near enough


class Canary:
    """The change of a policy's weights. Made before they are gathered: it finds them by what they are."""

    def __init__(self, policy: Policy, end_of_turn: int):
        self.policy, self.end = policy, end_of_turn
        names = {id(parameter): name for name, parameter in policy.named_parameters()}
        merger: Any = policy.visual.merger
        self.head = names[id(policy.head)]
        self.features = tuple(names[id(parameter)] for parameter in merger.linear_fc2.parameters())

    def changed(self, name: str, value: Tensor) -> Tensor:
        """Of a whole weight by the policy's name."""
        if name == self.head:
            never = torch.arange(len(value), device=value.device) >= self.policy.words
            never[list(self.policy.forbidden)] = True
            return torch.where(never[:, None], value[self.end], value) * STRETCH
        return -value if name in self.features else value

    def fault(self, gap: Callable[[], float], *, image: bool) -> str | None:
        """What the engine did not follow. ``gap``: of its log-probs to those of the policy as it is, which is gathered.

        ``image``: whether the prompt had one.
        """
        ways = {"head": (self.head,)} | ({"image features": self.features} if image else {})
        everything = tuple(name for names in ways.values() for name in names)
        with self._changed(everything):
            right = gap()
        without = {}
        for what, names in ways.items():
            with self._changed(tuple(name for name in everything if name not in names)):
                without[what] = gap()
        what, least = min(without.items(), key=lambda item: item[1])
        if right <= max(ROUNDING, least / NEARER):
            return None
        return (
            f"given another head and other image features, its log-probs differ from that policy's by {right:.2g} nats "
            f"a token, and by {least:.2g} were its {what} those of before; expected less than a {NEARER:g}th of that"
        )

    @contextlib.contextmanager
    def _changed(self, names: tuple[str, ...]) -> Iterator[None]:
        kept = {name: self.policy.get_parameter(name).detach().clone() for name in names}
        try:
            with torch.no_grad():
                for name, value in kept.items():
                    self.policy.get_parameter(name).copy_(self.changed(name, value))
            yield
        finally:
            with torch.no_grad():
                for name, value in kept.items():
                    self.policy.get_parameter(name).copy_(value)
