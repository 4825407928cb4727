"""The contract: arguments, checks, dispatch. Dimensions: T tokens, I intermediate."""

from __future__ import annotations

from torch import Tensor

from prism_kernels.checks import FLOATING, check_tensor, describe, wrong
from prism_kernels.dispatch import Impl, Implementation, Op, need_triton
from prism_kernels.native import need_native

_PACKAGE = "prism_kernels.swiglu"

SWIGLU = Op(
    "swiglu",
    [
        Implementation(Impl.TRITON, f"{_PACKAGE}.operators:swiglu", ("cuda",), need_triton, fake=True),
        Implementation(Impl.TORCH, f"{_PACKAGE}.torch_autograd:swiglu", ("cpu", "cuda"), fake=True),
        # Behind the one that auto takes on a CPU, as it has no gradient: whoever decodes asks for it.
        Implementation(Impl.NATIVE, f"{_PACKAGE}.native:swiglu", ("cpu",), need_native),
        Implementation(Impl.REFERENCE, f"{_PACKAGE}.reference:swiglu", ("cpu", "cuda")),
    ],
)


def swiglu(gate_up: Tensor, *, up: Tensor | None = None, impl: str | Impl = "auto") -> Tensor:
    """SwiGLU (arXiv 2002.05202) between the products of an MLP. Equals, in at least fp32 and rounded once::

        gate, up = gate_up.chunk(2, -1)                                     # or: gate = gate_up, and up as given
        torch.nn.functional.silu(gate) * up

    Differentiable in both arguments; the backward keeps them alone.

    Args:
        gate_up: (T, 2I) floating, [gate | up]; with ``up``: the gate, (T, I). Strided views are read in place.
        up: None, or shape, dtype and device of the gate: of an MLP whose two products are apart.
        impl: "auto", "triton", "torch" (one step with a backward of its own), "native"
            (C++ on a CPU, forward alone) or "reference".

    Returns:
        (T, I) in the dtype of ``gate_up``.

    Raises:
        ValueError: an argument of another shape, dtype or device; names it.
        RuntimeError: ``impl`` cannot run here.
    """
    check_tensor("gate_up", gate_up, {"T": None, "2I" if up is None else "I": None}, FLOATING)
    if gate_up.shape[1] < 1 or (up is None and gate_up.shape[1] % 2):
        expected = "an even 2I, at least 2; a gate (T, I) goes with up" if up is None else "I >= 1"
        raise wrong("gate_up", expected, describe(gate_up))
    if up is not None and describe(up) != describe(gate_up):
        raise wrong("up", f"{describe(gate_up)}, as the gate is", describe(up))
    _, run = SWIGLU.select(impl, gate_up.device, gate_up, up)
    return run(gate_up, up)
