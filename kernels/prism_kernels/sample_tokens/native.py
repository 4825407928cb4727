"""sample_tokens in C++ (csrc/sampling.cpp): one pass over the logits, noise where a block of words can hold the top."""

from __future__ import annotations

import torch
from torch import Tensor

from prism_kernels.native import library, threads_for
from prism_kernels.sample_tokens.records import Draw


def sample_tokens(draw: Draw) -> tuple[Tensor, Tensor]:
    logits = draw.logits if draw.logits.dtype == draw.wide else draw.logits.to(draw.wide)
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    rows = logits.shape[0]
    response, step = draw.response.contiguous(), draw.step.contiguous()
    forbidden = torch.tensor(draw.forbidden, dtype=torch.int64)
    token, logprob = torch.empty(rows, dtype=torch.int64), torch.empty(rows, dtype=torch.float32)
    library().sample_tokens(
        draw.wide == torch.float64, logits.data_ptr(), rows, logits.stride(0), draw.words, draw.inverse,
        draw.temperature > 0, int(draw.seed) & ((1 << 64) - 1), response.data_ptr(), step.data_ptr(),
        forbidden.data_ptr(), len(forbidden), draw.first_allowed, token.data_ptr(), logprob.data_ptr(),
        threads_for(rows * draw.words),
    )  # fmt: skip
    return token, logprob
