"""Calls of a GPU recorded once and launched together: a token's hundreds of launches become one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

WHY_NOT = "not captured: there is no CUDA device, and the same calls run one by one"
SIZES = (1.0, 0.75, 0.5, 0.25, 0.125, 0.0625)  # of the rows: at how many sizes decoding is captured


def capture_of_decoding() -> str:
    """What a sampler does with a token's calls on this machine."""
    if not torch.cuda.is_available():
        return WHY_NOT
    return f"captured in CUDA graphs, of {len(SIZES)} numbers of rows"


def captured_sizes(rows: int) -> list[int]:
    """Numbers of rows, ascending, of which the smallest that holds the rows in use is run."""
    return sorted({max(1, -(-int(rows * share * 16) // 16)) for share in SIZES})


class Captured:
    """``repeat(n)`` runs a function n times that reads and writes the same tensors each time, and waits for nothing.

    On a GPU the second run is recorded, and launched from then on. ``pool``: memory that graphs share, where they never
    run at once.
    """

    def __init__(self, function: Callable[[], None], device: torch.device, pool: Any = None):
        self.function, self.on_gpu, self.pool = function, device.type == "cuda", pool
        self.graph: torch.cuda.CUDAGraph | None = None

    def repeat(self, times: int) -> None:
        if not self.on_gpu:
            for _ in range(times):
                self.function()
            return
        if self.graph is None:
            # The first run, which may compile kernels and choose library algorithms, is not recorded.
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                self.function()
            torch.cuda.current_stream().wait_stream(aside)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, pool=self.pool):
                self.function()
            times -= 1
        for _ in range(times):
            self.graph.replay()
