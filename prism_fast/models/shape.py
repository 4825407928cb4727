"""What packing reads of a model, from its files alone: no weights are opened."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from prism_fast.balance import Dimensions
from prism_fast.data.chat import Chat
from prism_fast.models.checkpoint_checks import read_config
from prism_fast.pack import ImageTokens


@dataclass(frozen=True)
class Shape:
    """As a TreeModel has them. ``dimensions``: None where nothing asks what a pack costs, as in one process."""

    image: ImageTokens
    dimensions: Dimensions | None = None

    @classmethod
    def of(cls, chat: Chat, folder: Path | None = None) -> Shape:
        """``folder``: the checkpoint directory, of a policy or a discriminator, for its dimensions. Raises DataError
        where its configuration is none of theirs."""
        image = ImageTokens(chat.image_id, chat.image_processor.merge_size)
        return cls(image, None if folder is None else Dimensions.of(read_config(folder, _architecture(folder))))


def _architecture(folder: Path) -> str:
    """The discriminator's where the folder says so, else the policy's, by which a fault is told."""
    try:
        told = json.loads((folder / "config.json").read_text()).get("model_type")
    except (OSError, ValueError, AttributeError):
        told = None
    return told if told == "qwen3_vl_moe" else "qwen3_vl"
