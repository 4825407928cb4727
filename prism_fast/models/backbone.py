"""Qwen3-VL checkpoints as modules: opening them, images into the token stream, the pass that both models share."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from prism_fast.models.blocks import Attend, ReadOut, Recompute, TextModel, attend_tree, own_layers, run_layers
from prism_fast.pack import ImageTokens
from prism_fast.records import DataError, PackedTree
from prism_kernels import RoutingStats


def local_directory(path: str | Path) -> Path:
    """``path`` where it is a directory; else the snapshot of a hub model of that name ("Qwen/Qwen3-VL-4B-Instruct")."""
    if Path(path).is_dir():
        return Path(path)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        raise DataError(f"{path}: no such model directory; give a Hugging Face directory or a hub name like Qwen/NAME")
    try:
        return Path(snapshot_download(str(path), allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja"]))
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path}: no such directory, and the hub has no answer ({reason}); download it first") from None


def read_config(path: Path, expected: str):
    """The checkpoint's configuration. Raises DataError where it is missing or of another architecture."""
    if not (path / "config.json").is_file():
        raise DataError(f"{path}: no config.json; expected a Hugging Face checkpoint directory of {expected}")
    try:
        config = AutoConfig.from_pretrained(path)
    except (ValueError, OSError, KeyError) as error:
        raise DataError(f"{path}/config.json: cannot be read ({str(error).splitlines()[0]})") from None
    if config.model_type != expected:
        raise DataError(f"{path}/config.json: model_type is {config.model_type!r}, expected {expected!r}")
    return config


def load_model(model_class, path: str | Path, expected: str, dtype: torch.dtype, device: torch.device | str, **kwargs):
    """A Hugging Face model with every weight accounted for."""
    path = local_directory(path)
    config = read_config(path, expected)
    try:
        model, report = model_class.from_pretrained(
            path, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True, **kwargs
        )
    except OSError as error:
        raise DataError(
            f"{path}: weights cannot be read ({str(error).splitlines()[0]}); expected safetensors"
        ) from None
    missing, wrong = sorted(report["missing_keys"]), sorted(map(str, report.get("mismatched_keys", ())))
    if missing or wrong:
        what = f"no weights for {missing[0]}" if missing else f"wrong shape for {wrong[0]}"
        raise DataError(
            f"{path}: {what} ({len(missing)} missing, {len(wrong)} mismatched); expected a whole {expected}"
        )
    return model.to(device)


def image_tokens(config) -> ImageTokens:
    return ImageTokens(config.image_token_id, config.vision_config.spatial_merge_size)


class TreeModel(nn.Module):
    """A Qwen3-VL(-MoE) of transformers that reads packed trees: what policy and discriminator share.

    The vision tower stays transformers' own (sdpa, per image). ``norm``: see blocks.Norm.
    """

    model: Any  # transformers' modules say no attributes' types

    def __init__(self, model: PreTrainedModel, *, norm: str):
        super().__init__()
        self.model = model
        own_layers(self.text, norm=norm)
        self.image = image_tokens(model.config)
        self.recompute: Recompute | None = None

    @property
    def text(self) -> TextModel:
        return self.model.model.language_model

    @property
    def visual(self) -> PreTrainedModel:
        return self.model.model.visual

    def freeze(self, *, vision: bool = False, embeddings: bool = False) -> None:
        """Takes the vision tower, or the token embeddings (and a head tied to them), out of training."""
        if vision:
            self.visual.requires_grad_(False)
        if embeddings:
            self.model.get_input_embeddings().requires_grad_(False)

    def hidden_states(
        self,
        pack: PackedTree,
        *,
        attend: Attend | None = None,
        positions: Tensor | None = None,
        read: ReadOut | None = None,
    ) -> tuple[Tensor, tuple[RoutingStats, ...]]:
        """Behind the last norm: (T, H), or with ``read`` (Q, H); and routing statistics where layers have experts.

        ``attend``: what the rows see, by default the pack's tree; ``positions``: by default the pack's.
        """
        hidden, deepstack = embed(self.model.model, pack)
        return run_layers(
            self.text,
            hidden,
            pack.position_ids if positions is None else positions,
            attend_tree(pack.layout) if attend is None else attend,
            image=(pack.image_row, deepstack),
            kind=pack.segment_kind,
            read=read,
            recompute=self.recompute,
        )


def embed(backbone: Any, pack: PackedTree) -> tuple[Tensor, list[Tensor]]:
    """Token embeddings (T, H) with image features in their rows, and the DeepStack features (image rows, H) each.

    Images are taken from roots only (``pack.image_row``): a placeholder token in a branch stays an ordinary embedding.
    """
    hidden = backbone.get_input_embeddings()(pack.input_ids)
    if pack.pixel_values is None:
        return hidden, []
    visual = backbone.visual
    features = visual(pack.pixel_values.to(visual.dtype), grid_thw=pack.image_grid_thw, return_dict=True)
    hidden = hidden.index_copy(0, pack.image_row, features.pooler_output.to(hidden.dtype))
    return hidden, list(features.deepstack_features)
