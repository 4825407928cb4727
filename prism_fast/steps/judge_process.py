"""DiscriminatorReward in a process of its own, for a trainer whose environment cannot hold prism_fast.

    python -m prism_fast.steps.judge_process --discriminator warmup/final --data align.parquet --steps 500 --lr 1e-6

`prism_kernels.integrations.judge.JudgeProcess` starts it and speaks with it: a line of JSON for each request and one
for each answer, ``{"scores": ..., "metrics": ...}``, ``{}`` or ``{"error": ...}``. What libraries print goes to stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from prism_fast import DataError
from prism_fast.config import OptimizerConfig
from prism_fast.data.formats import read_align
from prism_fast.steps.reward_functions import DiscriminatorReward

Open = Callable[[Path], DiscriminatorReward]


def serve(opened: Open, path: Path, lines: Iterable[str], answer: Callable[[dict[str, Any]], None]) -> None:
    """Answers each of ``lines``: requests as JSON. ``opened(path)`` makes the judge, again for each that is loaded."""
    try:
        judge = opened(path)
    except DataError as error:
        return answer({"error": str(error)})
    answer({})
    for line in lines:
        request = json.loads(line)
        try:
            if "load" in request:
                judge = opened(Path(request["load"]))
            elif "save" in request:
                judge.save(request["save"])
            answer(judged(judge, request) if "judge" in request else {})
        except DataError as error:
            answer({"error": str(error)})


def judged(judge: DiscriminatorReward, request: dict[str, Any]) -> dict[str, Any]:
    """Scores of the responses in ``request["judge"]``; learned from where ``request["learn"]`` says so."""
    columns, metrics = request["judge"], {}
    if missing := {"completion_ids", "record"} - columns.keys():
        raise DataError(
            f"a request without {', '.join(sorted(missing))}; name the column under algorithm.prism.columns"
        )
    with torch.set_grad_enabled(request["learn"]):
        sides = (judge.perception, judge.reasoning, judge.format_valid)
        scores = {side.__name__: side(**columns, log_metric=metrics.__setitem__) for side in sides}
    return {"scores": scores, "metrics": metrics}


def parsed(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("prism_fast.steps.judge_process", allow_abbrev=False)
    parser.add_argument("--discriminator", type=Path, required=True, help="its folder, with the chat format")
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="records of the alignment format")
    parser.add_argument("--steps", type=int, required=True, help="of the learning rate's schedule")
    parser.add_argument("--lr", type=float, required=True)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--tokens-per-pack", type=int, default=16_384)
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    given = parsed(arguments)

    def opened(path: Path) -> DiscriminatorReward:
        return DiscriminatorReward(
            path, read_align(given.data), optimizer=OptimizerConfig.model_validate({"lr": given.lr}),
            steps=given.steps, dtype=given.dtype, tokens_per_pack=given.tokens_per_pack,
        )  # fmt: skip

    def answer(made: dict[str, Any]) -> None:
        out.write(json.dumps(made) + "\n")
        out.flush()

    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    serve(opened, given.discriminator, sys.stdin, answer)


if __name__ == "__main__":
    main(sys.argv[1:])
