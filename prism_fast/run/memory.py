"""Bytes of one GPU in training, by count: from the models' dimensions, the form of sharding and the number of GPUs.

Nothing here is measured. Everything is in bytes; GB are 10**9 of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from prism_fast.records import DataError

FORMS = ("none", "zero1", "zero2", "zero3", "fsdp2")
CONTEXT = 3e9  # CUDA's context, NCCL's buffers, fragments
BUCKETS = {
    "none": 0.0,
    "zero1": 1e9,
    "zero2": 2e9,
    "zero3": 2e9,
    "fsdp2": 0.0,
}  # of DeepSpeed's 5e8 bf16 numbers, one or two
LIVE = {"zero3": 2e9, "fsdp2": 2e9}  # gathered weights: max_live_parameters = 1e9, in bf16


class Text(NamedTuple):
    """Dimensions of a Qwen3-VL language model, as config.json has them; ``experts``: of every layer."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    tied: bool  # the LM head is the word embedding
    experts: int = 1
    top_k: int = 1
    vocab: int = 151_936
    head_dim: int = 128

    @property
    def parameters(self) -> int:
        heads = self.heads + self.kv_heads
        attention = 2 * self.hidden * heads * self.head_dim + 2 * self.head_dim  # q and o, k and v; norms of q and k
        router = self.hidden * self.experts if self.experts > 1 else 0
        mlp = 3 * self.hidden * self.intermediate * self.experts + router
        layer = attention + mlp + 2 * self.hidden
        return self.vocab * self.hidden * (1 if self.tied else 2) + self.layers * layer + self.hidden

    def activations(self, tokens: int) -> float:
        """With checkpointing, in bf16: the input of every layer, and gate, up and their product within one."""
        inside = 3 * self.intermediate * self.top_k
        return 2.0 * tokens * (self.hidden * self.layers + inside)


class Vision(NamedTuple):
    """Dimensions of its vision tower; ``taps``: layers whose features go into the language model (DeepStack)."""

    hidden: int
    depth: int
    intermediate: int
    out: int
    taps: int = 3
    positions: int = 2304
    patch: int = 3 * 2 * 16 * 16  # channels, frames, height, width
    merge: int = 4  # patches that become one token

    @property
    def parameters(self) -> int:
        h, i, wide = self.hidden, self.intermediate, self.merge * self.hidden
        block = (3 * h * h + 3 * h) + (h * h + h) + (h * i + i) + (i * h + h) + 4 * h
        mlp = (wide * wide + wide) + (wide * self.out + self.out)
        mergers = (mlp + 2 * h) + self.taps * (mlp + 2 * wide)
        return self.patch * h + h + self.positions * h + self.depth * block + mergers


class Model(NamedTuple):
    text: Text
    vision: Vision
    head: int = 0  # numbers of the discriminator's

    @property
    def parameters(self) -> int:
        return self.text.parameters + self.vision.parameters + self.head


_SMALL = Vision(1024, 24, 4096, 2560)
# Dimensions as published with Qwen3-VL-2B, 4B and 8B (config.json of each); the discriminator is the 2B, its MLPs four
# times, of which two compute a token.
POLICIES = {
    "4b": Model(Text(2560, 36, 9728, 32, 8, tied=True), _SMALL),
    "8b": Model(Text(4096, 36, 12288, 32, 8, tied=False), Vision(1152, 27, 4304, 4096)),
}
DISCRIMINATOR = Model(Text(2048, 28, 6144, 16, 8, tied=True, experts=4, top_k=2), _SMALL._replace(out=2048), head=2048)


def trained(stage: str, policy: str) -> tuple[Model, ...]:
    """The models that a stage trains: ``trained("align", "4b")`` are two."""
    if policy not in POLICIES:
        raise DataError(f"plan: --policy: expected {' or '.join(POLICIES)}, got {policy!r}")
    return {"warmup": (DISCRIMINATOR,), "align": (POLICIES[policy], DISCRIMINATOR)}.get(stage, (POLICIES[policy],))


class Need(NamedTuple):
    """Bytes: of model states, while training (states, activations or AdamW's, context), and on the host of all GPUs."""

    states: float
    training: float
    host: float


def need(
    models: tuple[Model, ...], form: str, gpus: int, tokens: int, *, offload: bool = False, fp32_sums: bool = True
) -> Need:
    """What each of ``gpus`` GPUs holds, for bf16 weights and AdamW, with activation checkpointing.

    P parameters in all, P_max of the larger model, N GPUs; per parameter bf16 weights and gradients take 2 bytes each,
    fp32 master and moments 12. ``fp32_sums``: DeepSpeed's gradients add up in fp32, ``tokens``: of a pack.

        none    2 P + 4 P + 12 P                     weight; sum of gradients; master, moments
        zero1   2 P + 2 P_max + 12 P / N + 1 GB      with fp32 sums + 4 P_max
        zero2   2 P + 2 P / N + 12 P / N + 2 GB      with fp32 sums + 2 P / N
        zero3   16 P / N + 4 GB                      with fp32 sums + 2 P / N
        fsdp2   16 P / N + 2 GB                      the shards are the masters, their gradients are fp32

    none takes 16 P where the CUDA part of prism_kernels is built: a remainder of 2 bytes stands for the master. zero1
    holds a gradient of one model at a time. ``offload`` takes 12 P / N away (8 P / N of fsdp2, whose shards stay, 12 P
    of none); the host then holds, of DeepSpeed, 18 P, whatever N: master, moments, fp32 gradient, and the new weights
    on their way back; 12 P of fsdp2, and of none 12 P of each process. Without it DeepSpeed's AdamW takes 4 P_max / N
    for a moment, when no activations are there.
    """
    count = [model.parameters for model in models]
    total, largest = sum(count), max(count)
    shard = total / gpus
    states = {
        "none": 18 * total,
        "zero1": 2 * total + (6 if fp32_sums else 2) * largest + 12 * shard,
        "zero2": 2 * total + (4 if fp32_sums else 2) * shard + 12 * shard,
        "zero3": (18 if fp32_sums else 16) * shard,
        "fsdp2": 16 * shard,
    }[form]
    states += BUCKETS[form] + LIVE.get(form, 0.0)
    more = max(model.text.activations(tokens) for model in models)
    host = 0.0
    if offload:
        states -= {"none": 12 * total, "fsdp2": 8 * shard}.get(form, 12 * shard)
        host = {"none": 12.0 * total * gpus, "fsdp2": 12.0 * total}.get(form, 18.0 * total)
    elif form.startswith("zero"):
        more = max(more, 4 * largest / gpus)
    return Need(states, states + more + CONTEXT, host)


def table(
    stage: str, policy: str, gpus: Sequence[int], memory: float, tokens: int
) -> tuple[list[str], list[list[str]]]:
    """(headings, rows) of GB while training, by number of GPUs and form; ``*``: more than ``memory`` GB."""
    models, columns = trained(stage, policy), [(form, False) for form in FORMS]
    columns.insert(FORMS.index("zero2") + 1, ("zero2", True))
    rows = []
    for count in gpus:
        needs = [need(models, form, count, tokens, offload=offload).training / 1e9 for form, offload in columns]
        rows.append([str(count), *(f"{gb:.1f}{'*' if gb > memory else ''}" for gb in needs)])
    host = need(models, "zero2", 1, tokens, offload=True).host / 1e9
    heads = [f"{form}, offload ({host:.0f} GB of the host)" if offload else form for form, offload in columns]
    return ["GPUs", *heads], rows
