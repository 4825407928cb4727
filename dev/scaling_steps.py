"""Alignment steps on so many ranks, simulated from lengths: what docs/scaling.md shows (dev/scaling.py).

Packs are those of `prism_kernels.pack_trees`, dealt by `prism_fast.balance`, and cost what its formula says.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from prism_fast.balance import SPARE, Dimensions, Work, deal, deal_groups, pack_cost, rates
from prism_fast.data.chat import Chat
from prism_fast.data.formats import read_align, read_sft
from prism_fast.demo.digits import DemoSizes, write_demo_data
from prism_fast.demo.tiny import MERGE, PATCH, image_processor, tiny_config, train_tokenizer
from prism_fast.models.upcycle import moe_config
from prism_fast.response_format import split_parts
from prism_kernels import pack_trees
from prism_kernels.packing.arguments import PackCost

# Qwen3-VL-4B-Instruct, and a mixture of four experts out of Qwen3-VL-2B-Instruct.
POLICY = Dimensions(
    hidden=2560, layers=36, heads=32, kv_heads=8, head_dim=128, intermediate=9728, experts=0, top_k=1, vocab=151_936,
    vision_hidden=1024, vision_depth=24, vision_intermediate=4096, vision_patch=1536, vision_merge=4, vision_mergers=4,
)  # fmt: skip
DISCRIMINATOR = replace(POLICY, hidden=2048, layers=28, heads=16, intermediate=6144, experts=4, top_k=2, vocab=0)


class Group(NamedTuple):
    """A prompt and its responses, by their lengths in tokens: (caption, reasoning) of the teacher and of students."""

    prompt: int
    images: tuple[int, ...]  # patches
    teacher: tuple[int, int]
    students: list[tuple[int, int]]


@dataclass(frozen=True)
class Corpus:
    name: str
    policy: Dimensions
    discriminator: Dimensions
    tokens_per_pack: int
    samples: int  # responses per prompt
    prompts: tuple[int, ...]  # per step, the first as in the recipe
    draw: Callable[[np.random.Generator, int], Group]

    def batches(self, prompts: int, steps: int) -> list[list[Group]]:
        rng = np.random.default_rng([2026, prompts])
        return [[self.draw(rng, self.samples) for _ in range(prompts)] for _ in range(steps)]


# ---- lengths


def demo_corpus(records: int = 512) -> Corpus:
    """The demo's own: prompts and teachers of its alignment file, students as the demonstrations of its SFT file."""
    with tempfile.TemporaryDirectory() as folder:
        files = write_demo_data(folder, 0, DemoSizes(sft=records, align=records, rlvr=1, eval=1))
        texts = list(read_sft(files.sft))
        words = [text for sample in texts for text in (*(m.content for m in sample.messages), sample.response)]
        chat = Chat(train_tokenizer(words), image_processor(min_pixels=(PATCH * MERGE) ** 2, max_pixels=64 * 64))
        lessons = []
        for sample in read_align(files.align):
            prompt = chat.encode_prompt(sample)
            parts = sample.teacher_caption, sample.teacher_reasoning
            images = tuple(prompt.image_grid_thw.prod(-1).tolist())
            lessons.append((len(prompt), images, tuple(len(chat.encode_part(part)) for part in parts)))
        voices = [split_parts(sample.response) for sample in texts]
        students = [(len(chat.encode_part(v.caption)), len(chat.encode_part(v.reasoning))) for v in voices]

    def draw(rng: np.random.Generator, samples: int) -> Group:
        lesson = lessons[rng.integers(len(lessons))]
        return Group(*lesson, [students[i] for i in rng.integers(len(students), size=samples)])

    config = tiny_config(chat.tokenizer)
    experts = Dimensions.of(moe_config(config, 4, 2))
    return Corpus("demo", Dimensions.of(config), experts, 4096, 8, (8, 64, 512, 4096), draw)


