"""Model and data of the discriminator's step: a random Qwen3-VL-MoE, one prompt with N responses and a teacher's."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.steps.case import Case, Parts, Shape, draw, moved, rollout_of, stock_model, stock_twin
from prism_fast.config import DiscriminatorStep
from prism_fast.models.blocks import Recompute
from prism_fast.models.discriminator import Discriminator
from prism_fast.records import Lesson, Prompt, Sample

STEP = DiscriminatorStep()  # the stage's defaults


@dataclass
class DiscriminatorCase(Case):
    """``parts``: (caption, reasoning) tokens per response."""

    lesson: Lesson
    parts: list[Parts]
    tokens_per_pack: int

    @property
    def prompt(self) -> Prompt:
        return self.lesson.prompt

    def checkpoint(self, on: bool) -> None:
        """Whether text layers and vision blocks recompute their activations in the backward."""
        if on:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        elif self.module.recompute:
            self.model.gradient_checkpointing_disable()
        self.module.recompute = Recompute() if on else None

    def few(self, count: int) -> DiscriminatorCase:
        """The same with its first ``count`` responses."""
        parts = self.parts[:count]
        shape = replace(self.shape, responses=count)
        return replace(self, shape=shape, parts=parts, rollout=rollout_of(self.prompt, parts))

    def there(self) -> DiscriminatorCase:
        """Prompt and parts on the model's device, where a stock forward takes them; packs move there by themselves."""

        def move(pair: Parts) -> tuple[Tensor, ...]:
            return tuple(ids.to(self.device) for ids in pair)

        lesson = replace(self.lesson, prompt=moved(self.prompt, self.device), teacher=move(self.lesson.teacher))
        return replace(self, lesson=lesson, parts=[move(pair) for pair in self.parts])


def build(
    shape: Shape, *, dtype: torch.dtype, device: torch.device, checkpointing: bool = False, seed: int = 0
) -> DiscriminatorCase:
    """``checkpointing``: as :meth:`DiscriminatorCase.checkpoint`, in every way."""
    model = stock_model(shape, dtype, device, seed)
    with device:
        head = torch.randn(shape.hidden) / shape.hidden**0.5
    prompt, (teacher, *parts) = draw(shape, seed)
    lesson = Lesson(Sample("benchmark:1", ()), prompt, teacher)
    tokens = shape.prompt + sum(len(ids) for pair in [teacher, *parts] for ids in pair)
    rollout = rollout_of(prompt, parts)
    stock = stock_twin(model)
    case = DiscriminatorCase(shape, Discriminator(model, head), stock, rollout, lesson, parts, tokens)
    case.checkpoint(checkpointing)
    return case
