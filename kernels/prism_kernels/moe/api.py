"""The contract: arguments, checks, dispatch. Dimensions: T tokens, H hidden, E experts, k per token, I intermediate."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from prism_kernels.checks import (
    FLOATING,
    INTEGER,
    check_count,
    check_device,
    check_tensor,
    describe,
    flag,
    integer,
    one_of,
    wrong,
)
from prism_kernels.dispatch import Impl, Implementation, Op, need_triton, on_device_of
from prism_kernels.moe import operators
from prism_kernels.moe.checks import check_indices, check_plan
from prism_kernels.moe.routing import Experts, RouteArguments, Routing

_PACKAGE = "prism_kernels.moe"
MAX_KINDS = MAX_EXPERTS = 1 << 16


def _op(name: str, triton_module: str) -> Op:
    return Op(
        name,
        [
            Implementation(Impl.TRITON, f"{_PACKAGE}.{triton_module}:{name}", ("cuda",), need_triton, fake=True),
            Implementation(Impl.CPU, f"{_PACKAGE}.cpu:{name}", ("cpu",)),
            Implementation(Impl.REFERENCE, f"{_PACKAGE}.reference:{name}", ("cpu", "cuda")),
        ],
    )


ROUTE = _op("moe_route", "triton_route")
PLAN = _op("plan_routing", "triton_plan")
MLP = _op("moe_mlp", "triton_mlp")


def moe_route(
    hidden: Tensor,
    router_weight: Tensor,
    top_k: int,
    *,
    renormalize: bool = True,
    segment_kind: Tensor | None = None,
    num_kinds: int = 0,
    expert_index: Tensor | None = None,
    impl: str = "auto",
) -> Routing:
    """Choose ``top_k`` experts per token, plan the grouping of slots by expert, and count loads by kind of token.

    Equals, in fp32 (fp64 for fp64 hidden states)::

        probability = (hidden.float() @ router_weight.float().T).softmax(-1)
        weight, expert_index = probability.topk(top_k)              # ties to the lowest index
        weight = weight / weight.sum(-1, keepdim=True)              # renormalize
        token_order = expert_index.flatten().argsort(stable=True)

    ``weight`` and ``stats.prob_sum`` are differentiable in ``hidden`` and ``router_weight``. Autocast changes nothing.

    Args:
        hidden: (T, H) floating; T = 0 works.
        router_weight: (E, H) floating, its dtype may differ from that of ``hidden``.
        top_k: experts per token, 1 to E.
        renormalize: make the weights of a token sum to 1.
        segment_kind: (T,) integer, kind of every token in [0, num_kinds); values outside raise on a CPU, and count in
            no kind on a GPU, where reading them would synchronise.
        num_kinds: rows of the statistics. 0: one row for all tokens, ``segment_kind`` is not read.
        expert_index: (T, k) int32 or int64: take these experts (of an earlier call) instead of choosing. Activation
            recompute needs it, as a near tie may fall the other way the second time. Values outside [0, E) raise on a
            CPU and are undefined on a GPU.
        impl: "auto", "reference", "cpu" or "triton".

    Raises:
        ValueError: an argument of another shape, dtype, device or value; names it.
        RuntimeError: ``impl`` cannot run here.
    """
    return _route(hidden, router_weight, top_k, renormalize, segment_kind, num_kinds, expert_index, impl)[0]


def moe_route_through(
    hidden: Tensor,
    router_weight: Tensor,
    top_k: int,
    *,
    renormalize: bool = True,
    segment_kind: Tensor | None = None,
    num_kinds: int = 0,
    expert_index: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Routing, Tensor]:
    """:func:`moe_route`, and ``hidden`` for :func:`moe_mlp`: the same values, whose gradient goes through the router's
    backward, which adds its own where it computes it. Otherwise autograd reads both parts again and writes their sum,
    which torch.compile still does.

    >>> routing, hidden = moe_route_through(hidden, router_weight, 2)
    >>> out = moe_mlp(hidden, gate_up, down, routing)
    """
    return _route(hidden, router_weight, top_k, renormalize, segment_kind, num_kinds, expert_index, impl)


def _route(
    hidden: Tensor,
    router_weight: Tensor,
    top_k: int,
    renormalize: bool,
    segment_kind: Tensor | None,
    num_kinds: int,
    expert_index: Tensor | None,
    impl: str,
) -> tuple[Routing, Tensor]:
    check_tensor("hidden", hidden, {"T": None, "H": None}, FLOATING)
    check_tensor("router_weight", router_weight, {"E": None, "H": hidden.shape[1]}, FLOATING)
    check_device("router_weight", router_weight, "hidden", hidden)
    tokens, experts = hidden.shape[0], router_weight.shape[0]
    if not experts:
        raise wrong("router_weight", "E >= 1 rows", describe(router_weight))
    top_k, num_kinds = integer("top_k", top_k, 1, experts), integer("num_kinds", num_kinds, 0, MAX_KINDS)
    check_count("hidden", "slots T*top_k", tokens * top_k)
    if num_kinds:
        if segment_kind is None:
            raise wrong("num_kinds", "0, or segment_kind too", f"{num_kinds} and segment_kind None")
        _check_index("segment_kind", segment_kind, {"T": tokens}, "hidden", hidden)
    if expert_index is not None:
        _check_index("expert_index", expert_index, {"T": tokens, "top_k": top_k}, "hidden", hidden)
    arguments = RouteArguments(
        top_k,
        flag("renormalize", renormalize),
        segment_kind if num_kinds else None,
        num_kinds=max(num_kinds, 1),
        expert_index=expert_index,
    )
    check_indices(experts, expert_index, arguments.segment_kind, num_kinds)
    chosen, run = ROUTE.select(impl, hidden.device, hidden, router_weight)
    if _by_operator(hidden) and chosen != Impl.REFERENCE:
        return operators.moe_route(hidden, router_weight, arguments, str(chosen)), hidden
    with on_device_of(hidden), _no_autocast(hidden.device):
        return run(hidden, router_weight, arguments)


def plan_routing(expert_index: Tensor, weight: Tensor, num_experts: int, *, impl: str = "auto") -> Routing:
    """A :class:`Routing` for experts that another router chose: what :func:`moe_mlp` needs, without statistics.

    Args:
        expert_index: (T, k) int32 or int64 in [0, E); values outside raise on a CPU and are undefined on a GPU.
        weight: (T, k) floating, passed through.
        num_experts: E.
        impl: "auto", "reference", "cpu" or "triton".

    Returns:
        Routing with ``stats`` None.

    Raises:
        ValueError: an argument of another shape, dtype, device or value; names it.
        RuntimeError: ``impl`` cannot run here.
    """
    num_experts = integer("num_experts", num_experts, 1, MAX_EXPERTS)
    check_tensor("weight", weight, {"T": None, "k": None}, FLOATING)
    dims = {"T": weight.shape[0], "k": weight.shape[1]}
    _check_index("expert_index", expert_index, dims, "weight", weight)
    if weight.shape[1] < 1:
        raise wrong("weight", "k >= 1 experts per token", describe(weight))
    check_count("expert_index", "slots T*k", expert_index.numel())
    check_indices(num_experts, expert_index)
    chosen, run = PLAN.select(impl, weight.device, expert_index)
    if _by_operator(weight) and chosen != Impl.REFERENCE:
        token_order, expert_offset = operators.plan(expert_index, num_experts, str(chosen))
        return Routing(expert_index.int(), weight, token_order, expert_offset, None)
    with on_device_of(weight):
        token_order, expert_offset = run(expert_index, num_experts)
        return Routing(expert_index.int(), weight, token_order, expert_offset, None)


def moe_mlp(
    hidden: Tensor, gate_up: Tensor, down: Tensor, routing: Routing, *, layout: str = "v5", impl: str = "auto"
) -> Tensor:
    """SwiGLU experts of a routed layer: ``out[t] = sum_j weight[t, j] * MLP_{expert_index[t, j]}(hidden[t])``.

    With ``gate, up = (gate_up[e] @ x).chunk(2)``, ``MLP_e(x) = down[e] @ (silu(gate) * up)`` (layout "v5").
    Differentiable in hidden, gate_up, down and ``routing.weight``. The same inputs give the same bits, in forward and
    backward. Under autocast, hidden, gate_up and down are cast as for a matrix product.

    Args:
        hidden: (T, H) floating; T = 0 works.
        gate_up: "v5": (E, 2I, H), "v4": (E, H, 2I), [gate | up] along 2I, dtype of ``hidden``. Strided views are
            read in place.
        down: "v5": (E, H, I), "v4": (E, I, H), dtype of ``hidden``.
        routing: of :func:`moe_route`, for these T tokens and E experts.
        layout: "v5" (transformers 5) or "v4" (transformers 4 and the released discriminators).
        impl: "auto", "reference", "cpu" or "triton".

    Returns:
        (T, H) in the dtype of ``hidden``.

    Raises:
        ValueError: an argument of another shape, dtype, device or value; names it.
        RuntimeError: ``impl`` cannot run here.
    """
    check_tensor("hidden", hidden, {"T": None, "H": None}, FLOATING)
    one_of("layout", layout, ("v5", "v4"))
    result = hidden.dtype
    hidden, gate_up, down = _autocast(hidden, gate_up, down)
    width = hidden.shape[1]
    shapes = {"v5": ("E, 2I, H", "E, H, I"), "v4": ("E, H, 2I", "E, I, H")}[layout]
    for name, weight, shape in (("gate_up", gate_up, shapes[0]), ("down", down, shapes[1])):
        check_tensor(name, weight, dict.fromkeys(shape.split(", ")), (hidden.dtype,), f"layout is {layout!r}")
        check_device(name, weight, "hidden", hidden)
    if layout == "v4":
        gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
    experts, intermediate = down.shape[0], down.shape[2]
    if gate_up.shape != (experts, 2 * intermediate, width) or down.shape[1] != width:
        given = [tuple((w.transpose(1, 2) if layout == "v4" else w).shape) for w in (gate_up, down)]
        raise wrong(
            "gate_up, down",
            f"({shapes[0]}) and ({shapes[1]}) with H = {width} for layout {layout!r}",
            f"{given[0]} and {given[1]}",
            "is it the other layout?",
        )
    _check_routing(routing, hidden, experts)
    chosen, run = MLP.select(impl, hidden.device, hidden, gate_up, down, routing.weight)
    plan = {"token_order": routing.token_order.int(), "expert_offset": routing.expert_offset.int()}
    if _by_operator(hidden) and chosen != Impl.REFERENCE:
        return operators.moe_mlp(Experts(hidden, gate_up, down, routing.weight, **plan), str(chosen)).to(result)
    with on_device_of(hidden), _no_autocast(hidden.device):
        return run(hidden, gate_up, down, routing._replace(**plan)).to(result)


def _by_operator(tensor: Tensor) -> bool:
    """torch.compile does not look into kernels, and tensors without storage have nothing to launch one on."""
    return torch.compiler.is_compiling() or tensor.is_meta


def _autocasts(device: torch.device) -> bool:
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def _no_autocast(device: torch.device) -> AbstractContextManager:
    """Off, as products with an ``out`` refuse it, and the router is fp32 by contract."""
    return torch.autocast(device.type, enabled=False) if _autocasts(device) else nullcontext()


def _autocast(hidden: Tensor, *weights: Tensor) -> list[Tensor]:
    """The operands in autocast's dtype where it is on; fp64 is left alone, as everywhere under autocast."""
    dtype = torch.get_autocast_dtype(hidden.device.type) if _autocasts(hidden.device) else None
    return [
        x.to(dtype) if dtype and isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64 else x
        for x in (hidden, *weights)
    ]


