"""Production configurations of the router, the experts' kernels and our grouped GEMMs, for the compile gate."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl

from prism_kernels.compile_gate import Configuration
from prism_kernels.moe import triton_grouped_gemm, triton_mlp, triton_plan, triton_route

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}  # fp16 compiles as bf16 does
# (E, k) of every padding of E, 16 to 128; of E that 16 divides and does not, as Triton compiles these apart; of few and
# many choices. The last is Qwen3-VL-30B-A3B's.
EXPERTS = ((4, 2), (12, 8), (16, 8), (24, 8), (32, 2), (32, 8), (40, 1), (64, 1), (64, 8), (128, 8))


def configurations() -> list[Configuration]:
    """H 2048 and I 6144 are multiples of 16; T and the number of blocks are any."""
    return [*_route(), *_plan(), *_memory_bound(), *_grouped_gemm()]


def _aligned(experts: int, *names: str) -> tuple[str, ...]:
    """``names``, and the number of experts where 16 divides it."""
    return (*names, "num_experts") if experts % 16 == 0 else names


def _wide(dtype: str) -> str:
    return "fp64" if dtype == "fp64" else "fp32"


def _split(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(constexprs, launch options) of what a launcher passes by keyword."""
    launch = {name: value for name, value in options.items() if name.startswith("num_") or name == "maxnreg"}
    return {name: value for name, value in options.items() if name not in launch}, launch


def _route() -> list[Configuration]:
    rows = []
    dtypes = [(dtype, dtype) for dtype in DTYPES] + [("bf16", "fp32")]  # of hidden states and router
    for (dtype, router), (experts, k), kind in product(dtypes, EXPERTS, (False, True)):
        wide = f"*{_wide(router)}"
        size, wide_size = DTYPES[router].itemsize, DTYPES[_wide(router)].itemsize
        blocks, launch = _split(triton_route.route_options(experts, k, size))
        common = {"K": k, "E_PAD": triton_plan.padded(experts)}
        name = f"{dtype}{'' if router == dtype else f'/{router}'} E{experts} k{k}{' kinds' if kind else ''}"
        for forced in (False, True):
            signature = {"x_ptr": f"*{dtype}", "router_ptr": f"*{router}"}
            signature |= {"kind_ptr": "*i32" if kind else f"*{router}"}
            signature |= {"index_ptr": "*i32", "weight_ptr": wide, "probability_ptr": wide, "block_count_ptr": "*i32"}
            signature |= {"kind_count_ptr": "*i32", "kind_probability_ptr": wide}
            lengths = ("num_tokens", "hidden", "num_experts", "num_kinds", "num_blocks", "x_stride")
            flags = {"HAS_KIND": kind, "FORCED": forced, "RENORMALIZE": True, **blocks}
            rows.append(
                Configuration(
                    f"route {name}{' forced' if forced else ''}",
                    triton_route.moe_route_fwd_kernel,
                    {**signature, **{length: "i32" for length in lengths if kind or length != "num_kinds"}},
                    {**common, **flags, "K_PAD": triton.next_power_of_2(k), **({} if kind else {"num_kinds": 1})},
                    divisible_by_16=_aligned(experts, "hidden", "x_stride"),
                    **launch,
                )
            )
        names = ("probability_ptr", "d_weight_ptr", "d_prob_sum_ptr", "d_logits_ptr")
        signature = {**dict.fromkeys(names, wide), "index_ptr": "*i32", "kind_ptr": "*i32"}
        blocks, launch = _split(triton_route.d_logits_options(experts, wide_size))
        rows.append(
            Configuration(
                f"d_logits {name}",
                triton_route.moe_route_bwd_dlogits_kernel,
                signature | dict.fromkeys(("num_tokens", "num_experts", "num_kinds"), "i32"),
                {**common, **blocks, "HAS_KIND": kind, "RENORMALIZE": True},
                divisible_by_16=_aligned(experts),
                **launch,
            )
        )
        if not kind and (experts, k) == next(row for row in EXPERTS if row[0] == experts):  # k does not change it
            rows += [_d_router(name, dtype, router, experts, passed) for passed in (False, True)]
    return rows


