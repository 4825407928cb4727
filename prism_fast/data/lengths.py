"""How long a file's records are: part of `prism-fast data check --model`."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from prism_fast.files import replacing, writing
from prism_fast.records import Lesson, PairRecord, Prompt

PERCENTILES = (1, 5, 25, 50, 75, 95, 99)

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


class Lengths:
    """Trees of the good records of a file, in its order: 16 bytes a record and 8 a part."""

    def __init__(self) -> None:
        self._roots, self._parts, self._ends = array("q"), array("q"), array("q")

    def add(self, tree: Tree) -> None:
        self._roots.append(tree[0])
        self._parts.extend(tree[1])
        self._ends.append(len(self._parts))

    def __len__(self) -> int:
        return len(self._roots)

    def __getitem__(self, number: int) -> Tree:
        start = self._ends[number - 1] if number else 0
        return self._roots[number], self._parts[start : self._ends[number]].tolist()

    def _whole(self) -> np.ndarray[Any, Any]:
        """Tokens of each record, prompt and parts."""
        total = np.concatenate([[0], np.cumsum(self._parts, dtype=np.int64)])
        ends = np.array(self._ends)
        return np.array(self._roots) + np.diff(total[ends], prepend=0)

    def figures(self) -> dict[str, dict[str, float]]:
        """Of "prompt" and, where parts follow one, "whole": least, most, mean and percentiles."""
        columns = {"prompt": np.array(self._roots)} | ({"whole": self._whole()} if self._parts else {})
        return {
            name: {
                "min": int(values.min()),
                "max": int(values.max()),
                "mean": round(float(values.mean()), 1),
                **{f"p{p}": round(float(point)) for p, point in zip(PERCENTILES, np.percentile(values, PERCENTILES))},
            }
            for name, values in columns.items()
        }

    def longest(self) -> int:
        """The number of the record that has the most tokens."""
        return int(self._whole().argmax())

    def lines(self) -> Iterator[str]:
        """What a person is told."""
        for name, told in self.figures().items():
            shown = ", ".join(f"{p} %: {told[f'p{p}']:,}" for p in PERCENTILES)
            yield f"{name} tokens: {told['min']:,} to {told['max']:,}, mean {told['mean']:,.0f}; {shown}"

    def plot(self, path: Path, name: str) -> None:
        """A histogram of whole lengths as PNG, or what else ``path`` ends with."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 3.2), layout="constrained")
        axes = figure.subplots()
        axes.hist(self._whole(), bins=60, color="#4477aa")
        axes.set(xlabel="tokens of a record, prompt included", ylabel="records", title=name)
        with writing(path, "--histogram"), replacing(path) as aside:
            figure.savefig(aside, dpi=150, format=path.suffix.lstrip(".") or "png")
