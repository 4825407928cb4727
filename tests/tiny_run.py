"""A tiny run directory (data, model, discriminator) and stage settings for tests of whole stages."""

from __future__ import annotations

import multiprocessing
import os
import sys
from pathlib import Path

from prism_fast.cli.command_line import one_line
from prism_fast.config import AlignConfig, RLVRConfig, SFTConfig, WarmupConfig, load_config
from prism_fast.data.formats import read_align, read_sft, write_warmup
from prism_fast.demo.digits import DemoSizes, write_demo_data
from prism_fast.demo.tiny import make_tiny_model
from prism_fast.models.upcycle import upcycle
from prism_fast.stages.align import align
from prism_fast.stages.rlvr import rlvr
from prism_fast.stages.sft import sft
from prism_fast.stages.warmup import warmup

STAGES = {
    "sft": (sft, SFTConfig),
    "warmup": (warmup, WarmupConfig),
    "align": (align, AlignConfig),
    "rlvr": (rlvr, RLVRConfig),
}


def prepare(folder: Path) -> Path:
    """Writes data/, base/ and discriminator/ into ``folder``."""
    from dataclasses import replace

    from prism_fast.data.chat import Chat
    from prism_fast.models.load import with_chat

    files = write_demo_data(folder / "data", 0, DemoSizes(sft=48, align=12, rlvr=12, eval=6))
    samples = read_sft(files.sft)
    make_tiny_model(folder / "base", [t for s in samples for t in (*(m.content for m in s.messages), s.response)])
    with_chat(upcycle(folder / "base"), Chat.load(folder / "base"))(folder / "discriminator")
    pairs = [
        replace(s, student_caption="<caption>digits</caption>", student_reasoning="<think>so</think><answer>1</answer>")
        for s in read_align(files.align)
    ]
    write_warmup(folder / "data" / "pairs.jsonl", pairs)
    return folder


def settings(folder: Path, stage: str, out: Path, **changes) -> dict:
    """The configuration tree of a stage of eight steps that saves every two, and keeps two checkpoints."""
    model, judge = {"path": str(folder / "base")}, {"path": str(folder / "discriminator")}
    data = folder / "data"
    small = {"prompts_per_step": 2, "samples": 4, "max_response_tokens": 12}
    run = {"out": str(out), "tokens_per_pack": 512, "threads": 1, "seed": 3}
    run |= {"save_every": 2, "keep_last": 2, "eval_every": 4}
    trees = {
        "sft": {
            "model": model,
            "data": {"files": [str(data / "sft.json")]},
            "optimizer": {"lr": 1e-3},
            "batch_size": 4,
        },
        "warmup": {
            "discriminator": judge,
            "data": {"files": [str(data / "pairs.jsonl")]},
            "optimizer": {"lr": 1e-3},
            "batch_size": 4,
        },
        "align": {
            "policy": model,
            "discriminator": judge,
            "data": {"files": [str(data / "align.parquet")]},
            "rollout": small,
            "policy_optimizer": {"lr": 1e-3},
            "discriminator_optimizer": {"lr": 1e-3},
        },
        "rlvr": {
            "policy": model,
            "data": {"files": [str(data / "rlvr.parquet")], "eval_files": [str(data / "eval.parquet")]},
            "rollout": small,
            "optimizer": {"lr": 1e-3},
            "eval": {"max_response_tokens": 8},
        },
    }
    trees[stage]["data"]["workers"] = 0  # a process less for each of hundreds of runs; with some: test_resume.py
    return {**trees[stage], "steps": 8, "run": run, **changes}


def run_stage(stage: str, tree: dict, *, resume: bool = False) -> dict:
    function, cls = STAGES[stage]
    return function(load_config(cls, None, base=tree), resume=resume)


# Forked from a process that has imported all of this, which takes seconds.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload([__name__])


def start_stage(stage: str, tree: dict, said: Path) -> multiprocessing.Process:
    """A stage in a process that a test can kill; its errors go to the file ``said``, it exits as the program does."""
    process = PROCESSES.Process(target=_in_a_process, args=(stage, tree, said), daemon=True)
    process.start()
    return process


def _in_a_process(stage: str, tree: dict, said: Path) -> None:
    with open(os.devnull, "w") as nowhere, open(said, "w", buffering=1) as errors:
        sys.stdout, sys.stderr = nowhere, errors
        try:
            with one_line():
                run_stage(stage, tree)
        finally:
            sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
