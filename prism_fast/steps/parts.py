"""Captions and reasonings as branches of trees: equal parts stand once, and labels say which are compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from prism_fast.pack import (
    KIND_STUDENT_CAPTION,
    KIND_STUDENT_REASONING,
    KIND_TEACHER_CAPTION,
    KIND_TEACHER_REASONING,
    Tree,
)
from prism_fast.records import Prompt

# By side: of the caption (perception), of the reasoning.
TEACHER_KINDS = (KIND_TEACHER_CAPTION, KIND_TEACHER_REASONING)
STUDENT_KINDS = (KIND_STUDENT_CAPTION, KIND_STUDENT_REASONING)


class PartLabels(NamedTuple):
    """Labels of the parts in a batch's trees, by side (0 caption, 1 reasoning).

    One prompt, two responses with equal captions, and a third whose format is invalid:

    >>> PartLabels(teacher=torch.tensor([[0], [1]]), student=torch.tensor([[2, 2, -1], [3, 4, -1]]), total=5,
    ...            same=torch.tensor([[True, True, False], [False, False, False]]))
    """

    teacher: Tensor  # (2, prompts) int64; of warm-up records (2, records)
    student: Tensor  # (2, responses) int64, -1 where a response's format is invalid; of warm-up records (2, records)
    total: int
    same: Tensor  # (2, responses) bool, of warm-up records (2, records): the student's tokens are the teacher's


class PartTrees:
    """Trees under construction. A part's label is its number in order of first mention in the whole batch."""

    def __init__(self, prompts: Sequence[Prompt]):
        self._prompts = prompts
        self._parts: list[list[tuple[Tensor, int, int]]] = [[] for _ in prompts]  # (tokens, kind, label) by tree
        self._labels: dict[tuple, int] = {}

    def __len__(self) -> int:
        """Number of labels."""
        return len(self._labels)

    def add(self, tree: int, parts: Sequence[Tensor], kinds: Sequence[int]) -> list[int]:
        """Labels of the parts; a part that the tree holds already (same kind, same tokens) has the label it had."""
        labels = []
        for ids, kind in zip(parts, kinds):
            key = (tree, kind, tuple(ids.tolist()))
            if key not in self._labels:
                self._parts[tree].append((ids, kind, len(self._labels)))
                self._labels[key] = len(self._labels)
            labels.append(self._labels[key])
        return labels

    def trees(self) -> list[Tree]:
        """A split tree repeats its teacher's parts, so that every student's part stands beside them."""
        made = []
        for prompt, parts in zip(self._prompts, self._parts):
            branches, kinds, labels = zip(*parts)
            together = tuple(i for i, kind in enumerate(kinds) if kind in TEACHER_KINDS)
            made.append(Tree(prompt, branches, kinds, labels, together))
        return made


def same_parts(pairs: Sequence[tuple[Sequence[Tensor], Sequence[Tensor] | None]]) -> Tensor:
    """(2, pairs) bool: whether a student's part has the teacher's tokens; (teacher, student or None) each."""
    found = [
        [student is not None and torch.equal(teacher[side], student[side]) for side in range(2)]
        for teacher, student in pairs
    ]
    return torch.tensor(found, dtype=torch.bool).view(-1, 2).T.contiguous()


def compared(branch: Tensor, teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
    """The pairs of a pack, in their order: (the teacher's branches (n,), the students' branches (n,)), int64.

    A pair is where its student's part is. ``branch`` as PackedTree.branch_of gives it; ``teacher`` and ``student`` are
    labels, of equal shape; student -1 is no pair.
    """
    here = (student >= 0) & (branch[student] >= 0)
    return branch[teacher[here]], branch[student[here]]