def _check_index(name: str, value: Tensor, dims: dict[str, int], peer: str, like: Tensor) -> None:
    """Integers on the device of ``like``."""
    check_tensor(name, value, dims, INTEGER)
    check_device(name, value, peer, like)


def _check_routing(routing: Routing, hidden: Tensor, experts: int) -> None:
    if not isinstance(routing, Routing):
        raise wrong("routing", "the Routing of moe_route", type(routing).__name__)
    index, order, offset = routing.expert_index, routing.token_order, routing.expert_offset
    check_tensor("routing.expert_index", index, {"T": hidden.shape[0], "k": None}, INTEGER)
    check_count("routing.expert_index", "slots T*k", index.numel())
    check_tensor("routing.weight", routing.weight, {"T": hidden.shape[0], "k": index.shape[1]}, FLOATING)
    check_tensor("routing.token_order", order, {"T*k": index.numel()}, INTEGER)
    check_tensor("routing.expert_offset", offset, {"E + 1": experts + 1}, INTEGER, "E is that of gate_up")
    for name in ("expert_index", "weight", "token_order", "expert_offset"):
        check_device(f"routing.{name}", getattr(routing, name), "hidden", hidden)
    if index.shape[1] < 1:
        raise wrong("routing.expert_index", "k >= 1 experts per token", describe(index))
    check_plan(order, offset, index)
