"""The packs that a stage would make of records, before it runs: what `prism-fast data check --model` tells of packing.

Trees, shared roots and packs are made by the functions that the stages call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prism_fast.data.chat import Chat
from prism_fast.data.lengths import tree_of
from prism_fast.data.packing import SAMPLES, Packed, Plan
from prism_fast.models.shape import Shape
from prism_fast.records import Lesson, PairRecord, Prompt, Rollout
from prism_fast.steps.discriminator_step import discriminator_trees
from prism_fast.steps.own_packs import packs_for_all, unevenness
from prism_fast.steps.pair_step import pair_packs
from prism_fast.steps.policy_step import response_trees
from prism_fast.steps.sft_step import demonstration_packs


def plan(chat: Chat, folder: Path | None = None, world: int = 1) -> Plan:
    """What packs the records of a step for ``world`` processes, as `prism_fast.data.packing.Plan`.

    ``folder``: the model's, which several processes need: they even out what packs cost.
    """
    return partial(planned, shape=Shape.of(chat, folder if world > 1 else None), world=world)


def planned(kind: str, made: Sequence[Any], tokens_per_pack: int, *, shape: Shape, world: int = 1) -> dict[str, Packed]:
    """By the model that reads them, the packs of a step's records, encoded as the stage of this ``kind`` encodes them;
    nothing where they are not known before responses are. Raises DataError where a record does not fit.

    Of alignment, SAMPLES responses a prompt, each as long as its teacher's: in one process of both models, in several
    of the one whose dimensions are given.
    """
    return {name: of(made, tokens_per_pack, shape, world) for name, of in _models(kind, shape).items()}


_Of = Callable[[Sequence[Any], int, Shape, int], Packed]


def _models(kind: str, shape: Shape) -> dict[str, _Of]:
    if kind == "alignment":
        both: dict[str, _Of] = {"policy": _policy, "discriminator": _discriminator}
        dims = shape.dimensions
        kept = [*both] if dims is None else ["discriminator" if dims.experts else "policy"]
        return {name: both[name] for name in kept}
    one: dict[str, dict[str, _Of]] = {"sft": {"policy": _demonstrations}, "warm-up": {"discriminator": _pairs}}
    return one.get(kind, {})


def _demonstrations(made: Sequence[tuple[Prompt, Tensor]], capacity: int, shape: Shape, world: int) -> Packed:
    packs = demonstration_packs(made, capacity, shape, world=world)
    return _packed(packs, [tree_of(each) for each in made], shape, world)


def _pairs(made: Sequence[PairRecord], capacity: int, shape: Shape, world: int) -> Packed:
    packs, _ = pair_packs(made, capacity, shape)
    return _packed(packs, [tree_of(each) for each in made], shape, world)


def _policy(made: Sequence[Lesson], capacity: int, shape: Shape, world: int) -> Packed:
    rollout = _answered(made)
    packs = packs_for_all(response_trees(rollout), capacity, shape, world=world)
    whole = [(len(item.prompt), [len(torch.cat(item.teacher)) + 1] * SAMPLES) for item in made]
    return _packed(packs, whole, shape, world)


def _discriminator(made: Sequence[Lesson], capacity: int, shape: Shape, world: int) -> Packed:
    students = [(_other(c, n), _other(r, n)) for c, r in (item.teacher for item in made) for n in range(SAMPLES)]
    trees, _ = discriminator_trees(made, _answered(made), students)
    packs = packs_for_all(trees, capacity, shape, world=world)
    whole = [(len(item.prompt), [len(ids) for ids in item.teacher] * (1 + SAMPLES)) for item in made]
    return _packed(packs, whole, shape, world)


def _other(part: Tensor, number: int) -> Tensor:
    """Of the same length, and equal to no other student's: what packing makes of it does not depend on the words."""
    return torch.cat([torch.tensor([-1 - number]), part[1:]])


def _answered(made: Sequence[Lesson]) -> Rollout:
    """SAMPLES responses a prompt, each as long as the teacher's and its end of turn."""
    ids = [torch.zeros(len(torch.cat(item.teacher)) + 1, dtype=torch.int64) for item in made for _ in range(SAMPLES)]
    group = torch.arange(len(made)).repeat_interleave(SAMPLES)
    finished = torch.ones(len(ids), dtype=torch.bool)
    prompts = [item.prompt for item in made]
    return Rollout(prompts, group, ids, [each.float() for each in ids], [""] * len(ids), finished)


def _packed(packs: Any, whole: Sequence[tuple[int, Sequence[int]]], shape: Shape, world: int) -> Packed:
    """``whole``: of every record its prompt's tokens, and those of what follows it."""
    sequences = [root + part for root, parts in whole for part in parts]
    return Packed(
        packs=len(packs),
        tokens=packs.num_tokens,
        apart=sum(root + sum(parts) for root, parts in whole),
        padded=len(sequences) * max(sequences),
        unevenness=1.0 if shape.dimensions is None else unevenness(packs, shape.dimensions, world),
    )
