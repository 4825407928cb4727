"""AdamW's state of the parameters that are trained, and its step: by `prism_kernels.adamw_step`, or by torch's own.

State is told and restored in one form, whoever holds it: whole fp32 tensors, the master and the moments of a parameter.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from prism_fast import ranks
from prism_fast.config import OptimizerConfig
from prism_fast.records import DataError
from prism_kernels import adamw_step, join_master, split_master, which_impl

MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # the state of a parameter
KERNEL_DTYPES = (torch.float32, torch.bfloat16)
ALIGNMENT = 64  # bytes


class State(Protocol):
    """Of the i-th of the parameters; tensors are whole ones, so that each call is one of all processes."""

    def step(self, gradients: Sequence[Tensor | None], clip: Tensor, lr: float) -> None:
        """Updates the parameters that have a gradient, times ``clip`` (0-d); none where that is not finite."""
        ...

    def master(self, i: int) -> Tensor: ...

    def moments(self, i: int) -> dict[str, Tensor]:
        """By the names of `MOMENTS`; none before the first step."""
        ...

    def load(self, i: int, master: Tensor | None, moments: dict[str, Tensor]) -> None: ...


def open_adamw(parameters: list[nn.Parameter], config: OptimizerConfig) -> State:
    """What holds the state of these parameters. Raises DataError where it cannot hold it as the settings say."""
    by_kernel, reason = runs_kernel(parameters, config)
    if by_kernel:
        return (HostAdamW if config.offload else KernelAdamW)(parameters, config)
    if config.moments != "float32":
        raise DataError(
            f"optimizer.moments = {config.moments}: torch's AdamW has none ({reason}); set float32, or offload=true"
        )
    return TorchAdamW(parameters, config)


def runs_kernel(parameters: Sequence[Tensor], config: OptimizerConfig) -> tuple[bool, str]:
    """(whether `prism_kernels.adamw_step` updates these parameters, why)."""
    place = "cpu" if config.offload or not parameters else parameters[0].device.type
    implementation, reason = which_impl(place)["adamw_step"]
    asked = "PRISM_IMPL" in reason
    odd = [p for p in parameters if p.dtype not in KERNEL_DTYPES or not ranks.local(p.detach()).is_contiguous()]
    if odd:
        return False, f"a parameter is {odd[0].dtype} with strides {odd[0].stride()}"
    plain = config.moments == "float32" and all(p.dtype == torch.float32 for p in parameters)
    if implementation == "reference":  # slow, and large: only where it is asked for and nothing else has the moments
        return asked and config.moments != "float32", f"{implementation}: {reason}"
    if place == "cpu" and plain and not config.offload and not asked:
        # Nothing is gained there, and a run that was begun with torch's rounding goes on to the bit.
        return False, "float32 on a CPU, where it would round otherwise and be no smaller"
    return True, f"{implementation}: {reason}"


class KernelAdamW:
    """By `prism_kernels.adamw_step`: one call for all tensors, 12 bytes a parameter in bf16 (8 with bf16 moments).

    A bf16 weight is exact to fp32 with a remainder of 16 bits, so there is no master; fp32 weights are their own.
    """

    def __init__(self, parameters: list[nn.Parameter], config: OptimizerConfig):
        self.parameters, self.config = parameters, config
        self.dtype = torch.bfloat16 if config.moments == "bfloat16" else torch.float32
        self.decay = [config.weight_decay if p.dim() >= 2 else 0.0 for p in parameters]
        self.steps = [0] * len(parameters)
        self.remainders: list[Tensor | None] = [None] * len(parameters)
        self.averages: list[Tensor | None] = [None] * len(parameters)
        self.squares: list[Tensor | None] = [None] * len(parameters)
        self._allocate()

    def _allocate(self) -> None:
        """Remainders are 0 at first: a weight is what was loaded. Moments come with the first gradient."""
        for i, parameter in enumerate(self.parameters):
            if parameter.dtype == torch.bfloat16:
                self.remainders[i] = torch.zeros_like(self._weight(i), dtype=torch.int16)

    def _weight(self, i: int) -> Tensor:
        """What is updated: this process's shard of the parameter."""
        return ranks.local(self.parameters[i].detach())

    def _moments(self, i: int) -> tuple[Tensor, Tensor]:
        average, square = self.averages[i], self.squares[i]
        if average is None or square is None:
            average, square = (torch.zeros_like(self._weight(i), dtype=self.dtype) for _ in range(2))
            self.averages[i], self.squares[i] = average, square
        return average, square

    def step(self, gradients: Sequence[Tensor | None], clip: Tensor, lr: float) -> None:
        held = {i: ranks.local(gradient.detach()) for i, gradient in enumerate(gradients) if gradient is not None}
        self._update(held, clip, lr)
        if bool(clip.isfinite()):  # the update waits for no one: the kernel sees it too
            for i in held:
                self.steps[i] += 1

    def _update(self, gradients: dict[int, Tensor], clip: Tensor, lr: float) -> None:
        if gradients:
            clip = clip.to(next(iter(gradients.values())).device, torch.float32)
            self._call(list(gradients), list(gradients.values()), clip, lr)

    def _call(self, indices: list[int], gradients: list[Tensor], clip: Tensor, lr: float) -> None:
        moments = [self._moments(i) for i in indices]
        adamw_step(
            [self._weight(i) for i in indices],
            [gradient.contiguous() for gradient in gradients],
            [self.remainders[i] for i in indices],
            [average for average, _ in moments],
            [square for _, square in moments],
            lr=lr,
            betas=(self.config.beta1, self.config.beta2),
            weight_decay=[self.decay[i] for i in indices],
            step=[self.steps[i] + 1 for i in indices],
            clip=clip,
            numbers=indices,
        )

    def master(self, i: int) -> Tensor:
        remainder = self.remainders[i]
        own = self._weight(i) if remainder is None else join_master(self._weight(i), remainder)
        return ranks.whole(own, self.parameters[i])

    def moments(self, i: int) -> dict[str, Tensor]:
        if not self.steps[i]:
            return {}
        average, square = (ranks.whole(moment.float(), self.parameters[i]) for moment in self._moments(i))
        return {"step": torch.tensor(float(self.steps[i])), "exp_avg": average, "exp_avg_sq": square}

    def load(self, i: int, master: Tensor | None, moments: dict[str, Tensor]) -> None:
        like, remainder = self.parameters[i], self.remainders[i]
        if master is not None:
            own = ranks.local(ranks.shard_like(master, like))
            for held, value in zip(
                (self._weight(i), remainder), split_master(own) if remainder is not None else (own,)
            ):
                assert held is not None
                held.copy_(value)
        if moments:
            self.steps[i] = int(moments["step"])
            for held, name in zip(self._moments(i), ("exp_avg", "exp_avg_sq")):
                held.copy_(ranks.local(ranks.shard_like(moments[name], like)))


