"""What a whole step of a stage works on: random models and made-up records, of a recipe's dimensions and lengths.

The records are a step's own: an image as a file's bytes, text, a teacher's response, a gold answer. Responses are what
the sampler samples, and end where it samples the end of turn, which is favoured so that they have the mean length that
is asked for. Nobody could judge what a random model says: for the judge and the discriminator each response stands for
a text of the same length in the response format, every second one with the right answer.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2VLImageProcessorPil

from benchmarks.harness.lengths import SIGMA, factors, scaled
from benchmarks.steps.case import MERGE, PATCH, TEMPORAL, Shape, stock_model
from prism_fast.config import Sampling
from prism_fast.data.chat import Chat
from prism_fast.demo.tiny import train_tokenizer
from prism_fast.models.discriminator import Discriminator
from prism_fast.models.policy import Policy
from prism_fast.pack import KIND_RESPONSE, Tree, pack
from prism_fast.records import ImageRef, Message, Prompt, Rollout, Sample
from prism_fast.steps.sampler import Sampler

SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprst" for vowel in "aeiou"]  # a token each
CAPTION = 3 / 13  # of a response's tokens: 300 of 1,300
RIGHT, WRONG = "7", "8"


@dataclass(frozen=True)
class Load:
    """One step. Of ``policy`` and ``judge`` the dimensions are read, and of the policy's the lengths: an image and a
    prompt, samples a prompt ("responses"), and caption and reasoning together as the mean of a response."""

    policy: Shape
    judge: Shape
    prompts: int
    longest: int  # tokens of a response
    tokens_per_pack: int

    @property
    def mean(self) -> int:
        return self.policy.caption + self.policy.reasoning

    @property
    def responses(self) -> int:
        return self.prompts * self.policy.responses


def make_chat(load: Load) -> Chat:
    """A tokenizer with as many words as the model's embedding has rows, less a few, as Qwen's."""
    text = " ".join(["", *SYLLABLES])
    small = train_tokenizer([f"<caption>{text}</caption><think>{text}</think><answer>{RIGHT}{WRONG}</answer>"] * 9)
    state, words = json.loads(small.backend_tokenizer.to_str()), load.policy.vocab - load.policy.vocab // 500
    state["model"]["vocab"] |= {f"word{number}": number for number in range(len(small), words)}  # that nothing makes
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token=small.eos_token, pad_token=small.pad_token,
        chat_template=small.chat_template, clean_up_tokenization_spaces=False,
    )  # fmt: skip
    pixels = load.policy.grid[0] * load.policy.grid[1] * PATCH**2
    processor = Qwen2VLImageProcessorPil(
        patch_size=PATCH, merge_size=MERGE, temporal_patch_size=TEMPORAL,
        size={"shortest_edge": pixels // 4, "longest_edge": pixels},
    )  # fmt: skip
    return Chat(tokenizer, processor)


def text_of(tokens: int, answer: str, number: int = 0) -> str:
    """A response in its format, of about so many tokens; another ``number`` says something else."""
    words = [SYLLABLES[(number + i) % len(SYLLABLES)] for i in range(tokens)]
    cut = int(CAPTION * tokens)
    caption, reasoning = (" ".join(["", *part]) for part in (words[:cut], words[cut:]))
    return f"<caption>{caption}</caption><think>{reasoning}</think><answer>{answer}</answer>"


def make_samples(load: Load, chat: Chat) -> list[Sample]:
    """A record a prompt: its image, and text up to the prompt's length."""
    shape, random = load.policy, np.random.default_rng(0)
    rows, columns = (side * PATCH for side in shape.grid)
    found: list[Sample] = []
    for number in range(load.prompts):
        file = io.BytesIO()
        Image.fromarray(random.integers(0, 256, (rows, columns, 3), dtype=np.uint8)).save(file, "PNG")
        teacher = text_of(load.mean, RIGHT)
        caption, _, reasoning = teacher.partition("</caption>")
        sample = Sample(
            place=f"benchmark:{number}", messages=(Message("user", "<image>"),),
            images=(ImageRef(data=file.getvalue()),), response=teacher, gold=RIGHT,
            teacher_caption=f"{caption}</caption>", teacher_reasoning=reasoning,
        )  # fmt: skip
        words = [
            SYLLABLES[(number + i) % len(SYLLABLES)] for i in range(shape.prompt - len(chat.encode_prompt(sample)))
        ]
        found.append(replace(sample, messages=(Message("user", " ".join(["<image>", *words])),)))
    return found


