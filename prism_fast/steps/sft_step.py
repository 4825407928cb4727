"""The supervised step's trees."""

from __future__ import annotations

from torch import Tensor

from prism_fast.config import SFTConfig
from prism_fast.data.chat import Chat
from prism_fast.pack import KIND_RESPONSE, Tree, merge_prompts
from prism_fast.records import DataError, Prompt, Sample


def demonstration(sample: Sample, chat: Chat, config: SFTConfig) -> tuple[Prompt, Tensor]:
    """(prompt, response tokens) of one sample. Raises DataError where it is too long."""
    prompt = chat.encode_prompt(sample, config.data.max_prompt_tokens)
    response = chat.encode_response(sample.response)
    if len(prompt) + len(response) > config.max_tokens:
        raise DataError(
            f"{sample.place}: {len(prompt) + len(response)} tokens are over max_tokens = {config.max_tokens}; "
            "raise it, or shorten the record"
        )
    return prompt, response


def demonstration_trees(demonstrations: list[tuple[Prompt, Tensor]]) -> list[Tree]:
    """Prompt -> demonstrations; samples with the same prompt and image share one root."""
    distinct, which = merge_prompts([prompt for prompt, _ in demonstrations])
    branches: list[list[Tensor]] = [[] for _ in distinct]
    for (_, response), root in zip(demonstrations, which):
        branches[root].append(response)
    return [Tree(p, b, [KIND_RESPONSE] * len(b)) for p, b in zip(distinct, branches)]
