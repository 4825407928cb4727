"""Prompts -> Rollout by the trainer's own weights: one stream of responses, whose rows are filled again as they end.

A prompt and its images are read once for all of its responses (prefill); then tokens are sampled, a token of every row
at a time (decode). Keys and values lie in pages. The host looks at the device every few tokens: it takes what is
finished, gives its row to the next response, and reads the next prompts when they are due.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from prism_fast import ranks
from prism_fast.config import Sampling
from prism_fast.data.chat import Chat
from prism_fast.models.policy import Policy
from prism_fast.models.token_step import TokenStep
from prism_fast.pack import Tree, build_pack, mrope_positions
from prism_fast.records import DataError, Prompt, Rollout
from prism_fast.steps.sampler_memory import size_of
from prism_fast.steps.sampler_rows import Begun, Draws, Held, Rows
from prism_fast.steps.sampler_shares import Response, Share, deal, rollout_of
from prism_kernels import TreeLayout, tree_attention
from prism_kernels.tree_attention.decode_layout import PAGE

LOOK = {"cpu": 4, "cuda": 16}  # tokens between two looks of the host; a CPU waits for nothing when it looks
BEGINS = -1  # in place of a row on the device
PREFILL_TOKENS = 1 << 14  # of the prompts that are read together, but one prompt may have more


@torch.no_grad()
def generate(
    policy: Policy,
    chat: Chat,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> Rollout:
    """Samples ``sampling.samples`` responses for each prompt; B = len(prompts) * samples.

    A token's noise is a function of the seed, its response's number in [0, B), its index and the word. So the same seed
    gives the same responses whatever ``rows_at_once`` and the number of processes are, up to near ties that rounding
    parts: each process samples a share of them and has all in the end. ``policy`` holds whole weights
    (`Updater.gathered`). ``progress`` is told the number of this process's finished responses.
    """
    was_training = policy.training
    policy.eval()
    shares = deal(prompts, sampling.samples)
    mine: dict[int, Response] = {}
    draws = Draws(sampling.temperature, seed, chat.end_of_turn_id, sampling.max_response_tokens)
    own = shares[ranks.rank()]
    if own:
        for number, response in _Stream(policy, prompts, own, sampling, draws).run():
            mine[number] = response
            if progress is not None:
                progress(len(mine))
    policy.train(was_training)
    return rollout_of(prompts, shares, sampling.samples, mine, chat)


class _Prefill:
    """Attention of the prompts, whose keys and values go to their pages."""

    def __init__(self, layout: TreeLayout, rows: Rows, held: Held):
        self.layout, self.rows, self.held = layout, rows, held

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float, query_row: Tensor | None
    ) -> Tensor:
        self.rows.keep(self.held, layer, k, v)
        return tree_attention(q, k, v, self.layout, scale=scale, query_row=query_row)


@dataclass
class _Read:
    """A prompt whose keys and values are there, as long as ``left`` responses to it are not finished."""

    key: bytes
    slot: int
    pages: list[int]
    position: int  # of a response's first token
    left: int = 0


@dataclass
class _Row:
    """A response that is being sampled."""

    number: int
    prompt: _Read
    lane: int
    pages: list[int]
    length: int = 1  # tokens, when the host looked last
    seat: int = BEGINS  # its row on the device


@dataclass
class _Stream:
    policy: Policy
    prompts: Sequence[Prompt]
    shares: Sequence[Share]
    sampling: Sampling
    draws: Draws
    seated: list[_Row] = field(default_factory=list)
    read: dict[int, _Read] = field(default_factory=dict)  # by group
    by_key: dict[bytes, _Read] = field(default_factory=dict)
    leaving: list[tuple[list[_Row], list[Tensor]]] = field(default_factory=list)

    def __post_init__(self):
        samples = self.sampling.samples
        self.waiting = deque(n for share in self.shares for n in share.responses(samples))
        self.unread = deque(self.shares)
        step = TokenStep(self.policy)
        self.size = size_of(step, self.sampling, len(self.waiting))
        self.rows = Rows(step, self.size, self.draws)
        self.look = LOOK[step.device.type]
        self.pages = list(range(self.size.pages - 1, 0, -1))  # the free ones; 0 is nobody's
        self.lanes, self.slots = list(range(self.size.rows)), list(range(self.size.prompts))
        self.positions = 1
        self.places: list[tuple[int, int]] = []  # of the rows, as the device has them

    def run(self) -> Iterator[tuple[int, Response]]:
        while self.waiting or self.seated:
            self._admit()
            self._reserve()
            self._seat()
            left = self.draws.limit - min(row.length for row in self.seated)  # of the longest that there can be
            self.rows.repeat(len(self.seated), min(self.look, left))
            yield from self._look()
        self.rows.wait()
        yield from self._left()

    # ---- rows to responses

    def _admit(self) -> None:
        """Free rows go to the responses that wait, in order, as far as their prompts can be held."""
        while self.waiting and len(self.seated) < self.size.rows and self.pages:
            number = self.waiting[0]
            prompt = self._prompt_of(number // self.sampling.samples)
            if prompt is None or not self.pages:
                break
            self.waiting.popleft()
            self.seated.append(_Row(number, prompt, self.lanes.pop(), [self.pages.pop()]))
        if not self.seated:
            raise self._no_room(f"response {self.waiting[0]} and its prompt")

    def _reserve(self) -> None:
        """Pages for the tokens until the next look. Where there are none left, the youngest responses wait again: they
        will be the same."""
        at = 0
        while at < len(self.seated):
            row = self.seated[at]
            needed = -(-min(row.length + self.look, self.draws.limit) // PAGE)
            if len(row.pages) >= needed:
                at += 1
            elif self.pages:
                row.pages.append(self.pages.pop())
            elif len(self.seated) > 1:
                youngest = self.seated.pop()
                self._release(youngest)
                self.waiting.appendleft(youngest.number)
            elif not self._give_up_idle():
                raise self._no_room(f"a response of {row.length + self.look} tokens and its prompt")

    def _seat(self) -> None:
        places = [(row.seat, len(row.pages)) for row in self.seated]
        if places == self.places:  # all go on as they are
            return
        begun = [row for row in self.seated if row.seat == BEGINS]
        kept = [row.seat for row in self.seated if row.seat != BEGINS]
        self.positions = max([self.positions, *(row.prompt.position + self.draws.limit for row in begun)])
        if self.positions > len(self.rows.step.cos):
            self.rows.rotate(2 * self.positions)
        columns = [(row.prompt.slot, row.number, row.lane, row.prompt.position) for row in begun]
        width = self.rows.own_page.shape[1]
        pages = torch.tensor([row.pages + [0] * (width - len(row.pages)) for row in self.seated], dtype=torch.int32)
        self.rows.seat(kept, Begun(*zip(*columns)) if begun else None, [r.prompt.slot for r in self.seated], pages)
        for seat, row in enumerate(self.seated):
            row.seat = seat
        self.places = [(row.seat, len(row.pages)) for row in self.seated]

    def _look(self) -> Iterator[tuple[int, Response]]:
        """What was finished when the host looked last, and whose rows are free now."""
        own, length = self.rows.fetched(self.rows.own_length, self.rows.length)
        self.rows.wait()
        yield from self._left()
        going, lengths = own.tolist(), length.tolist()
        gone: list[_Row] = []
        for row in self.seated:
            row.length = lengths[row.lane]
            if going[row.seat] == 0:
                gone.append(row)
        if not gone:
            return
        self.seated = [row for row in self.seated if going[row.seat] > 0]
        lanes, longest = self.rows.sent([row.lane for row in gone]), max(row.length for row in gone)
        written = [x[lanes, :longest] for x in (self.rows.tokens, self.rows.logprob)]
        self.leaving.append((gone, self.rows.fetched(*written)))
        for row in gone:
            self._release(row)
            row.prompt.left -= 1
            if row.prompt.left == 0:
                self._forget(row.prompt)

    def _left(self) -> Iterator[tuple[int, Response]]:
        for rows, (tokens, logprob) in self.leaving:
            for i, row in enumerate(rows):
                yield row.number, Response(tokens[i, : row.length].clone(), logprob[i, : row.length].clone())
        self.leaving.clear()

    def _release(self, row: _Row) -> None:
        self.pages += row.pages
        self.lanes.append(row.lane)

    def _no_room(self, what: str) -> DataError:
        return DataError(
            f"sampling: {what} need more than the {self.size.pages - 1} pages of {PAGE} tokens that fit the memory; "
            "lower max_response_tokens or data.max_prompt_tokens, or take a smaller model"
        )

    # ---- prompts

    def _prompt_of(self, group: int) -> _Read | None:
        """None where there is no room for it now."""
        while group not in self.read:
            if not self._prefill():
                return None
        return self.read[group]

    def _prefill(self) -> bool:
        """Reads the next prompts: those that free rows wait for, and some more, as one call serves many. False where
        the first of them finds no room."""
        samples = self.sampling.samples
        free = self.size.rows - len(self.seated)
        number = max(-(-free // samples), self.size.rows // (8 * samples), 1)
        taken: list[tuple[_Read, Prompt]] = []
        tokens, added = 0, False
        while self.unread and number > 0:
            share = self.unread[0]
            prompt = self.prompts[share.group]
            found = self.by_key.get(prompt.key)
            if found is None:
                needed, reserve = -(-len(prompt) // PAGE), self.size.rows - len(self.seated) if added else 1
                full = taken and tokens + len(prompt) > PREFILL_TOKENS
                if full or not self.slots or len(self.pages) < needed + reserve:
                    break
                position = mrope_positions(prompt, self.policy.image)[1]
                pages = [self.pages.pop() for _ in range(needed)]
                found = self.by_key[prompt.key] = _Read(prompt.key, self.slots.pop(), pages, position)
                taken.append((found, prompt))
                tokens += len(prompt)
            found.left += share.number
            self.read[share.group] = found
            self.unread.popleft()
            number, added = number - 1, True
        if taken:
            self._run_prefill([read for read, _ in taken], [prompt for _, prompt in taken])
        return added

    def _run_prefill(self, read: list[_Read], prompts: list[Prompt]) -> None:
        trees = [Tree(p, (), ()) for p in prompts]
        pack = build_pack(trees, [(i, ()) for i in range(len(prompts))], self.policy.image).to(self.rows.device)
        slots = [r.slot for r in read]
        held = self.rows.hold(slots, [r.pages for r in read], [len(p) for p in prompts])
        hidden = self.policy(pack, attend=_Prefill(pack.layout, self.rows, held))
        self.rows.state[self.rows.sent(slots)] = hidden[pack.layout.segment_start[1:].long() - 1]

    def _forget(self, prompt: _Read) -> None:
        self.pages += prompt.pages
        self.slots.append(prompt.slot)
        del self.by_key[prompt.key]
        self.read = {group: read for group, read in self.read.items() if read is not prompt}

    def _give_up_idle(self) -> bool:
        """Prompts of which no response is being sampled give up their pages, and are read again when they are due."""
        used = {row.prompt.key for row in self.seated}
        idle = [read for read in self.by_key.values() if read.key not in used]
        for prompt in idle:
            self._forget(prompt)
        left = Counter(number // self.sampling.samples for number in self.waiting)  # in order, as they wait
        self.unread = deque(Share(group, 0, n) for group, n in left.items() if group not in self.read)
        return bool(idle)
