"""What the libraries of this machine do, before anything relies on it: python -m benchmarks.gpu.probe. Minutes matter
there, so it needs torch alone, and a fact that is not as expected says so in one line.

Each probe prints "ok" with what it found, or "NOT AS EXPECTED" with what hangs on it; exit status 1 where one is not.
"remedy: NAME=VALUE" is what the benchmarks that follow are started with, so that there is a figure all the same. On a
CPU those that can be looked at there.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import shutil
import sys
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

from benchmarks.harness.measure import Summary, Timer, short

# As prism_kernels.tree_attention.flash_library calls them: by place up to *, then scale.
FLASH = {
    "_flash_attention_forward": (
        "query key value cum_seq_q cum_seq_k max_q max_k dropout_p is_causal return_debug_mask scale"
    ),
    "_flash_attention_backward": (
        "grad_out query key value out logsumexp cum_seq_q cum_seq_k max_q max_k dropout_p is_causal rng_state unused "
        "scale"
    ),
}
BF16 = torch.bfloat16
REMEDIES = {
    "flash_schema": "PRISM_IMPL=tree_attention=sdpa,segment_attention=sdpa",
    "flash_on_device": "PRISM_IMPL=tree_attention=sdpa,segment_attention=sdpa",
    "grouped_mm": "PRISM_GROUPED_MM=triton",
}


class Unexpected(RuntimeError):
    """A library does something else than the kernels rely on."""


def need(condition: bool, found: object) -> None:
    if not condition:
        raise Unexpected(str(found))


def flash_schema(device: torch.device) -> str:
    """tree_attention on a GPU."""
    for name, expected in FLASH.items():
        schema = getattr(torch.ops.aten, name).default._schema
        found = [argument.name for argument in schema.arguments]
        wanted = expected.split()
        need(found[: len(wanted)] == wanted, f"{schema}; expected it to begin with {expected}")
        later = schema.arguments[len(wanted) :]
        need(all(argument.has_default_value() for argument in later), f"{schema}: more arguments without a default")
    return "arguments as expected"


def flash_on_device(device: torch.device) -> str:
    """Grouped heads, queries without keys, natural logs, and a backward: against float64."""
    q, k, v = (torch.randn(70, heads, 64, device=device, dtype=BF16) for heads in (4, 2, 2))
    # Three sequences: 30 queries on 40 keys, 25 queries without keys, 15 on 30.
    cu_q = torch.tensor([0, 30, 55, 70], dtype=torch.int32, device=device)
    cu_k = torch.tensor([0, 40, 40, 70], dtype=torch.int32, device=device)
    aten, scale = _aten(), 0.125
    given = (cu_q, cu_k, 30, 40, 0.0, False)
    out, lse, state, unused, _ = aten._flash_attention_forward(q, k, v, *given, False, scale=scale)
    need(lse.shape == (4, 70) and lse.dtype == torch.float32, f"log-sum-exps are {tuple(lse.shape)} {lse.dtype}")
    need(bool((out[30:55] == 0).all()), "the output of queries without keys is not 0")
    need(bool(lse[:, 30:55].isinf().all()), f"the log-sum-exp of a query without keys is {float(lse[0, 30])}")
    wide = [x.double().requires_grad_() for x in (q, k, v)]
    parts, sums = [], []
    for rows, keys in ((slice(0, 30), slice(0, 40)), (slice(55, 70), slice(40, 70))):
        keys_of, values = (x[keys].repeat_interleave(2, 1) for x in wide[1:])
        scores = torch.einsum("qhd,khd->hqk", wide[0][rows], keys_of) * scale
        parts.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), values))
        sums.append(scores.logsumexp(-1))
    truth, total = torch.cat(parts), torch.cat(sums, 1)
    rows = torch.cat([torch.arange(30), torch.arange(55, 70)]).to(device)
    error = _relative(out[rows], truth)
    need(error < 0.02, f"output off by {error:.1e}")
    off = float((lse[:, rows].double() - total.detach()).abs().max())
    need(off < 1e-3, f"log-sum-exps off by {off:.1e}: another base than e?")
    d_out = torch.randn_like(out)
    d_out[30:55] = 0
    known = lse.masked_fill(lse.isinf(), 0.0)  # as the merge leaves it
    gradients = aten._flash_attention_backward(d_out, q, k, v, out, known, *given, state, unused, scale=scale)
    exact = torch.autograd.grad(truth, wide, d_out[rows].double())
    errors = [_relative(mine, true) for mine, true in zip(gradients, exact)]
    need(max(errors) < 0.03, f"gradients off by {[f'{e:.1e}' for e in errors]}")
    return f"output {error:.1e}, log-sum-exp {off:.1e}, gradients {max(errors):.1e}; +-inf without keys: {lse[0, 30]}"


def fp32_out(device: torch.device) -> str:
    """The LM head's products: fp32 results of bf16 operands."""
    a, b, c = (torch.randn(64, 64, device=device, dtype=BF16) for _ in range(3))
    total = torch.addmm(c.float(), a, b, out_dtype=torch.float32)
    error = _relative(total, c.double() + a.double() @ b.double())
    need(total.dtype == torch.float32 and error < 1e-5, f"{total.dtype}, off by {error:.1e}")
    return f"mm and addmm(fp32, bf16, bf16, out_dtype=fp32): off by {error:.1e}"


