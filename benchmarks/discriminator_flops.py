"""Floating-point operations of every way of the discriminator step, by formula: 2 per multiply-add of every product.

Counted: vision tower (patches, attention, MLP, mergers), projections, attention, router, the k active experts, head.
Attention counts the rectangle queries x keys of each segment, as dense attention computes it. A backward is two
products per product of its forward; the patch embedding needs no gradient of its input. Elementwise work is not
counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.discriminator_case import MERGE, PATCH, TEMPORAL, Case, Shape


@dataclass(frozen=True)
class Work:
    """FLOPs of one forward: ``repeated`` lies in checkpointed blocks, ``no_input`` has no gradient of its input."""

    repeated: float = 0.0
    other: float = 0.0
    no_input: float = 0.0

    def __add__(self, more: Work) -> Work:
        return Work(self.repeated + more.repeated, self.other + more.other, self.no_input + more.no_input)

    def forward(self) -> float:
        return self.repeated + self.other + self.no_input

    def trained(self, checkpointing: bool) -> float:
        """Forward and backward; under activation checkpointing the blocks' forward once more."""
        return (4 if checkpointing else 3) * self.repeated + 3 * self.other + 2 * self.no_input


def vision(shape: Shape) -> Work:
    """One image."""
    patches, width = shape.grid[0] * shape.grid[1], shape.vision_hidden
    merged = width * MERGE**2
    block = patches * (4 * width**2 + 2 * width * shape.vision_inner) + 2 * patches**2 * width
    merger = patches // MERGE**2 * (merged**2 + merged * shape.hidden)
    return Work(
        repeated=2 * shape.vision_depth * block,
        other=2 * (1 + len(shape.deepstack)) * merger,
        no_input=2 * patches * 3 * TEMPORAL * PATCH**2 * width,
    )


def layer(shape: Shape, queries: int, keys: int, pairs: int) -> float:
    """One decoder layer: rows whose output is computed, rows whose key and value are, query-key pairs."""
    inner = shape.heads * shape.head_dim
    projections = queries * 2 * shape.hidden * inner + keys * 2 * shape.hidden * shape.kv_heads * shape.head_dim
    experts = queries * (shape.top_k * 3 * shape.hidden * shape.inner + shape.hidden * shape.experts)
    return 2 * (projections + experts + 2 * pairs * inner)


def sequence(shape: Shape, length: int) -> Work:
    """The text side of prompt and part as one sequence, the head at its last token."""
    return Work(repeated=shape.layers * layer(shape, length, length, length**2), other=2 * shape.hidden)


def tree(case: Case, *, read_out: bool) -> Work:
    """The text side of one packed tree; ``read_out``: queries and experts of the last layer at read-out rows alone."""
    shape, root = case.shape, case.shape.prompt
    lengths = [len(part) for pair in [case.lesson.teacher, *case.parts] for part in pair]
    tokens = root + sum(lengths)
    pairs = root**2 + sum(length * (root + length) for length in lengths)
    whole = layer(shape, tokens, tokens, pairs)
    last = layer(shape, len(lengths), tokens, len(lengths) * tokens) if read_out else whole
    return Work(repeated=(shape.layers - 1) * whole + last, other=2 * shape.hidden * len(lengths))


def flops_of_ways(case: Case, *, checkpointing: bool = False) -> list[float]:
    """One figure for every way of discriminator_ways.ways(checkpointing), in their order."""
    shape, image = case.shape, vision(case.shape)

    def total(*pairs, with_image: bool = True) -> Work:
        work = Work()
        for part in (part for pair in pairs for part in pair):
            work += sequence(shape, shape.prompt + len(part)) + (image if with_image else Work())
        return work

    students, teacher = total(*case.parts), total(case.lesson.teacher)
    every_teacher = total(*[case.lesson.teacher] * len(case.parts))
    update = (students + every_teacher).trained(checkpointing)
    once = image + total(*case.parts, case.lesson.teacher, with_image=False)
    read = image + tree(case, read_out=True)
    found = [
        students.forward() + update,
        update,
        (students + teacher).trained(checkpointing),
        once.trained(checkpointing),
        (image + tree(case, read_out=False)).trained(checkpointing),
        read.trained(checkpointing),
        read.trained(checkpointing),
    ]
    return [*found, read.trained(False)] if checkpointing else found
