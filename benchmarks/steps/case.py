"""Dimensions, random models and random data of the whole-step benchmarks: Qwen3-VL, dense or with experts.

One prompt with one image, N responses, and a teacher's for a discriminator. Two parts a response: caption, reasoning.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from benchmarks.harness.lengths import SIGMA, factors, scaled
from prism_fast.models.discriminator import Discriminator
from prism_fast.models.policy import Policy
from prism_fast.records import Prompt, Rollout

PATCH, MERGE, TEMPORAL = 16, 2, 2
Parts = tuple[Tensor, Tensor]  # tokens of a caption, of a reasoning


@dataclass(frozen=True)
class Shape:
    """Dimensions of the model and lengths of the data, caption and reasoning as means. ``experts`` 0: a dense MLP.

    ``sigma``: a response's length is log-normal, and both parts are longer or shorter with it. ``spread``: a part's
    length varies evenly by up to this fraction of it.
    """

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
    sigma: float = SIGMA
    spread: float = 0.0

    @property
    def image_tokens(self) -> int:
        return self.grid[0] * self.grid[1] // MERGE**2

    def dense(self, **changes: Any) -> Shape:
        return replace(self, experts=0, top_k=1, **changes)

    def even(self, spread: float = 0.15) -> Shape:
        """The same with lengths that are nearly equal."""
        return replace(self, sigma=0.0, spread=spread)


TINY = Shape(
    hidden=256, layers=4, heads=4, kv_heads=2, head_dim=64, experts=4, top_k=2, inner=768, vocab=2048,
    vision_depth=4, vision_hidden=128, vision_inner=512, vision_heads=2, deepstack=(0, 1, 2), grid=(24, 24),
    prompt=202, caption=60, reasoning=150, responses=16,
)  # fmt: skip
# Four experts out of Qwen3-VL-2B, and the lengths that docs/method.md counts with.
GPU = Shape(
    hidden=2048, layers=28, heads=16, kv_heads=8, head_dim=128, experts=4, top_k=2, inner=6144, vocab=151_936,
    vision_depth=24, vision_hidden=1024, vision_inner=4096, vision_heads=16, deepstack=(5, 11, 17), grid=(50, 64),
    prompt=1000, caption=300, reasoning=1000, responses=16,
)  # fmt: skip
# For tests: seconds on one core.
MINI = replace(
    TINY, hidden=64, layers=2, heads=2, kv_heads=1, head_dim=32, inner=96, vocab=256, vision_depth=2,
    vision_hidden=32, vision_inner=64, vision_heads=1, deepstack=(0,), grid=(8, 8), prompt=26, caption=9, reasoning=17,
    responses=3,
)  # fmt: skip


# In transformers' registry: calls the layer's argument ``tree`` with (1, heads, T, D) of queries, keys and values.
TREE = "benchmark_tree"


def call_tree(module, query, key, value, attention_mask=None, scaling=None, tree=None, **unused):
    return tree(query, key, value, scaling), None


AttentionInterface.register(TREE, call_tree)


@dataclass
class Case:
    """What every way of a step works on; the stock model's weights are those of the module, and all gradients go into
    their ``.grad``."""

    shape: Shape
    module: Policy | Discriminator
    model: PreTrainedModel  # transformers' own layers over the module's weights: stock_twin
    rollout: Rollout

    @property
    def device(self) -> torch.device:
        return self.module.head.device

    def whole_forward(self, prompt: Prompt, tokens: Tensor) -> Tensor:
        """Stock forward of prompt and tokens, batch 1: the last hidden states, (prompt + tokens, H)."""
        ids = torch.cat([prompt.input_ids, tokens])[None]
        return self.model.model(
            input_ids=ids,
            pixel_values=prompt.pixel_values,
            image_grid_thw=prompt.image_grid_thw,
            mm_token_type_ids=(ids == self.model.config.image_token_id).int(),
            use_cache=False,
        ).last_hidden_state[0]

    @contextmanager
    def tree_attention(self) -> Iterator[None]:
        """The stock text layers attend by calling their argument ``tree``."""
        text = self.model.model.language_model.config
        stock, text._attn_implementation = text._attn_implementation, TREE
        try:
            yield
        finally:
            text._attn_implementation = stock


def stock_model(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int, **changes: int) -> PreTrainedModel:
    """A random one in training mode, with experts or dense. ``changes``: of its settings, as image_token_id."""
    family = "Qwen3VLMoe" if shape.experts else "Qwen3VL"
    config = getattr(transformers, f"{family}Config")(**{**model_settings(shape), **changes})
    torch.manual_seed(seed)
    with device:
        made = getattr(transformers, f"{family}ForConditionalGeneration")._from_config(config, dtype=dtype).train()
        spread_weights(made)
    return made


def model_settings(shape: Shape) -> dict[str, Any]:
    """What Qwen3VLConfig takes, and with experts Qwen3VLMoeConfig."""
    tokens = shape.vocab - 5
    third = shape.head_dim // 2 // 3
    experts = {
        "moe_intermediate_size": shape.inner,
        "num_experts": shape.experts,
        "num_experts_per_tok": shape.top_k,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
    return {
        "text_config": {
            "vocab_size": shape.vocab,
            "hidden_size": shape.hidden,
            "intermediate_size": shape.inner,
            **(experts if shape.experts else {}),
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
            "tie_word_embeddings": True,
            "pad_token_id": tokens + 4,
        },
        "vision_config": {
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
        "image_token_id": tokens,
        "vision_start_token_id": tokens + 1,
        "vision_end_token_id": tokens + 2,
        "video_token_id": tokens + 3,
        "tie_word_embeddings": True,
    }


def spread_weights(model: nn.Module) -> None:
    """Every matrix normal with a gain near one, so that each part of the network moves results and gradients."""
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                value.add_(torch.randn_like(value), alpha=0.05)
            elif "embed_tokens" not in name and "pos_embed" not in name:
                fan_in = value.shape[-1] if value.dim() == 3 else value[0].numel()  # 3: experts; 5: patches
                value.normal_(std=fan_in**-0.5)


def stock_twin(model: PreTrainedModel) -> PreTrainedModel:
    """Transformers' own modules over the same weights and buffers; Policy and Discriminator put theirs into the model
    that they are given."""
    shared = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(kept): kept for kept in shared})


def draw(shape: Shape, seed: int) -> tuple[Prompt, list[Parts]]:
    """The prompt, and the parts of N + 1 responses, on the host."""
    words, random = shape.vocab - 5, torch.Generator().manual_seed(seed)

    def text(length: int) -> Tensor:
        return torch.randint(0, words, (length,), generator=random)

    def part(mean: int, factor: float) -> Tensor:
        length = scaled(mean, factor)
        reach = int(shape.spread * length)
        return text(length + (int(torch.randint(-reach, reach + 1, (), generator=random)) if reach else 0))

    before = shape.prompt - shape.image_tokens - 2
    image = [torch.tensor([words + 1]), torch.full((shape.image_tokens,), words), torch.tensor([words + 2])]
    ids = torch.cat([text(before // 2), *image, text(before - before // 2)])
    pixels = torch.randn(shape.grid[0] * shape.grid[1], 3 * TEMPORAL * PATCH**2, generator=random)
    key = hashlib.sha256(ids.numpy().tobytes() + pixels.numpy().tobytes()).digest()
    prompt = Prompt(ids, pixels, torch.tensor([[1, *shape.grid]]), key)
    ragged = factors(shape.responses + 1, shape.sigma, random)
    return prompt, [(part(shape.caption, factor), part(shape.reasoning, factor)) for factor in ragged]


def rollout_of(prompt: Prompt, parts: list[Parts]) -> Rollout:
    responses = [torch.cat(pair) for pair in parts]
    return Rollout(
        prompts=[prompt],
        group=torch.zeros(len(parts), dtype=torch.int64),
        response_ids=responses,
        logprob=[torch.zeros(len(ids)) for ids in responses],
        text=[""] * len(parts),
        finished=torch.ones(len(parts), dtype=torch.bool),
    )


def moved(prompt: Prompt, device: torch.device) -> Prompt:
    return replace(
        prompt,
        input_ids=prompt.input_ids.to(device),
        pixel_values=prompt.pixel_values.to(device),
        image_grid_thw=prompt.image_grid_thw.to(device),
    )