def fp32_out_speed(device: torch.device) -> str:
    """At the head's shape beside a bf16 result: what fp32 costs there."""
    x, weight = (torch.randn(n, 2560, device=device, dtype=BF16) for n in (8192, 151_936))
    chunk, timer = x[:4096], Timer(device)
    flops, found = 2.0 * len(chunk) * weight.numel(), []
    for dtype in (torch.float32, BF16):
        more = {"out_dtype": dtype} if dtype == torch.float32 else {}

        def call(more=more):
            return torch.mm(chunk, weight.T, **more)

        call()
        seconds = Summary.of([timer.once(call) for _ in range(5)]).median
        found.append(f"{str(dtype).removeprefix('torch.')} out {flops / seconds / 1e12:.0f} TFLOP/s")
    return ", ".join(found)


def grouped_mm(device: torch.device) -> str:
    """moe_mlp's products, with an expert that nobody chose, on transposed views."""
    x = torch.randn(48, 64, device=device, dtype=BF16)
    weight = torch.randn(3, 32, 64, device=device, dtype=BF16)
    ends = torch.tensor([16, 16, 48], dtype=torch.int32, device=device)
    out = torch._grouped_mm(x, weight.transpose(1, 2), ends)
    truth = torch.cat([x[:16].double() @ weight[0].double().T, x[16:].double() @ weight[2].double().T])
    forward = _relative(out, truth)
    d_weight = torch._grouped_mm(out.T, x, ends)  # (3, 32, 64)
    exact = torch.stack([out[a:b].double().T @ x[a:b].double() for a, b in ((0, 16), (16, 16), (16, 48))])
    backward = _relative(d_weight[[0, 2]], exact[[0, 2]])
    need(max(forward, backward) < 0.02, f"off by {forward:.1e}, {backward:.1e}")
    empty = d_weight[1].float().nan_to_num(float("inf")).abs().max()
    return (
        f"off by {forward:.1e}, {backward:.1e}; the empty expert's gradient is {'0' if empty == 0 else 'not written'}"
    )


def masked_attention(device: torch.device) -> str:
    """Which kernel takes a bool mask with grouped heads: the path that flash calls replace."""
    q, k, v = (torch.randn(1, heads, 256, 128, device=device, dtype=BF16) for heads in (8, 2, 2))
    mask = torch.ones(256, 256, dtype=torch.bool, device=device).tril()
    run = lambda: scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)  # noqa: E731
    run()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        run()
        torch.cuda.synchronize()
    names = sorted({event.key[:60] for event in seen.key_averages() if event.self_device_time_total > 0})
    return "; ".join(names)


def captured(device: torch.device) -> str:
    """A graph that reads what it is given anew: sampling's token is one."""
    x, graph = torch.ones(8, device=device), torch.cuda.CUDAGraph()
    torch.mm(x[:, None], x[None])
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        y = torch.mm(x[:, None], x[None])
    x.fill_(3)
    graph.replay()
    need(float(y[0, 0]) == 9, f"a replay gave {float(y[0, 0])}, expected 9")
    return "a replay reads its inputs anew"


def no_wait(device: torch.device) -> str:
    """torch refuses to wait for the GPU where it is told to: the tests of waits rely on it."""
    x = torch.ones(2, device=device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        x.sum().item()
    except RuntimeError:
        return "set_sync_debug_mode sees an item()"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    raise Unexpected("set_sync_debug_mode does not see an item()")


def what_is_here(device: torch.device) -> str:
    names = ("torch", "triton", "transformers", "flash-attn", "vllm", "deepspeed", "pydantic", "liger-kernel")
    found = []
    for name in names:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"no {name}")
    tools = [f"{'' if shutil.which(tool) else 'no '}{tool}" for tool in ("nvcc", "compute-sanitizer", "ncu")]
    return ", ".join([f"Python {sys.version.split()[0]}", *found, *tools])


Probe = Callable[[torch.device], str]
ANYWHERE: tuple[Probe, ...] = (what_is_here, flash_schema)
ON_A_GPU: tuple[Probe, ...] = (
    grouped_mm, fp32_out, masked_attention, captured, no_wait, flash_on_device, fp32_out_speed,
)  # fmt: skip


def _aten():
    return torch.ops.aten


def _relative(mine: Tensor, truth: Tensor) -> float:
    return float((mine.detach().double() - truth.detach()).norm() / truth.detach().norm().clamp_min(1e-30))


def run(probes: Sequence[Probe], device: torch.device) -> int:
    """How many are not as expected."""
    failed, remedies = 0, []
    for probe in probes:
        began = time.perf_counter()
        try:
            said = f"ok: {probe(device)}"
        except Exception as error:  # noqa: BLE001 - every probe is made, and the exit status tells
            failed += 1
            why = str(error) if isinstance(error, Unexpected) else short(error)
            uses = f" ({' '.join(probe.__doc__.split())})" if probe.__doc__ else ""
            said = f"NOT AS EXPECTED: {why}{uses}"
            remedies += [REMEDIES[probe.__name__]] if probe.__name__ in REMEDIES else []
        print(f"{probe.__name__:<18} {time.perf_counter() - began:5.1f} s  {said}", flush=True)
    for remedy in dict.fromkeys(remedies):
        print(f"remedy: {remedy}")
    print(f"probe: {failed} not as expected")
    return failed


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.probe", description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    given = parser.parse_args(arguments)
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; --device cpu makes those that need none")
    probes = (*ANYWHERE, *(ON_A_GPU if given.device == "cuda" else ()))
    return 1 if run(probes, torch.device(given.device)) else 0


if __name__ == "__main__":
    sys.exit(main())
