"""Which process samples which responses, and all of them in every process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from prism_fast import ranks
from prism_fast.balance import deal_groups
from prism_fast.data.chat import Chat
from prism_fast.records import Prompt, Rollout


class Share(NamedTuple):
    """Responses of one prompt that one process samples: ``number`` of them, from number ``first`` on."""

    group: int
    first: int
    number: int

    def responses(self, samples: int) -> range:
        """Their numbers in the batch."""
        start = self.group * samples + self.first
        return range(start, start + self.number)


class Response(NamedTuple):
    ids: Tensor  # (L,) int64, end-of-turn included
    logprob: Tensor  # (L,) fp32


def deal(prompts: Sequence[Prompt], samples: int) -> list[list[Share]]:
    """The shares of every process. In one process, each prompt in order."""
    world = ranks.world()
    lengths = [len(p) for p in prompts] if world > 1 else [1] * len(prompts)
    return [[Share(*share) for share in shares] for shares in deal_groups(lengths, samples, world)]


def rollout_of(
    prompts: Sequence[Prompt], shares: Sequence[Sequence[Share]], samples: int, mine: dict[int, Response], chat: Chat
) -> Rollout:
    """All processes' responses from this one's, by their numbers in the batch. A call of all processes."""
    responses = _everywhere(mine)
    sampled = tuple(
        sum(len(responses[number].ids) for share in part for number in share.responses(samples)) for part in shares
    )
    return rollout_from(prompts, samples, responses, sampled, chat)


def rollout_from(
    prompts: Sequence[Prompt], samples: int, responses: Sequence[Response], tokens_by_rank: tuple[int, ...], chat: Chat
) -> Rollout:
    """The record of a batch's responses, by their numbers in it."""
    ids = [response.ids for response in responses]
    return Rollout(
        prompts=prompts,
        group=torch.arange(len(prompts)).repeat_interleave(samples),
        response_ids=ids,
        logprob=[response.logprob for response in responses],
        text=[chat.decode(x) for x in ids],
        finished=torch.tensor([bool(len(x)) and int(x[-1]) == chat.end_of_turn_id for x in ids], dtype=torch.bool),
        tokens_by_rank=tokens_by_rank,
    )


def _everywhere(mine: dict[int, Response]) -> list[Response]:
    if ranks.world() == 1:
        return [mine[number] for number in range(len(mine))]
    empty = torch.zeros(0)
    own = {
        "index": torch.tensor(list(mine), dtype=torch.int64),
        "length": torch.tensor([len(r.ids) for r in mine.values()], dtype=torch.int64),
        "ids": torch.cat([empty.long(), *(r.ids for r in mine.values())]),
        "logprob": torch.cat([empty, *(r.logprob for r in mine.values())]),
    }
    found = ranks.merge({f"{ranks.rank()}.{name}": value for name, value in own.items()})
    responses: dict[int, Response] = {}
    for number in range(ranks.world()):
        lengths = found[f"{number}.length"].tolist()
        parts = zip(found[f"{number}.ids"].split(lengths), found[f"{number}.logprob"].split(lengths))
        responses |= {i: Response(*part) for i, part in zip(found[f"{number}.index"].tolist(), parts)}
    return [responses[i] for i in range(len(responses))]
