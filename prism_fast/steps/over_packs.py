"""A step's way over its packs: the next is built while this one is computed, and one that does not fit is halved."""

from __future__ import annotations

import contextlib
import errno
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from prism_fast.pack import Packs
from prism_fast.records import DataError, PackedTree
from prism_fast.steps.backprop import Backprop
from prism_fast.steps.own_packs import OwnPack, own_numbers, own_pack

T = TypeVar("T")

# How others than torch's allocators say it, in messages of a RuntimeError: the host's allocator, CUDA and Triton,
# cuBLAS and cuDNN.
NO_MEMORY = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "cannot allocate memory",
    "_STATUS_ALLOC_FAILED",
)


def over_packs(updater: Backprop, packs: Packs, compute: Callable[[OwnPack], T]) -> list[T]:
    """``compute(own)`` of every pack that is this process's, in order: a forward and a backward, and what it returns.

    A pack that does not fit in memory is computed again as two (`Packs.halves`), wherever in ``compute`` that showed:
    losses are shares of the batch's loss, so the halves' gradients add up to the pack's. Of a backward that ended in
    its middle, each parameter's gradient is there as a whole or not at all; the halves' go to those that have none. So
    ``compute`` must leave nothing behind but gradients before its end. ``updater.halved`` counts these packs, and
    ``updater.waited`` the seconds in which the next pack was not ready.

    Raises DataError where half a pack does not fit either, or a pack has no halves; and where processes must call
    their model equally often, so that one of them cannot do it twice.
    """
    numbers = own_numbers(updater, packs)
    device = updater.module.device
    found: list[T] = []
    with _Arrivals(updater) as arrivals, _Ahead(lambda n: own_pack(updater, packs, n), numbers, device) as ahead:
        for number in numbers:
            arrivals.begin()
            reason = None
            try:
                start = time.perf_counter()
                packed = ahead.take()
                updater.waited = (updater.waited or 0.0) + time.perf_counter() - start
                found.append(compute(OwnPack(number, None, packed)))
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                reason = _brief(error)
            if reason is not None:  # the exception is gone, and with it what its frames held
                found += _in_halves(updater, packs, number, compute, arrivals, reason)
    return found


@torch.no_grad()
def counts_of_whole(updater: Backprop, packs: Packs, own: OwnPack, **options: Any) -> list[Tensor] | None:
    """By layer, the experts' counts of the pack that this is half of, by a forward of each half; None of a whole one.

    The load-balancing loss is linear in the sums of probabilities, of which a half has its part, but not in counts.
    ``options``: of the model's call.
    """
    if own.half is None:
        return None
    halves = packs.halves(own.number)
    assert halves is not None
    device = updater.module.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):  # for the head's dropout
        first, second = (updater(halves[half].to(device), balance=True, **options).stats for half in range(2))
    return [a.counts + b.counts for a, b in zip(first, second)]


def is_out_of_memory(error: BaseException) -> bool:
    """A GPU's or the host's, whoever says it."""
    if isinstance(error, DataError):
        return False
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    said = isinstance(error, RuntimeError) and any(text.lower() in str(error).lower() for text in NO_MEMORY)
    return said or isinstance(error, torch.OutOfMemoryError | MemoryError)


def _in_halves(
    updater: Backprop, packs: Packs, number: int, compute: Callable[[OwnPack], T], arrivals: _Arrivals, reason: str
) -> list[T]:
    """What ``compute`` returns of both halves of a pack that did not fit."""
    arrivals.clear_partial()
    gc.collect()
    if updater.module.device.type == "cuda":
        torch.cuda.empty_cache()
    lower = f"lower run.tokens_per_pack{'' if packs.capacity is None else f' (now {packs.capacity})'}"
    if updater.lockstep:
        raise DataError(
            f"out of memory ({reason}); processes that share out a model go through their packs together, so none can "
            f"halve one by itself; {lower}, or take more of them"
        )
    whole, halves = packs.tokens(number), packs.halves(number)
    if halves is None:
        place = next((packs.trees[t].prompt.place for t, _ in packs.parts[number]), "") or "one prompt"
        raise DataError(
            f"out of memory ({reason}): a pack of {whole} tokens is {place} with what must stand beside it, which "
            "cannot be halved; lower the limits of lengths, or remove the record"
        )
    found = []
    with arrivals.only_missing():
        for half in range(2):
            try:
                found.append(compute(OwnPack(number, half, halves[half])))
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                raise DataError(
                    f"out of memory ({_brief(error)}) in half of a pack, {halves.tokens(half)} of {whole} tokens, as "
                    f"before in all of it ({reason}); {lower} to less than {halves.tokens(half)}"
                ) from error
    updater.halved += 1
    return found


def _brief(error: BaseException) -> str:
    """The first sentences of what an allocator says; it goes on with advice for programmers."""
    return " ".join(str(error).split())[:160] or type(error).__name__


class _Ahead:
    """Packs in order, each built by a thread while the one before it is used: one ahead, no more.

    What a build raises is raised by the ``take`` that asks for it. For a GPU it pins what it builds.
    """

    def __init__(self, build: Callable[[int], PackedTree], numbers: Sequence[int], device: torch.device):
        self._build, self._left, self._device = build, iter(numbers), device
        self._thread = ThreadPoolExecutor(1, "packs")
        self._next: Future[PackedTree] | None = None

    def __enter__(self) -> _Ahead:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    def take(self) -> PackedTree:
        due = self._next or self._begun()
        assert due is not None, "as many packs as numbers"
        try:
            return due.result()
        finally:
            self._next = self._begun()

    def _begun(self) -> Future[PackedTree] | None:
        number = next(self._left, None)
        return None if number is None else self._thread.submit(self._made, number)

    def _made(self, number: int) -> PackedTree:
        packed = self._build(number)
        if self._device.type != "cuda":
            return packed
        torch.cuda.set_device(self._device)  # a thread's own is the first GPU, whatever its process's is
        return packed.pinned()


class _Arrivals:
    """Which parameters a backward has reached: autograd adds a parameter's whole gradient at once."""

    def __init__(self, updater: Backprop):
        trained: list[nn.Parameter] = [p for p in updater.module.parameters() if p.requires_grad]
        self._parameters = [] if updater.lockstep else trained  # whose gradients are the engine's
        self._reached: set[Tensor] = set()
        self._bare: list[Tensor] = []  # had no gradient before the backward

    def __enter__(self) -> _Arrivals:
        # Behind the hooks that are there: where one of these fails, its parameter's gradient has not arrived.
        self._hooks = [p.register_post_accumulate_grad_hook(self._reached.add) for p in self._parameters]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def begin(self) -> None:
        self._reached.clear()
        self._bare = [p for p in self._parameters if p.grad is None]

    def clear_partial(self) -> None:
        """Takes away gradients that wait to be added to a sum which they have not reached."""
        for parameter in self._bare:
            if parameter not in self._reached:
                parameter.grad = None

    @contextlib.contextmanager
    def only_missing(self) -> Iterator[None]:
        """Backwards add exactly 0 to the parameters that the last one has reached."""
        hooks = [parameter.register_hook(torch.zeros_like) for parameter in self._reached]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
