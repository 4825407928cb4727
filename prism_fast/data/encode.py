"""Records -> what a step trains on: their texts as tokens, each within its limit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from torch import Tensor

from prism_fast.config import DiscriminatorStep
from prism_fast.data.chat import Chat
from prism_fast.data.formats import Dataset
from prism_fast.records import DataError, Lesson, PairRecord, Prompt, Sample

T = TypeVar("T")
E = TypeVar("E", Prompt, PairRecord)

HELD_BYTES = 1 << 30  # pixels of encoded records that a set for evaluation keeps in memory

NO_RECORDS = "every record of the step is bad; no update was made"  # what a stage says of such a step


def encode_all(data: Dataset, picked: list[int], encode: Callable[[Sample], T]) -> list[T]:
    """``encode`` of the picked records; empty where all are bad. A bad one raises, or is counted where
    skip_bad_records allows it."""
    made = []
    for index in picked:
        try:
            made.append(encode(data[index]))
        except DataError as error:
            data.skip(index, error)
    return made


class Held(Sequence[E]):
    """The good records among ``picked``, at most ``limit`` of them, encoded to be used again and again.

    All are encoded once, to know which are bad. Those within HELD_BYTES stay; the others are encoded at every use: a
    pixel takes 24 bytes, and a whole set of them may be larger than the host's memory.
    """

    def __init__(self, data: Dataset, picked: Iterable[int], encode: Callable[[Sample], E], limit: int | None = None):
        self._data, self._encode = data, encode
        self.index: list[int] = []  # of the records in ``data``
        self._kept: list[E] = []
        room = HELD_BYTES
        for index in picked:
            if len(self.index) == limit:
                break
            for made in encode_all(data, [index], encode):
                prompt = made if isinstance(made, Prompt) else made.prompt
                room -= 0 if prompt.pixel_values is None else prompt.pixel_values.nbytes
                if room >= 0:
                    self._kept.append(made)
                self.index.append(index)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, number: int) -> E:
        number = range(len(self))[number]
        if number < len(self._kept):
            return self._kept[number]
        return self._encode(self._data[self.index[number]])


def question(sample: Sample, chat: Chat, *, max_prompt_tokens: int) -> tuple[Sample, Prompt]:
    """A record with its prompt, for a policy to answer."""
    return sample, chat.encode_prompt(sample, max_prompt_tokens)


def demonstration(sample: Sample, chat: Chat, *, max_prompt_tokens: int, max_tokens: int) -> tuple[Prompt, Tensor]:
    """(prompt, response tokens) of one sample. Raises DataError where it is too long."""
    prompt = chat.encode_prompt(sample, max_prompt_tokens)
    response = chat.encode_response(sample.response)
    if len(prompt) + len(response) > max_tokens:
        raise DataError(
            f"{sample.place}: {len(prompt) + len(response)} tokens are over max_tokens = {max_tokens}; "
            "raise it, or shorten the record"
        )
    return prompt, response


def pair_record(sample: Sample, chat: Chat, *, max_prompt_tokens: int, max_tokens: int) -> PairRecord:
    """Tokens of one record. Raises DataError where a part is too long: teacher and student have the same limit."""
    prompt = chat.encode_prompt(sample, max_prompt_tokens)

    def parts(voice: str) -> tuple[Tensor, Tensor]:
        encoded = []
        for part in ("caption", "reasoning"):
            ids = chat.encode_part(getattr(sample, f"{voice}_{part}"))
            if len(prompt) + len(ids) > max_tokens:
                raise DataError(
                    f"{sample.place}: {voice} {part}: {len(prompt) + len(ids)} tokens with the prompt are over "
                    f"max_tokens = {max_tokens}; raise it, or shorten the record"
                )
            encoded.append(ids)
        return encoded[0], encoded[1]

    return PairRecord(prompt, parts("teacher"), parts("student"))


def lesson(
    sample: Sample, chat: Chat, *, max_prompt_tokens: int, config: DiscriminatorStep, needs_gold: bool = False
) -> Lesson:
    """Tokens of a prompt and its teacher's parts. A teacher that does not fit is an error, never cut in silence; so is
    a record without an answer where ``needs_gold``."""
    if needs_gold and sample.gold is None:
        raise DataError(
            f"{sample.place}: reward_model.ground_truth: missing, the advantage's rule reads answers; "
            "add it, or take advantage.rule=align"
        )
    prompt = chat.encode_prompt(sample, max_prompt_tokens)
    teacher = []
    for name, text in (("teacher_caption", sample.teacher_caption), ("teacher_cot", sample.teacher_reasoning)):
        ids = chat.encode_part(text)[: config.compat.teacher_token_limit]
        if len(ids) > config.max_part_tokens:
            raise DataError(
                f"{sample.place}: {name}: {len(ids)} tokens, max_part_tokens is {config.max_part_tokens}; raise it"
            )
        teacher.append(ids)
    return Lesson(sample, prompt, (teacher[0], teacher[1]))
