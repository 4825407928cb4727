"""Tiny models of transformers, by family, with weights of a spread at which losses differ, and batches for them."""

from __future__ import annotations

import torch
import transformers

from tests.models import qwen_config

VOCAB = 96
TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "decoder_sparse_step": 1}


def _qwen2_5_vl():
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    text = {**TEXT, "rope_parameters": rope}
    del text["head_dim"]
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "patch_size": 4, "out_hidden_size": 32,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "fullatt_block_indexes": [1], "window_size": 16,
    }  # fmt: skip
    tokens = {"image_token_id": 90, "vision_start_token_id": 91, "vision_end_token_id": 92, "video_token_id": 95}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


MODELS = {
    "qwen3_vl": lambda: transformers.Qwen3VLForConditionalGeneration(qwen_config(2)),  # tied
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**TEXT, tie_word_embeddings=True)),
    "qwen3_moe": lambda: transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(**TEXT, **MOE, output_router_logits=True)
    ),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT)),
    "gemma2": lambda: transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**TEXT, final_logit_softcapping=2.0, sliding_window=8)
    ),
    "cohere": lambda: transformers.CohereForCausalLM(transformers.CohereConfig(**TEXT, logit_scale=0.25)),
    "granite": lambda: transformers.GraniteForCausalLM(transformers.GraniteConfig(**TEXT, logits_scaling=4.0)),
}


def made(family: str):
    torch.manual_seed(0)
    model = MODELS[family]().train()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.dim() > 1 and "visual" not in name:
                value.normal_(std=0.3)
    return model


def batch(family: str, seed: int, rows: int = 2, length: int = 12) -> dict[str, torch.Tensor]:
    """Padded ids, labels of some tokens; an image of 16 patches in every row of a family with images."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 90, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0
    found = {"attention_mask": mask}
    if "vl" in family:
        ids[:, 0], ids[:, 1:5], ids[:, 5] = 91, 90, 92
        found["pixel_values"] = torch.randn(rows * 16, 3 * 2 * 4 * 4, generator=generator)
        found["image_grid_thw"] = torch.tensor([[1, 4, 4]] * rows)
        found["mm_token_type_ids"] = (ids == 90).int()
    labels = ids.masked_fill((mask == 0) | (ids >= 90), -100)
    labels[:, : length - 6 + seed % 3] = -100
    return {"input_ids": ids.masked_fill(mask == 0, 0), "labels": labels, **found}
