"""The warm-up's discriminator step: teacher against student, on records that hold both."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prism_fast.config import WarmupConfig
from prism_fast.data.chat import Chat
from prism_fast.models.discriminator import Discriminator
from prism_fast.pack import (
    KIND_STUDENT_CAPTION,
    KIND_STUDENT_REASONING,
    KIND_TEACHER_CAPTION,
    KIND_TEACHER_REASONING,
    Tree,
    merge_prompts,
    pack,
)
from prism_fast.records import DataError, PackedTree, Prompt, Sample

SIDES = ("perception", "reasoning")


@dataclass(frozen=True)
class PairRecord:
    """The tokens of one warm-up record: teacher and student, perception and reasoning."""

    place: str  # file and record, for messages
    prompt: Prompt
    teacher: tuple[Tensor, Tensor]
    student: tuple[Tensor, Tensor]


def pair_record(sample: Sample, chat: Chat, config: WarmupConfig) -> PairRecord:
    """Tokens of one record. Raises DataError where a part is too long: teacher and student have the same limit."""
    prompt = chat.encode_prompt(sample, config.data.max_prompt_tokens)
    parts = {}
    for voice in ("teacher", "student"):
        for part in ("caption", "reasoning"):
            ids = chat.encode_part(getattr(sample, f"{voice}_{part}"))
            if len(prompt) + len(ids) > config.max_tokens:
                raise DataError(
                    f"{sample.place}: {voice} {part}: {len(prompt) + len(ids)} tokens with the prompt are over "
                    f"max_tokens = {config.max_tokens}; raise it, or shorten the record"
                )
            parts[voice, part] = ids
    return PairRecord(
        sample.place,
        prompt,
        (parts["teacher", "caption"], parts["teacher", "reasoning"]),
        (parts["student", "caption"], parts["student", "reasoning"]),
    )


Pairs = list[tuple[int, tuple[int, int], tuple[int, int]]]  # (tree, teacher's branches, student's branches), by side


def pair_trees(records: list[PairRecord]) -> tuple[list[Tree], Pairs]:
    """One tree per distinct prompt; a branch that several records share stands once."""
    prompts, which = merge_prompts([r.prompt for r in records])
    branches: list[list[Tensor]] = [[] for _ in prompts]
    kinds: list[list[int]] = [[] for _ in prompts]
    known: dict[tuple, int] = {}

    def branch(tree: int, ids: Tensor, kind: int) -> int:
        key = (tree, kind, tuple(ids.tolist()))
        if key not in known:
            known[key] = len(branches[tree])
            branches[tree].append(ids)
            kinds[tree].append(kind)
        return known[key]

    pairs: Pairs = []
    for record, tree in zip(records, which):
        teacher = (
            branch(tree, record.teacher[0], KIND_TEACHER_CAPTION),
            branch(tree, record.teacher[1], KIND_TEACHER_REASONING),
        )
        student = (
            branch(tree, record.student[0], KIND_STUDENT_CAPTION),
            branch(tree, record.student[1], KIND_STUDENT_REASONING),
        )
        pairs.append((tree, teacher, student))
    teachers = (KIND_TEACHER_CAPTION, KIND_TEACHER_REASONING)
    trees = [
        Tree(p, b, k, together=tuple(i for i, kind in enumerate(k) if kind in teachers))
        for p, b, k in zip(prompts, branches, kinds)
    ]
    return trees, pairs


def pair_scores(score: Tensor, packed: PackedTree, pairs: Pairs, side: int) -> tuple[Tensor, Tensor]:
    """(teacher, student) scores of the pairs of one side whose student branch lies in this pack."""
    row = {name: i for i, name in enumerate(packed.branch)}
    here = [
        (row[t, teacher[side]], row[t, student[side]]) for t, teacher, student in pairs if (t, student[side]) in row
    ]
    index = torch.tensor(here, dtype=torch.int64, device=score.device).view(-1, 2)
    return score.index_select(0, index[:, 0]), score.index_select(0, index[:, 1])


def not_finite(score: Tensor, packed: PackedTree, pairs: Pairs, records: list[PairRecord]) -> str | None:
    """Names the first record a score of which, in this pack, is not finite."""
    bad = {packed.branch[i] for i in (~score.detach().isfinite()).nonzero().flatten().tolist()}
    for record, (tree, *voices) in zip(records, pairs):
        for voice, branches in zip(("teacher", "student"), voices):
            for side, branch in zip(SIDES, branches):
                if (tree, branch) in bad:
                    return f"the {side} score of the {voice} of {record.place} is not finite"
    return None


@torch.no_grad()
def pair_accuracy(discriminator: Discriminator, records: list[PairRecord], config: WarmupConfig) -> dict[str, float]:
    """How often the teacher's part scores higher than the student's, on held-out records."""
    discriminator.eval()
    trees, pairs = pair_trees(records)
    right: list[list[Tensor]] = [[], []]
    for packed in pack(trees, config.run.tokens_per_pack, discriminator.image):
        score = discriminator(packed.to(discriminator.head.device)).score
        for side in range(2):
            teacher, student = pair_scores(score, packed, pairs, side)
            right[side].append(teacher > student)
    discriminator.train()
    return {f"pair_accuracy_{name}": float(torch.cat(right[i]).float().mean()) for i, name in enumerate(SIDES)}
