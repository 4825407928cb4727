"""Which implementation of an op runs, and why.

Every op owns one :class:`Op` table, best implementation first. ``impl="auto"`` takes the first that can run on the
arguments' device; ``PRISM_IMPL`` steers auto (``PRISM_IMPL=reference`` for every op that has one, or
``PRISM_IMPL=moe_mlp=reference,tree_attention=sdpa``); an explicit argument wins over both. An explicit choice that
cannot run raises, with the reason and the alternative: there is no silent fallback.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from prism_kernels.checks import is_transformed, shown, wrong

log = logging.getLogger("prism_kernels")


class Impl(str, Enum):
    """Names that ``impl=`` takes. An op has some of them; :func:`which_impl` tells which one auto picks."""

    AUTO = "auto"
    REFERENCE = "reference"  # the definition: plain torch (or Python), any device
    CPU = "cpu"  # vectorised or bounded-memory torch on a CPU
    TORCH = "torch"  # plain torch with an autograd or a grouping of its own, any device
    SDPA = "sdpa"  # torch's scaled_dot_product_attention, any device
    VARLEN = "varlen"  # calls over sequences of any length, merged: plain torch, any device
    NATIVE = "native"  # C++ on the host (prism_kernels._C)
    TRITON = "triton"

    def __str__(self) -> str:
        return self.value


VMAP, GRAD, JVP = "torch.func.vmap", "torch.func.grad", "forward-mode derivative (torch.func.jvp)"
TWICE = "second derivative (torch.func.grad of torch.func.grad)"
TRANSFORMS = (VMAP, GRAD, JVP, TWICE)


@dataclass(frozen=True)
class Implementation:
    """One row of an op's table.

    ``target``: "module:attribute", imported on first use, so that ``import prism_kernels`` needs torch alone.
    ``devices``: torch device types whose tensors it takes. ``unavailable()``: None, or why it cannot run here.
    ``transforms``: what of torch.func goes through it; everything goes through a reference. ``fake``: it computes
    shapes and dtypes of tensors without storage (device "meta"), as an operator with a fake or plain torch does.
    """

    name: Impl
    target: str
    devices: tuple[str, ...]
    unavailable: Callable[[], str | None] = lambda: None
    transforms: tuple[str, ...] = ()  # of TRANSFORMS
    fake: bool = False

    def load(self) -> Callable:
        module, attribute = self.target.split(":")
        return getattr(importlib.import_module(module), attribute)


def need_triton() -> str | None:
    """Why Triton kernels cannot run here, or None. The interpreter (TRITON_INTERPRET=1) runs them on CPU tensors."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if interpreting() or torch.cuda.is_available():
        return None
    return "there is no CUDA device, and TRITON_INTERPRET=1 is not set"


def interpreting() -> bool:
    """True where Triton kernels run in Triton's interpreter, which takes CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def on_device_of(tensor: torch.Tensor) -> AbstractContextManager:
    """Makes the GPU that holds ``tensor`` the current one: Triton launches on the current device, wherever its
    arguments lie. Nothing for a CPU's, nor while torch.compile traces: an operator sets it when it runs."""
    return nullcontext() if torch.compiler.is_compiling() else torch.cuda.device_of(tensor)


_OPS: dict[str, Op] = {}


class Op:
    """The implementations of one op, best first; the reference is last and always there."""

    def __init__(self, name: str, implementations: Sequence[Implementation]):
        self.name = name
        self.table = {row.name: row for row in implementations}
        self._said: set[tuple[str, Impl]] = set()
        self._loaded: dict[Impl, Callable] = {}
        _OPS[name] = self

    def select(
        self, impl: str | Impl, device: torch.device | str = "cpu", *tensors: Tensor | None
    ) -> tuple[Impl, Callable]:
        """(name, function) of the implementation to run on tensors of ``device``, ``tensors`` among them.

        Raises ValueError for a name this op does not have, RuntimeError for one that cannot run here,
        NotImplementedError for one through which the transform that wraps one of ``tensors`` does not go.
        """
        kind = device.type if isinstance(device, torch.device) else torch.device(device).type
        if torch.compiler.is_compiling():
            chosen = Impl(choose(self.name, str(impl), kind))
            return chosen, self._loaded[chosen]
        chosen, reason = self._choose(impl, kind)
        if (kind, chosen) not in self._said:
            self._said.add((kind, chosen))
            log.info("%s on %s: %s (%s)", self.name, kind, chosen, reason)
        self.check_transforms(chosen, *tensors)
        run = self.load(chosen)
        whole = chosen == Impl.REFERENCE or self.table[chosen].transforms
        return chosen, run if whole else untransformed(run, *tensors)

    def check_transforms(self, chosen: str, *tensors: Tensor | None) -> None:
        """Torch's own errors there name neither the op nor a way out, and some of its results would be wrong: it takes
        the tangent of an operator without a forward-mode rule for 0."""
        if chosen == Impl.REFERENCE or torch.compiler.is_compiling() or not _any_transform():
            return
        for tensor in tensors:
            for transform in _transforms_of(tensor):
                if transform not in self.table[Impl(chosen)].transforms:
                    raise NotImplementedError(
                        f"{self.name}: implementation {str(chosen)!r} has no {transform}; use impl='reference' for one"
                    )

    def load(self, chosen: Impl) -> Callable:
        """What the table holds for an implementation that :meth:`select` chose."""
        if chosen not in self._loaded:
            self._loaded[chosen] = self.table[chosen].load()
        return self._loaded[chosen]

    def auto(self, kind: str) -> tuple[Impl, str]:
        """(implementation, reason) that ``impl="auto"`` runs on tensors of this device type."""
        return self._choose(Impl.AUTO, kind)

    def _choose(self, impl: str | Impl, kind: str) -> tuple[Impl, str]:
        if not isinstance(impl, str) or impl != Impl.AUTO:
            return self._must(impl, kind, "asked for by argument"), "asked for by argument"
        steered = _steering(os.environ.get("PRISM_IMPL", "")).get(self.name)
        if steered is None:
            steered = _steering(os.environ.get("PRISM_IMPL", "")).get("*")
            if steered is not None and steered not in self.table:
                steered = None
        if steered is not None and steered != Impl.AUTO:
            return self._must(steered, kind, "asked for by PRISM_IMPL"), "asked for by PRISM_IMPL"
        passed = []
        for row in self.table.values():
            why_not = self._why_not(row, kind, auto=True)
            if kind == "meta" and "cuda" in row.devices and why_not is not None:
                raise RuntimeError(f"{self.name}: {str(row.name)!r}, a GPU's default, cannot run on meta: {why_not}")
            if why_not is None:
                return row.name, "; ".join([f"default on {kind}", *passed])
            passed.append(f"{row.name}: {why_not}")
        raise RuntimeError(f"{self.name}: no implementation runs on {kind}: {'; '.join(passed)}")

    def _must(self, impl: str | Impl, kind: str, how: str) -> Impl:
        try:
            row = self.table[Impl(impl)]
        except (ValueError, KeyError):
            names = ", ".join(str(name) for name in self.table)
            raise wrong(f"impl of {self.name}", f"auto or one of {names}", f"{shown(str(impl))} ({how})") from None
        why_not = self._why_not(row, kind)
        if why_not is not None:
            alternative = self._alternative(kind)
            raise RuntimeError(
                f"{self.name}: implementation {str(impl)!r} ({how}) cannot run on {kind}: {why_not}; "
                f"use impl='{alternative}' instead"
            )
        return row.name

    def _alternative(self, kind: str) -> Impl:
        return next((r.name for r in self.table.values() if self._why_not(r, kind) is None), Impl.REFERENCE)

    @staticmethod
    def _why_not(row: Implementation, kind: str, auto: bool = False) -> str | None:
        if kind == "meta":  # nothing runs there: it tells shapes and bytes of what a GPU would run
            return None if row.fake or row.name is Impl.REFERENCE else "it has no fake"
        devices = row.devices
        if row.name is Impl.TRITON and interpreting() and not auto:
            devices = (*devices, "cpu")
        if kind not in devices:
            return f"it takes {' or '.join(devices)} tensors"
        return row.unavailable()


