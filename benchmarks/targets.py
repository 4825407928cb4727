"""What is to be reached, as data: each target reads one figure out of the results. RESULTS.md shows them all.

A figure is looked up in the newest result that holds it: an op, a problem, a shape, a row. Nothing found: not measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.tested import refused

Row = dict[str, Any]
Problem = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """``value(problem)``: the figure, or None where the problem does not hold it. ``least``: larger is better."""

    table: str
    quantity: str
    kind: str  # "cuda" or "cpu": where it must be measured
    op: str
    problem: str
    shape: dict[str, Any]
    value: Callable[[Problem], float | None]
    must: float
    stretch: float | None = None
    least: bool = False
    unit: str = "x"

    def met(self, value: float, bound: float) -> bool:
        return value >= bound if self.least else value <= bound

    def bound(self, value: float) -> str:
        return f"{'>=' if self.least else '<='} {number(value, self.unit)}"


def number(value: float, unit: str) -> str:
    if unit == "error":
        return f"{value:.1e}"
    if unit == "%":
        return f"{100 * value:.0f} %"
    if unit == "x":
        return f"{value:.2f}x"
    return f"{value:.3g} {unit}"


def row(problem: Problem, name: str) -> Row | None:
    """The timed row whose name is, or contains, ``name``."""
    timed = [r for r in problem["rows"] if "median_s" in r]
    exact = [r for r in timed if r["name"] == name]
    return next(iter(exact or [r for r in timed if name in r["name"]]), None)


def of(name: str, key: str, scale: float = 1.0) -> Callable[[Problem], float | None]:
    """A key of a row, of "extra" in it, or the largest of "errors" by ``errors.<a>,<b>``."""

    def value(problem: Problem) -> float | None:
        found = row(problem, name)
        if found is None:
            return None
        if key.startswith("errors."):
            errors = [found.get("errors", {}).get(part, {}).get("value") for part in key[7:].split(",")]
            return None if None in errors else scale * max(errors)
        measured = found.get(key, found.get("extra", {}).get(key))
        return None if measured is None else scale * measured

    return value


def inverse(value: Callable[[Problem], float | None]) -> Callable[[Problem], float | None]:
    def inverted(problem: Problem) -> float | None:
        found = value(problem)
        return 1 / found if found else None

    return inverted


def best_peer(problem: Problem) -> float | None:
    ratios = [r["times_ours"] for r in problem["rows"] if r["role"] == "peer" and "times_ours" in r]
    return min(ratios, default=None)


def extra_memory(problem: Problem) -> float | None:
    """Peak of ours over inputs and outputs, bytes."""
    found = row(problem, "prism")
    return None if found is None or "peak_bytes" not in found else found["peak_bytes"] - found["output_bytes"]


def over_faster_transformers(problem: Problem) -> float | None:
    """Our time over that of transformers' eager or grouped experts, whichever is faster."""
    found = [of(f"transformers {name}", "times_ours")(problem) for name in ("eager", "grouped_mm")]
    ratios = [ratio for ratio in found if ratio is not None]
    return 1 / min(ratios) if ratios else None


def error_ratio(problem: Problem) -> float | None:
    ours, theirs = (of(name, "errors.d_weight")(problem) for name in ("prism", "Liger"))
    return theirs / ours if ours and theirs else None


def over_reference(name: str) -> Callable[[Problem], float | None]:
    """How many times as fast as the reference's way another way of a whole step is."""

    def measured(problem: Problem) -> float | None:
        found = row(problem, name)
        return found.get("speedup") if found else None

    return measured


def scaled(value: Callable[[Problem], float | None], scale: float) -> Callable[[Problem], float | None]:
    def measured(problem: Problem) -> float | None:
        found = value(problem)
        return None if found is None else scale * found

    return measured


HEAD = "LM head (bf16, T 8192, H 2560, V 151,936)"
HEAD_CPU = "LM head on a CPU (fp32, T 4096, H 512, V 32,768)"
ADVANTAGE = "Group advantage"
EXPERTS = "Mixture of experts (bf16, E 4, top-2, H 2048, I 6144)"
ATTENTION = "Tree attention"
STEPS = "Whole steps, against the reference's path on the same machine in the same run"


def _head() -> Iterator[Target]:
    size, cpu = {"T": 8192, "H": 2560, "V": 151936, "dtype": "bf16"}, {"T": 4096, "H": 512, "V": 32768, "dtype": "fp32"}
    op = "linear_logprob"

    def gpu(quantity: str, problem: str, value, must: float, stretch=None, **more) -> Target:
        return Target(HEAD, quantity, "cuda", op, problem, size, value, must, stretch, **more)

    limit = of("prism", "times_limit")
    yield gpu("forward with entropy, over F1 (one product)", "logprob_entropy", limit, 1.25, 1.05)
    yield gpu("policy loss forward + backward, over F3 (three products)", "policy_loss", limit, 1.15, 1.05)
    faster = {"least": True}
    for name, problem, least in (
        ("verl", "policy_loss", 2.3),
        ("Liger fused linear CE", "cross_entropy", 4.0),
        ("Liger fused linear GRPO", "policy_loss", 8.0),
    ):
        yield gpu(f"{name}: its time over ours", problem, of(name, "times_ours"), least, **faster)
    yield gpu("fastest peer of the policy loss: its time over ours", "policy_loss", best_peer, 1.25, 1.38, **faster)
    yield gpu("log-prob error, absolute", "logprob_entropy", of("prism", "errors.logprob"), 2e-5, unit="error")
    yield gpu("dX and dW error, relative", "policy_loss", of("prism", "errors.dx,dw"), 2.2e-3, unit="error")
    memory = scaled(extra_memory, 1e-9)
    yield gpu("memory over inputs and outputs", "policy_loss", memory, 5.1, 2.6, unit="GB")
    small = of("prism, 0.5 GB chunk", "times_limit")
    yield gpu("policy loss with a 0.5 GB chunk, over F3", "policy_loss", small, 1.25)
    on_cpu = ("cpu", op, "policy_loss", cpu)
    megabytes = scaled(extra_memory, 1 / (1 << 20))
    yield Target(HEAD_CPU, "memory over inputs and outputs", *on_cpu, megabytes, 96, unit="MiB")
    eager = inverse(of("torch eager", "times_ours"))
    yield Target(HEAD_CPU, "policy loss forward + backward, over eager torch", *on_cpu, eager, 1.1)
    for name, problem in (("cross-entropy", "cross_entropy"), ("log-probs", "logprob")):
        quantity = f"{name} forward + backward, over eager torch"
        yield Target(HEAD_CPU, quantity, "cpu", op, problem, cpu, eager, 1.1)


