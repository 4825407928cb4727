"""What packing saves, and how even it leaves the ranks: counted by `prism_fast.balance`, and one ratio of CPU seconds.

    python -m dev.pack_savings [--seconds]

Samples: a step of the demo's SFT, and steps of the same questions in which several are about one picture. Before: every
prompt is a root, and every image of a pack is computed. After: as the stages pack. `--seconds` runs both steps of the
demo's tiny policy in turns, and gives the ratio of their CPU seconds.

Ranks: alignment's two models and SFT on the lengths of `dev.scaling_steps`, packs as few as go evenly into the ranks;
before without, after with the costs of packs.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import Qwen3VLForConditionalGeneration

from dev.scaling_steps import POLICY, Corpus, Group, Job, demo_corpus, log_normal_corpus
from prism_fast.balance import SPARE, Dimensions, Work, deal, pack_cost
from prism_fast.data.chat import Chat
from prism_fast.data.encode import demonstration
from prism_fast.data.formats import read_sft
from prism_fast.demo.digits import DemoSizes, write_demo_data
from prism_fast.demo.tiny import MERGE, PATCH, image_processor, tiny_config, train_tokenizer
from prism_fast.models.policy import Policy
from prism_fast.pack import KIND_RESPONSE, ImageTokens, Packs, Tree, merge_prompts, pack
from prism_fast.records import Prompt
from prism_fast.steps.sft_step import demonstration_trees, supervised_gradient
from prism_fast.steps.update import Backprop

STEP = 64  # records, as the demo's SFT
ROUNDS = 5
IMAGE = ImageTokens(0, 2)  # of lengths without a model
Demonstrations = list[tuple[Prompt, Tensor]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", action="store_true", help="run the steps too")
    seconds = parser.parse_args().seconds
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        policy, steps = demonstrations(Path(folder))
        print("| a step of 64 | tokens | patches | GFLOP |" + (" CPU seconds |" if seconds else ""))
        print("|---|---|---|---|" + ("---|" if seconds else ""))
        for name, step in steps.items():
            both = both_ways(step, policy.image, 4096)
            row = saved(both, policy.dimensions)
            print("| " + " | ".join([name, *row, *([f"{ratio(policy, both):.2f}"] if seconds else [])]) + " |")
    for pictures in (64, 32, 16):
        row = saved(both_ways(published(pictures), IMAGE, 24_576), POLICY)
        print(f"| 4B, {pictures} pictures | " + " | ".join(row) + (" | |" if seconds else " |"))
    print("\n| slowest rank over the mean | before: 2, 4, 8 ranks | after |\n|---|---|---|")
    for corpus in (demo_corpus(), log_normal_corpus()):
        for name, made in JOBS.items():
            print(
                f"| {corpus.name}, {name} | " + " | ".join(spread(corpus, made, even) for even in (False, True)) + " |"
            )


def demonstrations(folder: Path) -> tuple[Policy, dict[str, Demonstrations]]:
    """The demo's tiny policy, and steps of its samples."""
    samples = list(read_sft(write_demo_data(folder, 0, DemoSizes(sft=128, align=1, rlvr=1, eval=1)).sft))
    words = [text for s in samples for text in (*(m.content for m in s.messages), s.response)]
    chat = Chat(train_tokenizer(words), image_processor(min_pixels=(PATCH * MERGE) ** 2, max_pixels=64 * 64))
    policy = Policy(Qwen3VLForConditionalGeneration(tiny_config(chat.tokenizer)))

    def step(pictures: int, turned: bool = False) -> Demonstrations:
        """``pictures`` of them in a step; ``turned``: half of the questions stand before the picture."""
        made = []
        for i, sample in enumerate(samples[:STEP]):
            messages = list(sample.messages)
            if turned and i % 2:
                *first, last = messages
                messages = [*first, replace(last, content=last.content.replace("<image>", "") + f" ({i})<image>")]
            own = replace(sample, images=samples[i % pictures].images, messages=tuple(messages))
            made.append(demonstration(own, chat, max_prompt_tokens=4096, max_tokens=4096))
        return made

    return policy, {
        "the demo's own": step(STEP),
        "32 pictures": step(32),
        "16 pictures": step(16),
        "4 pictures": step(4),
        "16 pictures, half of them behind the question": step(16, turned=True),
    }


