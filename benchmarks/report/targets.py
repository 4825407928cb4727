"""What is to be reached, as data: each target reads one figure out of the results. RESULTS.md shows them all.

A figure is looked up in the newest result that holds it: an op, a problem, a shape, a row. Nothing found: not measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.report.tested import refused

Row = dict[str, Any]
Problem = dict[str, Any]
Value = Callable[[Problem], float | None]


@dataclass(frozen=True)
class Target:
    """``value(problem)``: the figure, or None where the problem does not hold it. ``least``: larger is better."""

    table: str
    quantity: str
    kind: str  # "cuda" or "cpu": where it must be measured
    op: str
    problem: str
    shape: dict[str, Any]
    value: Value
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


def of(name: str, key: str, scale: float = 1.0) -> Value:
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


def inverse(value: Value) -> Value:
    def inverted(problem: Problem) -> float | None:
        found = value(problem)
        return 1 / found if found else None

    return inverted


def best_peer(problem: Problem) -> float | None:
    ratios = [r["times_ours"] for r in problem["rows"] if r["role"] == "peer" and "times_ours" in r]
    return min(ratios, default=None)


def extra_memory(scale: float) -> Value:
    """Peak of ours over inputs and outputs, bytes times ``scale``."""

    def value(problem: Problem) -> float | None:
        found = row(problem, "prism")
        if found is None or "peak_bytes" not in found:
            return None
        return scale * (found["peak_bytes"] - found["output_bytes"])

    return value


def over_faster_transformers(problem: Problem) -> float | None:
    """Our time over that of transformers' eager or grouped experts, whichever is faster."""
    found = [of(f"transformers {name}", "times_ours")(problem) for name in ("eager", "grouped_mm")]
    ratios = [ratio for ratio in found if ratio is not None]
    return 1 / min(ratios) if ratios else None


def error_ratio(problem: Problem) -> float | None:
    ours, theirs = (of(name, "errors.d_weight")(problem) for name in ("prism", "Liger"))
    return theirs / ours if ours and theirs else None


def over_eager(problem: Problem) -> float | None:
    """Of all outputs the largest error of ours over that of eager torch in the same dtype."""
    ours, eager = row(problem, "prism"), row(problem, "torch eager")
    if ours is None or eager is None:
        return None
    return max(ours["errors"][name]["value"] / max(eager["errors"][name]["value"], 1e-300) for name in ours["errors"])


HEAD = "LM head (bf16, T 8192, H 2560, V 151,936)"
HEAD_CPU = "LM head on a CPU (fp32, T 4096, H 512, V 32,768)"
ADVANTAGE = "Group advantage"
EXPERTS = "Mixture of experts (bf16, E 4, top-2, H 2048, I 6144)"
ATTENTION = "Tree attention (bf16, ragged packs of some 33,000 tokens)"
STEPS = "Whole steps, against the reference's path on the same machine in the same run"
UPDATE = "AdamW step, beside torch.optim.AdamW"
TRAINING = "Training a 4B policy on one GPU (bf16, two packs of 24,576 tokens a step), against the plan's count"
DATA = "Data path on two cores of a CPU: packing, spans, and loading by two workers, beside others in one run"
SAMPLING = "Sampling: 64 and 256 rows; GPU: 4B dimensions, bf16, prompts of 1,024 tokens; CPU: the demo's, one thread"


Add = Callable[..., Target]


def _in(table: str, kind: str, op: str, problem: str, shape: dict[str, Any]) -> Add:
    return lambda quantity, value, must, stretch=None, problem=problem, least=False, unit="x": Target(
        table, quantity, kind, op, problem, shape, value, must, stretch, least, unit
    )


def _head() -> Iterator[Target]:
    gpu = _in(HEAD, "cuda", "linear_logprob", "policy_loss", {"T": 8192, "H": 2560, "V": 151936, "dtype": "bf16"})
    limit = of("prism", "times_limit")
    yield gpu("forward with entropy, over F1 (one product)", limit, 1.25, 1.05, problem="logprob_entropy")
    yield gpu("policy loss forward + backward, over F3 (three products)", limit, 1.15, 1.05)
    for name, problem, bound in (
        ("verl", "policy_loss", 2.3),
        ("Liger fused linear CE", "cross_entropy", 4.0),
        ("Liger fused linear GRPO", "policy_loss", 8.0),
    ):
        yield gpu(f"{name}: its time over ours", of(name, "times_ours"), bound, problem=problem, least=True)
    yield gpu("fastest peer of the policy loss: its time over ours", best_peer, 1.25, 1.38, least=True)
    logprob = of("prism", "errors.logprob")
    yield gpu("log-prob error, absolute", logprob, 2e-5, problem="logprob_entropy", unit="error")
    yield gpu("dX and dW error, relative", of("prism", "errors.dx,dw"), 2.2e-3, unit="error")
    yield gpu("memory over inputs and outputs", extra_memory(1e-9), 5.1, 2.6, unit="GB")
    yield gpu("policy loss with a 0.5 GB chunk, over F3", of("prism, 0.5 GB chunk", "times_limit"), 1.25)

    cpu = _in(HEAD_CPU, "cpu", "linear_logprob", "policy_loss", {"T": 4096, "H": 512, "V": 32768, "dtype": "fp32"})
    eager = inverse(of("torch eager", "times_ours"))
    yield cpu("memory over inputs and outputs", extra_memory(1 / (1 << 20)), 96, unit="MiB")
    yield cpu("policy loss forward + backward, over eager torch", eager, 1.1)
    for name, problem in (("cross-entropy", "cross_entropy"), ("log-probs", "logprob")):
        yield cpu(f"{name} forward + backward, over eager torch", eager, 1.1, problem=problem)


