"""sample_tokens in C++ (csrc/sample.cpp): noise for those blocks of words alone that can win; in one thread."""

from __future__ import annotations

import torch
from torch import Tensor

from prism_kernels.native import library
from prism_kernels.sample_tokens.records import Draw


def sample_tokens(draw: Draw) -> tuple[Tensor, Tensor]:
    logits = draw.logits.to(draw.wide)
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    response, step = draw.response.contiguous(), draw.step.contiguous()
    token, logprob = torch.empty_like(response), logits.new_empty(len(logits), dtype=torch.float32)
    library().sample_tokens(
        logits.dtype == torch.float64,
        logits.data_ptr(),
        (len(logits), logits.stride(0), draw.words),
        draw.inverse,
        draw.temperature == 0,
        tuple(x.data_ptr() for x in (draw.seed, response, step, token, logprob)),
        draw.forbidden,
        draw.first_allowed,
    )
    return token, logprob
