"""Group advantage: one launch on a GPU, a few passes on a CPU, against the loop over groups that trainers run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Optional

import numpy as np
import torch
from torch import Tensor

import prism_kernels
from benchmarks.harness.measure import Unavailable, graphed
from benchmarks.harness.op import Call, Contender, Op, Outputs, Problem, Shape, Tolerance
from benchmarks.harness.peers import function_alone

EPS = 1e-6


@dataclass
class Scores:
    """B responses in groups of N, two rewards each, in a random order."""

    rewards: tuple[Tensor, Tensor]  # (B,) fp32: perception, reasoning
    group: Tensor  # (B,) int64
    groups: list[list[int]]  # rows of each group, for the loop


def problems(shape: Shape, device: torch.device) -> list[Problem]:
    data = _scores(shape, device)
    count = shape["B"]
    tolerance = {"advantage": Tolerance("max", 1e-5, 1e-3)}
    # Two scores, a group's id and a result a response; about ten operations each for two rewards.
    return [
        Problem(
            "align", "multi_reward_advantage, rule align", shape, 20.0 * count, count * (4 + 4 + 8 + 4.0),
            _contenders(data, device), lambda: _truth(data), tolerance,
        )
    ]  # fmt: skip


def _scores(shape: Shape, device: torch.device) -> Scores:
    random = torch.Generator().manual_seed(0)
    count, size = shape["B"], shape["N"]
    group = (torch.arange(count) // size)[torch.randperm(count, generator=random)]
    order, edges = group.argsort(stable=True), group.bincount().cumsum(0).tolist()
    rows = order.tolist()
    groups = [rows[first:last] for first, last in zip([0, *edges], edges)]
    rewards = tuple(torch.randn(count, generator=random).to(device) for _ in range(2))
    return Scores(rewards, group.to(device), groups)


def _by_loop(rewards: Sequence[Tensor], groups: Iterable[list[int]]) -> Outputs:
    """Torch on each group: what trainers do, and in float64 the truth."""
    total = torch.zeros_like(rewards[0])
    for rows in groups:
        for scores in rewards:
            values = scores[rows]
            if len(rows) > 1:
                values = (values - values.mean()) / (values.std() + EPS)
            total[rows] += 0.5 * values
    return {"advantage": total}


def _truth(data: Scores) -> Outputs:
    exact = _by_loop([scores.cpu().double() for scores in data.rewards], data.groups)
    return {name: value.to(data.group.device) for name, value in exact.items()}


def _contenders(data: Scores, device: torch.device) -> list[Contender]:
    def ours(impl: str) -> Call:
        given = (*data.rewards, data.group)
        return lambda: {"advantage": prism_kernels.multi_reward_advantage(*given, impl=impl)}

    def loop() -> Call:
        """With the dictionary of groups."""
        ids = data.group.tolist()

        def call() -> Outputs:
            members: dict[int, list[int]] = {}
            for row, group in enumerate(ids):
                members.setdefault(group, []).append(row)
            return _by_loop(data.rewards, members.values())

        return call

    def scattered() -> Call:
        count = int(data.group.max()) + 1

        def normalize(scores: Tensor) -> Tensor:
            size = scores.new_zeros(count).index_add_(0, data.group, torch.ones_like(scores))
            mean = scores.new_zeros(count).index_add_(0, data.group, scores) / size
            centred = scores - mean[data.group]
            squares = scores.new_zeros(count).index_add_(0, data.group, centred.square())
            return centred / ((squares / (size - 1)).sqrt() + EPS)[data.group]

        return lambda: {"advantage": sum(0.5 * normalize(scores) for scores in data.rewards)}

    def verl() -> Call:
        if device.type == "cuda" and len(data.group) > 8192:
            raise Unavailable("some six launches a response: seconds a call at this size")
        # Alone, as its module needs ray, tensordict and omegaconf.
        name, types = "compute_grpo_outcome_advantage", {"Optional": Optional, "AlgoConfig": Any}
        op = function_alone(
            "verl.trainer.ppo.core_algos", name, "verl", torch=torch, np=np, defaultdict=defaultdict, **types
        )
        index = data.group.cpu().numpy()
        mask = torch.ones(len(data.group), 1, device=device)

        def call() -> Outputs:
            parts = [op(scores[:, None], mask, index)[0] for scores in data.rewards]
            return {"advantage": 0.5 * (parts[0] + parts[1]).squeeze(1)}

        return call

    return [
        Contender("prism", lambda: ours("auto"), "ours"),
        Contender("prism, graph replay", lambda: graphed(ours("auto"), device), "ours"),
        Contender("prism reference", lambda: ours("reference"), "ours"),
        Contender("loop over groups", loop),
        Contender("torch eager, index_add", scattered),
        Contender("verl GRPO advantage", verl),
    ]


BENCH = Op(
    op="advantage",
    description=__doc__,
    problems=problems,
    names=("align",),
    shapes={
        "published": [{"B": 512, "N": 16}, {"B": 65536, "N": 16}],
        "cpu": [{"B": 512, "N": 16}],
        "tiny": [{"B": 64, "N": 16}],
    },
    tiny={"B": 64, "N": 16},
    sweep=lambda shape: [{**shape, "B": shape["B"] * factor} for factor in (1, 4, 16, 64)],
)
