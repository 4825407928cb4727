"""Every kernel at small, awkward sizes, forward and backward: what compute-sanitizer watches.

    python -m benchmarks.gpu.sanitize --tool memcheck
    python -m benchmarks.gpu.sanitize --tool racecheck

``--tool`` starts this script again under compute-sanitizer, for our kernels alone, with torch's caching of memory off:
in its pool a write past a tensor would go unseen. ``--device cpu`` runs the same calls in Triton's interpreter
(TRITON_INTERPRET=1), so that this script itself is tested without a GPU. Results are compared with the definitions.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from itertools import product

import torch
from torch import Tensor

import prism_kernels
from benchmarks.harness.measure import short
from benchmarks.harness.processes import environment
from prism_kernels import compile_gate, tuned_options
from prism_kernels.dispatch import interpreting
from prism_kernels.group_advantage.rules import RULES
from prism_kernels.moe import grouped_gemm, plan_routing
from prism_kernels.native import need_cuda

TOOLS = ("memcheck", "racecheck")
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
Outputs = list[Tensor]


def checks(device: torch.device) -> dict[str, Callable[[str], Outputs]]:
    """{name: call of an implementation}; run for "triton" and for "reference". A name holds that of its op's parts in
    `make gpu`."""
    on_gpu = device.type == "cuda"
    found: dict[str, Callable[[str], Outputs]] = {}
    for dtype in [torch.float32, torch.bfloat16, torch.float16] if on_gpu else [torch.float32]:
        label, how = str(dtype).removeprefix("torch."), {"dtype": dtype, "device": device}
        found[f"linear_logprob {label}"] = partial(_logprob, **how)
        # Statistics and dZ by two kernels, and by one that a table of tuned options lets run.
        found[f"linear_policy_loss {label}"] = partial(_policy, **how, megabytes=1e-9)
        found[f"linear_policy_loss, two passes {label}"] = partial(_policy, **how, megabytes=1)
        found[f"linear_policy_loss, a ratio per sequence {label}"] = partial(_policy, **how, ratio="sequence")
        for backend in _backends(dtype, device):
            found[f"moe routed {label} {backend}"] = partial(_routed, **how, backend=backend)
            found[f"moe planned {label} {backend}"] = partial(_planned, **how, backend=backend)
        found[f"rms_norm {label}"] = partial(_norm, **how)
        found[f"rms_norm, wide {label}"] = partial(_norm, **how, width=9001)  # more than a program holds
        found[f"rms_norm, heads {label}"] = partial(_rotate, **how)
        found[f"swiglu {label}"] = partial(_swiglu, **how)
        found[f"moe clear {label}"] = partial(_clear, **how)
        found[f"other sample_tokens {label}"] = partial(_sample, **how)
        found[f"other shared_prompt_decode {label}"] = partial(_decode, **how)
        found[f"tree_attention merge {label}"] = partial(_merge, **how)
    for rule in RULES:
        found[f"advantage {rule}"] = partial(_advantage, rule=rule, device=device)
    found["advantage, group_normalize"] = partial(_normalize, device=device)
    if not on_gpu or need_cuda() is None:  # csrc/adamw.cu, where it was built
        found["update adamw_step"] = partial(_adamw, device=device)
    return found


# Three steps of the row kernels' loop, in which dZ overwrites the logits it was made from; the last one partial.
WORDS = 9001


def _random(*shape: int, device: torch.device, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(device, dtype)


def _head(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden = _random(67, 32, device=device, dtype=dtype, seed=1).requires_grad_()
    weight = (_random(WORDS, 32, device=device, seed=2) / 6).to(dtype).requires_grad_()
    bias = _random(WORDS, device=device, dtype=dtype, seed=3).requires_grad_()
    targets = torch.randint(0, WORDS, (67,), generator=torch.Generator().manual_seed(4)).to(device)
    targets[::7] = -100
    return hidden, weight, bias, targets


def _logprob(impl: str, dtype: torch.dtype, device: torch.device) -> Outputs:
    hidden, weight, bias, targets = _head(dtype, device)
    out = prism_kernels.linear_logprob(
        hidden, weight, targets, bias=bias, softcap=20.0, temperature=0.7, with_entropy=True, impl=impl
    )
    total = (out.logprob * 0.5 + out.logsumexp * 0.1 + out.entropy * 0.2).sum()
    return [out.logprob, out.entropy, *torch.autograd.grad(total, [hidden, weight, bias])]


def _policy(impl: str, dtype: torch.dtype, device: torch.device, megabytes: float = 0, ratio: str = "token") -> Outputs:
    hidden, weight, bias, targets = _head(dtype, device)
    start = torch.tensor([0, 20, 20, 67], dtype=torch.int32, device=device)
    old, ref = (_random(67, device=device, seed=seed) * 0.1 - 7 for seed in (5, 6))
    objective = prism_kernels.PolicyObjective.dapo(ratio=ratio, kl_coef=0.1, kl_estimator="k3", entropy_coef=0.01)
    advantages = torch.tensor([1.0, 0.5, -1.0], device=device)
    # A chunk of a few rows: the kernels see a first, a middle and a last chunk.
    chunk = {} if impl == "reference" else {"chunk_bytes": 4 * 9008 * 24}
    with tuned_options.forced("linear_logprob", "two_pass 4", {"MEGABYTES": megabytes}):
        out = prism_kernels.linear_policy_loss(
            hidden, weight, targets, advantages, start, objective, old_logprob=old, ref_logprob=ref, bias=bias,
            impl=impl, **chunk,
        )  # fmt: skip
    return [out.loss, *torch.autograd.grad(out.loss, [hidden, weight, bias])]


def _backends(dtype: torch.dtype, device: torch.device) -> list[str]:
    """Who can compute the grouped GEMMs of these checks here."""
    gate_up, down = _experts(dtype, device)[2:]
    return grouped_gemm.able(gate_up, down)


@contextmanager
def _pinned(backend: str) -> Iterator[None]:
    """These grouped GEMMs: measuring them all, as production does, takes long under a sanitizer."""
    before = os.environ.get("PRISM_GROUPED_MM", "")
    os.environ["PRISM_GROUPED_MM"] = backend
    try:
        yield
    finally:
        os.environ["PRISM_GROUPED_MM"] = before


def _experts(dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """(T, H), (E, H), (E, 2I, H), (E, H, I)."""
    hidden = _random(37, 48, device=device, dtype=dtype, seed=1)
    router = _random(5, 48, device=device, dtype=dtype, seed=2)
    router[3] -= 4  # an expert that nobody chooses, or few
    gate_up = (_random(5, 64, 48, device=device, seed=3) / 7).to(dtype)
    down = (_random(5, 48, 32, device=device, seed=4) / 6).to(dtype)
    return [tensor.requires_grad_() for tensor in (hidden, router, gate_up, down)]


def _routed(impl: str, dtype: torch.dtype, device: torch.device, backend: str) -> Outputs:
    """The fused router, top-2, with statistics of three kinds."""
    hidden, router, gate_up, down = _experts(dtype, device)
    kind = (torch.arange(37) % 3).to(device)
    routing = prism_kernels.moe_route(hidden, router, 2, segment_kind=kind, num_kinds=3, impl=impl)
    with _pinned(backend):
        out = prism_kernels.moe_mlp(hidden, gate_up, down, routing, impl=impl)
        weighted = (out * _random(37, 48, device=device, dtype=dtype, seed=5)).sum()
        total = weighted + 0.1 * routing.stats.prob_sum[0].sum()
        gradients = torch.autograd.grad(total, [hidden, router, gate_up, down])  # whose GEMMs are chosen again
    return [out, routing.weight, routing.stats.counts, *gradients]


def _planned(impl: str, dtype: torch.dtype, device: torch.device, backend: str) -> Outputs:
    """Experts of an earlier call, top-3: weights by the router, the plan from the indices; transformers 4's layout."""
    hidden, router, gate_up, down = _experts(dtype, device)
    index = (torch.arange(37)[:, None] + torch.arange(3)) % 4  # the last expert has no rows
    index = index.int().to(device)
    routing = prism_kernels.moe_route(hidden, router, 3, expert_index=index, renormalize=False, impl=impl)
    plan = plan_routing(index, routing.weight, 5, impl=impl)
    gate_up, down = (w.detach().transpose(1, 2).contiguous().requires_grad_() for w in (gate_up, down))
    with _pinned(backend):
        out = prism_kernels.moe_mlp(hidden, gate_up, down, plan, layout="v4", impl=impl)
        total = (out * _random(37, 48, device=device, dtype=dtype, seed=5)).sum()
        gradients = torch.autograd.grad(total, [hidden, router, gate_up, down])
    return [out, plan.token_order, plan.expert_offset, *gradients]


