"""The decoder layers of policy and discriminator: Hugging Face's modules, weights and names with forwards of our own.

:func:`own_layers` gives the modules of a loaded text model their classes here, in place: state_dict, ties, loading and
saving stay Hugging Face's. A weight is read inside the call of the module that owns it, and all of a layer's inside the
layer's, so that whoever shards weights gathers them by module hooks: :class:`TreeLayer` is the unit of one piece.

Dimensions: T rows (tokens of a pack, or one token per response), H hidden, Hq and Hkv heads of D, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.models.qwen3_vl import modeling_qwen3_vl as dense
from transformers.models.qwen3_vl_moe import modeling_qwen3_vl_moe as sparse

from prism_fast.pack import KIND_NAMES
from prism_kernels import (
    QueryRows,
    Routing,
    RoutingStats,
    TreeLayout,
    moe_mlp,
    qk_norm_rotate,
    rms_norm,
    swiglu,
    tree_attention,
)
from prism_kernels.moe import moe_route_through
from prism_kernels.rms_norm import rms_norm_rotate


class Attend(Protocol):
    """What the rows of a pass see: q (T or Q, Hq, D), k and v (T, Hkv, D) of layer ``layer`` -> as q.

    ``query_row`` (Q,): the rows that the queries are of; None: all.
    """

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float, query_row: QueryRows | None
    ) -> Tensor: ...


def attend_tree(layout: TreeLayout) -> Attend:
    """A token sees the segments above its own and, causally, its own."""
    return lambda layer, q, k, v, *, scale, query_row: tree_attention(q, k, v, layout, scale=scale, query_row=query_row)


@dataclass(frozen=True)
class ReadOut:
    """Only these rows go on behind the last layer; keys and values need all of them.

    ``balance``: its router still sees every row, because the load-balancing loss does.
    """

    rows: QueryRows  # (Q,)
    balance: bool = False


@dataclass(frozen=True)
class Recompute:
    """Activation checkpointing of a pass. Nothing in a layer draws random numbers: generators are not kept for it."""

    use_reentrant: bool = False


class Chosen(nn.Module):
    """A module whose op has several implementations, which differ in their last bits.

    ``on_cpu``: the one that the model asks for there. "reference" has the bits of transformers' modules; "auto" takes
    what keeps and moves least, and is what ``PRISM_IMPL`` steers. Off a CPU all take "auto".
    """

    on_cpu: str

    def impl(self, x: Tensor) -> str:
        return self.on_cpu if x.device.type == "cpu" else "auto"


class Norm(Chosen):
    """RMSNorm, with the residual sum before it, or with what follows it in the same step."""

    weight: Tensor
    variance_epsilon: float

    def forward(self, x: Tensor, op: Callable[..., Any] | None = None, *, residual: Tensor | None = None) -> Any:
        """x (T, H) -> as x; with ``residual`` (T, H): (the norm of the sum, the sum).

        ``op``: what is called as ``op(x, weight, eps, impl)`` instead, whose result is returned.
        """
        if op is not None:
            return op(x, self.weight, self.variance_epsilon, self.impl(x))
        return rms_norm(x, self.weight, self.variance_epsilon, residual=residual, impl=self.impl(x))


class Attention(nn.Module):
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear
    q_norm: Norm
    k_norm: Norm
    head_dim: int
    scaling: float
    layer_idx: int

    def forward(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], attend: Attend, *, rows: QueryRows | None, order: str
    ) -> Tensor:
        """x (T, H) -> (T, H), or at ``rows`` (Q,) -> (Q, H).

        ``order``: "qkv" or "kvq", which projection runs first. The last one's gradient is the first that x gets, and a
        sum of three depends on its order.
        """
        heads = {name: self._heads(name, x if name != "q" or rows is None else x[rows.row]) for name in order}
        q, k, v = (heads[name] for name in "qkv")
        if rows is None:
            q, k = self._rotated(q, k, rotation)
        else:
            turn = rotation[0][rows.row], rotation[1][rows.row]
            q, k = self._rotated_alone(self.q_norm, q, turn), self._rotated_alone(self.k_norm, k, rotation)
        out = attend(self.layer_idx, q, k, v, scale=self.scaling, query_row=rows)
        return self.o_proj(out.flatten(1))

    def _heads(self, name: str, x: Tensor) -> Tensor:
        """Projection as (T, heads, D)."""
        return getattr(self, f"{name}_proj")(x).view(x.shape[0], -1, self.head_dim)

    def _rotated(self, q: Tensor, k: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Queries and keys of the same rows, normalised and rotated in one step, inside the calls of both norms."""

        def step(q: Tensor, q_weight: Tensor, eps: float, impl: str) -> tuple[Tensor, Tensor]:
            return self.k_norm(
                k, lambda k, k_weight, *_: qk_norm_rotate(q, k, q_weight, k_weight, *rotation, eps, impl=impl)
            )

        return self.q_norm(q, step)

    def _rotated_alone(self, norm: Norm, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        return norm(x, lambda x, weight, eps, impl: rms_norm_rotate(x, weight, *rotation, eps, impl=impl))


class MLP(Chosen):
    gate_proj: nn.Linear
    up_proj: nn.Linear
    down_proj: nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), up=self.up_proj(x), impl=self.impl(x)))


