"""The contract: arguments, checks, dispatch. Dimensions: T tokens, H hidden, E experts, k per token, I intermediate."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from prism_kernels.dispatch import Impl, Implementation, Op, need_triton, on_device_of
from prism_kernels.moe.routing import RouteArguments, Routing, as_integer

_PACKAGE = "prism_kernels.moe"
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def _op(name: str, triton_module: str) -> Op:
    return Op(
        name,
        [
            Implementation(Impl.TRITON, f"{_PACKAGE}.{triton_module}:{name}", ("cuda",), need_triton),
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
    _check_matrix("hidden", hidden, "(T, H)")
    _check_matrix("router_weight", router_weight, f"(E, H = {hidden.shape[1]})")
    if router_weight.shape[1] != hidden.shape[1] or router_weight.shape[0] < 1:
        raise ValueError(f"router_weight: expected (E >= 1, H = {hidden.shape[1]}), got {_describe(router_weight)}")
    _check_device("router_weight", router_weight, hidden)
    tokens, experts = hidden.shape[0], router_weight.shape[0]
    top_k, num_kinds = as_integer("top_k", top_k), as_integer("num_kinds", num_kinds)
    if not 1 <= top_k <= experts:
        raise ValueError(f"top_k: expected 1 to E = {experts}, the rows of router_weight, got {top_k}")
    if num_kinds < 0 or (num_kinds > 0 and segment_kind is None):
        raise ValueError(
            f"num_kinds: expected 0, or the number of kinds together with segment_kind, got {num_kinds} "
            f"and segment_kind {'None' if segment_kind is None else _describe(segment_kind)}"
        )
    if num_kinds > 0:
        _check_integer("segment_kind", segment_kind, (tokens,), "(T,)", hidden, num_kinds, "num_kinds")
    if expert_index is not None:
        _check_integer("expert_index", expert_index, (tokens, top_k), "(T, top_k)", hidden, experts, "E")
    arguments = RouteArguments(
        top_k, renormalize, segment_kind if num_kinds else None, num_kinds=max(num_kinds, 1), expert_index=expert_index
    )
    _, run = ROUTE.select(impl, hidden.device)
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
    num_experts = as_integer("num_experts", num_experts)
    if num_experts < 1:
        raise ValueError(f"num_experts: expected E >= 1, got {num_experts}")
    _check_matrix("weight", weight, "(T, k)")
    _check_integer("expert_index", expert_index, tuple(weight.shape), "(T, k)", weight, num_experts, "num_experts")
    _, run = PLAN.select(impl, weight.device)
    with on_device_of(weight):
        return Routing(expert_index.int(), weight, *run(expert_index, num_experts), None)


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
    _check_matrix("hidden", hidden, "(T, H)")
    if layout not in ("v5", "v4"):
        raise ValueError(f"layout: expected 'v5' or 'v4', got {layout!r}")
    result = hidden.dtype
    hidden, gate_up, down = _autocast(hidden, gate_up, down)
    width = hidden.shape[1]
    shapes = {"v5": ("(E, 2I, H)", "(E, H, I)"), "v4": ("(E, H, 2I)", "(E, I, H)")}[layout]
    for name, weight, shape in (("gate_up", gate_up, shapes[0]), ("down", down, shapes[1])):
        if not isinstance(weight, Tensor) or weight.dim() != 3:
            raise ValueError(f"{name}: expected {shape} for layout {layout!r}, got {_describe(weight)}")
        if weight.dtype != hidden.dtype:
            raise ValueError(f"{name}: expected {hidden.dtype}, the dtype of hidden, got {_describe(weight)}")
        _check_device(name, weight, hidden)
    if layout == "v4":
        gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
    experts, intermediate = down.shape[0], down.shape[2]
    if gate_up.shape != (experts, 2 * intermediate, width) or down.shape[1] != width:
        given = [tuple((w.transpose(1, 2) if layout == "v4" else w).shape) for w in (gate_up, down)]
        raise ValueError(
            f"gate_up, down: expected {shapes[0]} and {shapes[1]} with H = {width} for layout {layout!r}, "
            f"got {given[0]} and {given[1]}; is it the other layout?"
        )
    _check_routing(routing, hidden, experts)
    _, run = MLP.select(impl, hidden.device)
    with on_device_of(hidden), _no_autocast(hidden.device):
        plan = {"token_order": routing.token_order.int(), "expert_offset": routing.expert_offset.int()}
        return run(hidden, gate_up, down, routing._replace(**plan)).to(result)


def _autocasts(device: torch.device) -> bool:
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def _no_autocast(device: torch.device) -> AbstractContextManager:
    """Off, as products with an ``out`` refuse it, and the router is fp32 by contract."""
    return torch.autocast(device.type, enabled=False) if _autocasts(device) else nullcontext()


def _autocast(hidden: Tensor, *weights: Tensor) -> list[Tensor]:
    """The operands in autocast's dtype where it is on; fp64 is left alone, as everywhere under autocast."""
    dtype = torch.get_autocast_dtype(hidden.device.type) if _autocasts(hidden.device) else None
    return [
        x.to(dtype) if dtype and x.is_floating_point() and x.dtype != torch.float64 else x for x in (hidden, *weights)
    ]


