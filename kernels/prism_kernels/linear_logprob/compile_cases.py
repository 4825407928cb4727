"""Production configurations of the row kernels, for the compile gate."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

from prism_kernels.compile_gate import Configuration
from prism_kernels.linear_logprob import triton_glue, triton_objective, triton_scale, triton_two_pass
from prism_kernels.linear_logprob.triton_kernel import block_options, lm_head_grad_kernel, lm_head_stats_kernel

TYPES = (("bf16", "fp32"), ("fp16", "fp32"), ("fp32", "fp32"), ("fp64", "fp64"))  # of hidden, of logits
LENGTHS = dict.fromkeys(("row_stride", "vocab_size", "num_words", "num_forbidden"), "i32")
SCALARS = dict.fromkeys(("inverse_temperature", "cap"), "fp64")
FURTHER = {"is_top1": "WITH_TOP1", "mean_logits": "WITH_MEAN", "log_sum_sq_probs": "WITH_SQUARES"}
TOKEN_SIZE = {"fp32": 4, "fp64": 8}


def _named(prefix: str, **flags: bool) -> str:
    return " ".join([prefix, *(name for name, on in flags.items() if on)])


def configurations() -> list[Configuration]:
    """hidden and bias in the first type, logits in the second. V (151,936) is a multiple of 16, as
    strides are; "odd V" is none. The trainer's heads are without bias, with and without forbidden words."""
    rows = [row for types in TYPES for row in (*_statistics(*types), *_gradients(*types))]
    return [*rows, *_objectives("fp32"), *_objectives("fp64"), *_scales(), *_two_passes()]


def _heads() -> Iterator[dict[str, bool]]:
    for bias, softcap in product((False, True), repeat=2):
        yield {"bias": bias, "softcap": softcap, "forbidden": False}
    for every in (False, True):
        yield {"bias": every, "softcap": every, "forbidden": True}


def _head(dtype: str, wide: str, head: dict[str, bool]) -> tuple[dict[str, str], dict[str, Any]]:
    """(signature, constexprs)."""
    signature = {"z_ptr": f"*{wide}", "target_ptr": "*i64", "bias_ptr": f"*{dtype if head['bias'] else wide}"}
    signature |= {"forbidden_ptr": "*i32" if head["forbidden"] else "*i64", **LENGTHS, **SCALARS}
    return signature, {f"HAS_{name.upper()}": on for name, on in head.items()}


def _blocks(kernel: str, wide: str, softcap: bool, further: bool = False) -> tuple[dict[str, int], dict[str, int]]:
    """(constexprs, launch options)."""
    blocks = block_options(kernel, TOKEN_SIZE[wide], softcap, further)
    return blocks, {name: blocks.pop(name) for name in ("num_warps", "maxnreg") if name in blocks}


def _statistics(dtype: str, wide: str) -> Iterator[Configuration]:
    # What TRL's trainers ask for: nothing, the entropy, the guesses beside it (SFT), all (DPO).
    asked = [(False, ()), (True, ()), (True, ("is_top1",)), (True, tuple(FURTHER))]
    for head, (entropy, wanted) in product(_heads(), asked):
        blocks, launch = _blocks("statistics", wide, head["softcap"], bool(wanted))
        signature, flags = _head(dtype, wide, head)
        signature |= dict.fromkeys(("logprob_ptr", "logsumexp_ptr", "lost_ptr", "entropy_ptr"), f"*{wide}")
        signature |= {f"{name}_ptr": f"*{wide}" for name in FURTHER}
        if "is_top1" in wanted:
            signature["is_top1_ptr"] = "*u8"
        name = _named(f"statistics {dtype}", **head, entropy=entropy, **dict.fromkeys(wanted, True))
        flags |= {"WITH_ENTROPY": entropy, **blocks}
        flags |= {flag: name in wanted for name, flag in FURTHER.items()}
        row = Configuration(
            name, lm_head_stats_kernel, signature, flags, divisible_by_16=("row_stride", "vocab_size"), **launch
        )
        yield row
        if len({*head.values(), entropy}) == 1 and len(wanted) != 1:
            yield replace(row, name=f"{name} odd V", divisible_by_16=("row_stride",))


