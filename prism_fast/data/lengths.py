"""How long a file's records are, and what packing makes of them: part of `prism-fast data check --model`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torch import Tensor

from prism_fast.data.order import order
from prism_fast.files import replacing, writing
from prism_fast.records import Lesson, PairRecord, Prompt
from prism_kernels import pack_trees

PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
MOST_BATCHES = 200  # that are packed to say how it goes

Tree = tuple[int, list[int]]  # tokens of the prompt, and of each part that follows it


def tree_of(made: object) -> Tree:
    """Of what a stage encodes a record to."""
    if isinstance(made, PairRecord):
        return len(made.prompt), [len(part) for part in (*made.teacher, *made.student)]
    if isinstance(made, Lesson):
        return len(made.prompt), [len(part) for part in made.teacher]
    first, second = made if isinstance(made, tuple) else (made, None)
    if isinstance(first, Prompt) and isinstance(second, Tensor):  # a demonstration
        return len(first), [len(second)]
    if isinstance(second, Prompt):  # a question
        return len(second), []
    raise TypeError(f"no tree is known of {type(made).__name__}")


@dataclass
class Lengths:
    """Trees of the good records of a file, in its order."""

    trees: list[Tree] = field(default_factory=list)

    def lines(self, capacity: int, batch_size: int) -> Iterator[str]:
        """What a person is told."""
        columns = {"prompt": [root for root, _ in self.trees], "whole": [root + sum(rest) for root, rest in self.trees]}
        if not any(rest for _, rest in self.trees):
            columns = {"prompt": columns["prompt"]}
        for name, values in columns.items():
            points = np.percentile(values, PERCENTILES).round().astype(int)
            shown = ", ".join(f"{p} %: {value:,}" for p, value in zip(PERCENTILES, points))
            yield f"{name} tokens: {min(values):,} to {max(values):,}, mean {np.mean(values):,.0f}; {shown}"
        if all(rest for _, rest in self.trees):
            yield self._packing(capacity, batch_size)

    def _packing(self, capacity: int, batch_size: int) -> str:
        longest = max(root + sum(rest) for root, rest in self.trees)
        if longest > capacity:
            return f"packing: the longest record takes {longest:,} tokens, over --tokens-per-pack={capacity:,}"
        tokens = padded = packs = 0
        batches = min(MOST_BATCHES, -(-len(self.trees) // batch_size))
        for number in range(batches):
            trees = [self.trees[i] for i in order(len(self.trees), 0, number * batch_size, batch_size)]
            packs += len(pack_trees(trees, capacity))
            tokens += sum(root + sum(rest) for root, rest in trees)
            sequences = [root + part for root, rest in trees for part in rest]
            padded += len(sequences) * max(sequences)
        return (
            f"packing, {batch_size} records a step into packs of {capacity:,} tokens: {packs / batches:.2f} packs a "
            f"step, {tokens / (packs * capacity):.1%} full; padded to the longest, every part with its prompt: "
            f"{padded / tokens:.2f} times the tokens"
        )

    def plot(self, path: Path, name: str) -> None:
        """A histogram of whole lengths as PNG, or what else ``path`` ends with."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 3.2), layout="constrained")
        axes = figure.subplots()
        axes.hist([root + sum(rest) for root, rest in self.trees], bins=60, color="#4477aa")
        axes.set(xlabel="tokens of a record, prompt included", ylabel="records", title=name)
        with writing(path, "--histogram"), replacing(path) as aside:
            figure.savefig(aside, dpi=150, format=path.suffix.lstrip(".") or "png")


def duplicates(digests: Sequence[bytes]) -> int:
    """How many records repeat an earlier one."""
    return len(digests) - len(set(digests))
