"""Which backend of grouped_gemm.py computes the experts' GEMMs: pinned, measured, saved, settled over ranks.

``PRISM_GROUPED_MM=torch|triton|loop`` pins one. Otherwise GPU, dtype and alignment decide: where the library's grouped
GEMM serves, it is taken. Where it does not, the first call of a (GPU, dtype, E, H, I, layout) times the others, at a
size that depends on these alone, and keeps the fastest for every number of tokens. On a CPU it is ``loop``.

Backends differ in the last bits, so a choice must not be made twice. :func:`product_choices` goes into a checkpoint,
:func:`load_product_choices` takes it back before the first step. In a job of several
processes a call does not measure: every rank calls :func:`settle_products` for its experts before the first step,
and takes what rank 0 measured; without that it takes the first row of the table that can run.
"""

from __future__ import annotations

import json
import logging
import os
import statistics
from collections.abc import Mapping

import torch
from torch import Tensor

from prism_kernels.checks import wrong
from prism_kernels.dispatch import on_device_of
from prism_kernels.moe.grouped_gemm import BACKENDS, GroupedGemm, able, load, unaligned, why_not

log = logging.getLogger("prism_kernels")

MEASURED_SLOTS = 16384  # rows of a measurement: 8k tokens of two experts each
MEASURED_BYTES = 512 << 20  # and a bound of their operands and result, as a step's memory may be nearly full
_REPEATS = 7
_choices: dict[str, str] = {}


def product_choices() -> dict[str, str]:
    """{case: backend} that this process measured or was given, for a checkpoint; without what the environment pins."""
    return dict(_choices)


def load_product_choices(choices: Mapping[str, str]) -> None:
    """Take over the result of :func:`product_choices`. Raises ValueError for a backend that does not exist."""
    for case, name in choices.items():
        if name not in BACKENDS:
            raise wrong("choices", f"one of {', '.join(BACKENDS)}", f"{name!r} of {case!r}")
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
        with on_device_of(gate_up):
            load_product_choices(_from_first(product_choices(), gate_up.device))


def _from_first(choices: dict[str, str], gpu: torch.device) -> dict[str, str]:
    """Rank 0's: as JSON in a tensor, since nothing is unpickled; on the GPU where the group has no way for hosts."""
    device = "cpu" if "cpu:" in torch.distributed.get_backend_config() else gpu
    text = torch.frombuffer(bytearray(json.dumps(choices).encode()), dtype=torch.uint8).to(device)
    size = torch.tensor([text.numel()], device=device)
    torch.distributed.broadcast(size, src=0)
    sent = text if torch.distributed.get_rank() == 0 else torch.empty(int(size), dtype=torch.uint8, device=device)
    torch.distributed.broadcast(sent, src=0)
    return json.loads(sent.cpu().numpy().tobytes())


def choose(gate_up: Tensor, down: Tensor) -> GroupedGemm:
    """The backend for experts (E, 2I, H) and (E, H, I): pinned, loaded, measured before, or measured now.

    Raises ValueError for an unknown PRISM_GROUPED_MM, RuntimeError for a pinned or loaded one that cannot run.
    """
    pinned = os.environ.get("PRISM_GROUPED_MM", "")
    if pinned:
        if pinned not in BACKENDS:
            raise wrong("PRISM_GROUPED_MM", f"one of {', '.join(BACKENDS)}", repr(pinned))
        reason = why_not(pinned, gate_up, down)
        if reason is not None:
            raise RuntimeError(f"PRISM_GROUPED_MM={pinned} cannot run: {reason}; unset it, or set it to 'loop'")
        return load(pinned)
    if gate_up.device.type == "cpu":
        return load("loop")
    case = _case(gate_up, down)
    if case not in _choices:
        if torch.cuda.is_current_stream_capturing():
            return load(able(gate_up, down)[0])  # a capture cannot be timed; not kept, so that a later call measures
        if _num_processes() > 1:
            _choices[case] = able(gate_up, down)[0]
            log.info(
                "grouped GEMMs of %s: %s (several processes: not measured, see settle_products)",
                case,
                _choices[case],
            )
        else:
            _choices[case] = _fastest(case, gate_up, down)
    reason = why_not(_choices[case], gate_up, down)
    if reason is not None:  # of a checkpoint that another torch wrote
        raise RuntimeError(
            f"grouped GEMMs of {case}: {_choices[case]!r}, chosen by an earlier run, cannot run: {reason}; "
            "another backend would change bits: set PRISM_GROUPED_MM=loop to accept that"
        )
    return load(_choices[case])


def _num_processes() -> int:
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if several else 1


def _case(gate_up: Tensor, down: Tensor) -> str:
    """What a choice is for. No number of tokens: the first pack of a run must not decide for all others."""
    experts, width, intermediate = down.shape
    order = "v4" if gate_up.stride(1) == 1 else "v5"
    odd = " unaligned" if unaligned(gate_up, down) else ""
    device = torch.cuda.get_device_name(gate_up.device)
    return f"{device} {str(gate_up.dtype).removeprefix('torch.')} E{experts} H{width} I{intermediate} {order}{odd}"


def _fastest(case: str, gate_up: Tensor, down: Tensor) -> str:
    """The library's where it serves; of the others the fastest."""
    if why_not("torch", gate_up, down) is None:
        log.info("grouped GEMMs of %s: torch", case)
        return "torch"
    with on_device_of(gate_up):
        seconds = {name: _measure(load(name), gate_up, down) for name in able(gate_up, down)}
    chosen = min(seconds, key=seconds.__getitem__)
    figures = ", ".join(f"{name} {1e3 * value:.2f} ms" for name, value in seconds.items())
    log.info("grouped GEMMs of %s: %s (%s)", case, chosen, figures)
    return chosen


def _measured_slots(experts: int, width: int, intermediate: int, itemsize: int) -> int:
    """Rows of a measurement: a multiple of 128, or a row per expert where not even these fit the bound."""
    fitting = MEASURED_BYTES // (2 * max(width, 2 * intermediate) * itemsize)
    return max(experts, min(MEASURED_SLOTS, fitting) // 128 * 128)


@torch.no_grad()
def _measure(gemm: GroupedGemm, gate_up: Tensor, down: Tensor) -> float:
    """Median seconds of the six GEMMs, experts loaded evenly, random rows.

    It takes MEASURED_BYTES, as the operands share their memory, and the gradient of one weight, which a step holds too.
    """
    experts, width, intermediate = down.shape
    slots, device = _measured_slots(experts, width, intermediate, down.itemsize), gate_up.device
    offset = torch.linspace(0, slots, experts + 1, device=device).int()
    random = torch.Generator(device).manual_seed(0)  # its own: a measurement must not move the program's
    shared = torch.randn(slots * max(width, 2 * intermediate), device=device, dtype=gate_up.dtype, generator=random)
    columns = width, 2 * intermediate, intermediate
    x, d_product, activation = (shared[: slots * size].view(slots, size) for size in columns)
    seconds = []
    for repeat in range(_REPEATS + 2):  # the first two compile and warm up
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        gemm.rows(x, gate_up.transpose(1, 2), offset)
        gemm.rows(activation, down.transpose(1, 2), offset)
        gemm.rows(x, down, offset)
        gemm.rows(d_product, gate_up, offset)
        gemm.outer(x, activation, offset, down)
        gemm.outer(d_product, x, offset, gate_up)
        end.record()
        end.synchronize()
        if repeat >= 2:
            seconds.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(seconds)
