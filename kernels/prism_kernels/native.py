"""The only importer of ``prism_kernels._C``, the C++ extension of ``csrc/``.

``_C`` is optional: every op that uses it has a Python reference. :func:`need_native`, which the dispatch table asks,
says whether it can be used, and if not, why and how to build it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

# csrc/bindings.cpp exports the same number. Both are raised whenever a signature changes, so that an extension left
# over from older sources is named as such instead of failing with an AttributeError.
INTERFACE = 5

HOW_TO_BUILD = "build it with `pip install -e .` (or `python setup.py build_ext --inplace`) in the repository root"
HOW_TO_BUILD_CUDA = "with nvcc on PATH, `PRISM_BUILD_CUDA=1 pip install -e .` builds it"


@lru_cache(maxsize=1)
def _load() -> tuple[ModuleType | None, str | None]:
    try:
        from prism_kernels import _C  # pyright: ignore[reportAttributeAccessIssue]  # compiled
    except ImportError as error:
        return None, f"the C++ extension prism_kernels._C is not built ({error}); {HOW_TO_BUILD}"
    found = getattr(_C, "INTERFACE", None)
    if found != INTERFACE:
        return (
            None,
            f"prism_kernels._C was built from other sources (interface {found}, not {INTERFACE}); {HOW_TO_BUILD}",
        )
    return _C, None


def need_native() -> str | None:
    """Why the C++ implementations cannot run here, with the command that builds them, or None."""
    return _load()[1]


def need_cuda() -> str | None:
    """Why the CUDA part of the extension cannot run here, with the command that builds it, or None."""
    module, why_not = _load()
    if module is None:
        return why_not
    if not module.CUDA:
        return f"prism_kernels._C was built without its CUDA part; {HOW_TO_BUILD_CUDA}"
    return None if torch.cuda.is_available() else "there is no CUDA device"


PER_THREAD = 1 << 20  # numbers to work through: starting a thread costs as much as some 10,000


def threads_for(numbers: int) -> int:
    """How many threads a loop over so many numbers starts: at most torch's."""
    return max(1, min(torch.get_num_threads(), numbers // PER_THREAD))


def library() -> ModuleType:
    """``prism_kernels._C``. Raises RuntimeError with the reason and the build command where it cannot be used."""
    module, why_not = _load()
    if module is None:
        raise RuntimeError(why_not)
    return module


class Call:
    """A function of the library with its arguments: made once, called again and again on tensors that stay in place.

    Dispatch, checks and conversions cost ten times what the call itself does, where a row is a token.
    """

    __slots__ = ("arguments", "run", "tensors")

    def __init__(self, run: Callable[..., object], arguments: tuple, tensors: tuple):
        self.run, self.arguments = run, arguments
        self.tensors = tensors  # whose addresses are among the arguments: they live as long as the call

    def __call__(self) -> None:
        self.run(*self.arguments)


def forward_alone(op: str, *tensors: Tensor | None) -> None:
    """Raises RuntimeError for what a C++ form without a backward, of fp32 and fp64, does not take."""
    given = [tensor for tensor in tensors if tensor is not None]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
        raise RuntimeError(f"{op}: implementation 'native' has no gradient; use impl='torch', or torch.no_grad()")
    if given[0].dtype not in (torch.float32, torch.float64):
        raise RuntimeError(f"{op}: implementation 'native' takes fp32 and fp64, got {given[0].dtype}; use impl='torch'")
