"""tree_attention, segment_attention and shared_prompt_decode: shapes, checks and dispatch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from prism_kernels.checks import (
    FLOATING,
    check_device,
    check_tensor,
    check_values,
    describe,
    flag,
    is_transformed,
    items,
    number,
    wrong,
)
from prism_kernels.dispatch import GRAD, HALF, VMAP, Impl, Implementation, Op, need_triton
from prism_kernels.native import need_native
from prism_kernels.operators import check_first_derivative
from prism_kernels.rms_norm import qk_norm_rotate
from prism_kernels.tree_attention import decode_operator, flash_library, operators
from prism_kernels.tree_attention.decode_layout import PAGE, DecodeLayout
from prism_kernels.tree_attention.decode_step import DecodeStep, HeadNorm, check_norm
from prism_kernels.tree_attention.layout import QueryRows, TreeLayout


def _no_flash() -> str | None:
    return flash_library.unavailable() or need_triton()


def _implementations(op: str) -> list[Implementation]:
    """A GPU's fp32 and fp64 tensors go to varlen, which never builds more than a block of scores and is repeatable.

    sdpa would, in fp32 with grouped heads and in fp64: none of torch's fused kernels takes those.
    """

    def row(name: Impl, devices: tuple[str, ...] = ("cpu", "cuda"), **options: Any) -> Implementation:
        return Implementation(name, f"prism_kernels.tree_attention.{name}:{op}", devices, **options)

    return [
        row(Impl.FLASH, ("cuda",), unavailable=_no_flash, fake=True, dtypes=HALF, detail=flash_library.detail),
        row(Impl.SDPA, transforms=(VMAP, GRAD), gpu_default=HALF),
        row(Impl.VARLEN, fake=True),
        row(Impl.REFERENCE),
    ]


_OP = Op("tree_attention", _implementations("tree_attention"))
_SEGMENTS = Op("segment_attention", _implementations("segment_attention"))

_DECODE = Op(
    "shared_prompt_decode",
    [
        Implementation(
            Impl.TRITON,
            "prism_kernels.tree_attention.triton_decode:shared_prompt_decode",
            ("cuda",),
            need_triton,
            fake=True,
        ),
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
    query_row: Tensor | QueryRows | None = None,
    impl: str | Impl = "auto",
) -> Tensor:
    """Attention of a packed tree: a token attends to the segments above its own and, causally, to its own segment.

    Equals, for every path from a root, ``softmax(q k^T * scale + causal mask) v`` of the concatenated path.

    q (T, Hq, D); k, v (T, Hkv, D) with Hq a multiple of Hkv (grouped queries); same dtype and device; layout of T
    tokens, any depth. scale: default D ** -0.5. query_row (Q,) int64: only these rows are computed, and q is
    (Q, Hq, D); the read-out of a last layer. They are planned on the host: a tensor there, or QueryRows, keeps the call
    from waiting for a GPU that holds them. Returns q's shape and dtype, differentiable in q, k and v.
    Raises ValueError naming the argument; RuntimeError where an explicit ``impl`` cannot run.
    """
    if not isinstance(layout, TreeLayout):
        raise wrong("layout", "a TreeLayout (TreeLayout.build(lengths, prefix))", type(layout).__name__)
    tokens = layout.num_tokens
    if query_row is None:
        check_tensor("q", q, {"T": tokens, "Hq": None, "D": None}, FLOATING, "T is that of layout")
    else:
        check_tensor("q", q, {"Q": None, "Hq": None, "D": None}, FLOATING)
        query_row = _on_host(query_row, q)
        check_values("query_row", query_row, "T", tokens)
    factor = _check_heads(q, k, v, tokens, "layout", scale)
    chosen, function = _OP.select(impl, q.device, q, k, v)
    if torch.compiler.is_compiling() and query_row is not None and chosen == Impl.SDPA:
        return operators.chosen_rows(q, k, v, layout, factor, query_row)
    out = function(q, k, v, layout.to(q.device, non_blocking=True), factor, query_row)
    return _once_differentiable("tree_attention", out, chosen)


def segment_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Sequence[int] | Tensor | TreeLayout,
    *,
    causal: bool = False,
    scale: float | None = None,
    impl: str | Impl = "auto",
) -> Tensor:
    """Attention of every segment of a stream to itself alone, as a vision tower's over the images of a pack.

    Equals ``softmax(q k^T * scale) v`` of every segment as a sequence of its own, with a causal mask if ``causal``.

    q (T, Hq, D); k, v (T, Hkv, D) with Hq a multiple of Hkv (grouped queries); same dtype and device. lengths: tokens
    of each segment, on the host, T in all; or a TreeLayout of roots alone, which keeps what the host derives from them
    (``TreeLayout.build(lengths, [-1] * len(lengths))``). scale: default D ** -0.5. Returns q's shape and dtype,
    differentiable in q, k and v. Raises ValueError naming the argument; RuntimeError where an explicit ``impl`` cannot
    run.
    """
    layout = lengths if isinstance(lengths, TreeLayout) else _roots(lengths)
    if not layout.flat:
        raise wrong("lengths", "segments that continue none", "a layout of trees", "call tree_attention")
    check_tensor("q", q, {"T": layout.num_tokens, "Hq": None, "D": None}, FLOATING, "T is the sum of lengths")
    factor = _check_heads(q, k, v, layout.num_tokens, "lengths", scale)
    causal = flag("causal", causal)
    chosen, function = _SEGMENTS.select(impl, q.device, q, k, v)
    out = function(q, k, v, layout.to(q.device, non_blocking=True), factor, causal)
    return _once_differentiable("segment_attention", out, chosen)


def _roots(lengths: Sequence[int] | Tensor) -> TreeLayout:
    if isinstance(lengths, Tensor) and lengths.device.type != "cpu":
        raise wrong("lengths", "numbers on the host", describe(lengths))
    numbers = items("lengths", lengths, "a sequence of integers")
    return TreeLayout.build(numbers, [-1] * len(numbers))


def _check_heads(q: Tensor, k: Tensor, v: Tensor, tokens: int, whose: str, scale: float | None) -> float:
    """k, v and scale beside q; returns the scale. T is that of the argument ``whose``."""
    _, heads, dim = q.shape
    if dim < 1:
        raise wrong("q", "D >= 1", describe(q))
    check_tensor("k", k, {"T": tokens, "Hkv": None, "D": dim}, (q.dtype,), f"T is that of {whose}, the rest as of q")
    check_tensor("v", v, {"T": tokens, "Hkv": k.shape[1], "D": dim}, (q.dtype,), "it is shaped as k")
    check_device("k", k, "q", q)
    check_device("v", v, "q", q)
    if k.shape[1] == 0 or heads % k.shape[1]:
        raise wrong("q", f"a multiple of the Hkv = {k.shape[1]} heads of k and v", f"{heads} heads")
    return dim**-0.5 if scale is None else number("scale", scale)


def _once_differentiable(op: str, out: Tensor, chosen: Impl) -> Tensor:
    """Torch's own error names neither the op nor a way out."""
    if out.requires_grad and chosen != Impl.REFERENCE and not torch.compiler.is_compiling() and not is_transformed(out):
        out.register_hook(lambda _: check_first_derivative(op))
    return out


