"""Bytes of the tensors that are alive, and their peak, by count: of what runs inside a context, on any device.

A storage counts from the operator that made it until it is freed. Tensors without storage (device "meta") count as a
GPU's would; of an operator of prism_kernels the body runs, so that what it allocates for itself is seen too. Memory
that a library takes within a call is not.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.waits import body_of


class Live(TorchDispatchMode):
    """``now``, ``peak``: bytes of what was made in this context; ``mark()`` gives the peak since the last mark."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        for given in tree_leaves((args, kwargs)):
            if isinstance(given, Tensor):
                self._known.setdefault(given.untyped_storage(), 0)  # from outside: not counted
        if (inside := body_of(func, args, kwargs)) is not None:
            with self:
                return inside()
        result = func(*args, **kwargs)
        for made in tree_leaves(result):
            if isinstance(made, Tensor):
                self._count(made)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        size = storage.nbytes()
        self._known[storage] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.now -= size

    def mark(self) -> int:
        peak, self.peak = self.peak, self.now
        return peak
