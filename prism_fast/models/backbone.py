"""Qwen3-VL checkpoints as modules: opening them, images into the token stream, the pass that both models share."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from prism_fast.balance import Dimensions
from prism_fast.data.chat_files import brief, one_line, quiet
from prism_fast.models.blocks import (
    Attend,
    ReadOut,
    Recompute,
    TextModel,
    TreeLayer,
    attend_tree,
    own_layers,
    run_layers,
)
from prism_fast.models.checkpoint_checks import check_values, check_weights, check_words, read_config
from prism_fast.models.vision import own_vision, planned
from prism_fast.pack import ImageTokens
from prism_fast.records import DataError, PackedTree
from prism_kernels import RoutingStats


def local_directory(path: str | Path, *, weights: bool = True) -> Path:
    """``path`` where it is a directory; else the snapshot of a hub model of that name ("Qwen/Qwen3-VL-4B-Instruct").

    ``weights``: whether they are downloaded too.
    """
    try:
        path = Path(path)
        if path.is_dir():
            next(path.iterdir(), None)  # raises where it may not be read
            (path / "config.json").exists()
            return path
        there = path.exists() or path.is_symlink()
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be opened ({brief(error)}); give a Hugging Face directory") from None
    if there:
        raise DataError(f"{path}: a file, or a link that leads nowhere; expected the model's directory")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        raise DataError(f"{path}: no such model directory; give a Hugging Face directory or a hub name like Qwen/NAME")
    patterns = ["*.json", "*.txt", "*.jinja", *(["*.safetensors"] if weights else [])]
    try:
        return Path(snapshot_download(str(path), allow_patterns=patterns))
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path}: no such directory, and the hub has no answer ({reason}); download it first") from None


def load_model(
    model_class,
    path: str | Path,
    expected: str,
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    words: int | None = None,
    beside: Collection[str] = (),
):
    """A Hugging Face model with every weight accounted for, and finite.

    ``words``: tokens that need a row in the embedding; ``beside``: names of weights that are not the model's.
    """
    path = local_directory(path)
    config = read_config(path, expected)
    if words is not None:
        check_words(path, config, words)
    stored = check_weights(model_class, config, path, beside)
    with one_line(f"{path}: the model does not load", "download the checkpoint again"):
        model, report = model_class.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
        lost = [*report["missing_keys"], *report.get("mismatched_keys", ()), *report.get("error_msgs", ())]
        if lost:
            raise ValueError(f"{len(lost)} did not load, such as {lost[0]}")
    model = model.to(device)
    check_values(model, config, path, stored)
    return model


def image_tokens(config) -> ImageTokens:
    vision = config.vision_config
    patch_dim = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    return ImageTokens(config.image_token_id, vision.spatial_merge_size, patch_dim)


class TreeModel(nn.Module):
    """A Qwen3-VL(-MoE) of transformers that reads packed trees: what policy and discriminator share.

    ``on_cpu``: see blocks.Chosen.
    """

    model: Any  # transformers' modules say no attributes' types
    always_fp32: frozenset[str] = frozenset()  # names of parameters that are fp32 whatever the model's dtype

    def __init__(self, model: PreTrainedModel, *, on_cpu: str):
        super().__init__()
        self.model = model
        own_layers(self.text, on_cpu=on_cpu)
        own_vision(self.visual)
        self.image = image_tokens(model.config)
        self.recompute: Recompute | None = None

    @property
    def device(self) -> torch.device:
        # Of a buffer: whoever shards weights leaves it where it is.
        return self.text.rotary_emb.get_buffer("inv_freq").device

    @property
    def dtype(self) -> torch.dtype:
        """Of the model's weights; see ``always_fp32``."""
        return self.model.dtype

    @property
    def dimensions(self) -> Dimensions:
        """What the cost of a pack depends on."""
        return Dimensions.of(
            self.model.config, frozen_vision=not any(p.requires_grad for p in self.visual.parameters())
        )

    def gathered_at_once(self) -> tuple[type, ...]:
        """Classes of the modules that are gathered in one piece, and called as a whole, where weights are sharded."""
        blocks: Any = self.visual.blocks
        return TreeLayer, type(blocks[0])

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

    @cached_property
    def shapes(self) -> PreTrainedModel:
        """The transformers model without storage: whoever shards weights leaves the model's own without their shapes,
        at which transformers looks to undo the conversions of loading."""
        with torch.device("meta"):
            made = type(self.model)(self.model.config)
        made.generation_config = self.model.generation_config
        if hasattr(self.model, "_weight_conversions"):
            made._weight_conversions = self.model._weight_conversions
        return made

    def files(self, weights: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """Any of the weights, whole, by name -> the tensors of a Hugging Face directory, by the names of its files.

        It may be called in a thread, once ``shapes`` is there.
        """
        return {"model": revert_weight_conversion(self.shapes, _inner(weights))}

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


def save_model(model: TreeModel, path: str | Path, weights: Mapping[str, Tensor] | None = None) -> None:
    """Writes a Hugging Face directory of the transformers model inside a TreeModel.

    ``weights``: whole ones by the TreeModel's names, where the model holds only parts of them.
    """
    with quiet():
        if weights is None:
            model.model.save_pretrained(path)
            return
        own = _inner(weights)
        torch.nn.Module.to(model.shapes, next(iter(own.values())).dtype)  # config.json says it
        model.shapes.save_pretrained(path, state_dict=own)


def _inner(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights by a TreeModel's names -> those of the transformers model inside, by its own."""
    return {name.removeprefix("model."): value for name, value in weights.items() if name.startswith("model.")}


def embed(backbone: Any, pack: PackedTree) -> tuple[Tensor, list[Tensor]]:
    """Token embeddings (T, H) with image features in their rows, and the DeepStack features (image rows, H) each.

    Images are taken from roots only (``pack.image_row``): a placeholder token in a branch stays an ordinary embedding.
    """
    hidden = backbone.get_input_embeddings()(pack.input_ids)
    grid = pack.image_grid_thw
    if pack.pixel_values is None or grid is None:
        return hidden, []
    visual = backbone.visual
    pixels = pack.pixel_values.to(visual.dtype)
    features = visual(pixels, grid_thw=grid, **planned(visual, grid, pixels.device), return_dict=True)
    pooled, *deepstack = (_by_row(x, pack) for x in (features.pooler_output, *features.deepstack_features))
    return hidden.index_copy(0, pack.image_row, pooled.to(hidden.dtype)), deepstack


def _by_row(features: Tensor, pack: PackedTree) -> Tensor:
    """The tower's output (image tokens of every image once, H) -> one for each of ``pack.image_row``.

    The gradients of an image that stands in several places are summed in at least fp32, and rounded once.
    """
    rows = len(pack.image_row)
    if pack.image_feature is None:  # a blank image has more than there are rows: it is computed, and no row takes it
        return features if len(features) == rows else features[:rows]
    wide = torch.promote_types(features.dtype, torch.float32)
    return nn.functional.embedding(pack.image_feature, features.to(wide))
