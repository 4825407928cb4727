"""Prompts -> Rollout: the prompt and its images are prefilled once per group, N continuations are sampled together.

B rows (responses), G distinct prompts, P prompt tokens, L generated tokens, Hq and Hkv heads of D.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from prism_fast import ranks
from prism_fast.config import Sampling
from prism_fast.data.chat import Chat
from prism_fast.models.policy import Policy
from prism_fast.pack import Tree, build_pack, merge_prompts, mrope_positions
from prism_fast.records import Prompt, Rollout
from prism_fast.steps.sampler_shares import Response, Share, deal, rollout_of
from prism_kernels import TreeLayout, tree_attention
from prism_kernels.tree_attention.dense_decode import DenseLayout, dense_decode

CACHE_BLOCK = 64  # the cache of generated tokens grows by so many
# Logits at a time, as numbers: 34 and 268 MB in fp32, and in draw up to ten times that.
LOGITS = {"cpu": 1 << 23, "cuda": 1 << 26}
COMPACT_AT = 8  # finished rows leave the batch as soon as they are one in so many


class _Prefill:
    """Attention of the prompts that keeps every layer's keys and values."""

    def __init__(self, layout: TreeLayout):
        self.layout = layout
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}  # of each layer, (Hkv, T, D)

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float, query_row: Tensor | None
    ) -> Tensor:
        self.kept[layer] = k.transpose(0, 1), v.transpose(0, 1)
        return tree_attention(q, k, v, self.layout, scale=scale, query_row=query_row)


class _Decode:
    """Attention of one new token per row: to its group's prompt, kept once per group, and to its own tokens."""

    def __init__(self, prefill: _Prefill, group: Tensor):
        self.layout = DenseLayout.build(group, prefill.layout.lengths)
        longest = self.layout.prompt_mask.shape[1]
        starts = prefill.layout.segment_start[:-1, None].long()
        rows = (starts + torch.arange(longest, device=starts.device)).clamp(max=prefill.layout.num_tokens - 1)
        self.prompt = {
            layer: (k[:, rows].transpose(0, 1), v[:, rows].transpose(0, 1)) for layer, (k, v) in prefill.kept.items()
        }  # (G, Hkv, P, D)
        self.own: dict[int, tuple[Tensor, Tensor]] = {}  # (B, Hkv, capacity, D)
        self.length = 0

    def keep(self, rows: Tensor) -> None:
        """Only these rows go on."""
        self.own = {layer: (k[rows], v[rows]) for layer, (k, v) in self.own.items()}
        self.layout = self.layout.keep(rows)

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float, query_row: Tensor | None
    ) -> Tensor:
        prompt_k, prompt_v = self.prompt[layer]
        own_k, own_v = self._append(layer, k, v)
        return dense_decode(q, prompt_k, prompt_v, own_k, own_v, self.layout, scale)

    def _append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k and v (B, Hkv, D) behind the row's tokens so far -> (B, Hkv, L, D) each."""
        used = self.length
        kept = self.own.get(layer)
        if kept is None or kept[0].shape[2] == used:
            self.own[layer] = _grown(k, kept and kept[0], used), _grown(v, kept and kept[1], used)
        for cache, x in zip(self.own[layer], (k, v)):
            cache[:, :, used] = x
        keys, values = self.own[layer]
        return keys[:, :, : used + 1], values[:, :, : used + 1]


def _grown(like: Tensor, kept: Tensor | None, used: int) -> Tensor:
    """Room for CACHE_BLOCK more tokens behind the ``used`` ones of ``kept``; ``like`` (B, Hkv, D)."""
    rows, heads, dim = like.shape
    new = like.new_zeros(rows, heads, used + CACHE_BLOCK, dim)
    if kept is not None:
        new[:, :, :used] = kept
    return new


