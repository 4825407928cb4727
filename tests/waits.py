"""Where the host would wait for a GPU: a step on tensors without storage (device "meta"), which stand for a GPU's.

Dispatch on meta is a GPU's. Of an operator of prism_kernels the body runs, with the launches of its Triton kernels left
out, so that what stands around them is looked at too.
"""

from __future__ import annotations

import gc
import sys
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dev.layer_bytes import is_composite
from prism_kernels.operators import Operator

ROOT = Path(__file__).resolve().parent.parent
# Their results' sizes, or Python values, depend on what the device computes.
READS = {
    "_local_scalar_dense", "_unique2", "equal", "is_nonzero", "masked_select", "nonzero", "unique_consecutive",
    "unique_dim", "bincount", "histc",
}  # fmt: skip
MADE_ON_THE_HOST = (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor)


class Waits(TorchDispatchMode):
    """``found``: what waited, in order, each as "operator at file:line". What the host reads it reads as zeros."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        seen = func.namespace != "prism_kernels" or any(tensor.is_meta for tensor in tensors_in(args))
        if seen and (inside := body_of(func, args, kwargs)) is not None:
            with self:
                return inside()
        name = func._schema.name.split("::")[1]
        if name == "_local_scalar_dense" and args[0].is_meta:
            self.note(name)
            return torch.zeros((), dtype=args[0].dtype).item()
        if name == "_to_copy" and args[0].is_meta and torch.device(kwargs.get("device") or "meta").type == "cpu":
            self.note(name)
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if name == "copy_" and args[1].is_meta and not args[0].is_meta:
            self.note(name)
            return args[0].zero_()
        if _waits(name, args, kwargs):
            self.note(name)
        return func(*args, **kwargs)

    def note(self, what):
        """With the innermost place of ours."""
        frame = sys._getframe(1)
        ours = (str(ROOT / "prism_fast"), str(ROOT / "kernels"))
        while frame is not None and not frame.f_code.co_filename.startswith(ours):
            frame = frame.f_back
        place = f"{Path(frame.f_code.co_filename).relative_to(ROOT)}:{frame.f_lineno}" if frame else "outside"
        self.found.append(f"{what} at {place}")


class HostValues(TorchFunctionMode):
    """What dispatch does not see: tensors that are made of Python's numbers on the device, which copies and waits."""

    def __init__(self, waits):
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        listed = func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and _holds_list(args[1])
        if (func in MADE_ON_THE_HOST and result.is_meta) or (listed and args[0].is_meta):
            self.waits.note(getattr(func, "__name__", str(func)))
        return result


def body_of(func, args, kwargs):
    """What an operator of prism_kernels, or one that torch composes of others, does; None where it is neither."""
    if func.namespace == "prism_kernels":
        operator = operator_of(func)
        return lambda: operator.run(*operator.records(*args))
    return (lambda: func.decompose(*args, **kwargs)) if is_composite(func) else None


@cache
def operator_of(func):
    """Whose body may have been imported a moment ago."""
    return next(found for found in gc.get_objects() if type(found) is Operator and found.overload is func)


def _holds_list(index):
    return any(isinstance(part, list) for part in (index if isinstance(index, tuple) else (index,)))


def _waits(name, args, kwargs):
    """Copies to a device say whether they wait; those from it have been seen to already."""
    if name == "_to_copy":
        goes = not args[0].is_meta and torch.device(kwargs.get("device") or "cpu").type == "meta"
        return goes and not kwargs.get("non_blocking")
    if name == "copy_":
        return args[0].is_meta and not args[1].is_meta and not (len(args) > 2 and args[2])
    if not any(tensor.is_meta for tensor in tensors_in((args, kwargs))):
        return False
    if name.startswith("index"):  # by a mask: how many there are is on the device; by what is on the host: it is copied
        return any(i.dtype in (torch.bool, torch.uint8) or not i.is_meta for i in tensors_in(args[1]))
    return name in READS or (name == "repeat_interleave" and kwargs.get("output_size") is None)


def tensors_in(values):
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


@contextmanager
def watched(monkeypatch):
    """Waits of what runs in the context; Triton kernels are not launched there."""
    from triton.runtime.jit import JITFunction

    with monkeypatch.context() as patched:
        patched.setattr(JITFunction, "run", lambda *args, **kwargs: None)
        waits = Waits()
        with HostValues(waits), waits:
            yield waits
