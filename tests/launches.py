"""What a GPU would launch: a call on tensors without storage (device "meta"), which are dispatched as a GPU's are.

Our Triton kernels by their names, each launch left out; torch's operators by theirs, each of them one launch at least
(what only renames memory, or allocates it, is none).
"""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager

from torch.utils._python_dispatch import TorchDispatchMode

from dev.layer_bytes import ALLOCATIONS
from tests.waits import body_of, tensors_in


class Launches(TorchDispatchMode):
    """``kernels``: our Triton kernels; ``others``: torch's operators, the library's GEMMs among them."""

    def __init__(self):
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.others: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if (inside := body_of(func, args, kwargs)) is not None:
            with self:
                return inside()
        result = func(*args, **kwargs)
        name = func._schema.name.split("::")[1]
        made = any(tensor.is_meta for tensor in tensors_in(result))
        if made and not func.is_view and name not in (*ALLOCATIONS, "detach"):
            self.others[name] += 1
        return result

    @property
    def total(self) -> int:
        return self.kernels.total() + self.others.total()


@contextmanager
def counted(monkeypatch):
    """Launches of what runs in the context."""
    from triton.runtime.jit import JITFunction

    with monkeypatch.context() as patched, Launches() as launches:

        def run(kernel, *args, **kwargs):
            launches.kernels[kernel.fn.__name__] += 1

        patched.setattr(JITFunction, "run", run)
        yield launches
