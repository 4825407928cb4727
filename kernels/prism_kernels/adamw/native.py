"""adamw_step in C++ on the host (csrc/adamw.cpp)."""

from __future__ import annotations

import math

from torch import Tensor

from prism_kernels.adamw.table import Constants, Factors, Operands, tables
from prism_kernels.native import library, threads_for


def adamw_step(operands: Operands, numbers: list[Factors], constants: Constants, clip: Tensor | None) -> None:
    scale = 1.0 if clip is None else float(clip)
    if not math.isfinite(scale):
        return
    found, threads = library(), threads_for(sum(parameter.numel() for parameter in operands.parameter))
    for table in tables(operands, numbers, found.ADAMW_CHUNK):
        found.adamw_step(table.rows, table.kind, constants, scale, threads)
