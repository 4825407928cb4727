"""The warm-up's discriminator step: teacher against student, on records that hold both."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from prism_fast import metric_names as names
from prism_fast.models.discriminator import Discriminator
from prism_fast.pack import Tree, merge_prompts, pack
from prism_fast.records import PackedTree, PairRecord
from prism_fast.steps.expert_load import ExpertLoad
from prism_fast.steps.pair_loss import bradley_terry
from prism_fast.steps.parts import STUDENT_KINDS, TEACHER_KINDS, PartLabels, PartTrees, compared
from prism_kernels import load_balancing_loss

AT_ONCE = 256  # held-out records


def pair_trees(records: Sequence[PairRecord]) -> tuple[list[Tree], PartLabels]:
    """One tree per distinct prompt; a part that several records share stands once."""
    prompts, which = merge_prompts([r.prompt for r in records])
    trees = PartTrees(prompts)
    labels = [
        (trees.add(tree, record.teacher, TEACHER_KINDS), trees.add(tree, record.student, STUDENT_KINDS))
        for record, tree in zip(records, which)
    ]
    teacher, student = torch.tensor(labels).permute(1, 2, 0)
    return trees.trees(), PartLabels(teacher, student, len(trees))


def pair_scores(score: Tensor, packed: PackedTree, labels: PartLabels, side: int) -> tuple[Tensor, Tensor]:
    """(teacher, student) scores of the pairs of one side whose student's part lies in this pack.

    score (branches,) on any device; ``packed`` on the host.
    """
    branches = compared(packed.branch_of(labels.total), labels.teacher[side], labels.student[side])
    teacher, student = (score.index_select(0, index.to(score.device)) for index in branches)
    return teacher, student


def pair_gradient(
    discriminator: Discriminator,
    packs: Sequence[PackedTree],
    labels: PartLabels,
    *,
    balance_coef: float,
    load: ExpertLoad,
) -> tuple[dict[str, float], set[int]]:
    """One forward and backward over a batch of pairs: (metrics, labels of parts whose score broke the loss).

    The loss is the mean over records and sides of -log sigmoid(D(y+) - D(y)), plus ``balance_coef`` times the
    load-balancing loss, averaged over packs. The labels are those of scores that are not finite in the first pack after
    which the loss is not.
    """
    records = labels.teacher.shape[1]
    metrics: dict[str, float] = {names.LOSS: 0.0, **{names.PAIR_LOSS[side]: 0.0 for side in names.SIDES}}
    right: list[list[Tensor]] = [[], []]
    broken: set[int] = set()
    for packed in packs:
        judgement = discriminator(packed.to(discriminator.head.device), balance=balance_coef > 0)
        loss = judgement.score.new_zeros(())
        for side, name in enumerate(names.SIDES):
            teacher, student = pair_scores(judgement.score, packed, labels, side)
            pair_loss = bradley_terry(teacher, student).sum() / records
            loss = loss + pair_loss / 2
            metrics[names.PAIR_LOSS[name]] += float(pair_loss.detach())
            right[side].append((teacher > student).detach())
        if balance_coef > 0:
            balance = load_balancing_loss(judgement.stats, discriminator.top_k) / len(packs)
            loss = loss + balance_coef * balance
            metrics[names.BALANCE_LOSS] = metrics.get(names.BALANCE_LOSS, 0.0) + float(balance.detach())
        loss.backward()
        metrics[names.LOSS] += float(loss.detach())
        if not broken and not math.isfinite(metrics[names.LOSS]):
            broken = set(packed.label[~judgement.score.detach().isfinite().cpu()].tolist())
        load.add(judgement.stats)
    metrics.update({names.PAIR_ACCURACY[name]: value for name, value in _fractions(right).items()})
    return metrics, broken


def not_finite(broken: set[int], labels: PartLabels, records: Sequence[PairRecord]) -> str | None:
    """Names the first record that has one of these parts, whose scores are not finite."""
    for i, record in enumerate(records):
        for voice, parts in (("teacher", labels.teacher), ("student", labels.student)):
            for name, label in zip(names.SIDES, parts[:, i].tolist()):
                if label in broken:
                    return f"the {name} score of the {voice} of {record.prompt.place} is not finite"
    return None


@torch.no_grad()
def pair_accuracy(
    discriminator: Discriminator, records: Sequence[PairRecord], *, tokens_per_pack: int
) -> dict[str, float]:
    """How often the teacher's part scores higher than the student's, on held-out records, AT_ONCE of them in memory."""
    discriminator.eval()
    right: list[list[Tensor]] = [[], []]
    for start in range(0, len(records), AT_ONCE):
        trees, labels = pair_trees([records[i] for i in range(start, min(start + AT_ONCE, len(records)))])
        for packed in pack(trees, tokens_per_pack, discriminator.image):
            score = discriminator(packed.to(discriminator.head.device)).score
            for side in range(2):
                teacher, student = pair_scores(score, packed, labels, side)
                right[side].append(teacher > student)
    discriminator.train()
    return {f"pair_accuracy_{name}": value for name, value in _fractions(right).items()}


def _fractions(right: list[list[Tensor]]) -> dict[str, float]:
    """By side's name, how many of the comparisons were right."""
    return {name: float(torch.cat(of_side).float().mean()) for name, of_side in zip(names.SIDES, right)}
