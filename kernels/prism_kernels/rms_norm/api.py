"""The contract: arguments, checks, dispatch. Dimensions: H hidden, T tokens, Hq and Hkv heads of D."""

from __future__ import annotations

from typing import overload

from torch import Tensor

from prism_kernels.checks import FLOATING, check_device, check_tensor, describe, is_tensor, number, wrong
from prism_kernels.dispatch import Impl, Implementation, Op, need_triton
from prism_kernels.native import need_native
from prism_kernels.rms_norm.heads import Heads

_PACKAGE = "prism_kernels.rms_norm"


def _op(name: str, function: str) -> Op:
    return Op(
        name,
        [
            Implementation(Impl.TRITON, f"{_PACKAGE}.operators:{function}", ("cuda",), need_triton, fake=True),
            Implementation(Impl.TORCH, f"{_PACKAGE}.torch_autograd:{function}", ("cpu", "cuda"), fake=True),
            # Behind the one that auto takes on a CPU, as it has no gradient: whoever decodes asks for it.
            Implementation(Impl.NATIVE, f"{_PACKAGE}.native:{function}", ("cpu",), need_native),
            Implementation(Impl.REFERENCE, f"{_PACKAGE}.reference:{function}", ("cpu", "cuda")),
        ],
    )


NORM = _op("rms_norm", "rms_norm")
ROTATE = _op("qk_norm_rotate", "norm_rotate")


@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float, *, residual: None = None, impl: str | Impl = "auto") -> Tensor: ...


@overload
def rms_norm(
    x: Tensor, weight: Tensor, eps: float, *, residual: Tensor, impl: str | Impl = "auto"
) -> tuple[Tensor, Tensor]: ...


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, *, residual: Tensor | None = None, impl: str | Impl = "auto"
) -> Tensor | tuple[Tensor, Tensor]:
    """RMSNorm over the last dimension (arXiv 1910.07467). Equals, in at least fp32 and rounded once::

        x = x + residual                                                    # where there is one; in the dtype of x
        y = weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)

    Differentiable in x, residual and weight.

    Args:
        x: (..., H) floating; no rows work.
        weight: (H,) floating.
        eps: > 0, added to the mean square.
        residual: None, or shape, dtype and device of ``x``.
        impl: "auto", "triton" (one launch), "torch" (one step with a backward of its own), "native" (C++
            on a CPU, forward alone) or "reference". The first two
            keep what was normalised and one number per row.

    Returns:
        y (..., H) in the dtype of ``x``; with ``residual``: (y, x + residual).

    Raises:
        ValueError: an argument of another shape, dtype or device; names it.
        RuntimeError: ``impl`` cannot run here.
    """
    if not is_tensor(x, FLOATING) or x.dim() < 1 or x.shape[-1] < 1:
        raise wrong("x", "floating (..., H), H >= 1", describe(x))
    _check_weight("weight", weight, "H", "x", x)
    if residual is not None and describe(residual) != describe(x):
        raise wrong("residual", f"{describe(x)}, as x is", describe(residual))
    eps = number("eps", eps, above=0)
    _, run = NORM.select(impl, x.device, x, weight, residual)
    return run(x, weight, eps, residual)


def qk_norm_rotate(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    *,
    impl: str | Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """RMSNorm of every head of queries and keys, then their rotary embedding: :func:`rms_norm_rotate` of each, on a GPU
    both in one launch.

    Args:
        q, k: (T, Hq, D) and (T, Hkv, D) floating, D even. Views of a packed projection are read in place.
        q_weight, k_weight: (D,) floating.
        cos, sin: (T, D) floating, as :func:`rms_norm_rotate` takes them.
        eps: > 0, added to the mean squares.
        impl: "auto", "triton", "torch", "native" or "reference".

    Returns:
        (q, k), shaped and typed as given; differentiable in all but ``cos`` and ``sin``.

    Raises:
        ValueError: an argument of another shape, dtype or device; names it.
        RuntimeError: ``impl`` cannot run here.
    """
    _check_heads("q", q)
    _check_heads("k", k)
    check_tensor("k", k, {"T": q.shape[0], "Hkv": None, "D": q.shape[2]}, [q.dtype])
    check_device("k", k, "q", q)
    _check_weight("q_weight", q_weight, "D", "q", q)
    _check_weight("k_weight", k_weight, "D", "k", k)
    _check_rotation(cos, sin, "q", q)
    eps = number("eps", eps, above=0)
    _, run = ROTATE.select(impl, q.device, q, k, q_weight, k_weight, cos, sin)
    return run(Heads(q, k, q_weight, k_weight, cos.detach(), sin.detach(), eps))


def rms_norm_rotate(
    x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float, *, impl: str | Impl = "auto"
) -> Tensor:
    """One tensor of :func:`qk_norm_rotate`, as where queries are of
    other rows than keys. Equals, in at least fp32 and rounded once::

        y = rms_norm(x, weight, eps)
        first, second = y.chunk(2, -1)
        y * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]

    ``x`` (T, heads, D), D even; ``weight`` (D,); ``cos`` and ``sin`` (T, D), both halves of their last dimension equal
    (Qwen3-VL's multimodal positions are interleaved in them already). Differentiable in ``x`` and ``weight``.
    """
    _check_heads("x", x)
    _check_weight("weight", weight, "D", "x", x)
    _check_rotation(cos, sin, "x", x)
    eps = number("eps", eps, above=0)
    _, run = ROTATE.select(impl, x.device, x, weight, cos, sin)
    return run(Heads(x, None, weight, None, cos.detach(), sin.detach(), eps))[0]


def _check_heads(name: str, x: Tensor) -> None:
    check_tensor(name, x, {"T": None, "heads": None, "D": None}, FLOATING)
    if x.shape[2] % 2 or x.shape[2] == 0:
        raise wrong(name, "an even D, at least 2", describe(x))


def _check_weight(name: str, weight: Tensor, dimension: str, peer: str, x: Tensor) -> None:
    check_tensor(name, weight, {dimension: x.shape[-1]}, FLOATING)
    check_device(name, weight, peer, x)


def _check_rotation(cos: Tensor, sin: Tensor, peer: str, x: Tensor) -> None:
    for name, tensor in (("cos", cos), ("sin", sin)):
        check_tensor(name, tensor, {"T": x.shape[0], "D": x.shape[2]}, FLOATING)
        check_device(name, tensor, peer, x)
