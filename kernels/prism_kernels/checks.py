"""One grammar of errors for the arguments of every op: ``NAME: expected WHAT, got WHAT; remedy``, a ValueError.

All but the checks of values can be traced by torch.compile: they read what a fake tensor knows.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence, Set
from functools import lru_cache
from typing import Any, TypeGuard

import torch
from torch import Tensor

INFINITY = float("inf")  # comparisons, unlike math.isfinite, can be traced
FLOATING = "floating"  # what torch computes with: of 16 bits or more
FLOATING_8 = "floating of any size"
INTEGER = "integer"
_FUNCTORCH: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]  # has no stubs
_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def wrong(name: str, expected: str, got: str, remedy: str = "") -> ValueError:
    """The error that says so; ``got`` as :func:`describe` or ``repr`` gives it."""
    return ValueError(f"{name}: expected {expected}, got {got}{'; ' if remedy else ''}{remedy}")


def describe(value: object) -> str:
    """What a tensor is, or that there is none."""
    if not isinstance(value, Tensor):
        return f"no tensor but {type(value).__name__}"
    layout = "" if value.layout == torch.strided else f"{value.layout} "
    return f"{tuple(value.shape)} {layout}{value.dtype} on {value.device}"


def shown(value: object) -> str:
    """``value`` on one line, cut."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def check_tensor(
    name: str,
    value: object,
    shape: Mapping[str, int | None],
    dtype: str | Sequence[torch.dtype] | None,
    remedy: str = "",
) -> None:
    """``shape``: {dimension: size, or None for any}. ``dtype``: FLOATING, FLOATING_8, INTEGER, the dtypes allowed, or
    None for any. Dense, whatever its strides.

    >>> check_tensor("weight", weight, {"V": None, "H": hidden.shape[1]}, FLOATING)
    """
    if not is_tensor(value, dtype) or not _has_shape(value, shape):
        raise wrong(name, f"{_dtype_text(dtype)} {_shape_text(shape)}", describe(value), remedy)


def is_tensor(value: object, dtype: str | Sequence[torch.dtype] | None) -> TypeGuard[Tensor]:
    """Dense and of this dtype, as :func:`check_tensor` takes it; of any shape."""
    return isinstance(value, Tensor) and value.layout == torch.strided and _has_dtype(value, dtype)


def _has_shape(value: Tensor, shape: Mapping[str, int | None]) -> bool:
    if value.dim() != len(shape):
        return False
    return all(size is None or size == given for size, given in zip(shape.values(), value.shape))


def _has_dtype(value: Tensor, dtype: str | Sequence[torch.dtype] | None) -> bool:
    if isinstance(dtype, str):
        if dtype == FLOATING_8:
            return value.is_floating_point()
        return value.dtype in (_FLOATS if dtype == FLOATING else _INTEGERS)
    return dtype is None or value.dtype in dtype


def _dtype_text(dtype: str | Sequence[torch.dtype] | None) -> str:
    if dtype is None or isinstance(dtype, str):
        return FLOATING if dtype == FLOATING_8 else dtype or "a tensor of shape"
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


def host_sees(value: Tensor) -> bool:
    """Whether values can be read without waiting: on a CPU, outside torch.compile and torch.func.vmap."""
    return value.device.type == "cpu" and not torch.compiler.is_compiling() and not is_transformed(value)


def is_transformed(value: object) -> bool:
    """Whether a transform of torch.func (vmap, grad, jvp) has wrapped the tensor."""
    return isinstance(value, Tensor) and _FUNCTORCH.is_functorch_wrapped_tensor(value)


def is_batched(value: object) -> bool:
    """Whether the tensor stands for a batch of them: of torch.func.vmap, or of gradients (is_grads_batched=True)."""
    return isinstance(value, Tensor) and (_FUNCTORCH.is_legacy_batchedtensor(value) or is_transformed(value))


