"""Model and data of bench_discriminator: a random Qwen3-VL-MoE and one prompt with N responses and a teacher's."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

from benchmarks.step_case import Parts, Shape, draw, model_settings, moved, rollout_of, spread_weights, stock_twin
from prism_fast.config import DiscriminatorStep
from prism_fast.models.blocks import Recompute
from prism_fast.models.discriminator import Discriminator
from prism_fast.records import Lesson, Prompt, Rollout, Sample

STEP = DiscriminatorStep()  # the stage's defaults


@dataclass
class Case:
    """What every way of the step works on. ``parts``: (caption, reasoning) tokens per response; the stock model's
    weights are those of the discriminator, and all gradients go into their ``.grad``.
    """

    shape: Shape
    discriminator: Discriminator
    model: Qwen3VLMoeForConditionalGeneration
    lesson: Lesson
    rollout: Rollout
    parts: list[Parts]
    tokens_per_pack: int

    @property
    def module(self) -> Discriminator:
        return self.discriminator

    @property
    def prompt(self) -> Prompt:
        return self.lesson.prompt

    def checkpoint(self, on: bool) -> None:
        """Whether text layers and vision blocks recompute their activations in the backward."""
        if on:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        elif self.discriminator.recompute:
            self.model.gradient_checkpointing_disable()
        self.discriminator.recompute = Recompute() if on else None

    def few(self, count: int) -> Case:
        """The same with its first ``count`` responses."""
        parts = self.parts[:count]
        shape = replace(self.shape, responses=count)
        return replace(self, shape=shape, parts=parts, rollout=rollout_of(self.prompt, parts))

    def there(self) -> Case:
        """Prompt and parts on the model's device, where a stock forward takes them; packs move there by themselves."""
        device = self.discriminator.head.device

        def move(pair: Parts) -> tuple[Tensor, ...]:
            return tuple(ids.to(device) for ids in pair)

        lesson = replace(self.lesson, prompt=moved(self.prompt, device), teacher=move(self.lesson.teacher))
        return replace(self, lesson=lesson, parts=[move(pair) for pair in self.parts])


def build(
    shape: Shape, *, dtype: torch.dtype, device: torch.device, checkpointing: bool = False, seed: int = 0
) -> Case:
    """``checkpointing``: as :meth:`Case.checkpoint`, in every way."""
    torch.manual_seed(seed)
    with device:
        model = Qwen3VLMoeForConditionalGeneration._from_config(
            Qwen3VLMoeConfig(**model_settings(shape)), dtype=dtype
        ).train()
        spread_weights(model)
        head = torch.randn(shape.hidden) / shape.hidden**0.5
    prompt, (teacher, *parts) = draw(shape, seed)
    lesson = Lesson(Sample("benchmark:1", ()), prompt, teacher)
    tokens = shape.prompt + sum(len(ids) for pair in [teacher, *parts] for ids in pair)
    stock = stock_twin(model)
    case = Case(shape, Discriminator(model, head), stock, lesson, rollout_of(prompt, parts), parts, tokens)
    case.checkpoint(checkpointing)
    return case
