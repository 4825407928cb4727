"""tree_attention and shared_prompt_decode: shapes, checks and dispatch."""

from __future__ import annotations

import torch
from torch import Tensor

from prism_kernels.checks import (
    FLOATING,
    check_device,
    check_tensor,
    check_values,
    describe,
    is_transformed,
    number,
    wrong,
)
from prism_kernels.dispatch import GRAD, VMAP, Impl, Implementation, Op
from prism_kernels.native import need_native
from prism_kernels.operators import check_first_derivative
from prism_kernels.tree_attention import operators
from prism_kernels.tree_attention.decode_layout import PAGE, DecodeLayout
from prism_kernels.tree_attention.decode_step import DecodeStep
from prism_kernels.tree_attention.layout import TreeLayout

_OP = Op(
    "tree_attention",
    [
        Implementation(
            Impl.SDPA, "prism_kernels.tree_attention.sdpa:tree_attention", ("cpu", "cuda"), transforms=(VMAP, GRAD)
        ),
        Implementation(Impl.VARLEN, "prism_kernels.tree_attention.varlen:tree_attention", ("cpu", "cuda")),
        Implementation(Impl.REFERENCE, "prism_kernels.tree_attention.reference:tree_attention", ("cpu", "cuda")),
    ],
)

_DECODE = Op(
    "shared_prompt_decode",
    [
        Implementation(Impl.NATIVE, "prism_kernels.tree_attention.native:shared_prompt_decode", ("cpu",), need_native),
        Implementation(
            Impl.TORCH,
            "prism_kernels.tree_attention.decode:shared_prompt_decode",
            ("cpu", "cuda"),
            fake=True,
        ),
        Implementation(Impl.REFERENCE, "prism_kernels.tree_attention.reference:shared_prompt_decode", ("cpu", "cuda")),
    ],
)


def tree_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: TreeLayout,
    *,
    scale: float | None = None,
    query_row: Tensor | None = None,
    impl: str | Impl = "auto",
) -> Tensor:
    """Attention of a packed tree: a token attends to the segments above its own and, causally, to its own segment.

    Equals, for every path from a root, ``softmax(q k^T * scale + causal mask) v`` of the concatenated path.

    q (T, Hq, D); k, v (T, Hkv, D) with Hq a multiple of Hkv (grouped queries); same dtype and device; layout of T
    tokens, any depth. scale: default D ** -0.5. query_row (Q,) int64: only these rows are computed, and q is
    (Q, Hq, D); the read-out of a last layer. Returns q's shape and dtype, differentiable in q, k and v.
    Raises ValueError naming the argument; RuntimeError where an explicit ``impl`` cannot run.
    """
    if not isinstance(layout, TreeLayout):
        raise wrong("layout", "a TreeLayout (TreeLayout.build(lengths, prefix))", type(layout).__name__)
    tokens = layout.num_tokens
    if query_row is None:
        check_tensor("q", q, {"T": tokens, "Hq": None, "D": None}, FLOATING, "T is that of layout")
    else:
        check_tensor("q", q, {"Q": None, "Hq": None, "D": None}, FLOATING)
        check_tensor("query_row", query_row, {"Q": q.shape[0]}, (torch.int64,), "one row per query")
        check_device("query_row", query_row, "q", q, host=True)
        check_values("query_row", query_row, "T", tokens)
    _, heads, dim = q.shape
    if dim < 1:
        raise wrong("q", "D >= 1", describe(q))
    check_tensor("k", k, {"T": tokens, "Hkv": None, "D": dim}, (q.dtype,), "T is that of layout, the rest as of q")
    check_tensor("v", v, {"T": tokens, "Hkv": k.shape[1], "D": dim}, (q.dtype,), "it is shaped as k")
    check_device("k", k, "q", q)
    check_device("v", v, "q", q)
    if k.shape[1] == 0 or heads % k.shape[1]:
        raise wrong("q", f"a multiple of the Hkv = {k.shape[1]} heads of k and v", f"{heads} heads")
    factor: float = dim**-0.5 if scale is None else number("scale", scale)
    chosen, function = _OP.select(impl, q.device, q, k, v)
    if torch.compiler.is_compiling() and query_row is not None and chosen == Impl.SDPA:
        return operators.chosen_rows(q, k, v, layout, factor, query_row)
    out = function(q, k, v, layout.to(q.device), factor, query_row)
    if out.requires_grad and chosen != Impl.REFERENCE and not torch.compiler.is_compiling() and not is_transformed(out):
        out.register_hook(_first_derivative)  # torch's own error names neither the op nor a way out
    return out


