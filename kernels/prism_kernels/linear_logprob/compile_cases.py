"""Production configurations of the row kernels, for the compile gate."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

from prism_kernels.compile_gate import Configuration
from prism_kernels.linear_logprob.triton_kernel import block_options, lm_head_grad_kernel, lm_head_stats_kernel

SCALARS = dict.fromkeys(("inverse_temperature", "cap"), "fp64")
TOKEN_SIZE = {"fp32": 4, "fp64": 8}


def _named(prefix: str, **flags: bool) -> str:
    return " ".join([prefix, *(name for name, on in flags.items() if on)])


def configurations() -> list[Configuration]:
    """hidden and bias in the first type, logits in the second. V (151,936) is a multiple of 16, as strides are; "odd V"
    is none."""
    rows = []
    for dtype, wide in (("bf16", "fp32"), ("fp16", "fp32"), ("fp32", "fp32"), ("fp64", "fp64")):
        blocks = {name: block_options(name, TOKEN_SIZE[wide]) for name in ("statistics", "gradient")}
        warps = {name: options.pop("num_warps") for name, options in blocks.items()}
        lengths = {"row_stride": "i32", "vocab_size": "i32", **SCALARS}
        strides = ("row_stride", "dz_row_stride")
        aligned, odd = {"divisible_by_16": (*strides, "vocab_size")}, {"divisible_by_16": strides}
        for bias, softcap, entropy in product((False, True), repeat=3):
            names = ("logprob_ptr", "logsumexp_ptr", "lost_ptr", "entropy_ptr")
            signature = {"z_ptr": f"*{wide}", "target_ptr": "*i64", "bias_ptr": f"*{dtype if bias else wide}"}
            signature.update(dict.fromkeys(names, f"*{wide}"))
            flags = {"HAS_BIAS": bias, "HAS_SOFTCAP": softcap, "WITH_ENTROPY": entropy, **blocks["statistics"]}
            name = _named(f"statistics {dtype}", bias=bias, softcap=softcap, entropy=entropy)
            rows.append(
                Configuration(
                    name, lm_head_stats_kernel, {**signature, **lengths}, flags, warps["statistics"], **aligned
                )
            )
            if bias == softcap == entropy:
                rows.append(replace(rows[-1], name=f"{name} odd V", **odd))
        for bias, softcap, d_logsumexp, d_entropy in product((False, True), repeat=4):
            names = ("logprob_ptr", "logsumexp_ptr", "lost_ptr", "entropy_ptr")
            names += ("d_logprob_ptr", "d_logsumexp_ptr", "d_entropy_ptr")
            signature = {"z_ptr": f"*{wide}", "dz_ptr": f"*{dtype}", "target_ptr": "*i64"}
            signature["bias_ptr"] = f"*{dtype if bias else wide}"
            signature.update(dict.fromkeys(names, f"*{wide}"))
            flags = {
                "HAS_BIAS": bias,
                "HAS_SOFTCAP": softcap,
                "HAS_D_LOGSUMEXP": d_logsumexp,
                "HAS_D_ENTROPY": d_entropy,
                "NARROW": dtype != wide,
                **blocks["gradient"],
            }
            name = _named(f"gradient {dtype}", bias=bias, softcap=softcap, d_logsumexp=d_logsumexp, d_entropy=d_entropy)
            signature.update(lengths, dz_row_stride="i32")
            rows.append(Configuration(name, lm_head_grad_kernel, signature, flags, warps["gradient"], **aligned))
            if bias == softcap == d_logsumexp == d_entropy:
                rows.append(replace(rows[-1], name=f"{name} odd V", **odd))
    return rows
