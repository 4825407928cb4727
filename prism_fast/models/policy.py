"""Qwen3-VL on a PackedTree: the policy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Qwen3VLForConditionalGeneration

from prism_fast.models.backbone import TreeModel, load_model, save_model
from prism_fast.models.blocks import Attend, Recompute
from prism_fast.records import PackedTree


class LMHead(nn.Linear):
    """The LM head, through which the fused ops reach its weight.

    ``head(hidden, op, ...)`` is ``op(hidden, weight, ...)``: the call is a module's, so hooks that gather a sharded
    weight run where it is read.
    """

    def forward(self, hidden: Tensor, op: Callable | None = None, *args, **kwargs):
        return super().forward(hidden) if op is None else op(hidden, self.weight, *args, **kwargs)


class Policy(TreeModel):
    """A Qwen3-VL whose forward takes a PackedTree and whose head is left to the fused ops.

    ``forbidden``: token ids that are never sampled (placeholders, padding); ``words``: tokens that the tokenizer knows,
    where the embedding has more rows. The policy is the distribution over the other tokens, in the sampler and in the
    trainer alike: all ops that read its logits are given :attr:`allowed`.
    """

    def __init__(
        self, model: Qwen3VLForConditionalGeneration, forbidden: tuple[int, ...] = (), words: int | None = None
    ):
        super().__init__(model, on_cpu="reference")  # the bits of transformers' own forward
        model.lm_head.__class__ = LMHead  # in place: the weight may be tied to the embeddings
        self.forbidden = tuple(sorted(set(forbidden)))
        self.words: int = self.model.config.text_config.vocab_size if words is None else words

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
        model = load_model(Qwen3VLForConditionalGeneration, path, "qwen3_vl", dtype, device, words=words)
        return cls(model, forbidden, words)

    @property
    def head(self) -> Tensor:
        """(V, H) weight of the LM head."""
        return self.model.lm_head.weight

    @property
    def allowed(self) -> dict[str, Any]:
        """What the LM head's ops and `sample_tokens` take to give the other tokens probability 0."""
        return {"forbidden": self.forbidden, "vocab_size": self.words}

    def may_sample(self, ids: Tensor) -> bool:
        """Whether the policy gives all of these (n,) tokens a probability."""
        barred = torch.isin(ids, torch.tensor(self.forbidden, dtype=torch.int64, device=ids.device))
        return bool(((ids >= 0) & (ids < self.words) & ~barred).all())

    def checkpoint_activations(self) -> None:
        """Layers and vision blocks recompute their activations in the backward; gradients stay the same."""
        self.recompute = Recompute()
        self.visual._set_gradient_checkpointing(
            True, partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        )

    def forward(self, pack: PackedTree, *, op: Callable | None = None, attend: Attend | None = None, **kwargs):
        """Hidden states behind the last norm, (T, H); with ``op``, what this LM-head op makes of them.

        ``op`` is one of prism_kernels', called as ``op(hidden (R, H), head weight (V, H), targets (R,), **kwargs)``
        with the R predicted tokens of the pack. The head is the last thing inside this call, so that whoever shards
        weights has it gathered. ``attend``: what the rows see, by default the pack's tree.
        """
        hidden, _ = self.hidden_states(pack, attend=attend)
        if op is None:
            if kwargs:
                raise TypeError(f"Policy: got {', '.join(kwargs)} without an op that takes them; pass op=")
            return hidden
        return self.model.lm_head(hidden[pack.predict_row], op, pack.target_ids, **kwargs)

    def save(self, path: str | Path, weights: Mapping[str, Tensor] | None = None) -> None:
        """A Hugging Face directory; ``weights``: see `save_model`."""
        save_model(self, path, weights)