class Router(nn.Module):
    weight: Tensor  # (E, H)
    top_k: int

    def forward(self, x: Tensor, kind: Tensor | None, expert_index: Tensor | None) -> tuple[Routing, Tensor]:
        """x (T, H), kind (T,) of pack.KIND_NAMES; ``expert_index``: the experts to take instead of choosing. With the
        routing comes x, for the experts: the router adds to its gradient."""
        return moe_route_through(
            x,
            self.weight,
            self.top_k,
            segment_kind=kind,
            num_kinds=len(KIND_NAMES),
            expert_index=expert_index,
        )


class Experts(nn.Module):
    gate_up_proj: Tensor  # (E, 2I, H)
    down_proj: Tensor  # (E, H, I)

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        return moe_mlp(x, self.gate_up_proj, self.down_proj, routing)


class SparseMLP(nn.Module):
    gate: Router
    experts: Experts

    def forward(self, x: Tensor, kind: Tensor | None, expert_index: Tensor | None) -> tuple[Tensor, Routing]:
        routing, x = self.gate(x, kind, expert_index)
        return self.experts(x, routing), routing


class TreeLayer(nn.Module):
    """One decoder layer, with a dense MLP or with experts."""

    input_layernorm: Norm
    self_attn: Attention
    post_attention_layernorm: Norm
    mlp: MLP | SparseMLP

    def forward(
        self,
        hidden: Tensor,
        rotation: tuple[Tensor, Tensor],
        attend: Attend,
        kind: Tensor | None = None,
        read: ReadOut | None = None,
        chosen: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, ...]:
        """hidden (T, H) -> (hidden,), or of a layer with experts (hidden, counts, prob_sum), RoutingStats of ``kind``
        (T,). With ``read``, hidden is (Q, H).

        What the load-balancing loss needs is an output, so that it keeps its gradient under activation checkpointing.
        ``chosen`` is filled with the experts of the first run; a recompute given the same takes them again, as a near
        tie may fall the other way.
        """
        sparse = self.mlp if isinstance(self.mlp, SparseMLP) else None
        balance = sparse is not None and read is not None and read.balance
        rows = None if read is None or balance else read.rows
        normed = self.input_layernorm(hidden)
        attended = self.self_attn(normed, rotation, attend, rows=rows, order="qkv" if read is None else "kvq")
        residual = hidden if rows is None else hidden[rows.row]
        normed, hidden = self.post_attention_layernorm(attended, residual=residual)
        if sparse is None:
            return (hidden + self.mlp(normed),)
        chosen = {} if chosen is None else chosen
        whole = None
        if read is not None and read.balance:
            whole, _ = sparse.gate(normed, kind, chosen.get("every"))
            chosen.setdefault("every", whole.expert_index.detach())
            hidden = hidden[read.rows.row]
            normed = self.post_attention_layernorm(hidden)
        kind = kind if read is None or kind is None else kind[read.rows.row]
        out, routing = sparse(normed, kind, chosen.get("taken"))
        chosen.setdefault("taken", routing.expert_index.detach())
        stats = (routing if whole is None else whole).stats
        return hidden + out, stats.counts, stats.prob_sum


