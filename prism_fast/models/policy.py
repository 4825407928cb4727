"""Qwen3-VL on a PackedTree: the policy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import Qwen3VLForConditionalGeneration

from prism_fast.models.backbone import embed, image_tokens, load_model
from prism_fast.records import PackedTree


class LMHead(nn.Linear):
    """The LM head, through which the fused ops reach its weight.

    ``head(hidden, op, ...)`` is ``op(hidden, weight, ...)``: the call is a module's, so hooks that gather a sharded
    weight run where it is read.
    """

    def forward(self, hidden: Tensor, op: Callable | None = None, *args, **kwargs):
        return super().forward(hidden) if op is None else op(hidden, self.weight, *args, **kwargs)


class Policy(nn.Module):
    """A Qwen3-VL whose forward takes a PackedTree and whose head is left to the fused ops.

    ``forbidden``: token ids that are never sampled (placeholders, padding); ``words``: tokens that the tokenizer knows,
    where the embedding has more rows. The policy is the distribution over the other tokens, in the sampler and in the
    trainer alike: ``bias`` adds -1e9 to the logits of these.
    """

    def __init__(
        self, model: Qwen3VLForConditionalGeneration, forbidden: tuple[int, ...] = (), words: int | None = None
    ):
        super().__init__()
        self.model = model
        model.lm_head.__class__ = LMHead  # in place: the weight may be tied to the embeddings
        self.image = image_tokens(model.config)
        bias = torch.zeros(model.config.text_config.vocab_size, dtype=torch.float32, device=model.device)
        bias[list(forbidden)] = -1e9
        if words is not None:
            bias[words:] = -1e9
        self.register_buffer("bias", bias, persistent=False)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        forbidden: tuple[int, ...] = (),
        words: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Policy:
        """Opens a Hugging Face Qwen3-VL directory (safetensors). Raises DataError on another architecture."""
        return cls(load_model(Qwen3VLForConditionalGeneration, path, "qwen3_vl", dtype, device), forbidden, words)

    @property
    def head(self) -> Tensor:
        """(V, H) weight of the LM head."""
        return self.model.lm_head.weight

    def through_head(self, op: Callable, hidden: Tensor, *args, **kwargs):
        """``op(hidden, head weight, ...)`` with one of prism_kernels' LM-head ops."""
        return self.model.lm_head(hidden, op, *args, **kwargs)

    def checkpoint_activations(self) -> None:
        self.model.gradient_checkpointing_enable({"use_reentrant": False})

    def freeze(self, *, vision: bool = False, embeddings: bool = False) -> None:
        """Takes the vision tower, or the token embeddings (and a head tied to them), out of training."""
        if vision:
            self.model.model.visual.requires_grad_(False)
        if embeddings:
            self.model.get_input_embeddings().requires_grad_(False)

    def forward(self, pack: PackedTree, prism=None, past_key_values=None) -> Tensor:
        """Hidden states after the last norm, (T, H). ``prism``: what attention sees, by default the pack's layout."""
        hidden, deepstack = embed(self.model.model, pack)
        rows = torch.zeros(1, pack.num_tokens, dtype=torch.bool, device=hidden.device)
        rows[0, pack.image_row] = True
        text_positions = torch.arange(pack.num_tokens, device=hidden.device)[None]
        output = self.model.model.language_model(
            inputs_embeds=hidden,
            position_ids=torch.cat([text_positions, pack.position_ids])[:, None],
            visual_pos_masks=rows if deepstack else None,
            deepstack_visual_embeds=deepstack or None,
            use_cache=False,
            prism=pack.layout if prism is None else prism,
        )
        return output.last_hidden_state[0]

    def save(self, path: str | Path) -> None:
        self.model.save_pretrained(path, safe_serialization=True)
