"""Where caption, reasoning and answer of a response are, in tokens: ours beside the ways that decode it.

A response of T tokens, random words of a byte-level BPE that is trained on such, whose tags take several tokens each.
"decode prefixes" decodes all tokens up to each one until a closing tag is there; "decode, encode with offsets" decodes
once, searches the text, and encodes it again for the place of every token, which is right where the tokens come back.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from benchmarks.harness.op import Call, Contender, Op, Outputs, Problem, Shape, Tolerance
from prism_kernels import find_tag_spans

TAGS = ("caption", "think", "answer")
SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprst" for vowel in "aeiou"]
EXACT = {"span": Tolerance("max", 0.0, 0.0)}


@dataclass
class Response:
    tokenizer: Tokenizer
    ids: list[int]
    pieces: list[bytes]  # of every token


def problems(shape: Shape, device: torch.device) -> list[Problem]:
    held = response(shape["T"])
    ids, pieces = held.ids, held.pieces
    rows = [
        Contender("prism", lambda: lambda: _span(find_tag_spans(ids, pieces, TAGS)), "ours"),
        Contender("decode prefixes", lambda: _by_prefixes(held)),
        Contender("decode, encode with offsets", lambda: _by_offsets(held)),
    ]
    return [
        Problem("spans", "spans of a response's parts", shape, 0.0, 0.0, rows, lambda: _truth(held), EXACT,
                figures=())
    ]  # fmt: skip


@lru_cache(maxsize=1)
def _tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([_words(4000, seed) for seed in range(4)], trainer)
    return tokenizer


def _words(count: int, seed: int) -> str:
    draw = random.Random(seed)
    return " ".join("".join(draw.choices(SYLLABLES, k=draw.randint(1, 3))) for _ in range(count))


@lru_cache(maxsize=4)
def response(tokens: int) -> Response:
    """Of exactly so many tokens."""
    tokenizer = _tokenizer()
    ids = tokenizer.encode(_words(2 * tokens, 9)).ids
    opening, closing = ([tokenizer.encode(f"{s}{tag}>").ids for tag in TAGS] for s in ("<", "</"))
    room = tokens - sum(map(len, (*opening, *closing)))
    cuts = [0, room * 3 // 13, room - 4, room]
    found: list[int] = []
    for i, (start, end) in enumerate(zip(opening, closing)):
        found += [*start, *ids[cuts[i] : cuts[i + 1]], *end]
    # Bytes of a token: its characters stand for one each.
    table = {tokenizer.id_to_token(tokenizer.encode(chr(byte)).ids[0]): chr(byte) for byte in range(32, 127)}
    pieces = [
        "".join(table.get(letter, "?") for letter in tokenizer.id_to_token(index)).encode()
        for index in range(tokenizer.get_vocab_size())
    ]
    return Response(tokenizer, found, pieces)


def _span(spans: Sequence[tuple[int, int]] | None) -> Outputs:
    return {"span": torch.tensor([] if spans is None else spans, dtype=torch.float64)}


def _truth(held: Response) -> Outputs:
    """By asking of every token which bytes it holds."""
    pieces = [held.pieces[index] for index in held.ids]
    text, owner = b"".join(pieces), [i for i, piece in enumerate(pieces) for _ in piece]
    spans = [re.search(rf"<{tag}>.*</{tag}>".encode(), text, re.DOTALL).span() for tag in TAGS]
    return _span([(owner[first], owner[last - 1] + 1) for first, last in spans])


def _by_prefixes(held: Response) -> Call:
    def call() -> Outputs:
        spans, start = [], 0
        for tag in TAGS:
            end = start + 1
            while f"</{tag}>" not in held.tokenizer.decode(held.ids[start:end]):
                end += 1
            spans.append((start, end))
            start = end
        return _span(spans)

    return call


def _by_offsets(held: Response) -> Call:
    def call() -> Outputs:
        text = held.tokenizer.decode(held.ids)
        offsets = held.tokenizer.encode(text).offsets
        spans = []
        for tag in TAGS:
            first, last = re.search(f"<{tag}>.*?</{tag}>", text, re.DOTALL).span()
            spans.append((
                next(i for i, (_, end) in enumerate(offsets) if end > first),
                next(i for i, (_, end) in enumerate(offsets) if end >= last) + 1,
            ))  # fmt: skip
        return _span(spans)

    return call


def sweep(shape: Shape) -> list[Shape]:
    return [{**shape, "T": tokens} for tokens in (300, 600, 1200, 2400)]


LENGTHS = [{"T": 1200}, {"T": 6000}]
BENCH = Op(
    "spans", __doc__, problems, ("spans",), {"published": LENGTHS, "cpu": LENGTHS, "tiny": [{"T": 120}]}, {"T": 120},
    sweep,
)  # fmt: skip