def _clear(impl: str, dtype: torch.dtype, device: torch.device) -> Outputs:
    """What the library's grouped GEMM leaves open, zeroed: experts 0 and 3 have no rows."""
    out = torch.ones(4, 33, 65, dtype=dtype, device=device)
    if impl == "reference":
        out[[0, 3]] = 0
    else:
        from prism_kernels.moe.triton_grouped_gemm import clear_empty

        clear_empty(out, torch.tensor([0, 0, 2, 7, 7], dtype=torch.int32, device=device))
    return [out]


def _norm(impl: str, dtype: torch.dtype, device: torch.device, width: int = 63) -> Outputs:
    """Alone, and behind a sum whose gradient is asked for too."""
    x, residual = (_random(7, width, device=device, dtype=dtype, seed=seed).requires_grad_() for seed in (1, 2))
    weight = _random(width, device=device, dtype=dtype, seed=3).requires_grad_()
    found = []
    for given in ((x,), (x, residual)):
        out = prism_kernels.rms_norm(x, weight, 1e-6, residual=residual if len(given) == 2 else None, impl=impl)
        out = out if isinstance(out, tuple) else (out,)
        upstream = [_random(7, width, device=device, dtype=dtype, seed=4 + i) for i in range(len(out))]
        found += [*out, *torch.autograd.grad(out, [*given, weight], upstream)]
    return found


