"""Every benchmark: where it is, what its tests are, and its part of ``make gpu``. A new one adds a row.

Nothing is imported before it is loaded: what a benchmark compares with may not be installed.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Entry:
    """``seconds``: what its benchmark is sure of in ``make gpu``; ``arguments``: its options there.

    ``tests``: the folder of the op's tests, which must pass before a speed is shown; "" for a whole step, which shows
    none where its ways disagree.
    """

    module: str  # below benchmarks; its BENCH is what runs
    title: str
    part: str  # names of its parts: bench-<part>, tests-<part>, memcheck-<part>, racecheck-<part>; "": all on the host
    seconds: float
    arguments: tuple[str, ...]
    tests: str = ""
    group: str = ""  # a part whose kernels it runs, and whose name selects it too
    asked: bool = False  # its part of ``make gpu`` runs where it is named: it takes the time of all others


# A short one first; then by the targets that hang on them; what is left over goes to the whole steps, at the end.
CATALOG = {
    "advantage": Entry(
        "ops.advantage.bench", "group advantages, rule align", "advantage", 12, ("--seconds", "3"),
        tests="tests/kernels/group_advantage", group="moe",
    ),
    "linear_logprob": Entry(
        "ops.linear_logprob.bench", "LM head: log-probs, entropy, cross-entropy, policy loss", "linear", 60,
        ("--seconds", "4"), tests="tests/kernels/linear_logprob",
    ),
    "moe": Entry(
        "ops.moe.bench", "mixture of experts: router and plan, experts", "moe", 110, ("--seconds", "3"),
        tests="tests/kernels/moe",
    ),
    "tree_attention": Entry(
        "ops.tree_attention.bench", "attention of packed trees: forward, backward, read-out rows", "attention", 40,
        ("--seconds", "2"), tests="tests/kernels/tree_attention",
    ),
    "rms_norm": Entry(
        "ops.rms_norm.bench", "norms of a layer: behind a residual, of heads with their rotation", "rms_norm", 12,
        ("--seconds", "1"), tests="tests/kernels/rms_norm",
    ),
    "swiglu": Entry(
        "ops.swiglu.bench", "SwiGLU, packed and apart", "swiglu", 8, ("--seconds", "1"), tests="tests/kernels/swiglu",
    ),
    "update": Entry(
        "ops.adamw.bench", "AdamW step over many tensors, beside torch's fused and foreach", "update", 12,
        ("--seconds", "1"), tests="tests/kernels/adamw",
    ),
    "pack": Entry(
        "ops.packing.bench", "packing a corpus, and a step's responses dealt to ranks, beside TRL's, LLaMA-Factory's "
        "and verl's ways", "", 0, (), tests="tests/kernels/packing",
    ),
    "spans": Entry(
        "ops.spans.bench", "where a response's parts are, in tokens", "", 0, (), tests="tests/kernels/spans",
    ),
    "loader": Entry(
        "steps.loader", "records to encoded batches by worker processes, beside torch's DataLoader and datasets", "",
        0, (),
    ),
    "discriminator": Entry(
        "steps.discriminator", "whole step: discriminator scores and update, against the reference's way",
        "discriminator", 110, ("--rounds", "2"), group="moe",
    ),
    "policy": Entry(
        "steps.policy", "whole step: policy log-probs and update, against the reference's way", "policy", 55,
        ("--rounds", "2"), group="linear",
    ),
    "step": Entry(
        "steps.stages", "whole steps of rlvr, align and sft, part by part: rollout, score, update, optimizer, host",
        "step", 40, ("--stage", "sft", "--rounds", "3"),  # the others: first-rlvr, first-align
    ),
    # As large as a stage's; by far the longest where peers are slow.
    "rollout": Entry(
        "steps.rollout", "sampling: tokens/s beside transformers' and vLLM's, or another commit's", "rollout", 480, (),
        asked=True,
    ),
    # Of three forms 240 s each at most; the first is what counts.
    "train-4b": Entry(
        "steps.training", "training a 4B policy at a recipe's lengths: memory beside the plan, seconds", "train-4b",
        480, (), asked=True,
    ),
}  # fmt: skip


def load(op: str) -> Any:
    """The benchmark: a ``harness.op.Op`` or a ``steps.step.Step``."""
    return importlib.import_module(f"benchmarks.{CATALOG[op].module}").BENCH
