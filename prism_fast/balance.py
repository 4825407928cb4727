"""Who computes what: the cost of a pack, packs and prompts dealt to ranks, and how evenly it came out.

Every rank plans the whole batch, so all of this is a pure function of lengths: each rank finds the same plan by itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from prism_fast.pack import Packs, Rates

SPARE = -1  # where a turn has no pack for a rank


@dataclass(frozen=True)
class Work:
    """What a pack is made of, as far as its cost goes. Works add up: that of a pack is the sum of its trees'.

    A root of 3 tokens with an image of 8 patches, and branches of 2 and 1:

    >>> Work.of([3, 2, 1], [-1, 0, 0], images=[8])
    Work(tokens=6, pairs=19, branches=2, read_pairs=9, predicted=3, patches=8, patch_pairs=64)
    """

    tokens: int = 0
    pairs: int = 0  # (query, key) pairs that tree attention visits, a token's own included
    branches: int = 0  # each is read out at its last token
    read_pairs: int = 0  # of the read-out rows alone
    predicted: int = 0  # rows of the LM head
    patches: int = 0
    patch_pairs: int = 0  # of the vision tower: all patches of an image see each other

    @classmethod
    def of(
        cls,
        lengths: Sequence[int],
        prefix: Sequence[int],
        images: Iterable[int] = (),
        branch: Sequence[bool] | None = None,
    ) -> Work:
        """By the segments' lengths, and the segment that each continues (-1: none, a root), as in TreeLayout.

        ``images``: patches of every image; ``branch``: which segments are branches, by default all that continue
        another. A root of P tokens has P (P + 1) / 2 pairs, a branch of L behind it L P + L (L + 1) / 2.
        """
        above: list[int] = []  # tokens above each segment
        for parent in prefix:
            above.append(0 if parent < 0 else above[parent] + lengths[parent])
        branch = [parent >= 0 for parent in prefix] if branch is None else branch
        branches = [i for i, own in enumerate(branch) if own]
        images = list(images)
        return cls(
            tokens=sum(lengths),
            pairs=sum(n * over + n * (n + 1) // 2 for n, over in zip(lengths, above, strict=True)),
            branches=len(branches),
            read_pairs=sum(above[i] + lengths[i] for i in branches),
            predicted=sum(lengths[i] for i in branches),
            patches=sum(images),
            patch_pairs=sum(n * n for n in images),
        )

    @classmethod
    def of_tree(cls, root: int, branches: Sequence[int], images: Iterable[int] = ()) -> Work:
        """A root and branches that follow it."""
        return cls.of([root, *branches], [-1] + [0] * len(branches), images)

    @classmethod
    def of_packs(cls, packs: Packs) -> list[Work]:
        """Of every pack of a plan, without building it."""
        outlines = map(packs.outline, range(len(packs)))
        return [cls.of(found.lengths, found.prefix, found.images, found.branch) for found in outlines]

    def __add__(self, other: Work) -> Work:
        return Work(*(mine + more for mine, more in zip(vars(self).values(), vars(other).values())))


@dataclass(frozen=True)
class Dimensions:
    """Of a Qwen3-VL policy or a discriminator, as far as its products go."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int  # of the MLP, or of one expert
    experts: int  # 0: dense
    top_k: int  # experts that a token takes; 1 where dense
    vocab: int  # rows of the LM head; 0: a scalar head at read-out rows
    vision_hidden: int
    vision_depth: int
    vision_intermediate: int
    vision_patch: int  # numbers in a patch
    vision_merge: int  # patches in an image's token
    vision_mergers: int  # the last, and those of DeepStack
    frozen_vision: bool = False

    @classmethod
    def of(cls, config: Any, *, frozen_vision: bool = False) -> Dimensions:
        """Of a transformers Qwen3VLConfig (a policy), or Qwen3VLMoeConfig (a discriminator: its head is one row)."""
        text, vision = config.text_config, config.vision_config
        experts = getattr(text, "num_experts", 0)
        return cls(
            hidden=text.hidden_size,
            layers=text.num_hidden_layers,
            heads=text.num_attention_heads,
            kv_heads=text.num_key_value_heads,
            head_dim=text.head_dim,
            intermediate=text.moe_intermediate_size if experts else text.intermediate_size,
            experts=experts,
            top_k=text.num_experts_per_tok if experts else 1,
            vocab=0 if experts else text.vocab_size,
            vision_hidden=vision.hidden_size,
            vision_depth=vision.depth,
            vision_intermediate=vision.intermediate_size,
            vision_patch=vision.in_channels * vision.temporal_patch_size * vision.patch_size**2,
            vision_merge=vision.spatial_merge_size**2,
            vision_mergers=1 + len(vision.deepstack_visual_indexes),
            frozen_vision=frozen_vision,
        )


