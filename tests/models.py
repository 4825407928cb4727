"""Tiny random Qwen3-VL checkpoints and prompts, built in memory."""

from __future__ import annotations

import copy
import hashlib

import torch
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from prism_fast.data.chat import _key
from prism_fast.data.images import image_key
from prism_fast.records import Prompt
from tests.oracle import assert_as_exact

IMAGE_TOKEN, VISION_START, VISION_END, EOS, PAD = 90, 91, 92, 93, 94
VOCAB = 96


def qwen_config(layers: int = 3, hidden: int = 32, tie: bool = True) -> Qwen3VLConfig:
    return Qwen3VLConfig(
        text_config={
            "vocab_size": VOCAB,
            "hidden_size": hidden,
            "intermediate_size": 48,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 512,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [4, 2, 2],
                "mrope_interleaved": True,
            },
            "tie_word_embeddings": tie,
            "pad_token_id": PAD,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 24,
            "intermediate_size": 32,
            "num_heads": 2,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": hidden,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 1],
        },
        image_token_id=IMAGE_TOKEN,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        video_token_id=95,
        tie_word_embeddings=tie,
    )


def qwen(seed: int = 0, **kwargs) -> Qwen3VLForConditionalGeneration:
    torch.manual_seed(seed)
    model = Qwen3VLForConditionalGeneration(qwen_config(**kwargs)).eval()
    with torch.no_grad():  # norms and biases off their defaults, so that a forgotten one shows
        for name, value in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                value.add_(0.1 * torch.randn_like(value))
            elif "embed_tokens" not in name:
                value.mul_(3)
    return model


def prompt(seed: int, images: tuple[tuple[int, int], ...] = (), text: int = 5) -> Prompt:
    """Text, then every image of (h, w) patches between vision tokens, then text."""
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(0, 90, (text,), generator=generator)]
    for h, w in images:
        middle = torch.full((h * w // 4,), IMAGE_TOKEN)
        ids += [torch.tensor([VISION_START]), middle, torch.tensor([VISION_END])]
    ids.append(torch.randint(0, 90, (3,), generator=generator))
    patches = sum(h * w for h, w in images)
    pixels = torch.randn(patches, 3 * 2 * 4 * 4, generator=generator) if images else None
    grid = torch.tensor([[1, h, w] for h, w in images]) if images else None
    ids = torch.cat(ids)
    raw = ids.numpy().tobytes() + (pixels.numpy().tobytes() if images else b"")
    return Prompt(ids, pixels, grid, hashlib.sha256(raw).digest())


def question(pictures: tuple[int, ...], text: int, *, before: int = 0, size: tuple[int, int] = (4, 4)) -> Prompt:
    """Text by the seed ``before``, these pictures, then text of 3 + text % 3 tokens, all as Chat makes a prompt."""
    h, w = size
    middle = torch.cat(
        [torch.tensor([VISION_START]), torch.full((h * w // 4,), IMAGE_TOKEN), torch.tensor([VISION_END])]
    )
    ids = torch.cat([tokens(before, 4), *[middle] * len(pictures), tokens(text, 3 + text % 3)])
    if not pictures:
        return Prompt(ids, None, None, _key(ids, ()), f"text {before} {text}")
    grid = torch.tensor([[1, h, w]])
    made = [torch.randn(h * w, 96, generator=torch.Generator().manual_seed(500 + seed)) for seed in pictures]
    keys, place = (
        tuple(image_key(f"{seed} {size}".encode()) for seed in pictures),
        f"pictures {pictures}, text {before} {text}",
    )
    return Prompt(ids, torch.cat(made), grid.repeat(len(made), 1), _key(ids, keys), place, image_keys=keys)


def tokens(seed: int, length: int) -> torch.Tensor:
    return torch.randint(0, 90, (length,), generator=torch.Generator().manual_seed(1000 + seed))


def moe(seed: int = 0, experts: int = 4, top_k: int = 2, **kwargs):
    """A random Qwen3-VL-MoE of the same dimensions (stock attention)."""
    from transformers import Qwen3VLMoeForConditionalGeneration

    from prism_fast.models.upcycle import moe_config

    torch.manual_seed(seed)
    model = Qwen3VLMoeForConditionalGeneration(moe_config(qwen_config(**kwargs), experts, top_k)).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                value.add_(0.1 * torch.randn_like(value))
            elif "gate.weight" in name:
                value.copy_(0.3 * torch.randn_like(value))
            elif "embed_tokens" not in name:
                value.mul_(3)
    return model


# ---- "the same as separate stock forwards", by the law of tests/oracle.py: the stock model is eager torch, its float64
# copy the truth.


def exact(model):
    """A float64 copy, whose gradients are its own; its experts one by one, since torch groups no float64 products."""
    copied = copy.deepcopy(model).double().requires_grad_()
    if hasattr(copied.config.get_text_config(), "num_experts"):
        copied.set_experts_implementation("eager")
    return copied


def roundings(model, rows: int) -> int:
    """On the way to a gradient, for trees of this many rows: the sums of every layer there and back, head, rows."""
    text = model.config.get_text_config()
    attention = 2 * text.hidden_size + text.head_dim + 2 * rows + text.num_attention_heads * text.head_dim
    layer = attention + 2 * text.hidden_size + text.intermediate_size
    return 2 * text.num_hidden_layers * layer + text.vocab_size + rows


def assert_gradients_as_exact(mine, truth, stock, terms: int, without: tuple[str, ...] = ()) -> None:
    """Of every parameter; where one model has none, as of a vision tower without an image, it is 0."""
    for (name, a), (_, t), (_, e) in zip(*(model.named_parameters() for model in (mine, truth, stock)), strict=True):
        if not name.startswith(without):
            found = (torch.zeros_like(p) if p.grad is None else p.grad for p in (a, t, e))
            assert_as_exact(*found, terms, name)