OURS = {
    dense.Qwen3VLTextDecoderLayer: TreeLayer,
    dense.Qwen3VLTextAttention: Attention,
    dense.Qwen3VLTextRMSNorm: Norm,
    dense.Qwen3VLTextMLP: MLP,
    sparse.Qwen3VLMoeTextDecoderLayer: TreeLayer,
    sparse.Qwen3VLMoeTextAttention: Attention,
    sparse.Qwen3VLMoeTextRMSNorm: Norm,
    sparse.Qwen3VLMoeTextMLP: MLP,
    sparse.Qwen3VLMoeTextSparseMoeBlock: SparseMLP,
    sparse.Qwen3VLMoeTextTopKRouter: Router,
    sparse.Qwen3VLMoeTextExperts: Experts,
}


class TextModel(Protocol):
    """What a pass needs of transformers' text model."""

    embed_tokens: nn.Embedding
    rotary_emb: nn.Module
    layers: nn.ModuleList
    norm: Norm

    def modules(self) -> Iterator[nn.Module]: ...


def own_layers(text: TextModel, *, on_cpu: str) -> None:
    """Gives the modules of a Qwen3-VL(-MoE) text model their classes here; ``on_cpu``: see :class:`Chosen`.

    In place: weights may be tied, sharded or on a device already. Raises TypeError on a layer that it does not know.
    """
    for module in text.modules():
        module.__class__ = OURS.get(type(module), type(module))
        if isinstance(module, Chosen):
            module.on_cpu = on_cpu
    for i, layer in enumerate(text.layers):
        if not isinstance(layer, TreeLayer):
            raise TypeError(f"layer {i}: got {type(layer).__name__}, expected a decoder layer of Qwen3-VL(-MoE)")


def run_layers(
    text: TextModel,
    hidden: Tensor,
    positions: Tensor,
    attend: Attend,
    *,
    image: tuple[Tensor, Sequence[Tensor]] | None = None,
    kind: Tensor | None = None,
    read: ReadOut | None = None,
    recompute: Recompute | None = None,
) -> tuple[Tensor, tuple[RoutingStats, ...]]:
    """Embeddings -> the hidden states behind the last norm, and the routing statistics of the layers with experts.

    hidden (T, H); positions (3, T) int64: t, h, w; ``image``: (rows (image tokens,) int64, DeepStack features
    (image tokens, H) that are added there behind the first layers); kind (T,): see :class:`Router`. Returns (T, H), or
    with ``read`` (Q, H).
    """
    cos, sin = text.rotary_emb(hidden[None], positions[:, None])
    rotation = cos[0], sin[0]
    image_row, deepstack = image or (positions[0, :0], ())
    stats = []
    for i, layer in enumerate(text.layers):
        last = read if i == len(text.layers) - 1 else None
        arguments = (rotation, attend, kind, last, {})
        hidden, *routing = _run(layer, hidden, arguments, recompute)
        if routing:
            stats.append(RoutingStats(*routing))
        if i < len(deepstack) and last is None:
            hidden = hidden.index_add(0, image_row, deepstack[i].to(hidden.dtype))
    return text.norm(hidden), tuple(stats)


def _run(layer: nn.Module, hidden: Tensor, arguments: tuple, recompute: Recompute | None) -> tuple[Tensor, ...]:
    if recompute is None or not torch.is_grad_enabled():
        return layer(hidden, *arguments)
    if recompute.use_reentrant and not hidden.requires_grad:
        raise RuntimeError(
            "checkpoint_activations: reentrant checkpointing gives no gradient where a layer's input has none "
            "(embeddings and vision tower are frozen); use use_reentrant=False"
        )
    return checkpoint(layer, hidden, *arguments, use_reentrant=recompute.use_reentrant, preserve_rng_state=False)
