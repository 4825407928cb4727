"""Model and data of bench_discriminator: a random Qwen3-VL-MoE and one prompt with N responses and a teacher's."""

from __future__ import annotations

import copy
import hashlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

from prism_fast.config import AlignConfig
from prism_fast.discriminator import Discriminator
from prism_fast.records import Prompt, Rollout, Sample
from prism_fast.stages.align import Lesson

PATCH, MERGE, TEMPORAL = 16, 2, 2


@dataclass(frozen=True)
class Shape:
    """Dimensions of the model and lengths of the data. ``spread``: a part's length varies by this fraction of it."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    experts: int
    top_k: int
    inner: int
    vocab: int
    vision_depth: int
    vision_hidden: int
    vision_inner: int
    vision_heads: int
    deepstack: tuple[int, ...]  # vision layers whose features go into the first text layers
    grid: tuple[int, int]  # patches of the one image
    prompt: int
    caption: int
    reasoning: int
    responses: int
    spread: float

    @property
    def image_tokens(self) -> int:
        return self.grid[0] * self.grid[1] // MERGE**2


TINY = Shape(
    hidden=256, layers=4, heads=4, kv_heads=2, head_dim=64, experts=4, top_k=2, inner=768, vocab=2048,
    vision_depth=4, vision_hidden=128, vision_inner=512, vision_heads=2, deepstack=(0, 1, 2), grid=(24, 24),
    prompt=202, caption=60, reasoning=150, responses=16, spread=0.15,
)  # fmt: skip
# Four experts out of Qwen3-VL-2B, and the lengths that docs/method.md counts with.
GPU = Shape(
    hidden=2048, layers=28, heads=16, kv_heads=8, head_dim=128, experts=4, top_k=2, inner=6144, vocab=151_936,
    vision_depth=24, vision_hidden=1024, vision_inner=4096, vision_heads=16, deepstack=(5, 11, 17), grid=(50, 64),
    prompt=1000, caption=300, reasoning=1000, responses=16, spread=0.0,
)  # fmt: skip
# For tests: seconds on one core.
MINI = replace(
    TINY, hidden=64, layers=2, heads=2, kv_heads=1, head_dim=32, inner=96, vocab=256, vision_depth=2,
    vision_hidden=32, vision_inner=64, vision_heads=1, deepstack=(0,), grid=(8, 8), prompt=26, caption=9, reasoning=17,
    responses=3, spread=0.3,
)  # fmt: skip
SHAPES = {"tiny": TINY, "gpu": GPU, "mini": MINI}


@dataclass
class Case:
    """What every way of the step works on. ``parts``: (caption, reasoning) tokens per response; the model's weights are
    those of ``discriminator`` too, and all gradients go into their ``.grad``.
    """

    shape: Shape
    model: Qwen3VLMoeForConditionalGeneration
    discriminator: Discriminator
    lesson: Lesson
    rollout: Rollout
    parts: list[tuple[Tensor, Tensor]]
    config: AlignConfig

    @property
    def prompt(self) -> Prompt:
        return self.lesson.prompt

    def checkpoint(self, on: bool) -> None:
        """Whether text layers and vision blocks recompute their activations in the backward."""
        if on:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        elif self.discriminator.checkpointing:
            self.model.gradient_checkpointing_disable()
        self.discriminator.checkpointing = on

    def gradients(self) -> dict[str, Tensor]:
        """Those that any way computes; the LM head of a tied model is its embedding."""
        return {name: p.grad for name, p in self.discriminator.named_parameters() if p.grad is not None}


def model_config(shape: Shape) -> Qwen3VLMoeConfig:
    tokens = shape.vocab - 5
    third = shape.head_dim // 2 // 3
    return Qwen3VLMoeConfig(
        text_config={
            "vocab_size": shape.vocab,
            "hidden_size": shape.hidden,
            "intermediate_size": shape.inner,
            "moe_intermediate_size": shape.inner,
            "num_experts": shape.experts,
            "num_experts_per_tok": shape.top_k,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "head_dim": shape.head_dim,
            "max_position_embeddings": 32768,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5e6,
                "mrope_section": [shape.head_dim // 2 - 2 * third, third, third],
                "mrope_interleaved": True,
            },
            "pad_token_id": tokens + 4,
        },
        vision_config={
            "depth": shape.vision_depth,
            "hidden_size": shape.vision_hidden,
            "intermediate_size": shape.vision_inner,
            "num_heads": shape.vision_heads,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": TEMPORAL,
            "out_hidden_size": shape.hidden,
            "num_position_embeddings": 2304,
            "deepstack_visual_indexes": list(shape.deepstack),
        },
        image_token_id=tokens,
        vision_start_token_id=tokens + 1,
        vision_end_token_id=tokens + 2,
        video_token_id=tokens + 3,
        tie_word_embeddings=True,
    )


def build(
    shape: Shape, *, dtype: torch.dtype, device: torch.device, checkpointing: bool = False, seed: int = 0
) -> Case:
    """``checkpointing``: as :meth:`Case.checkpoint`, in every way."""
    torch.manual_seed(seed)
    config = model_config(shape)
    with device:
        model = Qwen3VLMoeForConditionalGeneration._from_config(config, dtype=dtype).train()
        spread_weights(model)
        head = torch.randn(shape.hidden) / shape.hidden**0.5
    discriminator = Discriminator(model, head)
    generator = torch.Generator().manual_seed(seed)
    lesson, rollout, parts = draw(shape, config, generator)
    tokens = shape.prompt + sum(len(ids) for pair in [lesson.teacher, *parts] for ids in pair)
    case = Case(shape, model, discriminator, lesson, rollout, parts, align_config(tokens))
    case.checkpoint(checkpointing)
    return case


def spread_weights(model: torch.nn.Module) -> None:
    """Every matrix normal with a gain near one, so that each part of the network moves scores and gradients."""
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                value.add_(torch.randn_like(value), alpha=0.05)
            elif "embed" not in name:
                fan_in = value[0].numel() if value.dim() in (2, 5) else value.shape[-1]
                value.normal_(std=fan_in**-0.5)


def draw(shape: Shape, config: Qwen3VLMoeConfig, generator: torch.Generator) -> tuple[Lesson, Rollout, list]:
    words = config.image_token_id

    def text(length: int) -> Tensor:
        return torch.randint(0, words, (length,), generator=generator)

    def part(length: int) -> Tensor:
        reach = int(shape.spread * length)
        return text(length + (int(torch.randint(-reach, reach + 1, (), generator=generator)) if reach else 0))

    before = shape.prompt - shape.image_tokens - 2
    image = torch.full((shape.image_tokens,), config.image_token_id)
    ids = torch.cat(
        [
            text(before // 2),
            torch.tensor([config.vision_start_token_id]),
            image,
            torch.tensor([config.vision_end_token_id]),
            text(before - before // 2),
        ]
    )
    pixels = torch.randn(shape.grid[0] * shape.grid[1], 3 * TEMPORAL * PATCH**2, generator=generator)
    key = hashlib.sha256(ids.numpy().tobytes() + pixels.numpy().tobytes()).digest()
    prompt = Prompt(ids, pixels, torch.tensor([[1, *shape.grid]]), key)
    lesson = Lesson(Sample("benchmark:1", ()), prompt, (part(shape.caption), part(shape.reasoning)))
    parts = [(part(shape.caption), part(shape.reasoning)) for _ in range(shape.responses)]
    responses = [torch.cat(pair) for pair in parts]
    rollout = Rollout(
        prompts=[prompt],
        group=torch.zeros(shape.responses, dtype=torch.int64),
        response_ids=responses,
        logprob=[torch.zeros(len(ids)) for ids in responses],
        text=[""] * shape.responses,
        finished=torch.ones(shape.responses, dtype=torch.bool),
    )
    return lesson, rollout, parts


def align_config(tokens_per_pack: int) -> AlignConfig:
    """The stage's settings. The benchmark reads the loss's; paths and optimizers are never used."""
    unused = "unused"
    return AlignConfig.model_validate(
        {
            "policy": {"path": unused},
            "discriminator": {"path": unused},
            "data": {"files": [unused]},
            "rollout": {"prompts_per_step": 1},
            "policy_optimizer": {"lr": 1e-6},
            "discriminator_optimizer": {"lr": 1e-6},
            "run": {"out": unused, "tokens_per_pack": tokens_per_pack},
            "steps": 1,
        }
    )


def moved(case: Case) -> Case:
    """The prompt and parts on the model's device, where a stock forward takes them; packs move there by themselves."""
    prompt, device = case.prompt, case.discriminator.head.device
    there = replace(
        prompt,
        input_ids=prompt.input_ids.to(device),
        pixel_values=prompt.pixel_values.to(device),
        image_grid_thw=prompt.image_grid_thw.to(device),
    )
    teacher = tuple(ids.to(device) for ids in case.lesson.teacher)
    result = copy.copy(case)
    result.lesson = replace(case.lesson, prompt=there, teacher=teacher)
    result.parts = [tuple(ids.to(device) for ids in pair) for pair in case.parts]
    return result
