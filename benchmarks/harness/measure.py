"""Time, memory and machine limits: how a number is taken. What is compared with what is in op.py and steps/step.py."""

from __future__ import annotations

import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

Call = Callable[[], object]
Samples = dict[str, list[float]]  # seconds of every round, by name

FLUSH_BYTES = 512 << 20  # several times any L2; writing it also gives the host time to enqueue what is timed next
PATIENCE_SECONDS = 10  # what takes longer says so beforehand
CPU_SAMPLE_SECONDS = 2e-3  # shorter calls are repeated within one sample of a CPU's clock
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}


class Unavailable(RuntimeError):
    """A contender cannot run here; the message is the reason that its row shows ("not installed", "needs a GPU")."""


@dataclass(frozen=True)
class Summary:
    """Median and quartiles of one contender's samples, seconds."""

    median: float
    low: float  # first quartile
    high: float  # third quartile
    samples: int

    @classmethod
    def of(cls, values: list[float]) -> Summary:
        """Raises ValueError for no values."""
        if not values:
            raise ValueError("values: expected at least one sample, got none")
        single = len(values) == 1
        low, median, high = values * 3 if single else statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high, len(values))


class Timer:
    """Seconds of one call. On a GPU: CUDA events, the L2 cache flushed before each; on a CPU: perf_counter, or
    (``busy``) what the process itself had of a machine that others use."""

    def __init__(self, device: torch.device, busy: bool = False):
        self.device = device
        self.clock = time.process_time if busy else time.perf_counter
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device) if device.type == "cuda" else None

    def once(self, call: Call, repeats: int = 1) -> float:
        if self.flush is None:
            start = self.clock()
            for _ in range(repeats):
                call()
            return (self.clock() - start) / repeats
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def repeats(self, call: Call) -> int:
        """Calls within one sample: on a CPU so many that a sample is well above the clock's resolution."""
        if self.flush is not None:
            return 1
        return max(1, min(1000, round(CPU_SAMPLE_SECONDS / max(self.once(call), 1e-7))))


def interleave(
    calls: Mapping[str, Call],
    timer: Timer,
    seconds: float,
    rounds: int | None = None,
    warmups: int = 2,
    keep: Callable[[Samples, dict[str, str]], object] | None = None,
) -> tuple[Samples, dict[str, str]]:
    """({name: seconds of every round}, {name: why it stopped}): all contenders in turn, so that drift hits all alike.

    Every second round runs in reverse order. ``rounds``: default as many as fit ``seconds``, 5 to 100. A contender that
    raises leaves; what it had measured by then is dropped. ``keep`` has both after every round: what is interrupted
    later has measured that much.
    """
    alive, failed, repeats = dict(calls), {}, {}

    def attempt(name: str, action: Callable[[], float]) -> float | None:
        try:
            return action()
        except Exception as error:  # noqa: BLE001 - a peer may raise anything; its row says what, the others go on
            failed[name] = short(error)
            del alive[name]
        require_alive(timer.device, name)
        return None

    estimate = 0.0
    for name, call in list(alive.items()):
        for _ in range(warmups):
            if name in alive:
                attempt(name, lambda call=call: timer.once(call))
        if name in alive:
            repeats[name] = attempt(name, lambda call=call: timer.repeats(call))
        if name in alive and rounds is None:
            estimate += (attempt(name, lambda call=call: timer.once(call)) or 0.0) * repeats[name]
    count = rounds or max(5, min(100, int(seconds / max(estimate, 1e-9))))
    if estimate * count > PATIENCE_SECONDS:
        say(f"{len(alive)} in turn, {count} rounds of about {estimate:.0f} s")
    samples: Samples = {name: [] for name in alive}
    for index in range(count):
        for name in list(alive) if index % 2 == 0 else list(reversed(alive)):
            value = attempt(name, lambda name=name: timer.once(calls[name], repeats[name]))
            if value is not None:
                samples[name].append(value)
        samples = {name: samples[name] for name in alive}
        if keep is not None:
            keep(samples, failed)
    return samples, failed


def say(text: str) -> None:
    """Progress, beside the results."""
    print(text, file=sys.stderr, flush=True)


def require_alive(device: torch.device, who: str) -> None:
    """Raises RuntimeError where the GPU no longer answers: after an illegal access every later call of the process
    fails, whoever made it."""
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        raise RuntimeError(f"{who} has broken the CUDA context ({short(error)}); run again without it") from error


def short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


def free(device: torch.device) -> None:
    """Gives back what nothing holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def graphed(call: Call, device: torch.device) -> Call:
    """The call captured in a CUDA graph: its replays have no launch gaps. Raises Unavailable without a GPU."""
    if device.type != "cuda":
        raise Unavailable("needs a GPU")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call()

    def replay() -> object:
        graph.replay()
        return outputs

    return replay


def nbytes(outputs: Mapping[str, Tensor] | Tensor) -> int:
    """Of what a call returned: the storages."""
    tensors = outputs.values() if isinstance(outputs, Mapping) else [outputs]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def cuda_peak_bytes(call: Call) -> tuple[int, int]:
    """(peak over what was allocated before the call, bytes of its outputs)."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    outputs = call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, nbytes(outputs)


def rss_peak_bytes(call: Call) -> tuple[int, int]:
    """The same on a CPU, from the process's resident memory: whatever allocates is seen, C++ and libraries too.

    For a fresh process after a warm-up, so that freed memory that the allocator kept hides nothing. Raises Unavailable
    where the kernel does not let a process reset its high-water mark.
    """
    _release_freed_memory()
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = _status_bytes("VmRSS")
        outputs = call()
        peak = _status_bytes("VmHWM") - before
    except OSError as error:
        raise Unavailable(f"peak memory: {short(error)}") from error
    return max(0, peak), nbytes(outputs)


def _release_freed_memory() -> None:
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc alone has it
    if trim is not None:
        trim(0)


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) << 10
    raise OSError(f"/proc/self/status has no {field}")


def limits(dtype: torch.dtype, timer: Timer, *, small: bool = False) -> dict[str, float]:
    """Measured ceilings of this machine, random data: {"matmul_tflops", "copy_gbps"}; copy counts reads and writes."""
    device, on_gpu = timer.device, timer.device.type == "cuda"
    n = 256 if small else 8192 if on_gpu else 2048
    size = (4 if small else 4096 if on_gpu else 256) << 20
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(a)
    source = torch.randint(-128, 127, (size,), device=device, dtype=torch.int8)
    target = torch.empty_like(source)
    calls = {"matmul": lambda: torch.mm(a, b, out=product), "copy": lambda: target.copy_(source)}
    samples, failed = interleave(calls, timer, seconds=2.0, rounds=3 if small else None)
    if failed:
        raise RuntimeError(f"limits: {failed}")
    median = {name: Summary.of(values).median for name, values in samples.items()}
    return {"matmul_tflops": 2 * n**3 / median["matmul"] / 1e12, "copy_gbps": 2 * size / median["copy"] / 1e9}


def breakdown(call: Call, device: torch.device) -> dict[str, float]:
    """{kernel (GPU) or operator (CPU): its own microseconds} of one warm call, by torch.profiler."""
    call()
    activity = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity]) as record:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
    own = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    times = {row.key: float(getattr(row, own)) for row in record.key_averages()}
    return {name: value for name, value in times.items() if value > 0}


def saved_bytes(forward: Call, inputs: list[Tensor]) -> int:
    """Bytes that a forward keeps for its backward, besides its inputs; a storage counts once."""
    known = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = forward()  # kept alive: a freed storage's address could be another's
    del outputs
    return sum(found.values())
