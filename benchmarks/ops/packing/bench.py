"""Packing: a corpus of lengths, and a step's responses packed and dealt to ranks, beside what trainers do on the host.

"corpus": N prompts with a response each, log-normal around ``mean`` tokens, into packs of ``capacity``. "step":
``prompts`` prompts of ``root`` tokens with ``samples`` responses, packed by `prism_fast.pack` and dealt to ranks by
cost; the other way has no trees, so a sequence is a prompt and a response. Algorithms of others are written anew
(peers.py). "fill" is tokens over what the packs could hold, "over" the tokens by which the fullest pack exceeds the
capacity, "slowest rank" its cost (`prism_fast.balance.pack_cost`, of a 4B policy) over the mean of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.lengths import SIGMA, factors, scaled
from benchmarks.harness.op import Call, Contender, Op, Outputs, Problem, Shape, Tolerance
from benchmarks.ops.packing import peers
from prism_fast.balance import SPARE, Dimensions, Work, deal, pack_cost
from prism_fast.pack import KIND_RESPONSE, ImageTokens, Tree, pack
from prism_fast.records import Prompt
from prism_kernels import pack_trees

IMAGE = ImageTokens(token_id=1, merge_size=2)
QWEN3_VL_4B = Dimensions(
    hidden=2560, layers=36, heads=32, kv_heads=8, head_dim=128, intermediate=9728, experts=0, top_k=1, vocab=151_936,
    vision_hidden=1024, vision_depth=24, vision_intermediate=4096, vision_patch=1536, vision_merge=4, vision_mergers=4,
)  # fmt: skip
NO_MISTAKE = Tolerance("max", 0.0, 0.0)
# "tokens": of each item that are in a pack; "over": by which the fullest exceeds the capacity. Others may; it is told.
FIGURES = ("packs", "fill", "over")
TOLERANCES = {"tokens": NO_MISTAKE, "over": Tolerance("max", 0.0, float("inf"))}


@dataclass
class Packed:
    """What a contender made: of every pack [(item, tokens of it), ...] without the roots, and the packs' tokens."""

    parts: list[list[tuple[int, int]]]
    tokens: list[int]  # of every pack, roots and all
    ranks: list[list[int]] | None = None  # packs of each

    def outputs(self, items: int, capacity: int) -> Outputs:
        held = torch.zeros(items, dtype=torch.float64)
        flat = torch.tensor([part for pack in self.parts for part in pack], dtype=torch.float64).view(-1, 2)
        held.index_add_(0, flat[:, 0].long(), flat[:, 1])
        over = max(0, max(self.tokens) - capacity)
        return {"tokens": held, "over": torch.tensor(float(over), dtype=torch.float64)}

    def figures(self, capacity: int) -> dict[str, float]:
        filled = sum(self.tokens) / (len(self.tokens) * capacity)
        return {
            "packs": len(self.tokens),
            "tokens": sum(self.tokens),
            "fill": filled,
            "over": max(0, max(self.tokens) - capacity),
        }


def problems(shape: Shape, device: torch.device) -> list[Problem]:
    return [_corpus(shape), _step(shape)]


