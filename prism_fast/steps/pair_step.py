"""The warm-up's discriminator step: teacher against student, on records that hold both."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from prism_fast import metric_names as names
from prism_fast import ranks
from prism_fast.balance import SPARE
from prism_fast.pack import Packs, Tree, merge_prompts, pack
from prism_fast.records import PackedTree, PairRecord, to_device
from prism_fast.steps.expert_load import ExpertLoad, balance_share
from prism_fast.steps.over_packs import counts_of_whole, over_packs
from prism_fast.steps.own_packs import OwnPack, Reader
from prism_fast.steps.pair_loss import bradley_terry, ranked_right
from prism_fast.steps.parts import STUDENT_KINDS, TEACHER_KINDS, PartLabels, PartTrees, compared, same_parts
from prism_fast.steps.readings import read, read_with_load
from prism_fast.steps.update import Backprop

AT_ONCE = 256  # held-out records
NUMBERS = 6  # that a pack adds to the figures of a batch, before its scores


def pair_trees(records: Sequence[PairRecord]) -> tuple[list[Tree], PartLabels]:
    """One tree per distinct prompt; a part that several records share stands once."""
    prompts, which = merge_prompts([r.prompt for r in records])
    trees = PartTrees(prompts)
    labels = [
        (trees.add(tree, record.teacher, TEACHER_KINDS), trees.add(tree, record.student, STUDENT_KINDS))
        for record, tree in zip(records, which)
    ]
    teacher, student = torch.tensor(labels).permute(1, 2, 0)
    same = same_parts([(record.teacher, record.student) for record in records])
    return trees.trees(), PartLabels(teacher, student, len(trees), same)


def pair_packs(records: Sequence[PairRecord], tokens_per_pack: int, discriminator: Reader) -> tuple[Packs, PartLabels]:
    """As few packs as fit, so that the load-balancing loss, a mean over packs, does not depend on the number of
    processes. Records with the same images share them, and the text with which their prompts begin."""
    trees, labels = pair_trees(records)
    return pack(trees, tokens_per_pack, discriminator.image, share=True), labels


def pair_scores(score: Tensor, packed: PackedTree, labels: PartLabels, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of the pairs of one side whose student's part lies in this pack: scores of teacher and student, (n,) each, and
    whether both have the same tokens, (n,) bool.

    score (branches,) on any device; ``packed`` on the host.
    """
    branch = packed.branch_of(labels.total)
    branches = compared(branch, labels.teacher[side], labels.student[side])
    teacher, student = (score.index_select(0, to_device(index, score.device)) for index in branches)
    return teacher, student, to_device(labels.same[side][branch[labels.student[side]] >= 0], score.device)


def pair_gradient(
    updater: Backprop,
    packs: Packs,
    labels: PartLabels,
    *,
    balance_coef: float,
    load: ExpertLoad,
) -> tuple[dict[str, float], set[int]]:
    """One forward and backward over a batch of pairs: (metrics, labels of parts whose score broke the loss).

    The loss is the mean over records and sides of -log sigmoid(D(y+) - D(y)), plus ``balance_coef`` times the
    load-balancing loss, averaged over packs. The labels are those of scores that are not finite in the first pack after
    which the loss is not. Both are the batch's in every process.
    """
    discriminator, records = updater.module, labels.teacher.shape[1]
    seeds = torch.randint(2**63 - 1, (len(packs),)).tolist() if discriminator.dropout else []

    def compute(own: OwnPack) -> _PackFigures:
        counts = counts_of_whole(updater, packs, own) if balance_coef > 0 else None
        with _drawing_by(_seed(own, seeds), discriminator.device):
            judgement = updater(own.packed.to(discriminator.device), balance=balance_coef > 0)
        loss = balance = judgement.score.new_zeros(())
        sides = [pair_scores(judgement.score, own.packed, labels, side) for side in range(2)]
        pair_loss = [bradley_terry(teacher, student).sum() / records for teacher, student, _ in sides]
        for part in pair_loss:
            loss = loss + part / 2
        if balance_coef > 0:
            top_k, counted = discriminator.top_k, own.counts
            balance = balance_share(judgement.stats, top_k, len(packs), counted=counted, whole=counts)
            loss = loss + balance_coef * balance
        updater.backward(loss)
        right = [ranked_right(*side).sum() for side in sides]
        score = judgement.score.detach()
        row = torch.cat([torch.stack([x.detach().to(score) for x in (loss, balance, *pair_loss, *right)]), score])
        load.add(judgement.stats, counted=own.counts)
        return _PackFigures(own.place, [len(teacher) for teacher, _, _ in sides], own.packed.label, row)

    found = [figures for figures in over_packs(updater, packs, compute) if figures.place != (SPARE,)]
    rows = read_with_load([figures.row for figures in found], load)  # the step's one wait
    metrics, broken = _over_packs(found, rows, balanced=balance_coef > 0)
    return metrics | equal_parts(labels), broken