def _describe(tensor: object) -> str:
    if not isinstance(tensor, Tensor):
        return f"no tensor but {type(tensor).__name__}"
    return f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"


def _check_matrix(name: str, tensor: Tensor, shape: str) -> None:
    if not isinstance(tensor, Tensor) or tensor.dim() != 2 or not tensor.is_floating_point():
        raise ValueError(f"{name}: expected floating {shape}, got {_describe(tensor)}")


def _check_device(name: str, tensor: Tensor, hidden: Tensor) -> None:
    if tensor.device != hidden.device:
        raise ValueError(f"{name}: expected a tensor on {hidden.device}, where its peers are, got {_describe(tensor)}")


def _check_integer(
    name: str, tensor: Tensor, shape: tuple[int, ...], dims: str, hidden: Tensor, limit: int, limit_name: str
) -> None:
    if not isinstance(tensor, Tensor) or tensor.dtype not in _INTEGERS or tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: expected integer {dims} = {shape}, got {_describe(tensor)}")
    _check_device(name, tensor, hidden)
    if tensor.device.type == "cpu" and tensor.numel():
        low, high = (int(bound) for bound in tensor.aminmax())
        if low < 0 or high >= limit:
            raise ValueError(f"{name}: expected values in [0, {limit_name} = {limit}), got {low} to {high}")


def _check_routing(routing: Routing, hidden: Tensor, experts: int) -> None:
    if not isinstance(routing, Routing):
        raise ValueError(f"routing: expected the Routing of moe_route, got {type(routing).__name__}")
    tokens = hidden.shape[0]
    index, weight = routing.expert_index, routing.weight
    if not (isinstance(index, Tensor) and isinstance(weight, Tensor) and weight.is_floating_point()) or (
        index.dim() != 2 or index.shape[0] != tokens or weight.shape != index.shape
    ):
        raise ValueError(
            f"routing: expected expert_index and weight (T = {tokens}, k), the weight floating, "
            f"got {_describe(index)}, {_describe(weight)}"
        )
    order, offset = routing.token_order, routing.expert_offset
    for name, tensor, size, dims in (
        ("expert_offset", offset, experts + 1, f"(E + 1,) = ({experts + 1},) of gate_up's experts"),
        ("token_order", order, index.numel(), f"(T*k,) = ({index.numel()},)"),
    ):
        if not isinstance(tensor, Tensor) or tensor.dtype not in _INTEGERS or tuple(tensor.shape) != (size,):
            raise ValueError(f"routing: expected {name} {dims} int32, got {_describe(tensor)}")
    for tensor in (index, weight, order, offset):
        _check_device("routing", tensor, hidden)
    if hidden.device.type == "cpu" and order.numel():
        edges = offset.tolist()
        low, high = (int(bound) for bound in order.aminmax())
        if edges != sorted(edges) or (edges[0], edges[-1]) != (0, len(order)) or low < 0 or high >= len(order):
            raise ValueError(
                f"routing: expected expert_offset rising from 0 to T*k = {len(order)} and token_order in [0, T*k), "
                f"got {edges} and {low} to {high}"
            )
