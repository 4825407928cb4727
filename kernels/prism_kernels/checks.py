"""One grammar of errors for the arguments of every op: ``NAME: expected WHAT, got WHAT; remedy``, a ValueError.

All but the checks of values can be traced by torch.compile: they read what a fake tensor knows.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

INFINITY = float("inf")  # comparisons, unlike math.isfinite, can be traced
FLOATING = "floating"
INTEGER = "integer"
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def wrong(name: str, expected: str, got: str, remedy: str = "") -> ValueError:
    """The error that says so; ``got`` as :func:`describe` or ``repr`` gives it."""
    return ValueError(f"{name}: expected {expected}, got {got}{'; ' if remedy else ''}{remedy}")


def describe(value: object) -> str:
    """What a tensor is, or that there is none."""
    if not isinstance(value, Tensor):
        return f"no tensor but {type(value).__name__}"
    return f"{tuple(value.shape)} {value.dtype} on {value.device}"


def check_tensor(
    name: str,
    value: object,
    shape: Mapping[str, int | None],
    dtype: str | Sequence[torch.dtype] | None,
    remedy: str = "",
) -> None:
    """``shape``: {dimension: size, or None for any}. ``dtype``: FLOATING, INTEGER, the dtypes allowed, or None for any.

    >>> check_tensor("weight", weight, {"V": None, "H": hidden.shape[1]}, FLOATING)
    """
    if not isinstance(value, Tensor) or not _has_dtype(value, dtype) or not _has_shape(value, shape):
        raise wrong(name, f"{_dtype_text(dtype)} {_shape_text(shape)}", describe(value), remedy)


def _has_shape(value: Tensor, shape: Mapping[str, int | None]) -> bool:
    if value.dim() != len(shape):
        return False
    return all(size is None or size == given for size, given in zip(shape.values(), value.shape))


def _has_dtype(value: Tensor, dtype: str | Sequence[torch.dtype] | None) -> bool:
    if isinstance(dtype, str):
        return value.is_floating_point() if dtype == FLOATING else value.dtype in _INTEGERS
    return dtype is None or value.dtype in dtype


def _dtype_text(dtype: str | Sequence[torch.dtype] | None) -> str:
    if dtype is None or isinstance(dtype, str):
        return dtype or "a tensor of shape"
    return " or ".join([str(allowed).removeprefix("torch.") for allowed in dtype])


def _shape_text(shape: Mapping[str, int | None]) -> str:
    dims = [dim if size is None else f"{dim} = {size}" for dim, size in shape.items()]
    return f"({', '.join(dims)}{',' if len(dims) == 1 else ''})"


def check_device(name: str, value: Tensor, peer: str, like: Tensor, host: bool = False) -> None:
    """On the device of ``like``, which the error calls ``peer``; ``host``: or on the host."""
    if value.device != like.device and not (host and value.device.type == "cpu"):
        raise wrong(name, f"a tensor on {like.device}, as {peer} is", describe(value))


def check_constant(name: str, value: Tensor) -> None:
    if value.requires_grad:
        raise wrong(name, "a constant", "a tensor that requires grad", "detach() it")


def check_values(name: str, value: Tensor, bound: str, limit: int) -> None:
    """Integers in [0, limit), where the host can see them: on a CPU. The error calls the limit ``bound``."""
    if value.device.type != "cpu" or not value.numel():
        return
    low, high = (int(edge) for edge in value.aminmax())
    if low < 0 or high >= limit:
        raise wrong(name, f"values in [0, {bound} = {limit})", f"{low} to {high}")


def is_number(value: Any) -> bool:
    """Real and single: also NumPy's, and a 0-d tensor."""
    if isinstance(value, Tensor):
        return value.dim() == 0 and not value.is_complex()
    return isinstance(value, (int, float)) or (hasattr(value, "__float__") and getattr(value, "ndim", 0) == 0)


def number(
    name: str, value: Any, *, above: float | None = None, at_least: float | None = None, finite: bool = True
) -> float:
    """``value`` as a Python float; texts do not pass."""
    passes = is_number(value) and (not finite or -INFINITY < value < INFINITY)
    if passes and (above is None or value > above) and (at_least is None or value >= at_least):
        return float(value)
    bound = f" > {above}" if above is not None else f" >= {at_least}" if at_least is not None else ""
    raise wrong(name, f"a {'finite ' if finite else ''}number{bound}", repr(value))


def integer(name: str, value: Any, at_least: int | None = None, at_most: int | None = None) -> int:
    """``value`` as a Python integer, of whatever type holds one; no bool, no float."""
    try:
        result = None if isinstance(value, bool) else value if isinstance(value, int) else operator.index(value)
    except TypeError:
        result = None
    if result is not None and (at_least is None or result >= at_least) and (at_most is None or result <= at_most):
        return result
    bound = "" if at_least is None else f" >= {at_least}" if at_most is None else f" in [{at_least}, {at_most}]"
    raise wrong(name, f"an integer{bound}", repr(value))


def plain(values: Any) -> Any:
    """Tensors and arrays as lists of Python numbers; anything else as it is."""
    return values.tolist() if hasattr(values, "tolist") else values


def one_of(name: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise wrong(name, " or ".join([repr(choice) for choice in allowed]), repr(value))