def _rotate(impl: str, dtype: torch.dtype, device: torch.device) -> Outputs:
    """Views of one projection, heads of 6."""
    packed = _random(7, 9 * 6, device=device, dtype=dtype, seed=1).requires_grad_()
    weight = _random(6, device=device, dtype=dtype, seed=2).requires_grad_()
    angle = _random(7, 3, device=device, seed=3).repeat(1, 2)
    q, k = packed[:, :30].view(7, 5, 6), packed[:, 30:42].view(7, 2, 6)
    out = prism_kernels.qk_norm_rotate(q, k, weight, weight, angle.cos(), angle.sin(), 1e-6, impl=impl)
    upstream = [_random(*x.shape, device=device, dtype=dtype, seed=4) for x in out]
    return [*out, *torch.autograd.grad(out, [packed, weight], upstream)]


def _swiglu(impl: str, dtype: torch.dtype, device: torch.device) -> Outputs:
    """Packed and apart, in a full and a partial program a row."""
    gate_up, up = (_random(3, 4106, device=device, dtype=dtype, seed=seed).requires_grad_() for seed in (1, 2))
    found = []
    for given in ((gate_up,), (gate_up, up)):
        out = prism_kernels.swiglu(gate_up, up=up if len(given) == 2 else None, impl=impl)
        found += [out, *torch.autograd.grad(out, given, _random(*out.shape, device=device, dtype=dtype, seed=3))]
    return found


def _groups(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """A group of one, groups of 2 to 9, in a random order."""
    ids = torch.arange(10).repeat_interleave(torch.arange(10))
    ids = torch.cat([ids, torch.tensor([77])])
    ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))]
    return ids.to(device), _random(len(ids), device=device, seed=1), _random(len(ids), device=device, seed=2)


def _advantage(impl: str, rule: str, device: torch.device) -> Outputs:
    ids, perception, reasoning = _groups(device)
    valid, accuracy = perception > -1, (reasoning > 0).float()
    return [
        prism_kernels.multi_reward_advantage(
            perception, reasoning, ids, format_valid=valid, accuracy=accuracy, rule=rule, format_penalty=0.5, impl=impl
        )
    ]