def _on_host(query_row: Tensor | QueryRows, q: Tensor) -> Tensor:
    if isinstance(query_row, QueryRows):
        check_tensor("query_row", query_row.host, {"Q": q.shape[0]}, (torch.int64,), "one row per query")
        return query_row.host
    check_tensor("query_row", query_row, {"Q": q.shape[0]}, (torch.int64,), "one row per query")
    check_device("query_row", query_row, "q", q, host=True)
    if query_row.device.type == "meta":
        raise wrong("query_row", "rows that the host knows", describe(query_row), "give QueryRows")
    return query_row.cpu()


def shared_prompt_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    layout: DecodeLayout,
    *,
    scale: float | None = None,
    norm: HeadNorm | None = None,
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
        norm: q and k become ``qk_norm_rotate(q, k, *norm)`` first: (q_weight, k_weight, cos, sin, eps). On a GPU, and
            in C++ for fp32 and fp64, inside the same call.
        impl: "auto", "triton" (one launch), "native" (C++), "torch" or "reference".

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
    if len(layout.arrived) < rows * heads:
        least = f"DecodeLayout.build(heads={heads}) or more"
        raise wrong("layout", least, f"room for {len(layout.arrived) // rows} query heads")
    factor: float = dim**-0.5 if scale is None else number("scale", scale)
    chosen, run = _DECODE.select(impl, q.device, q, k, v, k_pages, v_pages)
    q, k, v, k_pages, v_pages = (x.detach() for x in (q, k, v, k_pages, v_pages))
    if norm is not None:
        norm = check_norm(norm, q)
        if not (chosen is Impl.TRITON or (chosen is Impl.NATIVE and q.dtype in (torch.float32, torch.float64))):
            how = "reference" if chosen is Impl.REFERENCE else "auto"
            with torch.no_grad():
                q, k = qk_norm_rotate(q, k, *norm, impl=how)
            norm = None
    step = DecodeStep(q, k, v, k_pages, v_pages, layout, factor, norm)
    return decode_operator.decode(step, str(chosen)) if torch.compiler.is_compiling() or q.is_meta else run(step)
