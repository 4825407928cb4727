"""Who computes the six grouped products on a GPU: a table, a measured choice, and how to pin or restore it.

====== ============================================================== ================================
name   the products come from                                         runs on
====== ============================================================== ================================
torch  torch's grouped product (``torch._grouped_mm``)                bf16, sm_90 and sm_100, 16-byte rows
triton ours                                                           any dtype
loop   one library product per expert; reads E + 1 integers back      any dtype and device
====== ============================================================== ================================

``PRISM_GROUPED_MM=torch|triton|loop`` pins one. Otherwise the first call of a (GPU, dtype, E, H, I, layout) times all
that can run and keeps the fastest. Backends differ in the last bits, so a job of several processes does not measure:
it takes the first row that can run, unless :func:`load_product_choices` brought what one rank measured
(:func:`product_choices`), by broadcast or from a checkpoint. On a CPU the choice is fixed: ``loop``.
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

log = logging.getLogger("prism_kernels")

BACKENDS = ("torch", "triton", "loop")
_REPEATS = 7
_choices: dict[str, str] = {}


class Products(NamedTuple):
    """``rows(a (S, R), b (E, R, N), offset) -> (S, N)`` multiplies every row with its expert's matrix;
    ``outer(a (S, M), b (S, N), offset, out (E, M, N)) -> out`` is a^T b over an expert's rows, zeros where it has none.
    Rows are grouped by expert, offset is (E+1,) int32, b and out may have any strides."""

    name: str
    rows: Callable[[Tensor, Tensor, Tensor], Tensor]
    outer: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def product_choices() -> dict[str, str]:
    """{case: backend} of this process, for a broadcast from rank 0 and for the checkpoint."""
    return dict(_choices)


def load_product_choices(choices: Mapping[str, str]) -> None:
    """Take over the result of :func:`product_choices`. Raises ValueError for a backend that does not exist."""
    for case, name in choices.items():
        if name not in BACKENDS:
            raise ValueError(f"choices: unknown backend {name!r} of {case!r}; expected one of {', '.join(BACKENDS)}")
    _choices.update(choices)


def choose(hidden: Tensor, gate_up: Tensor, down: Tensor, top_k: int) -> Products:
    """The backend for these operands: pinned, loaded, measured before, or measured now."""
    pinned = os.environ.get("PRISM_GROUPED_MM", "")
    if pinned:
        if pinned not in BACKENDS:
            raise ValueError(f"PRISM_GROUPED_MM: got {pinned!r}, expected one of {', '.join(BACKENDS)}")
        reason = why_not(pinned, hidden, gate_up, down)
        if reason is not None:
            raise RuntimeError(f"PRISM_GROUPED_MM={pinned} cannot run: {reason}; unset it, or set it to 'loop'")
        return _load(pinned)
    if hidden.device.type == "cpu":
        return _load("loop")
    case = _case(hidden, gate_up, down)
    if case not in _choices:
        able = [name for name in BACKENDS if why_not(name, hidden, gate_up, down) is None]
        if torch.cuda.is_current_stream_capturing():
            return _load(able[0])  # a capture cannot be timed; not kept, so that a later call measures
        several = torch.distributed.is_available() and torch.distributed.is_initialized()
        if several and torch.distributed.get_world_size() > 1:
            _choices[case] = able[0]
            log.info("grouped products of %s: %s (several processes: not measured)", case, able[0])
        else:
            seconds = {name: _measure(_load(name), hidden, gate_up, down, top_k) for name in able}
            _choices[case] = min(seconds, key=seconds.get)
            figures = ", ".join(f"{name} {1e3 * value:.2f} ms" for name, value in seconds.items())
            log.info("grouped products of %s: %s (%s)", case, _choices[case], figures)
    return _load(_choices[case])


def why_not(name: str, hidden: Tensor, gate_up: Tensor, down: Tensor) -> str | None:
    """Why a backend cannot multiply these operands, or None."""
    if name != "torch":
        return None
    if _library_grouped() is None:
        return "this torch has no grouped product"
    if hidden.device.type != "cuda":
        return "it is for CUDA tensors"
    if hidden.dtype != torch.bfloat16:
        return f"it takes bfloat16, not {hidden.dtype}"
    if torch.cuda.get_device_capability(hidden.device)[0] not in (9, 10):
        # There torch itself loops over the experts and waits for the offsets (2.9 to 2.11): that is our "loop".
        return "torch has a kernel for compute capability 9 and 10 alone"
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


def _case(hidden: Tensor, gate_up: Tensor, down: Tensor) -> str:
    experts, width, inner = down.shape
    order = "v4" if gate_up.stride(1) == 1 else "v5"
    device = torch.cuda.get_device_name(hidden.device)
    return f"{device} {str(hidden.dtype).removeprefix('torch.')} E{experts} H{width} I{inner} {order}"


def _load(name: str) -> Products:
    if name == "triton":
        from prism_kernels.moe import triton_products

        return Products("triton", triton_products.rows, triton_products.outer)
    return _TABLE[name]


def _measure(products: Products, hidden: Tensor, gate_up: Tensor, down: Tensor, top_k: int) -> float:
    """Median seconds of the six products at these sizes, experts loaded evenly, random rows."""
    experts, width, inner = down.shape
    slots = hidden.shape[0] * top_k
    offset = torch.linspace(0, slots, experts + 1, device=hidden.device).int()
    random = torch.Generator(hidden.device).manual_seed(0)  # its own: a measurement must not move the program's
    x, d_product, activation = (
        torch.randn(slots, columns, device=hidden.device, dtype=hidden.dtype, generator=random)
        for columns in (width, 2 * inner, inner)
    )
    d_gate_up, d_down = torch.empty_like(gate_up), torch.empty_like(down)
    seconds = []
    for repeat in range(_REPEATS + 2):  # the first two compile and warm up
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        products.rows(x, gate_up.transpose(1, 2), offset)
        products.rows(activation, down.transpose(1, 2), offset)
        products.rows(x, down, offset)
        products.rows(d_product, gate_up, offset)
        products.outer(x, activation, offset, d_down)
        products.outer(d_product, x, offset, d_gate_up)
        end.record()
        end.synchronize()
        if repeat >= 2:
            seconds.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(seconds)


def _library_grouped() -> Callable | None:
    return getattr(torch.nn.functional, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)


def _torch_rows(a: Tensor, b: Tensor, offset: Tensor) -> Tensor:
    return _library_grouped()(a, b, offs=offset[1:])


def _torch_outer(a: Tensor, b: Tensor, offset: Tensor, out: Tensor) -> Tensor:
    """The library writes row-major results: the transposed product for a column-major ``out``, which is not written."""
    grouped = _library_grouped()
    from prism_kernels.moe.triton_products import clear_empty

    columns_first = out.stride(1) == 1 and out.stride(2) != 1
    result = grouped(b.T, a, offs=offset[1:]) if columns_first else grouped(a.T, b, offs=offset[1:])
    clear_empty(result, offset)  # what the library leaves where an expert has no rows is not specified
    return result.transpose(1, 2) if columns_first else result


def _loop_rows(a: Tensor, b: Tensor, offset: Tensor) -> Tensor:
    out = a.new_empty(a.shape[0], b.shape[2])
    for e, (first, last) in enumerate(pairwise(offset.tolist())):
        if first < last:
            torch.mm(a[first:last], b[e], out=out[first:last])
    return out


def _loop_outer(a: Tensor, b: Tensor, offset: Tensor, out: Tensor) -> Tensor:
    for e, (first, last) in enumerate(pairwise(offset.tolist())):
        if first < last:
            torch.mm(a[first:last].T, b[first:last], out=out[e])
        else:
            out[e].zero_()
    return out


_TABLE = {"torch": Products("torch", _torch_rows, _torch_outer), "loop": Products("loop", _loop_rows, _loop_outer)}
