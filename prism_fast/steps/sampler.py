"""Prompts -> Rollout: the prompt and its images are prefilled once per group, N continuations are sampled together.

B rows (responses), G distinct prompts, P prompt tokens, L generated tokens, Hq and Hkv heads of D.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from prism_fast.config import Sampling
from prism_fast.data.chat import Chat
from prism_fast.models.policy import Policy
from prism_fast.pack import Tree, build_pack, merge_prompts, mrope_positions
from prism_fast.records import Prompt, Rollout
from prism_kernels import TreeLayout, tree_attention

CACHE_BLOCK = 64  # the cache of generated tokens grows by so many
# Logits at a time, as numbers: 34 and 268 MB in fp32, and in draw up to ten times that.
LOGITS = {"cpu": 1 << 23, "cuda": 1 << 26}
COMPACT_AT = 8  # finished rows leave the batch as soon as they are one in so many


class _Prefill:
    """Attention of the prompts that keeps every layer's keys and values."""

    def __init__(self, layout: TreeLayout):
        self.layout = layout
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        self.keys[layer], self.values[layer] = key[0], value[0]  # (Hkv, T, D)
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        return tree_attention(q, k, v, self.layout, scale=scale)[None]


class _Decode:
    """Attention of one new token per row: to its group's prompt, stored once per group, and to its own tokens.

    Both kinds of scores go through one softmax, so the result is exact; rows of a group share each read of the prompt.
    """

    def __init__(self, prefill: _Prefill, group: Tensor):
        lengths = torch.tensor(prefill.layout.lengths)
        longest = int(lengths.max())
        starts = prefill.layout.segment_start[:-1].long()
        rows = (starts[:, None].cpu() + torch.arange(longest)).clamp(max=prefill.layout.num_tokens - 1)
        device = next(iter(prefill.keys.values())).device
        rows = rows.to(device)
        self.prompt_mask = (torch.arange(longest) < lengths[:, None]).to(device)  # (G, P)
        self.prompt = {
            layer: tuple(x[:, rows].transpose(0, 1) for x in (prefill.keys[layer], prefill.values[layer]))
            for layer in prefill.keys
        }  # (G, Hkv, P, D)
        self.own: dict[int, tuple[Tensor, Tensor]] = {}  # (B, Hkv, capacity, D)
        self.length = 0
        self.place(group)

    def place(self, group: Tensor) -> None:
        """Slots of the rows in their groups: row b is slot ``slot[b]`` of the (G, N) grid."""
        order = torch.argsort(group, stable=True)
        counts = torch.bincount(group, minlength=len(self.prompt_mask))
        first = torch.cumsum(counts, 0) - counts
        within = torch.empty_like(group)
        within[order] = torch.arange(len(group), device=group.device) - first[group[order]]
        self.width = int(counts.max())
        self.group, self.slot = group, group * self.width + within

    def keep(self, rows: Tensor) -> None:
        """Only these rows go on."""
        self.own = {layer: tuple(x[rows] for x in pair) for layer, pair in self.own.items()}
        self.place(self.group[rows])

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (B, heads, D)
        batch, heads, dim = q.shape
        kv_heads = k.shape[1]
        own_k, own_v = self._append(layer, k, v)
        q = q.reshape(batch, kv_heads, heads // kv_heads, dim) * scale
        prompt_k, prompt_v = self.prompt[layer]
        on_prompt = self._ungrid(self._grid(q) @ prompt_k.transpose(2, 3))  # (B, Hkv, rep, P)
        on_prompt = on_prompt.masked_fill(~self.prompt_mask[self.group][:, None, None], float("-inf"))
        on_own = q @ own_k.transpose(2, 3)  # (B, Hkv, rep, L)
        weight = torch.cat([on_prompt, on_own], dim=-1).softmax(-1, dtype=torch.float32).to(q.dtype)
        prompt_weight, own_weight = weight.split([on_prompt.shape[-1], on_own.shape[-1]], dim=-1)
        out = self._ungrid(self._grid(prompt_weight) @ prompt_v) + own_weight @ own_v
        return out.reshape(1, batch, heads, dim)

    def _append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        used = self.length
        if layer not in self.own or self.own[layer][0].shape[2] == used:
            grown = tuple(x.new_zeros(x.shape[0], x.shape[1], used + CACHE_BLOCK, x.shape[2]) for x in (k, v))
            if layer in self.own:
                for new, old in zip(grown, self.own[layer]):
                    new[:, :, :used] = old
            self.own[layer] = grown
        for cache, x in zip(self.own[layer], (k, v)):
            cache[:, :, used] = x
        return tuple(cache[:, :, : used + 1] for cache in self.own[layer])

    def _grid(self, x: Tensor) -> Tensor:
        """(B, Hkv, rep, n) -> (G, Hkv, N * rep, n); slots without a row are 0."""
        _, kv_heads, rep, n = x.shape
        grid = x.new_zeros(len(self.prompt_mask) * self.width, kv_heads, rep, n).index_copy(0, self.slot, x)
        return grid.view(-1, self.width, kv_heads, rep, n).transpose(1, 2).reshape(-1, kv_heads, self.width * rep, n)

    def _ungrid(self, grid: Tensor) -> Tensor:
        groups, kv_heads, both, n = grid.shape
        grid = grid.view(groups, kv_heads, self.width, both // self.width, n).transpose(1, 2)
        return grid.reshape(groups * self.width, kv_heads, both // self.width, n)[self.slot]


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

    The same seed gives the same responses whatever ``rows_at_once`` is, up to rounding. ``progress`` is told the number
    of finished responses.
    """
    was_training = policy.training
    policy.eval()
    samples, limit = sampling.samples, sampling.max_response_tokens
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand((len(prompts) * samples, limit), generator=generator, dtype=torch.float64)
    ids: list[Tensor] = []
    logprobs: list[Tensor] = []
    per_batch = max(1, sampling.rows_at_once // samples)
    for start in range(0, len(prompts), per_batch):
        batch = prompts[start : start + per_batch]
        rows = slice(start * samples, (start + len(batch)) * samples)
        batch_ids, batch_logprobs = _generate(policy, chat, batch, samples, uniform[rows], sampling.temperature)
        ids += batch_ids
        logprobs += batch_logprobs
        if progress is not None:
            progress(len(ids))
    policy.train(was_training)
    return Rollout(
        prompts=list(prompts),
        group=torch.arange(len(prompts)).repeat_interleave(samples),
        response_ids=ids,
        logprob=logprobs,
        text=[chat.decode(x) for x in ids],
        finished=torch.tensor([bool(len(x)) and int(x[-1]) == chat.end_of_turn_id for x in ids], dtype=torch.bool),
    )


def _generate(
    policy: Policy, chat: Chat, prompts: Sequence[Prompt], samples: int, uniform: Tensor, temperature: float
) -> tuple[list[Tensor], list[Tensor]]:
    """(token ids, log-probs) of every row, on the host."""
    device = policy.head.device
    distinct, which = merge_prompts(prompts)
    pack = build_pack([Tree(p, (), ()) for p in distinct], [(i, ()) for i in range(len(distinct))], policy.image)
    pack = pack.to(device)
    prefill = _Prefill(pack.layout)
    hidden = policy(pack, prism=prefill)
    group = torch.tensor(which, device=device).repeat_interleave(samples)  # (B,) into distinct
    last = pack.layout.segment_start[1:].long() - 1
    state = hidden[last][group]  # (B, H)
    position = torch.tensor([mrope_positions(p, policy.image)[1] for p in distinct], device=device)[group]
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
            if step:
                cache.keep(keep)
            else:
                cache.place(cache.group[keep])
        state = _advance(policy, token, position + step, cache)
        cache.length += 1
    lengths = (tokens >= 0).sum(1).tolist()
    tokens, logprob = tokens.cpu(), logprob.cpu()
    return [t[:n] for t, n in zip(tokens, lengths)], [p[:n] for p, n in zip(logprob, lengths)]


def _next_token(policy: Policy, state: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(tokens, log-probs) after hidden states (B, H), a block of rows at a time."""
    rows = max(1, LOGITS[state.device.type] // policy.head.shape[0])
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


def _advance(policy: Policy, token: Tensor, position: Tensor, cache: _Decode) -> Tensor:
    """Hidden states (B, H) after one more token per row."""
    embedded = policy.model.get_input_embeddings()(token)[None]
    output = policy.model.model.language_model(
        inputs_embeds=embedded,
        position_ids=position.expand(4, 1, -1),
        use_cache=False,
        prism=cache,
    )
    return output.last_hidden_state[0]
