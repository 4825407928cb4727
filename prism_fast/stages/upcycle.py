"""Stage 2a: a dense Qwen3-VL directory becomes a discriminator's."""

from __future__ import annotations

from pathlib import Path

from prism_fast.config import UpcycleConfig
from prism_fast.files import try_new, write_aside, writing
from prism_fast.models.backbone import local_directory
from prism_fast.models.load import open_chat, pick_device, pick_dtype, with_chat
from prism_fast.models.upcycle import upcycle


def upcycle_directory(config: UpcycleConfig) -> Path:
    """Reads config.model.path, writes the discriminator with its tokenizer to config.out."""
    try_new(config.out)
    path = local_directory(config.model.path)
    chat = open_chat(path, "qwen3_vl")
    made = upcycle(
        path,
        num_experts=config.num_experts,
        top_k=config.top_k,
        expert_noise=config.expert_noise,
        router_std=config.router_std,
        seed=config.seed,
        dtype=pick_dtype(config.model.dtype, pick_device()),
    )
    with writing(config.out):
        write_aside(config.out, with_chat(made, chat))
    return config.out
