"""moe_route and moe_mlp inside transformers' mixture-of-experts models (5.17 and later).

Two ways in. Importing this module registers ``experts_implementation="prism"`` with transformers' ExpertsInterface:
the experts of any model with that interface, its own router before them. :func:`patch_moe` goes further where it knows
the router: one block with the fused router and experts, statistics by kind of token, a load-balancing loss with its
gradient, and the same experts on activation recompute. Parameters keep their names, shapes and modules, so checkpoints
load and save as before.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from prism_kernels.moe import RoutingStats, load_balancing_loss, moe_mlp, moe_route, plan_routing

EXPERTS_IMPLEMENTATION = "prism"

# Blocks whose router is softmax over all experts, then top-k, and whether it renormalises; nothing else in the block.
_FUSED_BLOCKS: dict[str, Callable[[nn.Module], bool]] = {
    "Qwen3VLMoeTextSparseMoeBlock": lambda gate: True,
    "Qwen3MoeSparseMoeBlock": lambda gate: bool(gate.norm_topk_prob),
}


class _Chosen(NamedTuple):
    """What a recompute of a block must repeat."""

    expert_index: Tensor
    segment_kind: Tensor | None
    num_kinds: int
    with_logits: bool


def experts_forward(experts: nn.Module, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """ExpertsInterface function: hidden (T, H), index and weights (T, k) of the model's own router -> (T, H).

    Raises ValueError for experts that are not plain SwiGLU (biases, another activation, interleaved gates, a norm
    behind the experts) or that are split over ranks.
    """
    _require_swiglu(experts)
    routing = plan_routing(top_k_index, top_k_weights, experts.gate_up_proj.shape[0])
    return moe_mlp(hidden, experts.gate_up_proj, experts.down_proj, routing, layout=_layout(experts))


ALL_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, experts_forward)


def patch_moe(model: nn.Module, *, load_balancing: bool | None = None, impl: str = "auto") -> MoePatch:
    """Run a transformers model's experts, and where known its router, on these kernels. Changes the model in place.

    Args:
        model: a ``PreTrainedModel`` with the experts interface. Blocks of Qwen3-VL-MoE and Qwen3-MoE are replaced as
            a whole; other models keep their router and get the experts alone.
        load_balancing: whether :meth:`MoePatch.load_balancing_loss` will be used. None: what the model's configuration
            says (``output_router_logits``). Then reentrant activation checkpointing is refused, now and later,
            because it cuts the gradient of what a block hands out on the side.
        impl: implementation of both ops, as everywhere.

    Returns:
        The patch: statistics, the loss, and ``remove()``.

    Raises:
        ValueError: no experts in the model, experts that are not SwiGLU, or load_balancing on a model whose router
            is not replaced.
        RuntimeError: load_balancing with reentrant activation checkpointing.
    """
    return MoePatch(model, load_balancing=load_balancing, impl=impl)


class MoePatch:
    """A patched model; see :func:`patch_moe`. ``fused`` and ``experts_only``: module names of what was replaced."""

    def __init__(self, model: nn.Module, *, load_balancing: bool | None, impl: str):
        self.model = model
        self.impl = impl
        self.stats: list[RoutingStats | None] = []  # of the last forward, by fused block
        self._kind: tuple[Tensor | None, int] = (None, 0)
        self._replay: Iterator[_Chosen] | None = None
        self._record: list[_Chosen] | None = None
        self._logits_asked = False
        experts = {
            name: m for name, m in model.named_modules() if hasattr(m, "gate_up_proj") and hasattr(m, "down_proj")
        }
        experts = {
            name: m
            for name, m in experts.items()
            if m.gate_up_proj.__class__ is nn.Parameter and m.gate_up_proj.dim() == 3
        }
        if not experts:
            raise ValueError(f"model: {type(model).__name__} has no experts with gate_up_proj and down_proj (E, ...)")
        for name, module in experts.items():
            _require_swiglu(module, name)
        blocks = {name.rpartition(".")[0] for name in experts}
        self.fused = [name for name in blocks if type(model.get_submodule(name)).__name__ in _FUSED_BLOCKS]
