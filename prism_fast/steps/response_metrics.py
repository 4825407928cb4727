"""What is measured of sampled responses."""

from __future__ import annotations

import torch
from torch import Tensor

from prism_fast.data.chat import Chat
from prism_fast.records import Rollout
from prism_fast.reward import verifiable_reward
from prism_fast.steps.discriminator_step import Lesson
from prism_kernels import find_tag_spans


def part_lengths(rollout: Rollout, chat: Chat) -> dict[str, float]:
    """Mean sampled tokens of the caption and of the reasoning of valid responses; absent where none is valid."""
    found = [find_tag_spans(ids.tolist(), chat.token_bytes) for ids in rollout.response_ids]
    spans = [s for s in found if s is not None]
    if not spans:
        return {}
    caption = sum(end - start for (start, end), _, _ in spans)
    reasoning = sum(answer[1] - think[0] for _, think, answer in spans)
    return {"tokens_of/perception": caption / len(spans), "tokens_of/reasoning": reasoning / len(spans)}


def answer_accuracy(lessons: list[Lesson], rollout: Rollout) -> Tensor | None:
    """(B,) fp32 in {0, 1}; None where the records have no gold answer."""
    if any(item.sample.gold is None for item in lessons):
        return None
    rewards = [
        verifiable_reward(text, lessons[g].sample.gold, equivalents=lessons[g].sample.equivalents)
        for text, g in zip(rollout.text, rollout.group.tolist())
    ]
    return torch.tensor([r.accuracy for r in rewards])
