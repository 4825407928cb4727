"""Group advantage: one launch on a GPU, a few passes on a CPU, against the loop over groups that trainers run."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Optional

import numpy as np
import torch
from torch import Tensor

import prism_kernels
from benchmarks.__main__ import main
from benchmarks.harness import Contender, Problem, Tolerance
from benchmarks.measure import Unavailable, graphed
from benchmarks.peers import function_alone

TESTS = ["tests/kernels/group_advantage/test_group_advantage.py"]
TINY = {"B": 64, "N": 16}
SHAPES: dict[str, list[dict[str, Any]]] = {
    "published": [{"B": 512, "N": 16}, {"B": 65536, "N": 16}],
    "cpu": [{"B": 512, "N": 16}],
    "tiny": [dict(TINY)],
}
GPU_PART = ("advantage", 20, "moe")
GPU_ARGUMENTS = ["--seconds", "3"]
EPS = 1e-6


@dataclass
class Scores:
    """B responses in groups of N, two rewards each, in a random order."""

    perception: Tensor  # (B,) fp32
    reasoning: Tensor  # (B,)
    group: Tensor  # (B,) int64
    groups: list[list[int]]  # rows of each group, for the loop


def sweep(shape: dict[str, Any]) -> list[dict[str, Any]]:
    return [{**shape, "B": shape["B"] * factor} for factor in (1, 4, 16, 64)]


def problems(shape: dict[str, Any], device: torch.device) -> list[Problem]:
    data = _scores(shape, device)
    count = shape["B"]
    tolerance = {"advantage": Tolerance("max", 1e-5, 1e-3)}
    # Two scores, a group's id and a result a response; about ten operations each for two rewards.
    return [
        Problem(
            "align", "multi_reward_advantage, rule align", shape, 20.0 * count, count * (4 + 4 + 8 + 4.0),
            _contenders(data, device), lambda: {"advantage": _truth(data)}, tolerance,
        )
    ]  # fmt: skip


def _scores(shape: dict[str, Any], device: torch.device) -> Scores:
    random = torch.Generator().manual_seed(0)
    count, size = shape["B"], shape["N"]
    group = (torch.arange(count) // size)[torch.randperm(count, generator=random)]
    order, edges = group.argsort(stable=True), group.bincount().cumsum(0).tolist()
    rows = order.tolist()
    groups = [rows[first:last] for first, last in zip([0, *edges], edges)]
    perception, reasoning = (torch.randn(count, generator=random).to(device) for _ in range(2))
    return Scores(perception, reasoning, group.to(device), groups)


def _truth(data: Scores) -> Tensor:
    total = torch.zeros(len(data.group), dtype=torch.float64)
    rewards = [scores.cpu().double() for scores in (data.perception, data.reasoning)]
    for rows in data.groups:
        for scores in rewards:
            values = scores[rows]
            if len(rows) > 1:
                values = (values - values.mean()) / (values.std() + EPS)
            total[rows] += 0.5 * values
    return total.to(data.group.device)


def _contenders(data: Scores, device: torch.device) -> list[Contender]:
    def ours(impl: str) -> Callable[[], dict[str, Tensor]]:
        def call() -> dict[str, Tensor]:
            result = prism_kernels.multi_reward_advantage(data.perception, data.reasoning, data.group, impl=impl)
            return {"advantage": result}

        return call

    def loop() -> Callable[[], dict[str, Tensor]]:
        """The dictionary of groups, then torch on each: what trainers do."""
        ids = data.group.tolist()

        def call() -> dict[str, Tensor]:
            members: dict[int, list[int]] = {}
            for row, group in enumerate(ids):
                members.setdefault(group, []).append(row)
            result = torch.zeros_like(data.perception)
            for rows in members.values():
                for scores in (data.perception, data.reasoning):
                    values = scores[rows]
                    if len(rows) > 1:
                        values = (values - values.mean()) / (values.std() + EPS)
                    result[rows] += 0.5 * values
            return {"advantage": result}

        return call

    def scattered() -> Callable[[], dict[str, Tensor]]:
        count = int(data.group.max()) + 1

        def normalize(scores: Tensor) -> Tensor:
            size = scores.new_zeros(count).index_add_(0, data.group, torch.ones_like(scores))
            mean = scores.new_zeros(count).index_add_(0, data.group, scores) / size
            centred = scores - mean[data.group]
            squares = scores.new_zeros(count).index_add_(0, data.group, centred.square())
            return centred / ((squares / (size - 1)).sqrt() + EPS)[data.group]

        return lambda: {"advantage": 0.5 * normalize(data.perception) + 0.5 * normalize(data.reasoning)}

    def verl() -> Callable[[], dict[str, Tensor]]:
        if device.type == "cuda" and len(data.group) > 8192:
            raise Unavailable("some six launches a response: seconds a call at this size")
        # Alone, as its module needs ray, tensordict and omegaconf.
        name, types = "compute_grpo_outcome_advantage", {"Optional": Optional, "AlgoConfig": Any}
        op = function_alone(
            "verl.trainer.ppo.core_algos", name, "verl", torch=torch, np=np, defaultdict=defaultdict, **types
        )
        index = data.group.cpu().numpy()
        mask = torch.ones(len(data.group), 1, device=device)

        def call() -> dict[str, Tensor]:
            parts = [op(scores[:, None], mask, index)[0] for scores in (data.perception, data.reasoning)]
            return {"advantage": 0.5 * (parts[0] + parts[1]).squeeze(1)}

        return call

    def replayed() -> Callable[[], dict[str, Tensor]]:
        if device.type != "cuda":
            raise Unavailable("needs a GPU")
        return graphed(ours("auto"), device)

    return [
        Contender("prism", lambda: ours("auto"), "ours"),
        Contender("prism, graph replay", replayed, "ours"),
        Contender("prism reference", lambda: ours("reference"), "ours"),
        Contender("loop over groups", loop),
        Contender("torch eager, index_add", scattered),
        Contender("verl GRPO advantage", verl),
    ]


if __name__ == "__main__":
    sys.exit(main(["advantage", *sys.argv[1:]]))