class HostAdamW(KernelAdamW):
    """The same with its state in host memory, where the update is made: a GPU keeps weights and gradients alone.

    The host holds 12 bytes a parameter in bf16 (8 with bf16 moments), and two of the largest gradients; over the bus
    go a gradient there and a weight back. All of it lies in one piece of memory, which is pinned as it is: torch's
    allocator of pinned memory would round every tensor up to a power of two.
    """

    def _allocate(self) -> None:
        shapes = [ranks.local(p.detach()) for p in self.parameters]
        largest = max((shape.numel() for shape in shapes), default=0)
        moment = self.dtype.itemsize
        sizes = [s.numel() * (s.element_size() + 2 * moment + (2 if s.element_size() == 2 else 0)) for s in shapes]
        room = sum(sizes) + 2 * 4 * largest + ALIGNMENT * (4 * len(shapes) + 2)
        self.arena = _Arena(room, shapes[0].device if shapes else torch.device("cpu"))
        self.weights = [self.arena.take(shape.shape, shape.dtype) for shape in shapes]
        self.staged = [self.arena.take((largest,), torch.float32) for _ in range(2)]
        for i, (shape, weight) in enumerate(zip(shapes, self.weights)):
            weight.copy_(shape)
            if shape.dtype == torch.bfloat16:
                self.remainders[i] = self.arena.take(shape.shape, torch.int16).zero_()
            self.averages[i], self.squares[i] = (self.arena.take(shape.shape, self.dtype).zero_() for _ in range(2))

    def _weight(self, i: int) -> Tensor:
        return self.weights[i]

    def _update(self, gradients: dict[int, Tensor], clip: Tensor, lr: float) -> None:
        on_host = clip.to("cpu", torch.float32)
        for i, gradient in self._fetched(gradients):
            self._call([i], [gradient], on_host, lr)
            ranks.local(self.parameters[i].detach()).copy_(self.weights[i], non_blocking=True)

    def _fetched(self, gradients: dict[int, Tensor]) -> Iterator[tuple[int, Tensor]]:
        """Gradients on the host, each on its way while the one before is used."""
        waiting: tuple[int, Tensor, Any] | None = None
        for number, (i, gradient) in enumerate(gradients.items()):
            staged = self.staged[number % 2][: gradient.numel()].view(gradient.shape)
            staged.copy_(gradient, non_blocking=True)
            arrived = torch.cuda.Event() if gradient.is_cuda else None
            if arrived is not None:  # on the stream of the copy: another GPU may be the current one
                arrived.record(torch.cuda.current_stream(gradient.device))
            if waiting is not None:
                yield _arrived(*waiting)
            waiting = (i, staged, arrived)
        if waiting is not None:
            yield _arrived(*waiting)

    def load(self, i: int, master: Tensor | None, moments: dict[str, Tensor]) -> None:
        weight = ranks.local(self.parameters[i].detach())
        if master is None:  # the weight is its own, and may have been restored since it was copied here
            self.weights[i].copy_(weight)
        super().load(i, master, moments)
        weight.copy_(self.weights[i])