def equal_parts(labels: PartLabels) -> dict[str, float]:
    """How many students' parts have the teacher's tokens, by side."""
    return {names.EQUAL_PARTS[side]: float(labels.same[i].float().mean()) for i, side in enumerate(names.SIDES)}


def _seed(own: OwnPack, seeds: Sequence[int]) -> int | None:
    """Of a pack's dropout; halves draw anew, and what a spare one draws is nobody's."""
    if not seeds:
        return None
    if not own.counts:
        return 0
    return seeds[own.number] + (0 if own.half is None else 1 + own.half)


@contextlib.contextmanager
def _drawing_by(seed: int | None, device: torch.device) -> Iterator[None]:
    """Dropout by a pack's own seed: the same whichever process computes it, and all processes' generators stay equal,
    as a checkpoint keeps one."""
    with torch.random.fork_rng([device] if device.type == "cuda" else [], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        yield


class _PackFigures(NamedTuple):
    """What one pack adds to a batch's figures."""

    place: tuple[int, ...]  # OwnPack.place
    pairs: list[int]  # by side
    label: Tensor  # (branches,), on the host
    row: (
        Tensor  # (NUMBERS + branches,): loss, balance loss, by side pair loss, by side pairs in the right order; scores
    )


def _over_packs(
    own: Sequence[_PackFigures], rows: Sequence[Tensor], *, balanced: bool
) -> tuple[dict[str, float], set[int]]:
    """As `pair_gradient` returns it, of the packs of all processes, in their order; ``rows``: theirs, on the host."""
    plain = [
        (figures.place, figures.pairs, row[:NUMBERS].tolist(), figures.label[~row[NUMBERS:].isfinite()].tolist())
        for figures, row in zip(own, rows)
    ]
    found = sorted((figures for part in ranks.gather(plain) for figures in part), key=lambda figures: figures[0])
    metrics: dict[str, float] = {names.LOSS: 0.0, **{names.PAIR_LOSS[side]: 0.0 for side in names.SIDES}}
    broken: set[int] = set()
    for _, _, (loss, balance, *pair_loss, _, _), faulty in found:
        for side, name in enumerate(names.SIDES):
            metrics[names.PAIR_LOSS[name]] += pair_loss[side]
        if balanced:
            metrics[names.BALANCE_LOSS] = metrics.get(names.BALANCE_LOSS, 0.0) + balance
        metrics[names.LOSS] += loss
        if not broken and not math.isfinite(metrics[names.LOSS]):
            broken = set(faulty)
    for side, name in enumerate(names.SIDES):
        right, pairs = [values[4 + side] for _, _, values, _ in found], [pairs[side] for _, pairs, _, _ in found]
        metrics[names.PAIR_ACCURACY[name]] = _share(right, pairs)
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
def pair_accuracy(updater: Backprop, records: Sequence[PairRecord], *, tokens_per_pack: int) -> dict[str, float]:
    """How often the teacher's part scores higher than the student's, on held-out records, AT_ONCE of them in memory;
    equal parts count one half."""
    discriminator = updater.module
    right: list[list[Tensor]] = [[], []]
    pairs: list[list[int]] = [[], []]
    discriminator.eval()
    with updater.gathered():
        for start in range(0, len(records), AT_ONCE):
            several = [records[i] for i in range(start, min(start + AT_ONCE, len(records)))]
            packs, labels = pair_packs(several, tokens_per_pack, discriminator)
            for number in range(ranks.rank(), len(packs), ranks.world()):
                packed = packs[number]
                score = discriminator(packed.to(discriminator.device)).score
                for side in range(2):
                    compared_here = pair_scores(score, packed, labels, side)
                    right[side].append(ranked_right(*compared_here).sum())
                    pairs[side].append(len(compared_here[0]))
    discriminator.train()
    counted = ranks.gather([[read(found) for found in right], pairs])
    return {
        f"pair_accuracy_{name}": _share(*([n for part in counted for n in part[what][side]] for what in range(2)))
        for side, name in enumerate(names.SIDES)
    }


def _share(right: Sequence[float], pairs: Sequence[int]) -> float:
    """How many of the comparisons were right."""
    return float(torch.tensor(float(sum(right))) / sum(pairs))
