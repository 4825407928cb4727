"""adamw_step in CUDA (csrc/adamw.cu): one launch per kind of tensors, on the current stream; no wait."""

from __future__ import annotations

import torch
from torch import Tensor

from prism_kernels.adamw.table import Constants, Factors, Operands, tables
from prism_kernels.dispatch import on_device_of
from prism_kernels.native import library


def adamw_step(operands: Operands, numbers: list[Factors], constants: Constants, clip: Tensor | None) -> None:
    device = operands.parameter[0].device
    if device.type == "meta":  # what is written are the arguments: there are no new shapes to tell
        return
    found = library()
    with on_device_of(operands.parameter[0]):
        stream = torch.cuda.current_stream().cuda_stream
        for table in tables(operands, numbers, found.ADAMW_CHUNK):
            rows = torch.frombuffer(bytearray(table.rows), dtype=torch.uint8).pin_memory()
            rows = rows.to(device, non_blocking=True)
            scale = 0 if clip is None else clip.data_ptr()
            found.adamw_step_cuda(
                rows.data_ptr(), table.num_rows, table.num_chunks, table.kind, constants, scale, stream
            )
