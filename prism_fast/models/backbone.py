"""Qwen3-VL checkpoints as modules: opening them, the attention hook, images into the token stream."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig
from transformers.masking_utils import AttentionMaskInterface

from prism_fast.pack import ImageTokens
from prism_fast.records import DataError, PackedTree
from prism_kernels import TreeLayout, tree_attention

ATTENTION = "prism_tree"


def _attend(module, query, key, value, attention_mask=None, scaling=None, prism=None, **unused):
    """transformers' attention interface: query (1, Hq, T, D), key and value (1, Hkv, T, D) -> (1, T, Hq, D).

    ``prism`` says what the rows are: a TreeLayout, or a callable such as the rollout's cache.
    """
    if prism is None:
        raise RuntimeError(f"attention {ATTENTION!r} needs its layout: call the model through Policy or Discriminator")
    if isinstance(prism, TreeLayout):
        out = tree_attention(*(x[0].transpose(0, 1) for x in (query, key, value)), prism, scale=scaling)
        return out[None], None
    return prism(module.layer_idx, query, key, value, scaling), None


# Both registries: without a mask function of its own, transformers would read restarted positions as packed sequences.
AttentionInterface.register(ATTENTION, _attend)

AttentionMaskInterface.register(ATTENTION, lambda *args, **kwargs: None)


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
    """A Hugging Face model with tree attention in its text side, and every weight accounted for."""
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
    use_tree_attention(model)
    return model.to(device)


def use_tree_attention(model: nn.Module) -> None:
    """In the text side; the vision side keeps transformers' own (sdpa, per image)."""
    model.config.text_config._attn_implementation = ATTENTION


def image_tokens(config) -> ImageTokens:
    return ImageTokens(config.image_token_id, config.vision_config.spatial_merge_size)


def embed(backbone: nn.Module, pack: PackedTree) -> tuple[Tensor, list[Tensor]]:
    """Token embeddings (1, T, H) with image features in their rows, and the DeepStack features (image rows, H) each.

    Images are taken from roots only (``pack.image_row``): a placeholder token in a branch stays an ordinary embedding.
    """
    hidden = backbone.get_input_embeddings()(pack.input_ids)
    if pack.pixel_values is None:
        return hidden[None], []
    visual = backbone.visual
    features = visual(pack.pixel_values.to(visual.dtype), grid_thw=pack.image_grid_thw, return_dict=True)
    hidden = hidden.index_copy(0, pack.image_row, features.pooler_output.to(hidden.dtype))
    return hidden[None], list(features.deepstack_features)