def check_values(name: str, value: Tensor, bound: str, limit: int) -> None:
    """Integers in [0, limit), where the host can see them. The error calls the limit ``bound``."""
    if not host_sees(value) or not value.numel():
        return
    low, high = (int(edge) for edge in value.aminmax())
    if low < 0 or high >= limit:
        raise wrong(name, f"values in [0, {bound} = {limit})", f"{low} to {high}")


def check_count(name: str, what: str, count: int) -> None:
    """So many rows that an int32 counts them: offsets and plans are int32."""
    if count >= 1 << 31:
        raise wrong(name, f"fewer than 2^31 {what}", str(count), "split the call")


def is_number(value: Any) -> bool:
    """Real and single: also NumPy's, and a 0-d tensor."""
    if isinstance(value, Tensor):
        return value.dim() == 0 and not value.is_complex()
    return isinstance(value, (int, float)) or (hasattr(value, "__float__") and getattr(value, "ndim", 0) == 0)


def number(
    name: str, value: Any, *, above: float | None = None, at_least: float | None = None, finite: bool = True
) -> float:
    """``value`` as a Python float; texts do not pass."""
    try:
        if is_number(value) and not isinstance(value, bool) and (not finite or -INFINITY < value < INFINITY):
            result = float(value)
            if (above is None or result > above) and (at_least is None or result >= at_least):
                return result
    except (OverflowError, TypeError, RuntimeError):  # too large for a float; without an order; without a value
        pass
    bound = f" > {above}" if above is not None else f" >= {at_least}" if at_least is not None else ""
    raise wrong(name, f"a {'finite ' if finite else ''}number{bound}", shown(value))


def integer(name: str, value: Any, at_least: int | None = None, at_most: int | None = None) -> int:
    """``value`` as a Python integer, of whatever type holds one; no bool, no float."""
    try:
        result = None if isinstance(value, bool) else value if isinstance(value, int) else operator.index(value)
    except TypeError:
        result = None
    if result is not None and (at_least is None or result >= at_least) and (at_most is None or result <= at_most):
        return result
    bound = "" if at_least is None else f" >= {at_least}" if at_most is None else f" in [{at_least}, {at_most}]"
    raise wrong(name, f"an integer{bound}", shown(value))


def flag(name: str, value: Any) -> bool:
    """``value`` as a bool: True or False, 1 or 0, of whatever type; no text, which would be true whatever it says."""
    if isinstance(value, bool):
        return value
    if is_number(value) and (value == 0 or value == 1):
        return bool(value)
    raise wrong(name, "True or False", shown(value))


def plain(values: Any) -> Any:
    """Tensors and arrays as lists of Python numbers; anything else as it is."""
    return values.tolist() if hasattr(values, "tolist") else values


def items(name: str, values: Any, expected: str) -> list[Any]:
    """``values`` as a list; texts, mappings and sets are none, as their entries are others or have no order."""
    try:
        if not isinstance(values, (str, bytes, Mapping, Set)):
            return list(plain(values))
    except (TypeError, RuntimeError):  # nothing to iterate over; a tensor without values
        pass
    raise wrong(name, expected, shown(values))


def allowed_words(forbidden: Sequence[int], vocab_size: int | None, columns: int) -> tuple[list[int], int]:
    """(ids below ``words`` that have probability 0, ascending, each once; words) of an op's arguments of these names.

    ``forbidden``: ids in [0, columns); ``vocab_size``: ids from there on have probability 0, too; None: ``columns``.
    """
    words = columns if vocab_size is None else integer("vocab_size", vocab_size, 1, columns)
    ids = [integer("forbidden", word, 0, columns - 1) for word in items("forbidden", forbidden, "a list of ids")]
    return _barred(tuple(ids), words), words


@lru_cache(maxsize=16)
def _barred(forbidden: tuple[int, ...], words: int) -> list[int]:
    barred = sorted({word for word in forbidden if word < words})
    if len(barred) == words:
        raise wrong("forbidden", "ids that leave a word to draw", f"all of [0, {words})")
    return barred


def one_of(name: str, value: object, allowed: Sequence[str]) -> None:
    if not isinstance(value, str) or value not in allowed:
        raise wrong(name, " or ".join([repr(choice) for choice in allowed]), shown(value))
