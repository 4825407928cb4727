"""Qwen3-VL-MoE with a scalar head on a PackedTree: the discriminator."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Qwen3VLMoeForConditionalGeneration

from prism_fast.models.backbone import embed, image_tokens, load_model, local_directory
from prism_fast.models.checkpoint_layouts import HEAD_FILE, HEAD_KEYS, read_head, settle_square_experts
from prism_fast.models.norm import rms_norm, rms_norm_rotate
from prism_fast.pack import KIND_NAMES
from prism_fast.records import DataError, PackedTree
from prism_kernels import RoutingStats, moe_mlp, moe_route, tree_attention


@dataclass(frozen=True)
class Judgement:
    """``score`` (branches,) fp32: head of the hidden state at each branch's last token, in stream order.
    ``stats``: routing statistics of every layer (kinds of pack.KIND_NAMES)."""

    score: Tensor
    stats: list[RoutingStats]


class Discriminator(nn.Module):
    """``forward(pack)`` scores every branch of a packed tree in one pass (PRISM, the adversarial stage).

    In the last layer only the read-out rows need queries, experts, norm and head. With ``balance=True`` (warm-up) its
    router still sees every row, because the load-balancing loss does.
    """

    def __init__(self, model: Qwen3VLMoeForConditionalGeneration, head: Tensor, *, dropout: float = 0.0):
        super().__init__()
        self.model = model
        self.head = nn.Parameter(head.detach().float().reshape(-1).to(model.device))
        self.dropout = dropout
        self.image = image_tokens(model.config)
        self.top_k = model.config.text_config.num_experts_per_tok
        self.checkpointing, self.use_reentrant = False, False
        if not model.config.text_config.tie_word_embeddings:
            model.lm_head.requires_grad_(False)
        for i, layer in enumerate(model.model.language_model.layers):
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
        model = load_model(Qwen3VLMoeForConditionalGeneration, path, "qwen3_vl_moe", dtype, device)
        settle_square_experts(model, path)
        head = read_head(path)
        if head.numel() != model.config.text_config.hidden_size:
            raise DataError(
                f"{path}: value head of {tuple(head.shape)}, expected (1, {model.config.text_config.hidden_size})"
            )
        return cls(model, head, dropout=dropout)

    def checkpoint_activations(self, *, use_reentrant: bool = False) -> None:
        """Every layer recomputes its activations in the backward; gradients stay the same, the routing loss's too."""
        self.checkpointing, self.use_reentrant = True, use_reentrant

    def freeze(self, *, vision: bool = False, embeddings: bool = False) -> None:
        if vision:
            self.model.model.visual.requires_grad_(False)
        if embeddings:
            self.model.get_input_embeddings().requires_grad_(False)

    def forward(self, pack: PackedTree, *, balance: bool = False, text_positions: bool = False) -> Judgement:
        """``text_positions``: 1-D positions instead of multimodal ones (as the reference aligns)."""
        text = self.model.model.language_model
        hidden, deepstack = embed(self.model.model, pack)
        hidden = hidden[0]
        positions = _one_dimensional(pack) if text_positions else pack.position_ids
        cos, sin = (x[0] for x in text.rotary_emb(hidden[None], positions[:, None]))
        stats = []
        last = len(text.layers) - 1
        for i, layer in enumerate(text.layers):
            chosen: list[Tensor] = []  # the experts of the first pass, for the recompute
            run = _last_block if i == last else _block
            arguments = (hidden, layer, cos, sin, pack, self.top_k, balance, chosen)
            if self.checkpointing and torch.is_grad_enabled():
                if self.use_reentrant and not hidden.requires_grad:
                    raise RuntimeError(
                        "checkpoint_activations: reentrant checkpointing gives no gradient where a layer's input has "
                        "none (embeddings and vision tower are frozen); use use_reentrant=False"
                    )
                hidden, counts, prob_sum = checkpoint(run, *arguments, use_reentrant=self.use_reentrant)
            else:
                hidden, counts, prob_sum = run(*arguments)
            stats.append(RoutingStats(counts, prob_sum))
            if i < len(deepstack) and i != last:
                hidden = hidden.index_add(0, pack.image_row, deepstack[i].to(hidden.dtype))
        hidden = _norm(text.norm, hidden).float()
        if self.dropout and self.training:
            hidden = nn.functional.dropout(hidden, self.dropout)
        return Judgement(hidden @ self.head, stats)

    def save(self, path: str | Path) -> None:
        """A Hugging Face directory; the head lies beside the model in ``value_head.safetensors``."""
        self.model.save_pretrained(path)
        save_file({HEAD_KEYS[0]: self.head.detach().reshape(1, -1).cpu().contiguous()}, Path(path) / HEAD_FILE)