def published(pictures: int) -> Demonstrations:
    """Lengths as a 4B policy's: pictures of 812 tokens, questions and responses log-normal around 60 and 400."""
    rng, grid = np.random.default_rng(pictures), torch.tensor([[1, 56, 58]])
    made = []
    for i in range(STEP):
        question, response = (int(n) for n in (60, 400) * np.exp(rng.normal(0, (0.5, 0.6))))
        words = torch.from_numpy(rng.integers(2, 1000, question))
        ids = torch.cat([torch.full((24,), 1), torch.full((812,), IMAGE.token_id), words])
        key = bytes([i % pictures])
        prompt = Prompt(ids, None, grid, key + ids.numpy().tobytes(), image_keys=(key,))
        made.append((prompt, torch.ones(response, dtype=torch.int64)))
    return made


def both_ways(step: Demonstrations, image: ImageTokens, capacity: int) -> tuple[Packs, Packs]:
    """Equal prompts are one root, and nothing else is shared; and as SFT packs."""
    after = pack(demonstration_trees(step), capacity, image, share=True)
    distinct, which = merge_prompts([prompt for prompt, _ in step])
    of = [[ids for (_, ids), own in zip(step, which) if own == number] for number in range(len(distinct))]
    trees = [Tree(replace(p, image_keys=()), ids, [KIND_RESPONSE] * len(ids)) for p, ids in zip(distinct, of)]
    return pack(trees, capacity, image), after


def saved(both: Sequence[Packs], dims: Dimensions) -> list[str]:
    """Tokens, patches and operations before and after."""
    before, after = (weighed(packs, dims) for packs in both)
    return [f"{a / n:,.0f} to {b / n:,.0f} ({b / a:.2f})" for a, b, n in zip(before, after, (1, 1, 1e9))]


def weighed(packs: Packs, dims: Dimensions) -> tuple[float, float, float]:
    """Tokens, patches, operations of a step."""
    works = Work.of_packs(packs)
    return (
        sum(w.tokens for w in works),
        sum(w.patches for w in works),
        sum(pack_cost(w, dims) for w in works),
    )


def ratio(policy: Policy, both: Sequence[Packs]) -> float:
    """CPU seconds of the second step's gradient over the first's, in turns."""
    updater = Backprop(policy)
    taken: list[list[float]] = [[], []]
    for number in range(ROUNDS + 1):
        for packs, seconds in zip(both, taken):
            start = time.process_time()
            supervised_gradient(updater, packs)
            if number:  # the first warms up
                seconds.append(time.process_time() - start)
    return statistics.median(taken[1]) / statistics.median(taken[0])


# ---- ranks


def sft(batch: Sequence[Group], corpus: Corpus) -> Job:
    """Every prompt with one response."""
    trees = [(g.prompt, [sum(g.students[0]) + 1]) for g in batch]
    return Job(corpus.policy, trees, [g.images for g in batch], corpus.tokens_per_pack, ())


JOBS: dict[str, tuple[int, Callable[[Sequence[Group], Corpus], Job]]] = {
    "SFT, 64 a step": (64, sft),
    "SFT, 256 a step": (256, sft),
    "policy, 8 prompts": (8, lambda batch, corpus: Job.of(batch, corpus, False)),
    "discriminator, 8 prompts": (8, lambda batch, corpus: Job.of(batch, corpus, True)),
}


def spread(corpus: Corpus, made: tuple[int, Callable[[Sequence[Group], Corpus], Job]], even: bool) -> str:
    """Means over 20 steps: where ranks wait at the end of a step, and (in brackets) where they wait in every turn."""
    prompts, job = made
    shown = []
    for ranks in (2, 4, 8):
        found = []
        for batch in corpus.batches(prompts, 20):
            costs = job(batch, corpus).costs(ranks, even=even)
            turns = [[0.0 if i == SPARE else costs[i] for i in turn] for turn in deal(costs, ranks)]
            mean = sum(costs) / ranks
            found.append((max(map(sum, zip(*turns))) / mean, sum(map(max, turns)) / mean))
        end, turn = np.mean(found, axis=0)
        shown.append(f"{end:.3f} ({turn:.3f})")
    return ", ".join(shown)


if __name__ == "__main__":
    main()
