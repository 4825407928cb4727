"""Who computes the six grouped products on a GPU: a table, a measured choice, and how to pin or restore it.

====== ============================================================== ================================
name   the products come from                                         runs on
====== ============================================================== ================================
torch  torch's grouped product (``torch._grouped_mm``)                bf16, sm_90 and sm_100, 16-byte rows
triton ours                                                           any dtype
loop   one library product per expert; reads E + 1 integers back      any dtype and device
====== ============================================================== ================================

``PRISM_GROUPED_MM=torch|triton|loop`` pins one. Otherwise the first call of a (GPU, dtype, E, H, I, layout) times all
that can run, at a size that depends on these alone, and keeps the fastest for every number of tokens. On a CPU the
choice is fixed: ``loop``.

Backends differ in the last bits, so a choice must not be made twice. :func:`product_choices` goes into a checkpoint,
:func:`load_product_choices` takes it back before the first step (``prism_fast.run`` does both). In a job of several
processes a call does not measure: every rank calls :func:`settle_products` for its experts before the first step, and
takes what rank 0 measured; without that it takes the first row of the table that can run.
"""

from __future__ import annotations

import logging
import os
import statistics
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from prism_kernels.dispatch import on_device_of

log = logging.getLogger("prism_kernels")

BACKENDS = ("torch", "triton", "loop")
MEASURED_SLOTS = 16384  # rows of a measurement: 8k tokens of two experts each
MEASURED_BYTES = 512 << 20  # and a bound of their operands and result, as a step's memory may be nearly full
_REPEATS = 7
_choices: dict[str, str] = {}


class Products(NamedTuple):
    """``rows(a (S, R), b (E, R, N), offset) -> (S, N)`` multiplies every row with its expert's matrix;
    ``outer(a (S, M), b (S, N), offset, like (E, M, N)) -> (E, M, N)``, strided as ``like``, is a^T b over an expert's
    rows, zeros where it has none. Rows are grouped by expert, offset is (E+1,) int32, b and like have any strides."""

    name: str
    rows: Callable[[Tensor, Tensor, Tensor], Tensor]
    outer: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def product_choices() -> dict[str, str]:
    """{case: backend} that this process measured or was given, for a checkpoint; without what the environment pins."""
    return dict(_choices)


def load_product_choices(choices: Mapping[str, str]) -> None:
    """Take over the result of :func:`product_choices`. Raises ValueError for a backend that does not exist."""
    for case, name in choices.items():
        if name not in BACKENDS:
            raise ValueError(f"choices: unknown backend {name!r} of {case!r}; expected one of {', '.join(BACKENDS)}")
    _choices.update(choices)


def settle_products(gate_up: Tensor, down: Tensor) -> None:
    """Measure now, and once for all ranks: rank 0's choices, loaded ones among them, become everybody's.

    A collective where torch.distributed has several processes: all call it, after :func:`load_product_choices` and
    before the first step. Nothing on a CPU but that broadcast, as there is nothing to choose.

    Args:
        gate_up, down: (E, 2I, H) and (E, H, I) with the strides of training (of layout "v4": transposed views).
    """
    several = _num_processes() > 1
    if gate_up.device.type != "cpu" and not (several and torch.distributed.get_rank()):
        case = _case(gate_up, down)
        if case not in _choices:
            _choices[case] = _fastest(case, gate_up, down)
    if several:
        box = [product_choices()]
        with on_device_of(gate_up):
            torch.distributed.broadcast_object_list(box, src=0)
        load_product_choices(box[0])


def choose(gate_up: Tensor, down: Tensor) -> Products:
    """The backend for experts (E, 2I, H) and (E, H, I): pinned, loaded, measured before, or measured now.

    Raises ValueError for an unknown PRISM_GROUPED_MM, RuntimeError for a pinned or loaded one that cannot run.
    """
    pinned = os.environ.get("PRISM_GROUPED_MM", "")
    if pinned:
        if pinned not in BACKENDS:
            raise ValueError(f"PRISM_GROUPED_MM: got {pinned!r}, expected one of {', '.join(BACKENDS)}")
        reason = why_not(pinned, gate_up, down)
        if reason is not None:
            raise RuntimeError(f"PRISM_GROUPED_MM={pinned} cannot run: {reason}; unset it, or set it to 'loop'")
        return _load(pinned)
    if gate_up.device.type == "cpu":
        return _load("loop")
    case = _case(gate_up, down)
    if case not in _choices:
        if torch.cuda.is_current_stream_capturing():
            return _load(_able(gate_up, down)[0])  # a capture cannot be timed; not kept, so that a later call measures
        if _num_processes() > 1:
            _choices[case] = _able(gate_up, down)[0]
            log.info(
                "grouped products of %s: %s (several processes: not measured, see settle_products)",
                case,
                _choices[case],
            )
        else:
            _choices[case] = _fastest(case, gate_up, down)
    reason = why_not(_choices[case], gate_up, down)
    if reason is not None:  # of a checkpoint that another torch wrote
        raise RuntimeError(
            f"grouped products of {case}: {_choices[case]!r}, chosen by an earlier run, cannot run: {reason}; "
            "other products would change bits: set PRISM_GROUPED_MM=loop to accept that"
        )
    return _load(_choices[case])


def why_not(name: str, gate_up: Tensor, down: Tensor) -> str | None:
    """Why a backend cannot multiply with these experts, or None."""
    if name != "torch":
        return None
    if _library_grouped() is None:
        return "this torch has no grouped product"
    if gate_up.device.type != "cuda":
        return "it is for CUDA tensors"
    if gate_up.dtype != torch.bfloat16:
        return f"it takes bfloat16, not {gate_up.dtype}"
    if torch.cuda.get_device_capability(gate_up.device)[0] not in (9, 10):
        # There torch itself loops over the experts and waits for the offsets (2.9 to 2.11): that is our "loop".
        return "torch has a kernel for compute capability 9 and 10 alone"
    return _unaligned(gate_up, down)