def log_normal_corpus() -> Corpus:
    """The published job's limits; docs/scaling.md has the parameters. Medians in tokens, sigmas of logarithms."""

    def length(rng: np.random.Generator, median: float, sigma: float, low: int, high: int) -> int:
        return int(np.clip(round(median * math.exp(rng.normal(0, sigma))), low, high))

    def response(rng: np.random.Generator, median: float) -> tuple[int, int]:
        total, share = length(rng, median, 0.6, 64, 6143), rng.uniform(0.15, 0.35)
        return round(total * share), total - round(total * share)

    def draw(rng: np.random.Generator, samples: int) -> Group:
        images = tuple(4 * length(rng, 500, 0.5, 64, 900) for _ in range(rng.choice((1, 2), p=(0.8, 0.2))))
        prompt = min(2048, length(rng, 120, 0.6, 20, 240) + sum(images) // 4)
        median = 1500 * math.exp(rng.normal(0, 0.5))  # a hard prompt has longer responses, all of them
        return Group(prompt, images, response(rng, median), [response(rng, median) for _ in range(samples)])

    prompts = (4, 16, 64, 256, 1024, 4096)
    return Corpus("log-normal", POLICY, DISCRIMINATOR, 24_576, 16, prompts, draw)


# ---- one step on so many ranks


Packs = list[list[tuple[int, list[int]]]]


@dataclass(frozen=True)
class Job:
    """One model's part of a step: trees, and what their packs cost."""

    dims: Dimensions
    trees: list[tuple[int, list[int]]]
    images: list[tuple[int, ...]]
    tokens_per_pack: int
    together: tuple[int, ...]

    @classmethod
    def of(cls, batch: Sequence[Group], corpus: Corpus, judge: bool) -> Job:
        images = [group.images for group in batch]
        if judge:
            trees = [(g.prompt, [*g.teacher, *(length for pair in g.students for length in pair)]) for g in batch]
            return cls(corpus.discriminator, trees, images, corpus.tokens_per_pack, (0, 1))
        trees = [(g.prompt, [sum(pair) + 1 for pair in g.students]) for g in batch]
        return cls(corpus.policy, trees, images, corpus.tokens_per_pack, ())

    def costs(self, ranks: int | None = None, *, even: bool = True) -> list[float]:
        """Of as few packs as fit; with ``ranks``, of as many as go evenly into them, where ``even`` of even cost."""
        more: dict[str, Any] = {}
        if ranks is not None:
            more = {"num_packs_multiple": ranks, "split_for_multiple": True}
            if even:
                each = rates(self.dims)
                seen = [each.images(images) for images in self.images]
                more["cost"] = PackCost(each.token, each.pair, seen, each.predicted)
        packs: Packs = pack_trees(self.trees, self.tokens_per_pack, together=[self.together] * len(self.trees), **more)
        return [sum(pack_cost(self._work(*part), self.dims) for part in pack) for pack in packs if pack]

    def _work(self, tree: int, chosen: Sequence[int]) -> Work:
        root, branches = self.trees[tree]
        return Work.of_tree(root, [branches[b] for b in chosen], self.images[tree])


@dataclass
class Case:
    """Sums over steps of one batch size on so many ranks. Costs are of both models together."""

    ranks: int
    alone: float = 0.0  # one process, which repeats no more roots than it must
    slowest: float = 0.0  # the slowest rank, where ranks wait for each other once a step
    turns: float = 0.0  # where they wait in every turn: the slowest rank's of each
    sampled: float = 0.0  # tokens, all ranks
    most: float = 0.0  # of the rank that samples most
    most_spread: float = 0.0  # the same, if every prompt's responses were spread over the ranks
    packs: tuple[float, float] = (0.0, 0.0)  # turns a step: policy, discriminator

    @property
    def apart(self) -> float:
        """Share of the ranks' time in which they do what one process would do: all-reduce, ZeRO 1."""
        return self.alone / self.ranks / self.slowest

    @property
    def in_step(self) -> float:
        """The same, of ranks that wait in every turn: ZeRO 2 and 3, FSDP2."""
        return self.alone / self.ranks / self.turns

    @property
    def sampling(self) -> float:
        """Mean over max of sampled tokens."""
        return self.sampled / self.ranks / self.most

    @property
    def spread(self) -> float:
        return self.sampled / self.ranks / self.most_spread

    def add(self, fewest: Sequence[float], taken: Sequence[float], judge: bool, steps: int) -> None:
        turns = [[0.0 if i == SPARE else taken[i] for i in turn] for turn in deal(taken, self.ranks)]
        self.alone += sum(fewest)
        self.slowest += max(map(sum, zip(*turns)))
        self.turns += sum(map(max, turns))
        more = len(turns) / steps
        self.packs = (self.packs[0], self.packs[1] + more) if judge else (self.packs[0] + more, self.packs[1])

    def sample(self, batch: Sequence[Group]) -> None:
        tokens = np.array([[sum(pair) + 1 for pair in group.students] for group in batch])
        dealt = deal_groups([group.prompt for group in batch], tokens.shape[1], self.ranks)
        held = [sum(int(tokens[g, first : first + n].sum()) for g, first, n in parts) for parts in dealt]
        self.sampled += int(tokens.sum())
        self.most += max(held)
        self.most_spread += max(int(tokens.reshape(-1)[rank :: self.ranks].sum()) for rank in range(self.ranks))


Cases = dict[tuple[str, int, int, bool], Case]  # by corpus, prompts per step, ranks, split


def simulate(corpora: Sequence[Corpus], ranks: Sequence[int], steps: int) -> Cases:
    """``split``: as many packs as go evenly into the ranks, else as few as fit. Fewer steps of large batches."""
    cases: Cases = {}
    for corpus in corpora:
        for prompts in corpus.prompts:
            batches = corpus.batches(prompts, max(2, min(steps, 1024 // prompts)))
            here = {(n, split): Case(n) for n in ranks for split in (True, False)}
            for batch in batches:
                for judge in (False, True):
                    job = Job.of(batch, corpus, judge)
                    fewest = job.costs()
                    for (n, split), case in here.items():
                        case.add(fewest, job.costs(n) if split else fewest, judge, len(batches))
                for case in here.values():
                    case.sample(batch)
            cases |= {(corpus.name, prompts, *key): case for key, case in here.items()}
    return cases