def pack_cost(work: Work, dims: Dimensions) -> float:
    """Floating-point operations of a pack's forward and backward, 2 for a multiply-add.

    Forward, with H hidden, Hq and Hkv heads of D, I intermediate, k of E experts taken, V words::

        layer    2 (q 2 H Hq D  +  t 2 H Hkv D  +  q (3 k H I + H E)  +  2 pairs Hq D)    q queries, t tokens
        head     2 predicted H V, or of a discriminator 2 branches H
        vision   2 (patches W in  +  depth (patches (4 W^2 + 2 W J)  +  2 patch_pairs W)
                    +  mergers patches / m (M^2 + M H))                   W width, J intermediate, M = m W, m = merge

    with q = t and all pairs, but in a discriminator's last layer q = branches and the pairs of read-out rows. A
    backward is two products for each of the forward, so 3 in all; the patch embedding needs no gradient of its input
    (2), a frozen vision tower no backward (1). Not counted, as it hardly moves one pack against another: elementwise
    work, what activation checkpointing computes again, and a warm-up's router and attention at the other rows of the
    last layer.
    """
    inner, kv = dims.heads * dims.head_dim, dims.kv_heads * dims.head_dim
    mlp = 3 * dims.top_k * dims.hidden * dims.intermediate + dims.hidden * dims.experts

    def layer(queries: int, pairs: int) -> int:
        return queries * (2 * dims.hidden * inner + mlp) + work.tokens * 2 * dims.hidden * kv + 2 * pairs * inner

    if dims.vocab:
        text = dims.layers * layer(work.tokens, work.pairs) + work.predicted * dims.hidden * dims.vocab
    else:
        text = (dims.layers - 1) * layer(work.tokens, work.pairs) + layer(work.branches, work.read_pairs)
        text += work.branches * dims.hidden
    width, merged = dims.vision_hidden, dims.vision_hidden * dims.vision_merge
    embedding = work.patches * width * dims.vision_patch
    block = work.patches * (4 * width**2 + 2 * width * dims.vision_intermediate) + 2 * work.patch_pairs * width
    mergers = dims.vision_mergers * work.patches // dims.vision_merge * (merged**2 + merged * dims.hidden)
    tower = dims.vision_depth * block + mergers
    vision = embedding + tower if dims.frozen_vision else 2 * embedding + 3 * tower
    return 2.0 * (3 * text + vision)


def rates(dims: Dimensions) -> Rates:
    """What one more of each costs, by `pack_cost`, which is a sum of these (and, of a discriminator, of its read-out
    rows, which are few)."""
    each = {"token": "tokens", "pair": "pairs", "predicted": "predicted", "patch_pair": "patch_pairs"}
    patch = pack_cost(Work(patches=dims.vision_merge), dims) / dims.vision_merge
    return Rates(patch=patch, **{rate: pack_cost(Work(**{work: 1}), dims) for rate, work in each.items()})


def deal(costs: Sequence[float], world: int) -> list[list[int]]:
    """Packs to ranks: ``turns[t][rank]`` is the pack that a rank computes in turn t, or SPARE, in the last turn alone.

    A turn's packs are of neighbouring cost, the costliest first, as ranks that shard gradients or weights wait for each
    other in every turn; within one, the costliest goes to the rank that has least so far, for those that wait only at
    the end of a step. Neither exceeds the mean of ranks by more than the costliest pack: not the sum over turns of the
    largest, nor the largest sum. In one process packs keep their order.

    >>> deal([1.0, 5.0, 4.0, 2.0, 2.0], 2)
    [[1, 2], [4, 3], [-1, 0]]

    Raises ValueError on costs that are negative or not finite, and on a world below 1.
    """
    _check("costs", costs, world)
    if world == 1:
        return [[i] for i in range(len(costs))]
    by_cost = sorted(range(len(costs)), key=lambda i: -costs[i])
    totals, turns = [0.0] * world, []
    for start in range(0, len(by_cost), world):
        turn = [SPARE] * world
        lightest = sorted(range(world), key=lambda rank: totals[rank])
        for rank, pack in zip(lightest, by_cost[start : start + world]):
            turn[rank] = pack
            totals[rank] += costs[pack]
        turns.append(turn)
    return turns


def deal_groups(costs: Sequence[float], samples: int, world: int) -> list[list[tuple[int, int, int]]]:
    """Prompts to the ranks that sample their responses: for each rank [(group, first sample, number of samples)].

    ``costs``: of each group what is known before its responses are, such as the prompt's tokens. As many groups as go
    evenly into the ranks stay whole, so that a prompt is read once; the cheapest ones left over are cut among all
    ranks. Numbers of samples differ by at most one between ranks. In one process groups keep their order.

    Four prompts of 16 responses on 8 ranks, and three prompts of 2 on 2:

    >>> deal_groups([9, 9, 9, 9], 16, 8)[:3]
    [[(0, 0, 8)], [(0, 8, 8)], [(1, 0, 8)]]
    >>> deal_groups([7, 5, 8], 2, 2)
    [[(1, 1, 1), (2, 0, 2)], [(0, 0, 2), (1, 0, 1)]]

    Raises ValueError as :func:`deal` does, and on samples below 1.
    """
    _check("costs", costs, world)
    if samples < 1:
        raise ValueError(f"samples: got {samples}, expected at least 1")
    by_cost = sorted(range(len(costs)), key=lambda i: -costs[i])
    whole = len(costs) // world * world
    dealt: list[list[tuple[int, int, int]]] = [[] for _ in range(world)]
    totals = [0.0] * world
    for turn in deal([costs[i] for i in by_cost[:whole]], world):
        for rank, place in enumerate(turn):
            dealt[rank].append((by_cost[place], 0, samples))
            totals[rank] += costs[by_cost[place]]
    rest, flat = sorted(by_cost[whole:]), (len(costs) - whole) * samples  # samples of the groups that are cut
    cuts = [flat * piece // world for piece in range(world + 1)]
    pieces = sorted(pairwise(cuts), key=lambda piece: piece[0] - piece[1])  # the largest to the lightest rank
    for rank, (start, end) in zip(sorted(range(world), key=lambda rank: totals[rank]), pieces):
        while start < end:
            group, first = divmod(start, samples)
            count = min(end - start, samples - first)
            dealt[rank].append((rest[group], first, count))
            start += count
    return [sorted(parts) for parts in dealt]


def _check(name: str, costs: Sequence[float], world: int) -> None:
    if world < 1:
        raise ValueError(f"world: got {world}, expected at least 1 process")
    bad = next((cost for cost in costs if not (cost >= 0 and math.isfinite(cost))), None)
    if bad is not None:
        raise ValueError(f"{name}: got {bad}, expected finite numbers of at least 0")