def _unaligned(gate_up: Tensor, down: Tensor) -> str | None:
    """Why the library's loads of 16 bytes do not fit, or None."""
    for label, weight in (("gate_up", gate_up), ("down", down)):
        steps = [step for step in weight.stride() if step != 1] + [
            weight.data_ptr() // weight.itemsize,
            *weight.shape[1:],
        ]
        if 1 not in weight.stride()[1:] or any(step * weight.itemsize % 16 for step in steps):
            return (
                f"{label} needs sizes and rows at multiples of 16 bytes, "
                f"got {tuple(weight.shape)} with strides {tuple(weight.stride())}"
            )
    return None


def _able(gate_up: Tensor, down: Tensor) -> list[str]:
    return [name for name in BACKENDS if why_not(name, gate_up, down) is None]


def _num_processes() -> int:
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if several else 1


def _case(gate_up: Tensor, down: Tensor) -> str:
    """What a choice is for. No number of tokens: the first pack of a run must not decide for all others."""
    experts, width, inner = down.shape
    order = "v4" if gate_up.stride(1) == 1 else "v5"
    odd = " unaligned" if _unaligned(gate_up, down) else ""
    device = torch.cuda.get_device_name(gate_up.device)
    return f"{device} {str(gate_up.dtype).removeprefix('torch.')} E{experts} H{width} I{inner} {order}{odd}"


def _load(name: str) -> Products:
    if name == "triton":
        from prism_kernels.moe import triton_products

        return Products("triton", triton_products.rows, triton_products.outer)
    return _TABLE[name]


def _fastest(case: str, gate_up: Tensor, down: Tensor) -> str:
    with on_device_of(gate_up):
        seconds = {name: _measure(_load(name), gate_up, down) for name in _able(gate_up, down)}
    chosen = min(seconds, key=seconds.get)
    figures = ", ".join(f"{name} {1e3 * value:.2f} ms" for name, value in seconds.items())
    log.info("grouped products of %s: %s (%s)", case, chosen, figures)
    return chosen


def _measured_slots(experts: int, width: int, inner: int, itemsize: int) -> int:
    """Rows of a measurement: a multiple of 128, or a row per expert where not even these fit the bound."""
    fitting = MEASURED_BYTES // (2 * max(width, 2 * inner) * itemsize)
    return max(experts, min(MEASURED_SLOTS, fitting) // 128 * 128)


@torch.no_grad()
def _measure(products: Products, gate_up: Tensor, down: Tensor) -> float:
    """Median seconds of the six products, experts loaded evenly, random rows.

    It takes MEASURED_BYTES, as the operands share their memory, and the gradient of one weight, which a step holds too.
    """
    experts, width, inner = down.shape
    slots, device = _measured_slots(experts, width, inner, down.itemsize), gate_up.device
    offset = torch.linspace(0, slots, experts + 1, device=device).int()
    random = torch.Generator(device).manual_seed(0)  # its own: a measurement must not move the program's
    shared = torch.randn(slots * max(width, 2 * inner), device=device, dtype=gate_up.dtype, generator=random)
    x, d_product, activation = (shared[: slots * columns].view(slots, columns) for columns in (width, 2 * inner, inner))
    seconds = []
    for repeat in range(_REPEATS + 2):  # the first two compile and warm up
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        products.rows(x, gate_up.transpose(1, 2), offset)
        products.rows(activation, down.transpose(1, 2), offset)
        products.rows(x, down, offset)
        products.rows(d_product, gate_up, offset)
        products.outer(x, activation, offset, down)
        products.outer(d_product, x, offset, gate_up)
        end.record()
        end.synchronize()
        if repeat >= 2:
            seconds.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(seconds)


def _library_grouped() -> Callable | None:
    return getattr(torch.nn.functional, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)


def _torch_rows(a: Tensor, b: Tensor, offset: Tensor) -> Tensor:
    return _library_grouped()(a, b, offs=offset[1:])


def _torch_outer(a: Tensor, b: Tensor, offset: Tensor, like: Tensor) -> Tensor:
    """The library allocates its result, row-major: for a column-major ``like`` it computes the transposed product."""
    grouped = _library_grouped()
    from prism_kernels.moe.triton_products import clear_empty

    columns_first = like.stride(1) == 1 and like.stride(2) != 1
    result = grouped(b.T, a, offs=offset[1:]) if columns_first else grouped(a.T, b, offs=offset[1:])
    clear_empty(result, offset)  # what the library leaves where an expert has no rows is not specified
    return result.transpose(1, 2) if columns_first else result


def _loop_rows(a: Tensor, b: Tensor, offset: Tensor) -> Tensor:
    out = a.new_empty(a.shape[0], b.shape[2])
    for e, (first, last) in enumerate(pairwise(offset.tolist())):
        if first < last:
            torch.mm(a[first:last], b[e], out=out[first:last])
    return out


def _loop_outer(a: Tensor, b: Tensor, offset: Tensor, like: Tensor) -> Tensor:
    out = torch.empty_like(like)
    for e, (first, last) in enumerate(pairwise(offset.tolist())):
        if first < last:
            torch.mm(a[first:last].T, b[first:last], out=out[e])
        else:
            out[e].zero_()
    return out


_TABLE = {"torch": Products("torch", _torch_rows, _torch_outer), "loop": Products("loop", _loop_rows, _loop_outer)}
