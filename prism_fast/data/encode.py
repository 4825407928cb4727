"""Records -> what a step trains on: their texts as tokens, each within its limit."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from torch import Tensor

from prism_fast import ranks
from prism_fast.config import DiscriminatorStep
from prism_fast.data.chat import Chat
from prism_fast.data.formats import Dataset
from prism_fast.data.wire import from_bytes, to_bytes
from prism_fast.records import DataError, Lesson, PairRecord, Prompt, Sample, Seen

T = TypeVar("T")
E = TypeVar("E", Prompt, PairRecord)

HELD_BYTES = 1 << 30  # pixels of encoded records that a set for evaluation keeps in memory

NO_RECORDS = "every record of the step is bad; no update was made"  # what a stage says of such a step


def encoded(
    data: Dataset, picked: Sequence[int], encode: Callable[[Sample], T], take: Callable[[int], T] | None = None
) -> list[tuple[int, T]]:
    """(index, what it was encoded to) of the good records among those picked. A bad one raises, or is counted where
    skip_bad_records allows it. ``take(i)``: gives what picked[i] was encoded to, where somebody else does it.

    Several processes encode a part of the records each, and tell the others all but pixels, and faults: who then needs
    an image reads its record and decodes it (`Prompt.pixels`). Questions and lessons hold their record, whose images a
    reward may look at: of these, sizes and keys of images are told, and the others read and tokenise them.
    """
    take = take or (lambda i: encode(data[picked[i]]))
    if ranks.world() > 1:
        return _encoded_apart(data, picked, encode, take)
    made = []
    for i, index in enumerate(picked):
        try:
            made.append((index, take(i)))
        except DataError as error:
            data.skip(index, error)
    return made


def _encoded_apart(
    data: Dataset, picked: Sequence[int], encode: Callable[[Sample], T], take: Callable[[int], T]
) -> list[tuple[int, T]]:
    mine: dict[int, T] = {}
    told: dict[int, Any] = {}  # by position: a fault, or what `_told` says
    for position in own_positions(picked):
        try:
            mine[position] = take(position)
            told[position] = _told(mine[position])
        except DataError as error:
            told[position] = str(error)
    found = {int(position): what for part in ranks.gather(told) for position, what in part.items()}
    made = []
    for position, index in enumerate(picked):
        what = found[position]
        if isinstance(what, str):
            data.skip(index, DataError(what))
        elif position in mine:
            made.append((index, mine[position]))
        elif "made" in what:
            made.append((index, _received(what["made"], data, index, encode)))
        else:
            keys = tuple(map(bytes.fromhex, what["images"]))
            seen = None if what["grid"] is None else Seen(what["grid"], keys)
            made.append((index, encode(replace(data[index], seen=seen))))
    return made


def _told(made: Any) -> dict[str, Any]:
    """Of an encoded record, for the other processes, as JSON."""
    prompt = _prompt(made)
    if isinstance(made, PairRecord) or (isinstance(made, tuple) and made[0] is prompt):
        bare = _with_prompt(made, replace(prompt, pixel_values=None))
        return {"made": base64.b64encode(to_bytes(bare)).decode()}
    grid = None if prompt.image_grid_thw is None else prompt.image_grid_thw.tolist()
    return {"grid": grid, "images": [key.hex() for key in prompt.image_keys]}


def _received(told: str, data: Dataset, index: int, encode: Callable[[Sample], T]) -> T:
    """What another process has encoded record ``index`` to; its pixels are decoded where they are needed."""
    made = from_bytes(base64.b64decode(told))
    prompt = _prompt(made)
    if prompt.image_grid_thw is None:
        return made

    def decode() -> Tensor:
        pixels = _prompt(encode(data[index])).pixel_values
        assert pixels is not None  # it has images
        return pixels

    return _with_prompt(made, replace(prompt, decode=decode))


def _with_prompt(made: Any, prompt: Prompt) -> Any:
    """A demonstration or a pair with another prompt."""
    return replace(made, prompt=prompt) if isinstance(made, PairRecord) else (prompt, *made[1:])


def own_positions(picked: Sequence[int]) -> list[int]:
    """Which of a batch's records this process looks at: as many as every other, give or take one, and where that goes
    the same ones in every epoch, as it keeps their images."""
    world = ranks.world()
    room = [len(range(rank, len(picked), world)) for rank in range(world)]
    owners: list[int | None] = []
    for index in picked:
        rank = index % world
        room[rank] -= 1
        owners.append(rank if room[rank] >= 0 else None)
    spare = iter([rank for rank in range(world) for _ in range(room[rank])])
    return [i for i, owner in enumerate(owners) if (next(spare) if owner is None else owner) == ranks.rank()]


def _prompt(made: Any) -> Prompt:
    """The prompt of what a record was encoded to."""
    if isinstance(made, tuple):
        return next(part for part in made if isinstance(part, Prompt))
    return made if isinstance(made, Prompt) else made.prompt


class Held(Sequence[E]):
    """The good records among ``picked``, at most ``limit`` of them, encoded to be used again and again.

    All are encoded once, to know which are bad. Those within HELD_BYTES stay; the others are encoded at every use: a
    pixel takes 24 bytes, and a whole set of them may be larger than the host's memory.
    """

    def __init__(self, data: Dataset, picked: Iterable[int], encode: Callable[[Sample], E], limit: int | None = None):
        self._data, self._encode = data, encode
        self.index: list[int] = []  # of the records in ``data``
        self._kept: list[E] = []
        room, rest = HELD_BYTES, list(picked)
        while rest and len(self.index) != limit:
            several = min(ranks.world(), len(rest) if limit is None else limit - len(self.index))
            for index, made in encoded(data, rest[:several], encode):
                pixels = _prompt(made).pixel_values
                room -= 0 if pixels is None else pixels.nbytes
                if room >= 0:
                    self._kept.append(made)
                self.index.append(index)
            rest = rest[several:]

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