def _arrived(i: int, staged: Tensor, event: Any) -> tuple[int, Tensor]:
    if event is not None:
        event.synchronize()
    return i, staged


class _Arena:
    """Host memory from which tensors are cut; pinned where ``device`` is a GPU."""

    def __init__(self, room: int, device: torch.device):
        self.memory, self.used = torch.empty(room, dtype=torch.uint8), 0
        if device.type == "cuda" and room:
            runtime: Any = torch.cuda.cudart()
            error = int(runtime.cudaHostRegister(self.memory.data_ptr(), room, 0))
            if error:
                raise DataError(
                    f"optimizer.offload: {room / 1e9:.1f} GB of host memory cannot be pinned (CUDA error {error}); "
                    "raise the limit of locked memory (ulimit -l), or leave offload out"
                )
            # Else its pages would stay locked, and a later arena at this address could not be pinned. When the process
            # ends, the driver sees to it.
            weakref.finalize(self, _unpin, runtime, self.memory, device).atexit = False

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        count = 1
        for size in shape:
            count *= size
        begin = -(-self.used // ALIGNMENT) * ALIGNMENT
        self.used = begin + count * dtype.itemsize
        return self.memory[begin : self.used].view(dtype).view(*shape)


def _unpin(runtime: Any, memory: Tensor, device: torch.device) -> None:
    torch.cuda.synchronize(device)  # weights may still be on their way
    runtime.cudaHostUnregister(memory.data_ptr())


class TorchAdamW:
    """By torch.optim.AdamW. Parameters of less than fp32 have an fp32 master, which it updates and they round."""

    def __init__(self, parameters: list[nn.Parameter], config: OptimizerConfig):
        self.parameters = parameters
        self.masters = [p if is_wide(p) else p.detach().float() for p in parameters]
        fused = config.offload or any(p.is_cuda for p in parameters)
        self.adamw = torch_adamw(self.masters, config, fused=fused)

    def step(self, gradients: Sequence[Tensor | None], clip: Tensor, lr: float) -> None:
        if not bool(clip.isfinite()):
            return
        scale = float(clip)
        for master, gradient in zip(self.masters, gradients):
            master.grad = None if gradient is None else gradient.to(master.dtype).mul_(scale)
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        with torch.no_grad():
            for parameter, master in zip(self.parameters, self.masters):
                if master is not parameter:
                    parameter.copy_(master)
                    master.grad = None

    def master(self, i: int) -> Tensor:
        return ranks.whole(self.masters[i].detach())

    def moments(self, i: int) -> dict[str, Tensor]:
        return {key: ranks.whole(value) for key, value in self.adamw.state.get(self.masters[i], {}).items()}

    def load(self, i: int, master: Tensor | None, moments: dict[str, Tensor]) -> None:
        own = self.masters[i]
        if master is not None:
            own.copy_(ranks.shard_like(master, own))
        if moments:
            self.adamw.state[own] = {
                key: value.clone() if key == "step" else ranks.shard_like(value.clone(), own)
                for key, value in moments.items()
            }


def torch_adamw(parameters: Sequence[Tensor], config: OptimizerConfig, *, fused: bool) -> torch.optim.AdamW:
    """Weight decay for matrices only.

    ``fused``: in one pass over weight, gradient and moments, 28 bytes a parameter; else in one per operation, some 80,
    with 4 bytes a parameter held for a moment, and the bits of every run on a CPU so far.
    """
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        foreach=not fused,
        fused=fused,
    )


def is_wide(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.float32, torch.float64)