def _d_router(name: str, dtype: str, router: str, experts: int, passed: bool) -> Configuration:
    wide = f"*{_wide(router)}"
    blocks, launch = _split(triton_route.d_router_options(experts, DTYPES[_wide(router)].itemsize))
    signature = {"d_logits_ptr": wide, "x_ptr": f"*{dtype}", "router_ptr": f"*{router}", "d_x_ptr": f"*{dtype}"}
    signature |= {"passed_ptr": f"*{dtype}", "d_router_ptr": wide}
    lengths = ("num_tokens", "tokens_per_split", "hidden", "num_experts", "x_stride")
    return Configuration(
        f"d_router {name}{' passed' if passed else ''}",
        triton_route.moe_route_bwd_drouter_kernel,
        signature | dict.fromkeys(lengths, "i32"),
        {"E_PAD": triton_plan.padded(experts), **blocks, "WITH_D_X": True, "HAS_PASSED": passed},
        divisible_by_16=_aligned(experts, "hidden", "x_stride", "tokens_per_split"),
        **launch,
    )


def _plan() -> list[Configuration]:
    rows = []
    for experts, k in EXPERTS:
        blocks, launch = _split(triton_plan.order_options(experts))
        common = {"K": k, "E_PAD": triton_plan.padded(experts)}
        launch["divisible_by_16"] = _aligned(experts)
        name = f"E{experts} k{k}"
        for wide, kind in product(("fp32", "fp64"), (False, True)):
            signature = dict.fromkeys(("index_ptr", "block_count_ptr", "kind_count_ptr"), "*i32")
            signature |= {"kind_probability_ptr": f"*{wide}", "order_ptr": "*i32", "offset_ptr": "*i32"}
            signature |= {"counts_ptr": "*fp32", "prob_sum_ptr": f"*{wide}"}
            lengths = ("num_tokens", "num_experts", "num_kinds", "num_blocks", "blocks_per_program")
            signature |= {length: "i32" for length in lengths if kind or length != "num_kinds"}
            rows.append(
                Configuration(
                    f"order {name} {wide}{' kinds' if kind else ''}",
                    triton_plan.moe_plan_fwd_order_kernel,
                    signature,
                    {**common, **blocks, **({} if kind else {"num_kinds": 1})},
                    **launch,
                )
            )
        signature = dict.fromkeys(("index_ptr", "block_count_ptr"), "*i32")
        signature |= dict.fromkeys(("num_tokens", "num_experts", "num_blocks"), "i32")
        common["BLOCK_T"] = blocks["BLOCK_T"]
        launch.pop("maxnreg", None)
        rows.append(Configuration(f"count {name}", triton_plan.moe_plan_fwd_count_kernel, signature, common, **launch))
    return rows


