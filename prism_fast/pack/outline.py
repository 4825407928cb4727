"""What a pack costs, before it is built."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from prism_fast.pack.roots import each_once, patches_of, roots_of
from prism_fast.pack.tree import ImageTokens, Parts, Tree


@dataclass(frozen=True)
class Rates:
    """What a pack costs, by what it is made of, in any unit; `prism_fast.balance.rates` has a model's operations."""

    token: float
    pair: float  # (query, key) pairs that tree attention visits
    predicted: float  # tokens of branches, besides ``token``
    patch: float
    patch_pair: float  # patches of one image see each other

    def images(self, patches: Iterable[int]) -> float:
        return sum(self.patch * n + self.patch_pair * n * n for n in patches)


class Outline(NamedTuple):
    """A pack's segments by their lengths, and its images by their sizes: what it costs, before it is built.

    Of a root of 3 tokens with an image, and two questions of 2 and 1 about it, each with an answer of 4:

    >>> Outline(lengths=[3, 2, 4, 1, 4], prefix=[-1, 0, 1, 0, 3], branch=[False, False, True, False, True], images=[8])
    """

    lengths: list[int]  # tokens
    prefix: list[int]  # the segment that each one continues, -1 for a root
    branch: list[bool]  # whether its tokens are predicted, and its last one is read out
    images: list[int]  # patches, of each image once


def outline_of(trees: Sequence[Tree], parts: Parts, image: ImageTokens, share: bool) -> Outline:
    made = Outline([], [], [], [])

    def add(length: int, parent: int, branch: bool = False) -> int:
        made.lengths.append(length)
        made.prefix.append(parent)
        made.branch.append(branch)
        return len(made.lengths) - 1

    roots = roots_of(trees, parts, image, share)
    for length, members in roots:
        root = add(length, -1)
        for t, chosen in members:
            rest = len(trees[t].prompt) - length
            above = add(rest, root) if rest else root
            for b in chosen:
                add(trees[t].branches[b].numel(), above, True)
    images, _ = each_once([trees[members[0][0]].prompt for _, members in roots])
    made.images.extend(patches_of(prompt)[i] for prompt, i in images)
    return made
