"""How many responses are sampled at once, and the pages for their keys and values, by the memory that is free."""

from __future__ import annotations

from prism_fast.config import Sampling
from prism_fast.models.token_step import TokenStep
from prism_fast.steps.free_memory import free_bytes
from prism_fast.steps.sampler_rows import Size
from prism_kernels.tree_attention.decode_layout import PAGE

MOST_ROWS = {"cpu": 256, "cuda": 512}  # of auto: more rows win little, as products are large enough by then
PART = {"cpu": 0.5, "cuda": 0.85}  # of the free memory; the rest is for prefill and logits
PROMPT_PAGES = 32  # that a prompt is expected to take at most: 2,048 tokens
LONG_PROMPT = 256  # pages that are there in any case, if memory has room


def size_of(step: TokenStep, sampling: Sampling, responses: int) -> Size:
    """For so many responses in all. With rows_at_once = auto, as many rows as have room for half of their limit each,
    since few responses reach it; where all pages are taken, the youngest responses wait (see `sampler_builtin`)."""
    kind = step.device.type
    of_row = -(-sampling.max_response_tokens // PAGE)
    room = max(2, int(PART[kind] * free_bytes(step.device)) // page_bytes(step))
    rows = sampling.rows_at_once
    if rows == "auto":
        rows = min(MOST_ROWS[kind], max(1, room // (max(1, of_row // 2) + -(-PROMPT_PAGES // sampling.samples))))
    rows = min(rows, responses)
    prompts = min(-(-responses // sampling.samples), rows) + max(1, rows // (8 * sampling.samples)) + 1
    wanted = rows * of_row + prompts * PROMPT_PAGES + LONG_PROMPT
    return Size(rows, prompts, min(room, wanted))


def page_bytes(step: TokenStep) -> int:
    """Of one page in all layers, keys and values."""
    return 2 * len(step.layers) * step.kv_heads * PAGE * step.dim * step.embedding.element_size()
