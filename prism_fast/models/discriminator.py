"""Qwen3-VL-MoE with a scalar head on a PackedTree: the discriminator."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Qwen3VLMoeForConditionalGeneration

from prism_fast.models.backbone import TreeModel, load_model, local_directory, save_model
from prism_fast.models.blocks import ReadOut, Recompute
from prism_fast.models.checkpoint_layouts import HEAD_FILE, HEAD_KEYS, read_head, settle_square_experts
from prism_fast.records import DataError, Judgement, PackedTree


class Discriminator(TreeModel):
    """``forward(pack)`` scores every branch of a packed tree in one pass (PRISM, the adversarial stage).

    In the last layer only the read-out rows need queries, experts, norm and head. With ``balance=True`` (warm-up) its
    router still sees every row, because the load-balancing loss does.
    """

    always_fp32 = frozenset({"head"})

    def __init__(self, model: Qwen3VLMoeForConditionalGeneration, head: Tensor, *, dropout: float = 0.0):
        super().__init__(model, on_cpu="auto")
        self.head = nn.Parameter(head.detach().float().reshape(-1).to(model.device))
        self.dropout = dropout
        config = self.model.config.text_config
        self.top_k = config.num_experts_per_tok
        if model.lm_head.weight is not model.get_input_embeddings().weight:
            model.lm_head.requires_grad_(False)
        for i, layer in enumerate(self.text.layers):
            if not hasattr(layer.mlp, "experts"):
                raise DataError(f"discriminator: layer {i} is dense; expected experts in every layer")

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        dropout: float = 0.0,
    ) -> Discriminator:
        """Opens a Hugging Face Qwen3-VL-MoE directory with a value head, in any of the released layouts.

        Experts as (E, H, 2I), (E, I, H) or (E, 2I, H), (E, H, I); the head as ``v_head.1.weight`` inside the
        safetensors or ``v_head.summary.weight`` in a file of its own. Raises DataError on anything else.
        """
        path = local_directory(path)
        model = load_model(Qwen3VLMoeForConditionalGeneration, path, "qwen3_vl_moe", dtype, device, beside=HEAD_KEYS)
        settle_square_experts(model, path)
        return cls(model, read_head(path, model.config.text_config.hidden_size), dropout=dropout)

    def checkpoint_activations(self, *, use_reentrant: bool = False) -> None:
        """Every layer recomputes its activations in the backward; gradients stay the same, the routing loss's too."""
        self.recompute = Recompute(use_reentrant)

    def forward(self, pack: PackedTree, *, balance: bool = False, text_positions: bool = False) -> Judgement:
        """``text_positions``: 1-D positions instead of multimodal ones (as the reference aligns)."""
        hidden, stats = self.hidden_states(
            pack,
            positions=_one_dimensional(pack) if text_positions else None,
            read=ReadOut(pack.readout, balance),
        )
        hidden = hidden.float()
        if self.dropout and self.training:
            hidden = nn.functional.dropout(hidden, self.dropout)
        return Judgement(hidden @ self.head.float(), stats)

    def save(self, path: str | Path, weights: Mapping[str, Tensor] | None = None) -> None:
        """A Hugging Face directory; the head lies beside the model in ``value_head.safetensors``.

        ``weights``: see `save_model`.
        """
        save_model(self, path, weights)
        save_file(_stored_head(self.head if weights is None else weights["head"]), Path(path) / HEAD_FILE)

    def files(self, weights: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        found = super().files(weights)
        return {**found, Path(HEAD_FILE).stem: _stored_head(weights["head"])} if "head" in weights else found


def _stored_head(head: Tensor) -> dict[str, Tensor]:
    return {HEAD_KEYS[0]: head.detach().float().reshape(1, -1).cpu().contiguous()}


def _one_dimensional(pack: PackedTree) -> Tensor:
    """(3, T): positions that count tokens and ignore image grids."""
    layout = pack.layout
    positions = torch.empty(pack.num_tokens, dtype=torch.int64)
    for segment, length in enumerate(layout.lengths):
        above = sum(layout.lengths[s] for s in layout.ancestors(segment))
        rows = layout.rows(segment)
        positions[rows.start : rows.stop] = torch.arange(above, above + length)
    return positions.to(pack.input_ids.device).expand(3, -1)