def _advantage() -> Iterator[Target]:
    size = {"B": 512, "N": 16}
    loop = of("loop over groups", "times_ours")
    yield Target(
        ADVANTAGE, "loop over groups, CPU: its time over ours", "cpu", "advantage", "align", size, loop, 20, least=True
    )
    time = of("prism", "median_s", 1e6)
    yield Target(ADVANTAGE, "one call, GPU", "cuda", "advantage", "align", size, time, 15, unit="us")


def _moe() -> Iterator[Target]:
    bounds = {8192: (0.80, 1.2, 1.5, 1.7), 16384: (0.84, 1.18, 1.4, 1.7), 65536: (0.87, 1.17, 1.3, 1.7)}
    names = ("transformers grouped_mm", "transformers eager", "Liger fused MoE")
    for tokens, (fraction, *least) in bounds.items():
        size = {"T": tokens, "H": 2048, "I": 6144, "E": 4, "skew": 0.0, "dtype": "bf16"}
        where = ("cuda", "moe", "experts", size)
        dense = inverse(of("prism", "times_limit"))
        quantity = f"T {tokens:,}: share of six dense products' speed"
        yield Target(EXPERTS, quantity, *where, dense, fraction, least=True, unit="%")
        for name, bound in zip(names, least):
            peer = of(name, "times_ours")
            yield Target(EXPERTS, f"T {tokens:,}: {name}: its time over ours", *where, peer, bound, least=True)
    first = {"T": 8192, "H": 2048, "I": 6144, "E": 4, "skew": 0.0, "dtype": "bf16"}
    time = of("prism", "median_s", 1e6)
    yield Target(EXPERTS, "T 8,192: router and plan", "cuda", "moe", "route", first, time, 25, unit="us")
    saved = of("prism", "saved_bytes_per_token", 1e-3)
    yield Target(EXPERTS, "kept for the backward, per token", "cuda", "moe", "experts", first, saved, 58, unit="KB")
    name = "router gradient: Liger's error over ours"
    yield Target(EXPERTS, name, "cuda", "moe", "experts", first, error_ratio, 10, least=True)

    on_cpu = ("cpu", "moe", "experts", {"T": 4096, "H": 256, "I": 768, "E": 4, "skew": 0.0, "dtype": "fp32"})
    name = "CPU (fp32, T 4,096, H 256, I 768): over transformers' faster path"
    yield Target(EXPERTS, name, *on_cpu, over_faster_transformers, 1.05)


def _whole() -> Iterator[Target]:
    varlen = ("cuda", "tree_attention", "attention", {})
    share = inverse(of("prism", "times_limit"))
    yield Target(
        ATTENTION, "share of the library's varlen kernel, visited blocks", *varlen, share, 0.6, least=True, unit="%"
    )
    separate = of("separate sequences", "times_ours")
    yield Target(ATTENTION, "separate sequences: their time over ours", *varlen, separate, 2, least=True)
    reference = of("reference", "times_ours")
    tiny = {"hidden": 256, "layers": 4, "vocab": 2048, "responses": 16}
    gpu = ("cuda", "discriminator", "step", {"hidden": 2048, "layers": 28, "recompute": True})
    cpu = ("cpu", "discriminator", "step", tiny)
    name = "discriminator score + update"
    yield Target(STEPS, f"{name}, GPU (N 16, P 1000, 300, 1000)", *gpu, reference, 6, 7, least=True)
    kept = over_reference("ours, activations kept")
    yield Target(STEPS, f"{name}, GPU, without recompute in ours", *gpu, kept, 6, 10, least=True)
    yield Target(STEPS, f"{name}, CPU, tiny", *cpu, reference, 8, least=True)
    gpu = ("cuda", "policy", "step", {"hidden": 2560, "layers": 36})
    cpu = ("cpu", "policy", "step", tiny)
    yield Target(STEPS, "policy log-prob + update, GPU", *gpu, reference, 2.5, least=True)
    yield Target(STEPS, "policy log-prob + update, CPU, tiny", *cpu, reference, 2.2, least=True)


TARGETS: list[Target] = [*_head(), *_advantage(), *_moe(), *_whole()]


def look_up(target: Target, documents: Sequence[dict[str, Any]]) -> tuple[float | None, dict[str, Any]] | None:
    """(figure, the document that holds it) of the newest document that does; no figure where the op's tests failed."""
    for document in sorted(documents, key=lambda d: d["date"], reverse=True):
        if document["op"] != target.op or document["environment"]["kind"] != target.kind:
            continue
        for problem in document["problems"]:
            fits = all(problem["shape"].get(key) == value for key, value in target.shape.items())
            if problem["name"] == target.problem and problem["status"] == "ok" and fits:
                value = target.value(problem)
                if value is not None:
                    return None if refused(document, documents) else value, document
    return None
