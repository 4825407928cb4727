"""Dense Qwen3-VL -> mixture-of-experts discriminator (PRISM, stage 2a)."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3VLForConditionalGeneration, Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

from prism_fast.models.backbone import load_model
from prism_fast.models.discriminator import Discriminator


def upcycle(
    dense_path: str | Path,
    *,
    num_experts: int = 4,
    top_k: int = 2,
    expert_noise: float = 0.01,
    router_std: float = 0.02,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Discriminator:
    """Every MLP becomes ``num_experts`` copies of itself plus Gaussian noise of std ``expert_noise``, behind a Gaussian
    router of std ``router_std`` whose top-k weights are renormalised; a scalar head without bias goes on top.
    """
    dense = load_model(Qwen3VLForConditionalGeneration, dense_path, "qwen3_vl", dtype, "cpu")
    config = moe_config(dense.config, num_experts, top_k)
    model: Any = Qwen3VLMoeForConditionalGeneration(config)
    model = model.to(dtype)
    generator = torch.Generator().manual_seed(seed)

    def noise(like, std):
        return (torch.randn(like.shape, generator=generator) * std).to(like.dtype)

    source = dense.state_dict()
    target = model.state_dict()
    with torch.no_grad():
        for name, value in target.items():
            if ".mlp.gate." in name:
                value.copy_(noise(value, router_std))
            elif name.endswith("experts.gate_up_proj"):
                prefix = name.removesuffix("experts.gate_up_proj")
                dense_weight = torch.cat([source[prefix + "gate_proj.weight"], source[prefix + "up_proj.weight"]])
                value.copy_(dense_weight + noise(value, expert_noise))  # (2I, H) for each of E
            elif name.endswith("experts.down_proj"):
                value.copy_(source[name.replace("experts.down_proj", "down_proj.weight")] + noise(value, expert_noise))
            else:
                value.copy_(source[name])
    hidden = model.config.text_config.hidden_size
    head = (torch.rand(hidden, generator=generator) * 2 - 1) / hidden**0.5
    return Discriminator(model, head)


def moe_config(dense_config, num_experts: int, top_k: int) -> Qwen3VLMoeConfig:
    """The dense configuration with experts of the dense MLP's size in every layer."""
    values = copy.deepcopy(dense_config.to_dict())
    text = values["text_config"]
    text.update(
        num_experts=num_experts,
        num_experts_per_tok=top_k,
        moe_intermediate_size=text["intermediate_size"],
        decoder_sparse_step=1,
        mlp_only_layers=[],
        norm_topk_prob=True,
        model_type="qwen3_vl_moe_text",
    )
    values["vision_config"]["model_type"] = "qwen3_vl_moe_vision"
    values.update(model_type="qwen3_vl_moe", architectures=["Qwen3VLMoeForConditionalGeneration"])
    for key in ("transformers_version", "_name_or_path", "dtype", "_attn_implementation"):
        values.pop(key, None)
    return Qwen3VLMoeConfig(**values)