def _heads(layer: nn.Module, normed: Tensor, cos: Tensor, sin: Tensor, *names: str) -> list[Tensor]:
    """Projections of (T, H) as (T, heads, D), queries and keys normalised and rotated."""
    attention = layer.self_attn
    out = []
    for name in names:
        x = getattr(attention, f"{name}_proj")(normed).view(normed.shape[0], -1, attention.head_dim)
        if name != "v":
            norm = getattr(attention, f"{name}_norm")
            x = rms_norm_rotate(x, norm.weight, norm.variance_epsilon, cos, sin)
        out.append(x)
    return out


def _norm(module: nn.Module, hidden: Tensor) -> Tensor:
    return rms_norm(hidden, module.weight, module.variance_epsilon)


def _experts(layer: nn.Module, hidden: Tensor, kind: Tensor, top_k: int, chosen: list[Tensor]):
    """hidden + MoE(norm(hidden)), and the routing. A recompute takes the experts of the first pass from ``chosen``."""
    normed = _norm(layer.post_attention_layernorm, hidden)
    routing = moe_route(
        normed,
        layer.mlp.gate.weight,
        top_k,
        segment_kind=kind,
        num_kinds=len(KIND_NAMES),
        expert_index=chosen[0] if chosen else None,
    )
    if not chosen:
        chosen.append(routing.expert_index.detach())
    experts = layer.mlp.experts
    return hidden + moe_mlp(normed, experts.gate_up_proj, experts.down_proj, routing), routing


def _block(hidden, layer, cos, sin, pack: PackedTree, top_k: int, balance: bool, chosen: list[Tensor]):
    """One decoder layer: hidden (T, H) -> hidden (T, H), counts and prob_sum (kinds, E).

    What the load-balancing loss needs is an output, so that it keeps its gradient under activation checkpointing.
    """
    q, k, v = _heads(layer, _norm(layer.input_layernorm, hidden), cos, sin, "q", "k", "v")
    attended = tree_attention(q, k, v, pack.layout, scale=layer.self_attn.scaling)
    hidden = hidden + layer.self_attn.o_proj(attended.flatten(1))
    hidden, routing = _experts(layer, hidden, pack.segment_kind, top_k, chosen)
    return hidden, routing.stats.counts, routing.stats.prob_sum


def _last_block(hidden, layer, cos, sin, pack: PackedTree, top_k: int, balance: bool, chosen: list[Tensor]):
    """The last decoder layer at the read-out rows: (T, H) -> (branches, H). Keys and values need every row."""
    rows = pack.readout_row
    normed = _norm(layer.input_layernorm, hidden)
    k, v = _heads(layer, normed, cos, sin, "k", "v")
    if balance:
        (q,) = _heads(layer, normed, cos, sin, "q")
        attended = tree_attention(q, k, v, pack.layout, scale=layer.self_attn.scaling)
        every = hidden + layer.self_attn.o_proj(attended.flatten(1))
        kinds = len(KIND_NAMES)
        whole = moe_route(
            _norm(layer.post_attention_layernorm, every),
            layer.mlp.gate.weight,
            top_k,
            segment_kind=pack.segment_kind,
            num_kinds=kinds,
            expert_index=chosen[1] if chosen else None,
        )
        read, _ = _experts(layer, every[rows], pack.segment_kind[rows], top_k, chosen)
        if len(chosen) == 1:
            chosen.append(whole.expert_index.detach())
        return read, whole.stats.counts, whole.stats.prob_sum
    (q,) = _heads(layer, normed[rows], cos[rows], sin[rows], "q")
    attended = tree_attention(q, k, v, pack.layout, scale=layer.self_attn.scaling, query_row=rows)
    read = hidden[rows] + layer.self_attn.o_proj(attended.flatten(1))
    read, routing = _experts(layer, read, pack.segment_kind[rows], top_k, chosen)
    return read, routing.stats.counts, routing.stats.prob_sum


def _one_dimensional(pack: PackedTree) -> Tensor:
    """(3, T): positions that count tokens and ignore image grids."""
    layout = pack.layout
    positions = torch.empty(pack.num_tokens, dtype=torch.int64)
    for segment, length in enumerate(layout.lengths):
        above = sum(layout.lengths[s] for s in layout.ancestors(segment))
        rows = layout.rows(segment)
        positions[rows.start : rows.stop] = torch.arange(above, above + length)
    return positions.to(pack.input_ids.device).expand(3, -1)