def _normalize(impl: str, device: torch.device) -> Outputs:
    ids, first, second = _groups(device)
    scores = torch.stack([first, second])
    return [
        prism_kernels.group_normalize(scores, ids, baseline=baseline, scale=scale, impl=impl)
        for baseline in ("mean", "leave_one_out")
        for scale in ("std", "none")
    ]


def _sample(impl: str, dtype: torch.dtype, device: torch.device) -> Outputs:
    logits = _random(3, WORDS, device=device, dtype=dtype, seed=5)
    outputs = []
    for temperature in (1.0, 0.0):
        outputs += prism_kernels.sample_tokens(
            logits, temperature=temperature, seed=3, response=torch.arange(3, device=device), step=1,
            forbidden=[0, 5000], vocab_size=WORDS - 9, impl=impl,
        )  # fmt: skip
    return outputs


def _decode(impl: str, dtype: torch.dtype, device: torch.device) -> Outputs:
    layout = prism_kernels.DecodeLayout.build(
        rows=5, prompts=2, prompt_tokens=130, own_tokens=70, rows_per_tile=2, device=device
    )
    layout.prompt_page.copy_(torch.tensor([[1, 2, 3], [4, 0, 0]]))
    layout.prompt_length.copy_(torch.tensor([130, 7]))
    layout.own_page.copy_(torch.arange(5, 15).view(5, 2))
    layout.own_length.copy_(torch.tensor([70, 1, 0, 64, 65]))
    layout.place([1, 0, 1, 1, 1])
    q, k, v, *pages = (
        _random(*shape, device=device, dtype=dtype, seed=seed)
        for seed, shape in enumerate(((5, 4, 20), (5, 2, 20), (5, 2, 20), (15, 2, 64, 20), (15, 2, 64, 20)))
    )
    norm = _decode_norm(device, dtype)
    out = prism_kernels.shared_prompt_decode(q, k, v, *pages, layout, norm=norm, impl=impl)
    return [pages[0][1:], pages[1][1:], out]


def _adamw(impl: str, device: torch.device) -> Outputs:
    """Every kind of tensors; sizes around a vector's and a chunk's. Without a GPU the same loops in C++."""
    impl = impl if impl == "reference" else "cuda" if device.type == "cuda" else "native"
    found: Outputs = []
    for split, half_gradient, half_moments in product((False, True), repeat=3):
        masters = [_random(size, device=device, seed=size) for size in (1, 7, 1003, 33_001)]
        pairs = [prism_kernels.split_master(x) if split else (x, None) for x in masters]
        gradients = [x.bfloat16() if half_gradient else x * 0.1 for x in masters]
        dtype = torch.bfloat16 if half_moments else torch.float32
        moments = [[torch.zeros_like(x, dtype=dtype) for x in masters] for _ in range(2)]
        clip = torch.tensor(0.5, device=device)
        weights, remainders = ([pair[i] for pair in pairs] for i in range(2))
        prism_kernels.adamw_step(weights, gradients, remainders, *moments, lr=0.1, step=3, clip=clip, impl=impl)
        found += [*weights, *moments[0], *moments[1]]
    return found


def _decode_norm(device: torch.device, dtype: torch.dtype) -> prism_kernels.HeadNorm:
    """Of five rows and heads of 20."""
    angle = _random(5, 10, device=device, seed=5).repeat(1, 2)
    weights = (_random(20, device=device, dtype=dtype, seed=seed) for seed in (6, 7))
    return prism_kernels.HeadNorm(*weights, angle.cos().to(dtype), angle.sin().to(dtype), 1e-6)