def make_models(
    load: Load, chat: Chat, dtype: torch.dtype, device: torch.device, *, judged: bool, checkpointing: bool
) -> tuple[Policy, Discriminator | None]:
    ids = {"image_token_id": chat.image_id, "video_token_id": chat.video_id}
    ids |= {"vision_start_token_id": chat.vision_start_id, "vision_end_token_id": chat.vision_end_id}
    policy = Policy(stock_model(load.policy, dtype, device, 0, **ids), chat.forbidden_ids, chat.vocab_size).train()
    judge = None
    if judged:
        judge = Discriminator(stock_model(load.judge, dtype, device, 1, **ids), torch.randn(load.judge.hidden)).train()
    for model in (policy, judge) if checkpointing else ():
        if model is not None:
            model.checkpoint_activations()
    return policy, judge


@torch.no_grad()
def favour_the_end(policy: Policy, chat: Chat, prompt: Prompt, load: Load) -> None:
    """From now on a response ends after ``load.mean`` tokens on average: the end of turn has 1 / mean.

    One number of the hidden state is made a constant, which no layer writes: through it the head's row of the end of
    turn, an embedding too, has a logit of its own, and all others the same.
    """
    ends = torch.full((64,), chat.end_of_turn_id)
    (packed,) = pack([Tree(prompt, [ends], [KIND_RESPONSE])], load.tokens_per_pack, policy.image)
    embedding = policy.text.embed_tokens.weight
    embedding[:, 0] = 1.0
    for layer in policy.text.layers:
        layer.self_attn.o_proj.weight[0] = layer.mlp.down_proj.weight[0] = 0.0
    words = torch.randint(chat.vocab_size, (len(ends),), generator=torch.Generator().manual_seed(0))
    packed.input_ids[-len(ends) :] = words.where(words != chat.image_id, 0)  # what a random model says
    packed = packed.to(policy.device)
    hidden = policy(packed)[packed.predict_row].float()
    logits = hidden @ policy.head.float().T
    own = logits[:, chat.end_of_turn_id] - hidden[:, 0] * embedding[chat.end_of_turn_id, 0]
    logits[:, chat.end_of_turn_id] = float("-inf")
    others = logits.logsumexp(-1)
    low, high = -1e3, 1e3
    for _ in range(60):
        middle = (low + high) / 2
        share = (own + middle * hidden[:, 0] - others).sigmoid().mean()
        low, high = (middle, high) if share * load.mean < 1 else (low, middle)
    embedding[chat.end_of_turn_id, 0] = low


class Spoken:
    """A sampler whose responses stand for texts in the response format."""

    def __init__(self, sampler: Sampler):
        self.sampler = sampler

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, *, seed: int) -> Rollout:
        rollout = self.sampler.generate(prompts, sampling, seed=seed)
        texts = [text_of(len(ids), (RIGHT, WRONG)[i % 2], i + 1) for i, ids in enumerate(rollout.response_ids)]
        return replace(rollout, text=texts)


def lengths(rollout: Rollout, group: int, kept: Tensor | None = None) -> list[int]:
    """Of the responses to a prompt; ``kept`` (B,): only of these."""
    rows = (rollout.group == group).nonzero().flatten().tolist()
    return [len(rollout.response_ids[i]) for i in rows if kept is None or bool(kept[i])]


def part_lengths(parts: Sequence[Any], teacher: tuple[Tensor, Tensor]) -> list[int]:
    """Of the branches of one prompt's tree in the discriminator: the teacher's parts, then those of valid responses."""
    found = [len(ids) for ids in teacher]
    return found + [len(ids) for pair in parts if pair is not None for ids in pair]


def cut_unevenly(demonstrations: Sequence[tuple[Prompt, Tensor]], load: Load, seed: int) -> list[tuple[Prompt, Tensor]]:
    """Of every demonstration as many as a prompt has samples, of log-normal lengths."""
    random, found = torch.Generator().manual_seed(seed), []
    for prompt, ids in demonstrations:
        for factor in factors(load.policy.responses, SIGMA, random):
            length = min(scaled(load.mean, factor), load.longest)
            found.append((prompt, ids.repeat(-(-length // len(ids)))[:length]))
    return found
