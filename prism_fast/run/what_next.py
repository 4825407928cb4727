"""What comes after a command: those that go on with what it has made."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

# The command, its recipe (for 2b, 4b and 8b models), and its arguments, {} for what was made.
ALIGNMENT = "data.files=ALIGNMENT.parquet"
NEXT = {
    "sft": (
        ("upcycle", "upcycle_2b", "model.path=Qwen/Qwen3-VL-2B-Instruct out=DISCRIMINATOR"),
        ("data pairs", "pairs", f"model.path={{}} {ALIGNMENT} out=PAIRS.jsonl"),
    ),
    "upcycle": (("warmup", "warmup_2b", "discriminator.path={} data.files=PAIRS.jsonl run.out=WARMUP"),),
    "pairs": (("warmup", "warmup_2b", "discriminator.path=DISCRIMINATOR data.files={} run.out=WARMUP"),),
    "warmup": (
        ("align", "align_4b", f"policy.path=SFT/final/policy discriminator.path={{}} {ALIGNMENT} run.out=ALIGN"),
    ),
    "align": (("rlvr", "rlvr_4b_grpo", "policy.path={} data.files=RLVR.parquet run.out=RLVR"),),
    "curate": (
        ("sft", "sft_4b", "model.path=Qwen/Qwen3-VL-4B-Instruct data.files={}/sft.json run.out=SFT"),
        ("data pairs", "pairs", "model.path=SFT/final/policy data.files={}/alignment.parquet out=PAIRS.jsonl"),
    ),
    "filter": (("rlvr", "rlvr_4b_grpo", "policy.path=ALIGN/final/policy data.files={} run.out=RLVR"),),
    "rlvr": (("eval", "eval", "model.path={} data.files=TEST.parquet out=EVAL.json"),),
}


def after(stage: str, made: Path, family: str) -> Iterator[str]:
    """Commands; ``family`` is the name of the configuration file that the stage had, "" without one."""
    for command, recipe, arguments in NEXT[stage]:
        if family.startswith("tiny_"):
            recipe = f"tiny_{command.split()[-1]}"
            arguments = arguments.replace("Qwen/Qwen3-VL-2B-Instruct", "{}")
        elif "_8b" in family:
            recipe = recipe.replace("_4b", "_8b")
        yield f"prism-fast {command} --config {recipe} {arguments.format(shlex.quote(str(made)))}"