def draw(logits: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """One token per row by inversion of the distribution function: (tokens (B,) int64, log-probs (B,) fp32).

    logits (B, V); uniform (B,) in [0, 1). Temperature 0 takes the most probable token, its log-prob at temperature 1.
    Tokens of probability 0 are never drawn.
    """
    logprob = (logits.float() / (temperature or 1.0)).log_softmax(-1)
    if temperature == 0:
        token = logprob.argmax(-1)
    else:
        cumulative = logprob.double().exp().cumsum(-1)
        threshold = uniform.double()[:, None] * cumulative[:, -1:]
        token = torch.searchsorted(cumulative, threshold, right=True)[:, 0]
        beyond = token >= logits.shape[1]  # uniform * total rounded up to total
        token = torch.where(beyond, logprob.argmax(-1), token)
    return token, logprob.gather(1, token[:, None])[:, 0]


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

    The same seed gives the same responses whatever ``rows_at_once`` and the number of processes are, up to rounding:
    each process samples a part of them and has all in the end. ``policy`` holds whole weights (`Updater.gathered`).
    ``progress`` is told the number of this process's finished responses.
    """
    was_training = policy.training
    policy.eval()
    samples, limit = sampling.samples, sampling.max_response_tokens
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand((len(prompts) * samples, limit), generator=generator, dtype=torch.float64)
    shares = deal(prompts, samples)
    mine: dict[int, Response] = {}
    for batch in _batches(shares[ranks.rank()], sampling.rows_at_once):
        rows = [number for share in batch for number in share.responses(samples)]
        distinct, which = merge_prompts([prompts[share.group] for share in batch])
        group = torch.tensor(which).repeat_interleave(torch.tensor([share.number for share in batch]))
        parts = _generate(policy, chat, distinct, group, uniform[rows], sampling.temperature)
        mine |= {number: Response(*part) for number, part in zip(rows, zip(*parts))}
        if progress is not None:
            progress(len(mine))
    policy.train(was_training)
    return rollout_of(prompts, shares, samples, mine, chat)


def _batches(shares: Sequence[Share], rows_at_once: int) -> Iterator[list[Share]]:
    """Shares of at most ``rows_at_once`` responses together, where one alone is not more."""
    batch: list[Share] = []
    for share in shares:
        if batch and sum(s.number for s in batch) + share.number > rows_at_once:
            yield batch
            batch = []
        batch.append(share)
    if batch:
        yield batch


def _generate(
    policy: Policy, chat: Chat, prompts: Sequence[Prompt], group: Tensor, uniform: Tensor, temperature: float
) -> tuple[list[Tensor], list[Tensor]]:
    """(token ids, log-probs) of every row, on the host; ``group`` (B,) into ``prompts``, which are distinct."""
    device = policy.bias.device
    pack = build_pack([Tree(p, (), ()) for p in prompts], [(i, ()) for i in range(len(prompts))], policy.image)
    pack = pack.to(device)
    prefill = _Prefill(pack.layout)
    hidden = policy(pack, attend=prefill)
    group = group.to(device)
    last = pack.layout.segment_start[1:].long() - 1
    state = hidden[last][group]  # (B, H)
    position = torch.tensor([mrope_positions(p, policy.image)[1] for p in prompts], device=device)[group]
    cache = _Decode(prefill, group)
    total, limit = uniform.shape
    tokens = torch.full((total, limit), -1, dtype=torch.int64, device=device)
    logprob = torch.zeros((total, limit), dtype=torch.float32, device=device)
    uniform = uniform.to(device)
    row = torch.arange(total, device=device)  # which response each row of the batch is
    done = torch.zeros(total, dtype=torch.bool, device=device)
    for step in range(limit):
        token, chosen_logprob = _next_token(policy, state, uniform[row, step], temperature)
        going = ~done
        tokens[row[going], step] = token[going]
        logprob[row[going], step] = chosen_logprob[going]
        done = done | (token == chat.end_of_turn_id)
        finished = int(done.sum())
        if finished == len(row) or step + 1 == limit:
            break
        if finished * COMPACT_AT >= len(row):
            keep = (~done).nonzero().flatten()
            row, token, position, done = row[keep], token[keep], position[keep], done[keep]
            cache.keep(keep)
        state = policy.decode(token, position + step, cache)
        cache.length += 1
    lengths = (tokens >= 0).sum(1).tolist()
    tokens, logprob = tokens.cpu(), logprob.cpu()
    return [t[:n] for t, n in zip(tokens, lengths)], [p[:n] for p, n in zip(logprob, lengths)]


def _next_token(policy: Policy, state: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(tokens, log-probs) after hidden states (B, H), a block of rows at a time."""
    rows = max(1, LOGITS[state.device.type] // policy.bias.numel())
    parts = [
        draw(_product(some, policy.head) + policy.bias, u, temperature)
        for some, u in zip(state.split(rows), uniform.split(rows))
    ]
    token, logprob = map(torch.cat, zip(*parts))
    return token, logprob


def _product(state: Tensor, head: Tensor) -> Tensor:
    """(B, V) fp32 logits. Rounding them to a lower precision would part the sampler's log-probs from the trainer's."""
    if head.is_cuda and head.dtype != torch.float32:
        return torch.mm(state, head.T, out_dtype=torch.float32)
    return state.float() @ head.float().T
