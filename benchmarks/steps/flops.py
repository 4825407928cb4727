"""Floating-point operations of a whole step, by formula: 2 per multiply-add of every product.

Counted: vision tower (patches, attention, MLP, mergers), projections, attention, router, the k active experts, head.
Attention counts the rectangle queries x keys of each segment, as dense attention computes it. A backward is two
products per product of its forward; the patch embedding needs no gradient of its input. Elementwise work is not
counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.steps.case import MERGE, PATCH, TEMPORAL, Shape


@dataclass(frozen=True)
class Work:
    """FLOPs of one forward: ``repeated`` lies in checkpointed blocks, ``no_input`` has no gradient of its input.

    ``last``: the part of ``repeated`` that a recompute leaves out, products that end a block: no backward reads them.
    """

    repeated: float = 0.0
    other: float = 0.0
    no_input: float = 0.0
    last: float = 0.0

    def __add__(self, more: Work) -> Work:
        return Work(
            self.repeated + more.repeated,
            self.other + more.other,
            self.no_input + more.no_input,
            self.last + more.last,
        )

    def forward(self) -> float:
        return self.repeated + self.other + self.no_input

    def trained(self, checkpointing: bool) -> float:
        """Forward and backward; under activation checkpointing the blocks' forward once more."""
        recompute = self.repeated - self.last if checkpointing else 0.0
        return 3 * self.repeated + recompute + 3 * self.other + 2 * self.no_input


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
        last=2 * shape.vision_depth * patches * width * shape.vision_inner,
    )


def layer(shape: Shape, queries: int, keys: int, pairs: int) -> float:
    """One decoder layer: rows whose output is computed, rows whose key and value are, query-key pairs."""
    inner = shape.heads * shape.head_dim
    projections = queries * 2 * shape.hidden * inner + keys * 2 * shape.hidden * shape.kv_heads * shape.head_dim
    mlp = queries * (shape.top_k * 3 * shape.hidden * shape.inner + shape.hidden * shape.experts)
    return 2 * (projections + mlp + 2 * pairs * inner)


def down(shape: Shape, rows: int, kernels: bool = False) -> float:
    """The last product of a layer, where a recompute leaves it out: of experts only ours do, by ``kernels``; elsewhere
    routing weights read it."""
    if shape.experts and not kernels:
        return 0.0
    return 2.0 * rows * (shape.top_k if shape.experts else 1) * shape.hidden * shape.inner


def sequence(shape: Shape, length: int) -> Work:
    """The text side of one sequence, without a head."""
    return Work(
        repeated=shape.layers * layer(shape, length, length, length**2), last=shape.layers * down(shape, length)
    )


def tree(shape: Shape, branches: Sequence[int], *, read_out: bool = False, kernels: bool = False) -> Work:
    """The text side of one packed tree; ``read_out``: queries and MLP of the last layer at read-out rows alone;
    ``kernels``: with our experts."""
    root, tokens = shape.prompt, shape.prompt + sum(branches)
    pairs = root**2 + sum(length * (root + length) for length in branches)
    whole = layer(shape, tokens, tokens, pairs)
    last = layer(shape, len(branches), tokens, len(branches) * tokens) if read_out else whole
    rows = len(branches) if read_out else tokens
    ends = (shape.layers - 1) * down(shape, tokens, kernels) + down(shape, rows, kernels)
    return Work(repeated=(shape.layers - 1) * whole + last, last=ends)


def head(shape: Shape, rows: int, outputs: int) -> Work:
    """``rows`` hidden states to ``outputs`` numbers each."""
    return Work(other=2 * rows * shape.hidden * outputs)
