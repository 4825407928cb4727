"""A micro-step's way through a module: its forward, and the gradients that its losses leave."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from prism_fast import metric_names as names
from prism_fast import ranks


class Backprop:
    """A module whose losses' gradients add up, without an optimizer: as much of an updater as a gradient needs.

    ``lockstep``: processes must call the module equally often, and each call must run every submodule.
    ``halved``, ``waited``: see `over_packs`, of this process since `figures` was called last.
    """

    lockstep = False
    every_module = False  # in lockstep: also those that no process needs in this step
    steps = 0  # of the optimizer so far
    halved = 0  # packs
    waited: float | None = None  # seconds; None: it went over no packs

    def __init__(self, module: Any):
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """A micro-step's forward: the loss must be made of its output alone."""
        return self.module(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def figures(self) -> dict[str, float]:
        """Metrics of this process alone (`metric_names.OWN`), since the last call."""
        found: dict[str, float] = {} if self.waited is None else {names.HOST_WAIT: self.waited}
        if self.halved:
            found[names.HALVED_PACKS] = float(self.halved)
        self.halved, self.waited = 0, None
        return found

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """Weights are whole, and a submodule may be called by itself: sampling, evaluation, saving. No gradients.

        Every forward outside a micro-step needs it. All processes enter and leave together; in between each may do
        what it likes.
        """
        yield

    def stream(self) -> Iterator[tuple[str, Tensor]]:
        """(name, whole tensor) of every weight, a tied one once; all processes take all of them, in the same order.

        A tensor is the caller's: it stays as it is when the next is taken.
        """
        for name, parameter in self.module.named_parameters():
            yield name, ranks.whole(parameter.detach())