def _any_transform() -> bool:
    """Whether some transform of torch.func, or forward-mode derivative, is under way at all."""
    functorch: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]  # has no stubs
    return forward_ad._current_level >= 0 or functorch.peek_interpreter_stack() is not None


def _transforms_of(tensor: Tensor | None) -> list[str]:
    """The transforms of torch.func that wrap the tensor, and a tangent of torch.autograd.forward_ad."""
    found: list[str] = []
    functorch: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]  # has no stubs
    if tensor is not None and forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None:
        found.append(JVP)
    if is_transformed(tensor):
        running = {interpreter.level(): interpreter.key().name for interpreter in functorch.get_interpreter_stack()}
        while is_transformed(tensor):
            kind = {"Vmap": VMAP, "Jvp": JVP}.get(running.get(functorch.maybe_get_level(tensor), ""), GRAD)
            found.append(TWICE if kind == GRAD and GRAD in found else kind)
            tensor = functorch.get_unwrapped(tensor)
    return found


def untransformed(run: Callable, *tensors: Tensor | None) -> Callable:
    """``run``, which no transform of torch.func goes through, for one that wraps none of its ``tensors``: inside the
    transform constants would become wrapped tensors, of which NumPy and autograd's Functions know nothing."""
    functorch: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]  # has no stubs
    if functorch.peek_interpreter_stack() is None or any(map(is_transformed, tensors)):
        return run
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

    def outside(*arguments: Any, **options: Any) -> Any:
        with temporarily_clear_interpreter_stack():
            return run(*arguments, **options)

    return outside


def choose(op: str, impl: str, device: str) -> str:
    """The name of the implementation of an op to run on tensors of this device type; it is loaded then."""
    found = _OPS[op]
    chosen = found._choose(impl, device)[0]
    found.load(chosen)
    return str(chosen)


# A constant to torch.compile, which cannot look into the environment. torch.compiler.assume_constant_result sets the
# same mark, but imports torch._dynamo: two seconds of every process that imports this package.
setattr(choose, "_dynamo_marked_constant", True)  # noqa: B010


def implementation(op: str, chosen: str) -> Any:
    """What the table of an op holds for an implementation that :meth:`Op.select` chose: for operators, which know
    both by name alone."""
    return _OPS[op].load(Impl(chosen))


@lru_cache(maxsize=32)
def _steering(text: str) -> dict[str, str]:
    """PRISM_IMPL -> {op or '*': implementation}. Raises ValueError on names that do not exist."""
    known = {member.value for member in Impl}
    table = {}
    for entry in filter(None, (part.strip() for part in text.split(","))):
        op, _, name = entry.rpartition("=")
        if name not in known:
            raise wrong("PRISM_IMPL", f"one of {sorted(known)}", f"{name!r} in {entry!r}")
        if op and op not in _OPS:
            raise wrong("PRISM_IMPL", f"one of {sorted(_OPS)}", f"op {op!r} in {entry!r}")
        table[op or "*"] = name
    return table


def which_impl(device: torch.device | str | None = None) -> dict[str, tuple[str, str]]:
    """{op: (implementation that auto picks, reason)} on ``device`` (default: cuda where there is one, else cpu)."""
    kind = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")).type
    return {name: (str(impl), reason) for name, op in sorted(_OPS.items()) for impl, reason in [op.auto(kind)]}
