"""moe_route and moe_mlp inside transformers' mixture-of-experts models (5.17 and later).

Two ways in. Importing this module registers ``experts_implementation="prism"`` with transformers' ExpertsInterface: the
experts of any model with that interface, behind the model's own router. :func:`patch_moe` goes further where it knows
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

from prism_kernels.checks import wrong
from prism_kernels.dispatch import Impl
from prism_kernels.moe import RoutingStats, load_balancing_loss, moe_mlp, moe_route, plan_routing
from prism_kernels.moe.api import MLP

EXPERTS_IMPLEMENTATION = "prism"
Block = Any  # a module of transformers, with attributes that nn.Module does not declare

# Blocks of a softmax-then-top-k router and experts, nothing else; whether the router renormalises.
_FUSED_BLOCKS: dict[str, Callable[[Block], bool]] = {
    "Qwen3VLMoeTextSparseMoeBlock": lambda gate: True,
    "Qwen3MoeSparseMoeBlock": lambda gate: bool(gate.norm_topk_prob),
}


def experts_forward(
    experts: Block, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor, *, impl: str = "auto"
) -> Tensor:
    """ExpertsInterface function: hidden (T, H), index and weights (T, k) of the model's own router -> (T, H).

    Raises ValueError for experts that are not plain SwiGLU (biases, another activation, interleaved gates, a norm
    behind them) or that are split over ranks.
    """
    _require_swiglu(experts, type(experts).__name__)
    routing = plan_routing(top_k_index, top_k_weights, experts.gate_up_proj.shape[0], impl=impl)
    return moe_mlp(hidden, experts.gate_up_proj, experts.down_proj, routing, layout=_layout(experts), impl=impl)


ALL_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, experts_forward)


def patch_moe(model: nn.Module, *, load_balancing: bool | None = None, impl: str = "auto") -> MoePatch:
    """Run a transformers model's experts, and where known its router, on these kernels. Changes the model in place.

    >>> model = Qwen3VLMoeForConditionalGeneration.from_pretrained(path)
    >>> patch = patch_moe(model, load_balancing=True)
    >>> loss = model(**batch).loss + 0.001 * patch.load_balancing_loss()

    Args:
        model: a transformers model, or any module, with experts of the experts interface. Blocks of Qwen3-VL-MoE and
            Qwen3-MoE are replaced as a whole; other models keep their router and get the experts alone.
        load_balancing: whether a load-balancing loss will be used. None: what the model's configuration says
            (``output_router_logits``, transformers' own loss, which keeps working). If so, reentrant activation
            checkpointing is refused, now and when it is switched on, because it cuts that loss off its gradient.
        impl: implementation of the ops, as everywhere.

    Returns:
        The patch: statistics, the loss, ``remove()``.

    Raises:
        ValueError: no module, no experts in the model, experts that are not SwiGLU, an unknown ``impl``, or
            ``load_balancing=True`` for a model whose router is not replaced.
        RuntimeError: a load-balancing loss with reentrant activation checkpointing.
    """
    return MoePatch(model, load_balancing=load_balancing, impl=impl)


class _Chosen(NamedTuple):
    """What the recompute of a block must repeat."""

    expert_index: Tensor
    segment_kind: Tensor | None
    num_kinds: int
    with_logits: bool


class MoePatch:
    """A patched model; see :func:`patch_moe`. ``fused`` and ``experts_only``: module names of what was replaced.

    ``stats``: routing statistics of the last forward, one per fused block in the model's order. Copies and pickles of
    the model hold a patch of their own, without statistics: copy the patch, and its ``model`` is the model's copy.
    """

    def __init__(self, model: nn.Module, *, load_balancing: bool | None, impl: str):
        if not isinstance(model, nn.Module):
            raise wrong("model", "a torch module", type(model).__name__)
        if impl != Impl.AUTO and impl not in MLP.table:
            raise wrong("impl", f"auto or one of {', '.join(map(str, MLP.table))}", repr(impl))
        self.model, self.impl = model, impl
        self.fused, self.experts_only = _find_blocks(model)
        if load_balancing is None:
            load_balancing = self._configured_logits()
        elif load_balancing and not self.fused:
            raise ValueError(
                f"load_balancing: the router of {type(model).__name__} is not replaced, so there are no statistics; "
                "use the model's own loss (output_router_logits=True) and load_balancing=None"
            )
        self.load_balancing = load_balancing
        self.stats: list[RoutingStats | None] = [None] * len(self.fused)
        self._kind: tuple[Tensor | None, int] = (None, 0)
        self._logits_asked = self._configured_logits()
        self._reentrant = False
        self._record: list[_Chosen] | None = None
        self._replay: Iterator[_Chosen] | None = None
        module: Block
        for module in model.modules():  # before anything is changed, so that a refusal leaves the model as it was
            if getattr(module, "gradient_checkpointing", False):
                self._refuse_reentrant(module._gradient_checkpointing_func)
        self._install()

    @contextmanager
    def kinds(self, segment_kind: Tensor, num_kinds: int) -> Iterator[None]:
        """Count the statistics of forwards inside by kind: ``segment_kind`` in [0, num_kinds), one per token."""
        before, self._kind = self._kind, (segment_kind.flatten(), num_kinds)
        try:
            yield
        finally:
            self._kind = before

    def load_balancing_loss(self, kinds: Sequence[int] | None = None) -> Tensor:
        """The loss of the last forward over all fused blocks, a differentiable scalar; call it before the next forward.

        Args:
            kinds: count tokens of these kinds alone (all but padding, for instance). None: all.

        Raises:
            ValueError: kinds that the last forward did not count.
            RuntimeError: there was no forward, or it left no gradient where the router wants one.
        """
        layers = [stats for stats in self.stats if stats is not None]
        if not self.fused or len(layers) < len(self.fused):
            raise RuntimeError("load_balancing_loss: no forward of the patched model has run")
        block: Block = self.model.get_submodule(self.fused[0])
        gate = block.gate
        if torch.is_grad_enabled() and gate.weight.requires_grad and not layers[0].prob_sum.requires_grad:
            raise RuntimeError(
                "load_balancing_loss: the forward recorded no gradient (torch.no_grad, or reentrant activation "
                "checkpointing around the blocks); checkpoint with use_reentrant=False, or call it under torch.no_grad"
            )
        if kinds is not None:
            rows, known = list(kinds), len(layers[0].counts)
            if not all(isinstance(kind, int) and 0 <= kind < known for kind in rows):
                raise wrong("kinds", f"integers in [0, {known}), the kinds of the last forward", str(rows))
            layers = [RoutingStats(stats.counts[rows], stats.prob_sum[rows]) for stats in layers]
        return load_balancing_loss(layers, gate.top_k)

    def remove(self) -> None:
        """Put the model's own code back. Parameters stay as they are. A second call does nothing."""
        if not self._hooks:
            return
        for name in [*self.fused, *self.experts_only]:
            del self.model.get_submodule(name).forward
        module: Block
        for module in self.model.modules():
            wrapped = getattr(module, "_gradient_checkpointing_func", None)
            if isinstance(wrapped, _KeepExperts):
                module._gradient_checkpointing_func = wrapped.checkpoint
            vars(module).pop("_set_gradient_checkpointing", None)
        while self._hooks:
            self._hooks.pop().remove()

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: without the statistics of a forward, whose graph can be in neither."""
        return {**vars(self), "stats": [None] * len(self.fused), "_record": None, "_replay": None}

    def _install(self) -> None:
        block: Block
        module: Block
        for i, name in enumerate(self.fused):
            block = self.model.get_submodule(name)
            renormalize = _FUSED_BLOCKS[type(block).__name__](block.gate)
            block.forward = functools.partial(self._run_block, i, block, renormalize)
        for name in self.experts_only:
            module = self.model.get_submodule(name)
            module.forward = functools.partial(experts_forward, module, impl=self.impl)
        for module in self.model.modules():
            if getattr(module, "gradient_checkpointing", False):
                module._gradient_checkpointing_func = self._keep_experts(module._gradient_checkpointing_func)
            if hasattr(module, "_set_gradient_checkpointing"):  # the models inside it have the switch too
                module._set_gradient_checkpointing = functools.partial(self._set_checkpointing, module)
        self._hooks = [
            module.register_forward_pre_hook(self._before_forward, with_kwargs=True)
            for name, module in self.model.named_modules()
            if module is self.model or (hasattr(module, "config") and any(f.startswith(name + ".") for f in self.fused))
        ]

    def _set_checkpointing(
        self, module: Block, enable: bool = True, gradient_checkpointing_func: Callable | None = None, **others: Any
    ) -> Any:
        """In place of a model's method that switches activation checkpointing."""
        if gradient_checkpointing_func is not None:
            others["gradient_checkpointing_func"] = self._keep_experts(gradient_checkpointing_func)
        return type(module)._set_gradient_checkpointing(module, enable, **others)

    def _run_block(self, i: int, block: Block, renormalize: bool, hidden_states: Tensor) -> Tensor:
        """(..., H) -> (..., H), in place of the block's forward."""
        hidden = hidden_states.reshape(-1, hidden_states.shape[-1])
        if self._replay is not None:  # a recompute: the experts and kinds of the first pass
            index, kind, num_kinds, with_logits = next(self._replay)
        else:
            index, (kind, num_kinds), with_logits = None, self._kind, self._logits_asked
        if with_logits:  # transformers' own loss reads what the gate module returns
            chosen = block.gate(hidden)[2]
            index = chosen if index is None else index
        routing = moe_route(
            hidden,
            block.gate.weight,
            block.gate.top_k,
            renormalize=renormalize,
            segment_kind=kind,
            num_kinds=num_kinds,
            expert_index=index,
            impl=self.impl,
        )
        if self._replay is None:
            if self._record is not None:
                self._record.append(_Chosen(routing.expert_index.detach(), kind, num_kinds, with_logits))
            if torch._C._current_graph_task_id() == -1:  # else a recompute, of someone else's checkpointing
                self.stats[i] = routing.stats
        experts = block.experts
        layout = _layout(experts)
        out = moe_mlp(hidden, experts.gate_up_proj, experts.down_proj, routing, layout=layout, impl=self.impl)
        return out.view(hidden_states.shape)

    def _keep_experts(self, checkpoint: Callable) -> Callable:
        self._refuse_reentrant(checkpoint)
        self._reentrant = _is_reentrant(checkpoint)
        return _KeepExperts(self, checkpoint)

    def _refuse_reentrant(self, checkpoint: Callable) -> None:
        if self.load_balancing and _is_reentrant(checkpoint):
            raise RuntimeError(
                "patch_moe: reentrant activation checkpointing cuts the load-balancing loss off its gradient; use "
                "gradient_checkpointing_kwargs={'use_reentrant': False}, or patch_moe(..., load_balancing=False)"
            )

    def _configured_logits(self) -> bool:
        config: Any = getattr(self.model, "config", None)
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        return bool(getattr(text, "output_router_logits", False))

    def _before_forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Of the model, and of the models inside it, which may be called alone."""
        if module is self.model:  # they hold the graph of a forward that may have had no backward
            self.stats = [None] * len(self.fused)
        asked = kwargs.get("output_router_logits")
        if asked is None:
            if module is not self.model:
                return
            asked = self._configured_logits()
        self._logits_asked = bool(asked)
        if self._logits_asked and self._reentrant and module.training and torch.is_grad_enabled():
            raise RuntimeError(
                "output_router_logits: transformers' load-balancing loss has no gradient under reentrant activation "
                "checkpointing; use gradient_checkpointing_kwargs={'use_reentrant': False}"
            )


class _KeepExperts:
    """A checkpointing function every call of which recomputes with the experts of its first run."""

    def __init__(self, patch: MoePatch, checkpoint: Callable):
        self.patch, self.checkpoint = patch, checkpoint

    def __call__(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        chosen: list[_Chosen] = []
        patch = self.patch

        def run(*inner: Any, **named: Any) -> Any:
            before = patch._record, patch._replay
            patch._record, patch._replay = (None, iter(tuple(chosen))) if chosen else (chosen, None)
            try:
                return function(*inner, **named)
            finally:
                patch._record, patch._replay = before

        return self.checkpoint(run, *args, **kwargs)


def has_experts(model: nn.Module) -> bool:
    """Whether :func:`patch_moe` would find any."""
    return bool(_experts_of(model))


def _experts_of(model: nn.Module) -> dict[str, nn.Module]:
    experts = {}
    for name, module in model.named_modules():
        weights = [getattr(module, weight, None) for weight in ("gate_up_proj", "down_proj")]
        if all(isinstance(weight, Tensor) and weight.dim() == 3 for weight in weights):
            experts[name] = module
    return experts


def _find_blocks(model: nn.Module) -> tuple[list[str], list[str]]:
    """Names of (blocks to replace as a whole, experts to replace alone). Raises ValueError as patch_moe does."""
    experts = _experts_of(model)
    if not experts:
        raise ValueError(f"model: {type(model).__name__} has no experts, modules with 3-D gate_up_proj and down_proj")
    fused, alone = [], []
    for name, module in experts.items():
        _require_swiglu(module, name)
        block_name = name.rpartition(".")[0]
        block = model.get_submodule(block_name)
        if "forward" in vars(block) or "forward" in vars(module):
            raise ValueError(
                f"model: the forward of {name} is replaced already, by patch_moe or by someone's hooks (accelerate's "
                "device_map over several devices); remove() the first patch, or the hooks"
            )
        known = type(block).__name__ in _FUSED_BLOCKS
        (fused if known else alone).append(block_name if known else name)
    return fused, alone


def _require_swiglu(experts: nn.Module, name: str) -> None:
    """Raises ValueError where moe_mlp would compute something else than these experts."""
    apply_gate = getattr(type(experts), "_apply_gate", None)
    unlike = {
        "no experts interface": not hasattr(experts, "is_concatenated"),  # they may take other arguments
        "biases": getattr(experts, "has_bias", False),
        "no gate": not getattr(experts, "has_gate", True),
        "interleaved gate and up": not getattr(experts, "is_concatenated", True),
        "a norm behind the experts": getattr(experts, "has_post_expert_norm", False),
        "expert parallelism": getattr(experts, "_is_expert_parallel", False),
        "a gating function of their own": getattr(apply_gate, "__name__", "") not in ("", "_default_apply_gate"),
        "another activation than SiLU": type(getattr(experts, "act_fn", None)).__name__
        not in ("SiLU", "SiLUActivation"),
    }
    found = [what for what, there in unlike.items() if there]
    if found:
        raise ValueError(
            f"model: experts {name} have {', '.join(found)}; expected SwiGLU, silu(gate) * up, of one rank"
        )


def _layout(experts: nn.Module) -> str:
    """ "v4" where the weights are stored (E, H, 2I), (E, I, H)."""
    return "v4" if getattr(experts, "is_transposed", False) else "v5"


def _is_reentrant(checkpoint: Callable) -> bool:
    """Only a function that says use_reentrant=False is known not to be."""
    return getattr(checkpoint, "keywords", {}).get("use_reentrant", True) is not False