def _advantage() -> Iterator[Target]:
    cpu, gpu = (_in(ADVANTAGE, kind, "advantage", "align", {"B": 512, "N": 16}) for kind in ("cpu", "cuda"))
    loop = of("loop over groups", "times_ours")
    yield cpu("loop over groups, CPU: its time over ours", loop, 20, least=True)
    yield gpu("one call, GPU", of("prism", "median_s", 1e6), 15, unit="us")


def _moe() -> Iterator[Target]:
    bounds = {8192: (0.80, 1.2, 1.5, 1.7), 16384: (0.84, 1.18, 1.4, 1.7), 65536: (0.87, 1.17, 1.3, 1.7)}
    names = ("transformers grouped_mm", "transformers eager", "Liger fused MoE")
    size = {"H": 2048, "I": 6144, "E": 4, "skew": 0.0, "dtype": "bf16"}
    gpu = {tokens: _in(EXPERTS, "cuda", "moe", "experts", {"T": tokens, **size}) for tokens in bounds}
    for tokens, (fraction, *least) in bounds.items():
        dense = inverse(of("prism", "times_limit"))
        yield gpu[tokens](f"T {tokens:,}: share of six dense products' speed", dense, fraction, least=True, unit="%")
        for name, bound in zip(names, least):
            yield gpu[tokens](f"T {tokens:,}: {name}: its time over ours", of(name, "times_ours"), bound, least=True)
    small = gpu[8192]
    yield small("T 8,192: router and plan", of("prism", "median_s", 1e6), 25, problem="route", unit="us")
    saved = of("prism", "saved_bytes_per_token", 1e-3)
    yield small("kept for the backward, per token", saved, 58, unit="KB")
    yield small("router gradient: Liger's error over ours", error_ratio, 10, least=True)
    size = {"T": 4096, "H": 256, "I": 768, "E": 4, "skew": 0.0, "dtype": "fp32"}
    name = "CPU (fp32, T 4,096, H 256, I 768): over transformers' faster path"
    yield _in(EXPERTS, "cpu", "moe", "experts", size)(name, over_faster_transformers, 1.05)


def _attention() -> Iterator[Target]:
    size = {"D": 128, "sigma": 0.45, "dtype": "bf16"}
    policy = _in(ATTENTION, "cuda", "tree_attention", "gradient", {"Hq": 32, "P": 1000, **size})
    discriminator = _in(ATTENTION, "cuda", "tree_attention", "gradient", {"Hq": 16, "P": 1000, **size})
    half = _in(ATTENTION, "cuda", "tree_attention", "gradient", {"Hq": 32, "P": 0, **size})
    share = inverse(of("prism", "times_limit"))
    for name, gpu in (("policy", policy), ("discriminator", discriminator)):
        for problem, title in (("forward", "forward"), ("gradient", "forward + backward")):
            quantity = f"{name}, {title}: share of the library's varlen speed on the same pairs"
            yield gpu(quantity, share, 0.9, problem=problem, least=True, unit="%")
    separate = of("separate sequences, SDPA", "times_ours")
    yield half("prompt half of the tokens: separate sequences' time over ours", separate, 2, least=True)
    yield policy("error over that of eager torch", over_eager, 2)


def _update() -> Iterator[Target]:
    for tensors, size in ((16, 1 << 20), (64, 1 << 16), (256, 1 << 12)):
        cpu = _in(UPDATE, "cpu", "update", "float32", {"tensors": tensors, "size": size})
        name = f"fp32, CPU, {tensors} tensors of {size:,}: torch fused's time over ours"
        yield cpu(name, of("torch fused", "times_ours"), 1, least=True)
    gpu = _in(UPDATE, "cuda", "update", "bfloat16", {"tensors": 64, "size": 1 << 22})
    # 4.44 G parameters in 36 ms are 124 GB in 1.25 times what a copy takes at 4.3 TB/s.
    yield gpu("bf16, GPU, 64 tensors of 4,194,304: over a copy of as many bytes", of("prism", "times_limit"), 1.25)
    yield gpu(
        "bf16, GPU: torch fused on fp32 masters: its time over ours", of("torch fused", "times_ours"), 1, least=True
    )