def _memory_bound() -> list[Configuration]:
    rows = []
    for dtype, width in product(DTYPES, (2048, 256)):
        block, launch = _split(triton_mlp.block_options(width))
        own, wide = f"*{dtype}", f"*{_wide(dtype)}"
        math = {"WIDE": getattr(tl, "float64" if dtype == "fp64" else "float32")}
        for k, flag in product((1, 2, 8), (False, True)):
            signature = {"source_ptr": own, "order_ptr": "*i32", "out_ptr": own, "position_ptr": "*i32"}
            signature |= {"width": "i32", "source_stride": "i32"}
            name = f"{dtype} {width} k{k}"
            rows.append(
                Configuration(
                    f"permute {name}{' position' if flag else ''}",
                    triton_mlp.moe_mlp_permute_kernel,
                    signature,
                    {"K": k, "WITH_POSITION": flag, **block},
                    divisible_by_16=("width", "source_stride"),
                    **launch,
                )
            )
            signature = {"rows_ptr": own, "position_ptr": "*i32", "weight_ptr": wide if flag else own, "out_ptr": own}
            rows.append(
                Configuration(
                    f"combine {name}{' weighted' if flag else ''}",
                    triton_mlp.moe_mlp_combine_kernel,
                    signature | {"width": "i32"},
                    {"K": k, "HAS_WEIGHT": flag, **math, **block},
                    divisible_by_16=("width",),
                    **launch,
                )
            )
        flags = {**math, **block}
        signature = {"product_ptr": own, "out_ptr": own, "intermediate": "i32"}
        rows.append(
            Configuration(
                f"swiglu {dtype} {width}",
                triton_mlp.moe_mlp_fwd_swiglu_kernel,
                signature,
                flags,
                divisible_by_16=("intermediate",),
                **launch,
            )
        )
        signature = dict.fromkeys(("product_ptr", "d_activation_ptr", "d_product_ptr", "activation_ptr"), own)
        signature |= {"weight_ptr": wide, "order_ptr": "*i32", "d_weight_ptr": wide, "intermediate": "i32"}
        rows.append(
            Configuration(
                f"swiglu backward {dtype} {width}",
                triton_mlp.moe_mlp_bwd_swiglu_kernel,
                signature,
                flags,
                divisible_by_16=("intermediate",),
                **launch,
            )
        )
    return rows


def _grouped_gemm() -> list[Configuration]:
    rows = []
    for dtype, layout in product(DTYPES, ("rows", "columns")):
        own = f"*{dtype}"
        blocks, launch = _split(triton_grouped_gemm.tile_options(DTYPES[dtype]))
        unit = 1 if layout == "rows" else 0  # which inner stride of the weight is 1
        strides = {"b_stride_e": "i32", "b_stride_r": "i32", "b_stride_n": "i32"}
        lengths = dict.fromkeys(("num_experts", "inner", "columns", "a_stride"), "i32")
        fixed = {("b_stride_r", "b_stride_n")[unit]: 1}  # Triton makes a stride of 1 a constant
        aligned = tuple(name for name in (*strides, "inner", "columns", "a_stride") if name not in fixed)
        signature = {"a_ptr": own, "b_ptr": own, "offset_ptr": "*i32", "out_ptr": own, **lengths, **strides}
        for pad in sorted({triton_plan.padded(experts) for experts, _ in EXPERTS}):
            rows.append(
                Configuration(
                    f"rows {dtype} {layout} E{pad}",
                    triton_grouped_gemm.moe_gemm_rows_kernel,
                    {name: kind for name, kind in signature.items() if name not in fixed},
                    {**blocks, "E_PAD": pad, **fixed},
                    divisible_by_16=aligned,
                    wgmma=dtype == "bf16",
                    **launch,
                )
            )
        strides = dict.fromkeys(("out_stride_e", "out_stride_m", "out_stride_n"), "i32")
        lengths = dict.fromkeys(("rows", "columns", "a_stride", "b_stride"), "i32")
        fixed = {("out_stride_m", "out_stride_n")[unit]: 1}
        signature = {"a_ptr": own, "b_ptr": own, "offset_ptr": "*i32", "out_ptr": own, **lengths, **strides}
        rows.append(
            Configuration(
                f"outer {dtype} {layout}",
                triton_grouped_gemm.moe_gemm_bwd_outer_kernel,
                {name: kind for name, kind in signature.items() if name not in fixed},
                {**blocks, **fixed},
                divisible_by_16=tuple(name for name in (*strides, *lengths) if name not in fixed),
                wgmma=dtype == "bf16",
                **launch,
            )
        )
        if layout == "rows":
            signature = {"out_ptr": own, "offset_ptr": "*i32", "size": "i32"}
            block = {"BLOCK": triton_grouped_gemm.CLEAR_BLOCK}
            kernel = triton_grouped_gemm.moe_gemm_bwd_clear_kernel
            rows.append(
                Configuration(f"clear {dtype}", kernel, signature, block, num_warps=8, divisible_by_16=("size",))
            )
    return rows