def _first_derivative(_: Tensor) -> None:
    check_first_derivative("tree_attention")


def shared_prompt_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    layout: DecodeLayout,
    *,
    scale: float | None = None,
    impl: str | Impl = "auto",
) -> Tensor:
    """Attention of one new token per row: to its group's prompt, which is stored once, and to the row's own tokens.

    Writes ``k`` and ``v`` into the row's page, as token ``layout.own_length - 1``. Then equals, for every row b,
    ``softmax(q[b] keys^T * scale) values`` with the tokens of prompt ``layout.group[b]`` followed by the row's own.
    Shapes and launches do not depend on lengths, and nothing is read back: a CUDA graph can hold it. No gradient goes
    through.

    Args:
        q: (B, Hq, D) floating, Hq a multiple of Hkv (grouped queries).
        k, v: (B, Hkv, D), dtype and device of ``q``.
        k_pages, v_pages: (N, Hkv, 64, D) contiguous, of one layer. Tokens beyond a length may hold anything; page 0 is
            nobody's, and may be written.
        layout: of B rows; tables and lengths that leave the pages are undefined on a GPU.
        scale: default D ** -0.5.
        impl: "auto", "native" (C++), "torch" or "reference".

    Returns:
        (B, Hq, D) in the dtype of ``q``; 0 for an idle row, whose length is 0.

    Raises:
        ValueError: an argument of another shape, dtype or device; names it.
        RuntimeError: ``impl`` cannot run here.
    """
    if not isinstance(layout, DecodeLayout):
        raise wrong("layout", "a DecodeLayout (DecodeLayout.build(...))", type(layout).__name__)
    rows, _ = layout.shape
    check_tensor("q", q, {"B": rows, "Hq": None, "D": None}, FLOATING, "B is that of layout")
    heads, dim = q.shape[1:]
    if dim < 1:
        raise wrong("q", "D >= 1", describe(q))
    check_tensor("k", k, {"B": rows, "Hkv": None, "D": dim}, [q.dtype])
    kv_heads = k.shape[1]
    if kv_heads < 1 or heads < 1 or heads % kv_heads:
        raise wrong("k", f"Hkv a divisor of Hq = {heads}", describe(k), "Hq is that of q, >= 1")
    check_tensor("v", v, {"B": rows, "Hkv": kv_heads, "D": dim}, [q.dtype], "it is shaped as k")
    check_tensor("k_pages", k_pages, {"N": None, "Hkv": kv_heads, str(PAGE): PAGE, "D": dim}, [q.dtype])
    check_tensor("v_pages", v_pages, {"N": len(k_pages), "Hkv": kv_heads, str(PAGE): PAGE, "D": dim}, [q.dtype])
    for name, tensor in (("k", k), ("v", v), ("k_pages", k_pages), ("v_pages", v_pages), ("layout", layout.group)):
        check_device(name, tensor, "q", q)
    for name, tensor in (("k_pages", k_pages), ("v_pages", v_pages)):
        if not tensor.is_contiguous() or len(tensor) < 1:
            raise wrong(name, "contiguous pages, one at least", f"{describe(tensor)} with strides {tensor.stride()}")
    scale = dim**-0.5 if scale is None else number("scale", scale)
    _, run = _DECODE.select(impl, q.device, q, k, v, k_pages, v_pages)
    pages = (x.detach() for x in (q, k, v, k_pages, v_pages))
    return run(DecodeStep(*pages, layout, scale))