def _gradients(dtype: str, wide: str) -> Iterator[Configuration]:
    strides = ("row_stride", "dz_row_stride")
    names = ("logprob_ptr", "logsumexp_ptr", "lost_ptr", "entropy_ptr")
    names += ("d_logprob_ptr", "d_logsumexp_ptr", "d_entropy_ptr")
    for head, d_logsumexp, d_entropy in product(_heads(), (False, True), (False, True)):
        blocks, launch = _blocks("gradient", wide, head["softcap"])
        signature, flags = _head(dtype, wide, head)
        signature |= {"dz_ptr": f"*{dtype}", "dz_row_stride": "i32"} | dict.fromkeys(names, f"*{wide}")
        flags |= {"HAS_D_LOGSUMEXP": d_logsumexp, "HAS_D_ENTROPY": d_entropy, "NARROW": dtype != wide, **blocks}
        name = _named(f"gradient {dtype}", **head, d_logsumexp=d_logsumexp, d_entropy=d_entropy)
        row = Configuration(
            name, lm_head_grad_kernel, signature, flags, divisible_by_16=(*strides, "vocab_size"), **launch
        )
        yield row
        if len({*head.values(), d_logsumexp, d_entropy}) == 1:
            yield replace(row, name=f"{name} odd V", divisible_by_16=strides)


def _of_an_objective(wide: str) -> dict[str, str]:
    """Arguments of the kernels that know one, by name."""
    floats = "logprob advantage mean old ref rollout divisor d_logprob d_entropy entropy partial loss means"
    types = dict.fromkeys([f"{name}_ptr" for name in floats.split()], f"*{wide}")
    types |= {"target_ptr": "*i64", "rows_ptr": "*i64", "sequence_ptr": "*i32", "count_ptr": "*i32"}
    types |= {"start_ptr": "*i32", "position_ptr": "*i32"}
    types |= dict.fromkeys(triton_objective.UNSPECIALIZED, "i32")
    scalars = ["clip_low", "clip_high", "dual_clip", "cap", "kl_coef", "entropy_coef", "max_length"]
    return types | dict.fromkeys(scalars, "fp64")


def _objectives(wide: str) -> Iterator[Configuration]:
    """The glue; which objective it is, is known at run time."""
    types, launch = _of_an_objective(wide), {"num_warps": triton_glue.WARPS}
    for part in ("_count", "_mean", "", "_total"):
        kernel = getattr(triton_objective, f"lm_head_objective_fwd{part}_kernel")
        signature = {name: types[name] for name in kernel.arg_names if name != "BLOCK"}
        flags = {"BLOCK": triton_glue.SUMS if part == "_total" else triton_glue.ROWS}
        yield Configuration(f"objective{part.replace('_', ' ')} {wide}", kernel, signature, flags, **launch)


def _two_passes() -> Iterator[Configuration]:
    """Not in fp16. Each part of a head alone is a pass's own configuration; here none, forbidden words, and all."""
    kernel = triton_two_pass.lm_head_objective_fwd_rows_kernel
    heads = ((False, False, False), (False, False, True), (True, True, True))
    outputs = ((False, False), (True, False), (True, True))  # entropy, dL/dentropy
    strides = ("row_stride", "dz_row_stride")
    for (dtype, wide), (bias, softcap, forbidden), (entropy, d_entropy) in product(TYPES, heads, outputs):
        if dtype == "fp16":
            continue
        head = {"bias": bias, "softcap": softcap, "forbidden": forbidden}
        signature, flags = _head(dtype, wide, head)
        signature = _of_an_objective(wide) | signature | {"dz_ptr": f"*{dtype}", "dz_row_stride": "i32"}
        signature |= {"importance_cap": "fp64"}
        launch = triton_two_pass.block_options(TOKEN_SIZE[wide], softcap)
        flags |= {"WITH_ENTROPY": entropy, "HAS_D_ENTROPY": d_entropy, "NARROW": dtype != wide}
        flags["BLOCK"] = launch.pop("BLOCK")
        row = Configuration(
            _named(f"two passes {dtype}", **head, entropy=entropy, d_entropy=d_entropy),
            kernel,
            {name: signature[name] for name in kernel.arg_names if name not in flags},
            flags,
            **launch,
            divisible_by_16=(*strides, "vocab_size"),
        )
        yield row
        if len({*head.values(), entropy, d_entropy}) == 1:
            yield replace(row, name=f"{row.name} odd V", divisible_by_16=strides)


def _scales() -> Iterator[Configuration]:
    """dX and db, which are rounded as they are scaled, and dW in place."""
    for dtype, out in (("fp32", "bf16"), ("fp32", "fp16"), ("bf16", "bf16"), ("fp32", "fp32"), ("fp64", "fp64")):
        signature = {"x_ptr": f"*{dtype}", "out_ptr": f"*{out}", "factor_ptr": "*fp64" if out == "fp64" else "*fp32"}
        flags = {"IN_PLACE": dtype == out, "BLOCK": triton_scale.BLOCK}
        kernel, launch = triton_scale.lm_head_bwd_scale_kernel, {"num_warps": triton_scale.WARPS}
        yield Configuration(f"scale {dtype} {out}", kernel, signature | {"num_elements": "i32"}, flags, **launch)
