"""Rows of a decoding batch on the device: where each stands, its pages, and one more token of all of them.

A row is where a response is sampled, and goes to another when that one is finished. All that a token's calls read and
write has a place and a size of its own, so that the calls can be captured; who fills rows writes into these tensors
between tokens. B rows, G prompts that are held, V words.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from prism_fast.models.captured import Captured, captured_sizes
from prism_fast.models.token_step import TokenStep
from prism_kernels import DecodeLayout, HeadNorm, sample_tokens, shared_prompt_decode
from prism_kernels.native import Call
from prism_kernels.tree_attention.decode_layout import PAGE
from prism_kernels.tree_attention.decode_step import DecodeStep
from prism_kernels.tree_attention.native import prepared

LOGITS = {"cpu": 1 << 23, "cuda": 1 << 27}  # at a time, as numbers: 34 and 537 MB in fp32


class Draws(NamedTuple):
    """How tokens are drawn, and where a response ends."""

    temperature: float
    seed: int
    end: int  # the end of turn
    limit: int  # tokens of a response


class Size(NamedTuple):
    rows: int
    prompts: int  # that are held at once
    pages: int


class Begun(NamedTuple):
    """Rows that begin a response each: what of, as lists of one length."""

    prompt: Sequence[int]  # where the prompt is held
    response: Sequence[int]  # its number: with the seed and a token's index it decides the noise
    lane: Sequence[int]  # where the tokens are written
    position: Sequence[int]  # of its first token


@dataclass
class Held:
    """Prompts of one prefill, on the device: their keys' and values' places."""

    row: Tensor  # (T,) int64: page of every token
    offset: Tensor  # (T,) int64: its place in the page


class Rows:
    def __init__(self, step: TokenStep, size: Size, draws: Draws):
        self.step, self.size, self.draws, self.device = step, size, draws, step.device
        shape = (size.pages, step.kv_heads, PAGE, step.dim)
        dtype = step.embedding.dtype
        self.k, self.v = ([torch.empty(shape, dtype=dtype, device=self.device) for _ in step.layers] for _ in range(2))

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=self.device)

        rows, limit = size.rows, draws.limit
        self.token, self.position, self.response, self.lane = (zeros(rows) for _ in range(4))
        self.own_page, self.own_length = (
            zeros(rows, -(-limit // PAGE), dtype=torch.int32),
            zeros(rows, dtype=torch.int32),
        )
        # By lane. There is one more than rows: what idle rows would write goes there.
        self.tokens, self.length = zeros(rows + 1, limit), zeros(rows + 1)
        self.logprob = zeros(rows + 1, limit, dtype=torch.float32)
        # By prompt that is held: where it lies, and its last hidden state, from which responses' first tokens come.
        self.prompt_page, self.prompt_length = (
            zeros(size.prompts, 1, dtype=torch.int32),
            zeros(size.prompts, dtype=torch.int32),
        )
        self.state = zeros(size.prompts, step.embedding.shape[1], dtype=dtype)
        self.seed = torch.tensor([draws.seed], device=self.device)
        self._sizes = captured_sizes(rows) if self.device.type == "cuda" else []
        self._layouts: dict[int, DecodeLayout] = {}
        self._runs: dict[int, Captured] = {}
        self._pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None

    # ---- prompts

    def hold(self, slots: Sequence[int], pages: Sequence[Sequence[int]], lengths: Sequence[int]) -> Held:
        """Names the places of prompts that are about to be read; their tokens come one prompt after another."""
        widest = max(map(len, pages))
        if widest > self.prompt_page.shape[1]:
            wider = self.prompt_page.new_zeros(self.size.prompts, widest)
            wider[:, : self.prompt_page.shape[1]] = self.prompt_page
            self.prompt_page = wider
            self._layouts.clear()  # they hold the table, and graphs hold them
            self._runs.clear()
        at = self.sent(slots)
        self.prompt_page[at] = self.sent([[*p, *[0] * (self.prompt_page.shape[1] - len(p))] for p in pages]).int()
        self.prompt_length[at] = self.sent(lengths).int()
        row = [p[i // PAGE] for p, n in zip(pages, lengths) for i in range(n)]
        return Held(self.sent(row), self.sent([i % PAGE for n in lengths for i in range(n)]))

    def keep(self, held: Held, layer: int, k: Tensor, v: Tensor) -> None:
        """Keys and values (T, Hkv, D) of the prompts that were named last."""
        self.k[layer][held.row, :, held.offset] = k
        self.v[layer][held.row, :, held.offset] = v

    # ---- rows

    def rotate(self, positions: int) -> None:
        """Makes room for positions below this number."""
        self.step.rotation(positions)
        self._runs.clear()  # graphs hold the table

    def seat(self, kept: Sequence[int], begun: Begun | None, group: Sequence[int], pages: Tensor) -> None:
        """Rows ``kept``, by their numbers so far, go on as the first; behind them responses begin.

        ``group`` of all of them: where their prompts are held; pages (rows, pages) int32 on the host.
        """
        old, count = len(kept), len(group)
        if list(kept) != list(range(old)):
            at = self.sent(kept)
            for tensor in (self.token, self.position, self.response, self.lane, self.own_length):
                tensor[:old] = tensor[at]
        rows = self.rows_run(count)
        self.own_length[count:rows] = 0
        self.lane[count:rows] = self.size.rows
        self.position[count:rows] = 0
        self.own_page[:count] = self.sent(pages)
        if begun is not None:
            new = slice(old, count)
            prompt, self.response[new], lane, self.position[new] = map(self.sent, begun)
            token, logprob = self.draw(self.state[prompt], self.response[new], torch.zeros_like(prompt))
            self.token[new] = token
            self.tokens[lane, 0], self.logprob[lane, 0], self.length[lane] = token, logprob, 1
            over = (token == self.draws.end) | (self.draws.limit == 1)
            self.own_length[new] = (~over).int()
            self.lane[new] = lane.masked_fill(over, self.size.rows)
        self._layout(rows).place([*group, *[0] * (rows - count)])

    def rows_run(self, count: int) -> int:
        """How many rows are run where ``count`` are in use."""
        return next((size for size in self._sizes if size >= count), count)

    def repeat(self, count: int, times: int) -> None:
        """``times`` more tokens of the first ``count`` rows, as far as they go."""
        rows = self.rows_run(count)
        if rows not in self._runs:
            layout = self._layout(rows)
            step = self._step(layout)
            self._runs[rows] = Captured(lambda: self._advance(layout, step), self.device, self._pool)
        self._runs[rows].repeat(times)

    def _layout(self, rows: int) -> DecodeLayout:
        if rows not in self._layouts:
            if not self._sizes:  # nothing is captured: an old one is of no use
                self._layouts.clear()
                self._runs.clear()
            built = DecodeLayout.build(
                rows=rows,
                prompts=self.size.prompts,
                prompt_tokens=self.prompt_page.shape[1] * PAGE,
                own_tokens=self.draws.limit,
                device=self.device,
            )
            self._layouts[rows] = replace(
                built,
                prompt_page=self.prompt_page,
                prompt_length=self.prompt_length,
                own_page=self.own_page[:rows],
                own_length=self.own_length[:rows],
            )
        return self._layouts[rows]

    def _step(self, layout: DecodeLayout) -> Callable[[Tensor, Tensor], Tensor]:
        """(token, position) -> the last hidden states of so many rows."""
        step = self.step
        if step.impl == "native":

            def prepare(layer: int, q: Tensor, k: Tensor, v: Tensor, norm: HeadNorm, out: Tensor) -> Call:
                return prepared(DecodeStep(q, k, v, self.k[layer], self.v[layer], layout, step.scale, norm), out)

            return step.prepared(len(layout.group), prepare)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, norm: HeadNorm) -> Tensor:
            return shared_prompt_decode(q, k, v, self.k[layer], self.v[layer], layout, scale=step.scale, norm=norm)

        return partial(step, attend=attend)

    def _advance(self, layout: DecodeLayout, step: Callable[[Tensor, Tensor], Tensor]) -> None:
        """One token of every row that goes on: nothing here waits for the device, or depends on what is in it."""
        rows = len(layout.group)
        token, position, response, lane = (x[:rows] for x in (self.token, self.position, self.response, self.lane))
        index = layout.own_length.long()  # of the token that comes; 0: the row is idle
        state = step(token, position)
        drawn, logprob = self.draw(state, response, index)
        self.tokens[lane, index] = drawn
        self.logprob[lane, index] = logprob
        self.length[lane] = index + 1
        over = (index == 0) | (drawn == self.draws.end) | (index + 1 >= self.draws.limit)
        layout.own_length.copy_((index + 1).masked_fill_(over, 0))
        lane.masked_fill_(over, self.size.rows)
        token.copy_(drawn)
        position.add_(~over)

    def draw(self, state: Tensor, response: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """(tokens, log-probs) after hidden states (B, H), a block of rows at a time."""
        block = max(1, LOGITS[self.device.type] // self.step.bias.numel())
        parts = [
            sample_tokens(
                self.step.logits(some), temperature=self.draws.temperature, seed=self.seed, response=r, step=i
            )
            for some, r, i in zip(state.split(block), response.split(block), index.split(block))
        ]
        token, logprob = parts[0] if len(parts) == 1 else map(torch.cat, zip(*parts))
        return token, logprob

    # ---- between device and host

    def sent(self, values: Sequence | Tensor) -> Tensor:
        host = values if isinstance(values, Tensor) else torch.tensor(values, dtype=torch.int64)
        return host.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else host

    def fetched(self, *tensors: Tensor) -> list[Tensor]:
        """On the host once `wait` returns."""
        if self.device.type != "cuda":
            return [x.clone() for x in tensors]
        return [torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True) for x in tensors]

    def wait(self) -> None:
        if self.device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
            event.synchronize()