def _merge(impl: str, dtype: torch.dtype, device: torch.device) -> Outputs:
    """A part of some rows into a whole, then one of all; the rows of which there is nothing; gradients."""
    merging = import_module(f"prism_kernels.tree_attention.{'triton_merge' if impl == 'triton' else 'merge'}")
    rows, some = 67, torch.tensor([3, 66, 0], dtype=torch.int32, device=device)

    def part(count: int, heads: int, seed: int) -> Tensor:
        return _random(count, heads, 72, device=device, dtype=dtype, seed=seed)

    found: Outputs = []
    for last in (False, True):
        out, lse = part(rows, 3, 1), _random(3, rows, device=device, seed=2)
        merging.merge_(out, lse, part(3, 3, 3), _random(3, 3, device=device, seed=4), some)
        merging.merge_(out, lse, part(rows, 3, 5), _random(3, rows, device=device, seed=6), None, last=last)
        found += [out, lse]
    out, lse = part(rows, 3, 7), _random(3, rows, device=device, seed=8)
    lse[:, 5] = float("inf")
    merging.settle_(out, lse)
    found += [out.nan_to_num(9.0), lse.nan_to_num(neginf=9.0)]
    sums = [part(rows, 3, 9), part(rows + 2, 1, 10), part(rows + 2, 1, 11)]
    merging.add_(sums, [part(rows, 3, 12), part(rows + 2, 1, 13), part(rows + 2, 1, 14)], None)
    merging.add_(sums, [part(3, 3, 15), part(rows + 2, 1, 16), part(rows + 2, 1, 17)], some)
    return [*found, *sums]


def run_all(device: torch.device, only: str = "", skip: str | None = None) -> int:
    failed = 0
    for name, call in checks(device).items():
        if only not in name or (skip is not None and skip in name.split()):
            continue
        began = time.perf_counter()
        try:
            actual, expected = call("triton"), call("reference")
            tolerance = TOLERANCE[actual[-1].dtype if actual[-1].dtype in TOLERANCE else torch.float32]
            worst = max(_error(a, b) for a, b in zip(actual, expected))
            verdict = "ok" if worst <= tolerance else f"FAILED: differs by {worst:.2e} > {tolerance:.0e}"
        except Exception as error:  # noqa: BLE001 - every kernel is tried, and the exit status tells
            verdict = f"FAILED: {short(error)}"
        failed += verdict != "ok"
        print(f"{name:<40} {time.perf_counter() - began:6.2f} s  {verdict}", flush=True)
    print(f"sanitize: {failed} failed")
    return 1 if failed else 0


def _error(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.detach().double(), expected.detach().double()
    error = float((actual - expected).norm() / expected.norm().clamp_min(1e-12))
    return error if error == error else float("inf")


def command(tool: str, only: str = "") -> list[str] | None:
    """The sanitizer's command line around this script, or None where it is not installed."""
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if sanitizer is None:
        return None
    # Only our kernels: the library's are not ours to check, and slow under a race check.
    filters = [word for name in kernel_names() for word in ("--kernel-name", f"kne={name}")]
    filters += ["--kernel-name", "kns=adamw"]  # of csrc/, whose names are C++'s
    script = [sys.executable, "-m", "benchmarks.gpu.sanitize", "--only", only]
    if tool == "racecheck":  # which ends in an error of its own inside torch's _grouped_mm (H200, torch 2.11)
        script += ["--skip", "torch"]
    return [sanitizer, "--tool", tool, *filters, "--error-exitcode", "9", *script]


def kernel_names() -> list[str]:
    """Every Triton kernel that the compile gate knows."""
    return sorted({row.kernel.__name__ for op in compile_gate.ops() for row in compile_gate.configurations(op)})


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.sanitize", description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", default="", help="a part of the check's name")
    parser.add_argument("--skip", help="a word of the names of checks that are left out")
    parser.add_argument("--tool", choices=TOOLS, default=None, help="run under compute-sanitizer")
    given = parser.parse_args(arguments)
    line = command(given.tool, given.only) if given.tool is not None else []
    why = ""
    if line is None:
        why = "compute-sanitizer is not installed (it is part of the CUDA toolkit)"
    elif not line and importlib.util.find_spec("triton") is None:
        why = "triton is not installed"
    elif not line and given.device == "cpu" and not interpreting():
        why = "without a GPU the kernels run in the interpreter: set TRITON_INTERPRET=1"
    if why:
        print(f"sanitize: {why}", file=sys.stderr)
        return 2
    if line:
        return subprocess.run(line, env=environment(PYTORCH_NO_CUDA_MEMORY_CACHING="1")).returncode
    return run_all(torch.device(given.device), given.only, given.skip)


if __name__ == "__main__":
    sys.exit(main())