def _corpus(shape: Shape) -> Problem:
    random, capacity = torch.Generator().manual_seed(0), shape["capacity"]
    lengths = [min(capacity, scaled(shape["mean"], f) + 1) for f in factors(shape["N"], shape["sigma"], random)]
    trees = [(length // 2, [length - length // 2]) for length in lengths]

    def of_items(packs: Sequence[Sequence[int]]) -> Packed:
        return Packed([[(i, lengths[i]) for i in p] for p in packs], [sum(lengths[i] for i in p) for p in packs])

    def of_trees(packs: Any) -> Packed:
        return of_items([[tree for tree, _ in p] for p in packs])

    def cut(packs: Sequence[Sequence[tuple[int, int]]]) -> Packed:
        return Packed([list(p) for p in packs], [sum(taken for _, taken in p) for p in packs])

    bfd, knapsack = (partial(peers.in_blocks, way) for way in (peers.best_fit_decreasing, peers.greedy_knapsack))
    rows = [
        _row("prism", lambda: pack_trees(trees, capacity), of_trees, len(lengths), capacity, "ours"),
        _row("TRL, wrapped (cuts items)", lambda: peers.wrapped(lengths, capacity), cut, len(lengths), capacity),
        _row("TRL, bfd", lambda: bfd(lengths, capacity), of_items, len(lengths), capacity),
        _row("LLaMA-Factory, knapsack", lambda: knapsack(lengths, capacity), of_items, len(lengths), capacity),
    ]
    truth = {"tokens": torch.tensor(lengths, dtype=torch.float64), "over": torch.zeros((), dtype=torch.float64)}
    title = "packing a corpus; others by blocks of 1,000, as they are called"
    return Problem(
        "corpus", title, shape, 0.0, 0.0, rows, lambda: truth, TOLERANCES, figures=FIGURES,
        sizes=("N", "mean", "sigma", "capacity"),
    )  # fmt: skip


@dataclass
class Batch:
    """Responses of a step: prompts of ``root`` tokens with ``samples`` each."""

    trees: list[Tree]
    root: int
    lengths: list[int]  # of the responses, in order

    @classmethod
    def random(cls, shape: Shape) -> Batch:
        random, samples = torch.Generator().manual_seed(0), shape["samples"]
        count, longest = shape["prompts"] * samples, shape["step_capacity"] - shape["root"]
        lengths = [min(longest, scaled(shape["response"], f)) for f in factors(count, SIGMA, random)]
        prompt = Prompt(torch.full((shape["root"],), 5), None, None)
        branches = [torch.full((length,), 7) for length in lengths]
        trees = [
            Tree(prompt, branches[i : i + samples], [KIND_RESPONSE] * samples, range(i, i + samples))
            for i in range(0, count, samples)
        ]
        return cls(trees, shape["root"], lengths)


def _step(shape: Shape) -> Problem:
    batch, capacity, ranks = Batch.random(shape), shape["step_capacity"], shape["ranks"]
    whole = [batch.root + length for length in batch.lengths]

    def ours() -> Any:
        packs = pack(batch.trees, capacity, IMAGE, multiple=ranks)
        return packs, deal([pack_cost(work, QWEN3_VL_4B) for work in Work.of_packs(packs)], ranks)

    def of_ours(made: Any) -> Packed:
        packs, turns = made
        labels = [packs.labels(i).tolist() for i in range(len(packs))]
        parts = [[(i, batch.lengths[i]) for i in label] for label in labels]
        dealt = [[turn[rank] for turn in turns if turn[rank] != SPARE] for rank in range(ranks)]
        return Packed(parts, [packs.tokens(i) for i in range(len(packs))], dealt)

    def of_verl(made: Any) -> Packed:
        flat = [items for rank in made for items in rank]
        dealt, first = [], 0
        for rank in made:
            dealt.append(list(range(first, first + len(rank))))
            first += len(rank)
        return Packed(
            [[(i, batch.lengths[i]) for i in p] for p in flat], [sum(whole[i] for i in p) for p in flat], dealt
        )

    def our_costs(made: Any) -> list[float]:
        return [pack_cost(work, QWEN3_VL_4B) for work in Work.of_packs(made[0])]

    def verl_costs(made: Any) -> list[float]:
        works = [Work.of_tree(batch.root, [length]) for length in batch.lengths]
        return [pack_cost(sum((works[i] for i in items), Work()), QWEN3_VL_4B) for rank in made for items in rank]

    rows = [
        _row("prism", ours, of_ours, len(batch.lengths), capacity, "ours", our_costs),
        _row(
            "verl, Karmarkar-Karp", lambda: peers.micro_batches(whole, capacity, ranks), of_verl, len(batch.lengths),
            capacity, "peer", verl_costs,
        ),
    ]  # fmt: skip
    truth = {"tokens": torch.tensor(batch.lengths, dtype=torch.float64), "over": torch.zeros((), dtype=torch.float64)}
    title = "packing a step's responses and dealing them to ranks"
    return Problem(
        "step", title, shape, 0.0, 0.0, rows, lambda: truth, TOLERANCES, figures=("tokens", *FIGURES, "slowest rank"),
        sizes=("prompts", "samples", "root", "response", "step_capacity", "ranks"),
    )  # fmt: skip


def _row(
    name: str, make: Any, packed: Any, items: int, capacity: int, role: str = "peer", costs: Any = None
) -> Contender:
    """``packed(made)``: what ``make()`` gave, as `Packed`; ``costs(made)``: of its packs."""

    def figures() -> dict[str, float]:
        made = make()
        found = packed(made)
        told = found.figures(capacity)
        if costs is not None:
            by_rank = [sum(costs(made)[i] for i in share) for share in found.ranks]
            told["slowest rank"] = max(by_rank) * len(by_rank) / sum(by_rank)
        return told

    def prepare() -> Call:
        return lambda: {"made": make()}

    def compared(outputs: dict[str, Any]) -> dict[str, Tensor]:
        return packed(outputs["made"]).outputs(items, capacity)

    return Contender(name, prepare, role, extra=figures, compared=compared)


CPU = {
    "N": 1_370_000, "mean": 800, "sigma": 0.8, "capacity": 8192, "prompts": 32, "samples": 16, "root": 1000,
    "response": 1300, "step_capacity": 24_576, "ranks": 8,
}  # fmt: skip
TINY = {"N": 3000, "prompts": 4, "samples": 4, "root": 100, "response": 130, "step_capacity": 1024, "ranks": 2}


def sweep(shape: Shape) -> list[Shape]:
    return [{**shape, "N": n} for n in (10_000, 100_000, 1_000_000)]


BENCH = Op(
    "pack", __doc__, problems, ("corpus", "step"),
    {"published": [CPU], "cpu": [CPU], "tiny": [{**CPU, **TINY}]}, TINY, sweep,
)  # fmt: skip
