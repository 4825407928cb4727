"""A stage's models: opened as its configuration says, saved with what opens them again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from prism_fast.config import ModelConfig
from prism_fast.data.chat import Chat
from prism_fast.models.discriminator import Discriminator
from prism_fast.models.policy import Policy


def pick_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)


def load_policy(config: ModelConfig, chat: Chat) -> Policy:
    device = pick_device()
    dtype = pick_dtype(config.dtype, device)
    policy = Policy.load(config.path, forbidden=chat.forbidden_ids, words=chat.vocab_size, dtype=dtype, device=device)
    return _prepare(policy, config)


def load_discriminator(config: ModelConfig, head_dropout: float = 0.0) -> Discriminator:
    device = pick_device()
    made = Discriminator.load(config.path, dtype=pick_dtype(config.dtype, device), device=device, dropout=head_dropout)
    return _prepare(made, config)


def _prepare(module, config: ModelConfig):
    module.freeze(vision=config.freeze_vision, embeddings=config.freeze_embeddings)
    if config.activation_checkpointing:
        module.checkpoint_activations()
    return module.train()


def with_chat(model: Policy | Discriminator, chat: Chat) -> Callable[[Path], None]:
    """Saves a model with its tokenizer and image processor, so that the directory opens by itself."""

    def save_both(path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)
        model.save(path)
        chat.save(path)

    return save_both