def _steps() -> Iterator[Target]:
    tiny = {"hidden": 256, "layers": 4, "vocab": 2048, "responses": 16}
    reference, kept = of("reference", "times_ours"), of("ours, activations kept", "speedup")
    for lengths, sigma, discriminator, policy in (("ragged", 0.45, 10, 3), ("near-equal", 0.0, 8, 2.2)):
        shape = {"hidden": 2048, "layers": 28, "recompute": True, "sigma": sigma}
        gpu = _in(STEPS, "cuda", "discriminator", "step", shape)
        name = f"discriminator score + update, {lengths}"
        yield gpu(f"{name}, GPU (N 16, P 1000, 300, 1000)", reference, 6, 7, least=True)
        yield gpu(f"{name}, GPU, without recompute in ours", kept, 6, 10, least=True)
        cpu = _in(STEPS, "cpu", "discriminator", "step", {**tiny, "sigma": sigma})
        yield cpu(f"{name}, CPU, tiny", reference, discriminator, least=True)
        name = f"policy log-prob + update, {lengths}"
        gpu = _in(STEPS, "cuda", "policy", "step", {"hidden": 2560, "layers": 36, "sigma": sigma})
        yield gpu(f"{name}, GPU", reference, 2.5, least=True)
        yield _in(STEPS, "cpu", "policy", "step", {**tiny, "sigma": sigma})(
            f"{name}, CPU, tiny", reference, policy, least=True
        )


def _training() -> Iterator[Target]:
    shape = {"model": "4b", "tokens_per_pack": 24_576, "response": 6_144, "sigma": 0.45}
    gpu = _in(TRAINING, "cuda", "train-4b", "training", shape)
    for name in ("zero2 with offload", "fsdp2", "none"):
        yield gpu(f"{name}: GPU memory, reserved, over the plan", of(name, "over_plan"), 1)
    yield gpu("zero2 with offload: host memory over the plan", of("zero2 with offload", "host_over_plan"), 1.1)


def _sampling() -> Iterator[Target]:
    def at(load: str, kind: str) -> Add:
        return _in(SAMPLING, kind, "rollout", "rollout", {"load": load})

    speed = of("base 1ff322e", "times_ours")
    yield at("64", "cpu")("64 rows, CPU: tokens/s over those of 1ff322e", speed, 1.5, least=True)
    yield at("64-ragged", "cpu")("64 rows, ragged, CPU: the same", speed, 1.5, least=True)
    yield at("256-ragged", "cpu")("256 rows, ragged, CPU: the same", speed, 2.0, least=True)
    for name, peer in (("a prompt at a time", "a prompt at a time"), ("in batches", "batches of rows")):
        value = of(peer, "times_ours")
        yield at("64", "cpu")(f"64 rows of 16 a prompt, CPU: over transformers generate, {name}", value, 3, least=True)
    yield at("4b-64", "cuda")("64 rows, GPU: a token", of("ours", "token_s", 1e3), 4, unit="ms")
    yield at("4b-256", "cuda")("256 rows, GPU: a token", of("ours", "token_s", 1e3), 9, unit="ms")
    for load in ("4b-64", "4b-256"):
        behind = inverse(of("vLLM", "times_ours"))
        yield at(load, "cuda")(f"{load[3:]} rows, GPU: vLLM's tokens/s over ours", behind, 1.3)


def _data() -> Iterator[Target]:
    corpus = _in(DATA, "cpu", "pack", "corpus", {"N": 1_370_000})
    yield corpus("packing 1.37 million records", of("prism", "median_s"), 2, unit="s")
    yield corpus("fill of their packs, in percent", of("prism", "fill", 100), 99.3, least=True, unit="percent")
    step = _in(DATA, "cpu", "pack", "step", {"prompts": 32, "samples": 16})
    yield step("packing and dealing 512 responses", of("prism", "median_s", 1e3), 2, unit="ms")
    spans = _in(DATA, "cpu", "spans", "spans", {"T": 1200})
    yield spans("spans of a response of 1,200 tokens", of("prism", "median_s", 1e6), 100, unit="us")
    loader = _in(DATA, "cpu", "loader", "loader", {"load": "digits"})
    yield loader("tokens/s of the first epoch over those of training", of("ours", "over_training"), 8, least=True)
    yield loader("tokens/s from the cache over those of training", of("ours, cached", "over_training"), 20, least=True)
    for load in ("digits", "photos"):
        at = _in(DATA, "cpu", "loader", "loader", {"load": load})
        yield at(f"{load}: torch DataLoader's time over ours", of("torch DataLoader", "times_ours"), 1, least=True)


TARGETS: list[Target] = [
    *(*_head(), *_advantage(), *_moe(), *_attention(), *_update(), *_steps(), *_training(), *_sampling(), *_data()),
]


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
