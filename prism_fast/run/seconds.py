"""Predicted seconds of the parts of a step on GPUs, from operations and bytes: by count, nothing here is measured.

A part takes the longer of its products at a share of the datasheet's rate and its bytes at a share of the bandwidth;
the shares are `Efficiency`, an assumption that `prism-fast plan` takes others for. Launches, waits and imbalance
between ranks are in the shares too.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from prism_fast.run.dimensions import Model, Pack, Tree
from prism_fast.run.memory import Need, Setup, Trained, need


class GPU(NamedTuple):
    """By its datasheet, of the SXM module: dense bf16; links and bus in one direction."""

    memory: float  # bytes
    flops: float  # a second
    bandwidth: float  # bytes a second of its memory
    link: float  # bytes a second to the other GPUs of a node
    bus: float  # bytes a second to the host


GPUS = {
    "a100": GPU(80e9, 312e12, 2.039e12, 300e9, 32e9),
    "h100": GPU(80e9, 989e12, 3.35e12, 450e9, 64e9),
    "h200": GPU(141e9, 989e12, 4.8e12, 450e9, 64e9),
    "b200": GPU(180e9, 2250e12, 7.7e12, 900e9, 64e9),
}
NODE = 8  # GPUs that links join
NETWORK = 50e9  # bytes a second of a GPU to other nodes: 400 Gbit/s each
HOST_BANDWIDTH = 100e9  # bytes a second of host memory, of each process that updates there


class Efficiency(NamedTuple):
    """Shares that are reached, and what the host needs: assumptions."""

    flops: float = 0.5  # of dense bf16, over whole layers with what lies between their products
    bytes: float = 0.8  # of memory, links and bus
    prompt: float = 0.02  # seconds of the host: an image decoded and resized, tokens
    response: float = 0.002  # decoded, judged, packed


class Batch(NamedTuple):
    """Of one step, tokens as means; ``longest``: the limit of a response, which the last one is taken to reach."""

    prompts: int
    samples: int  # responses of each
    prompt: int
    image: int  # tokens of the prompt that are an image's
    response: int
    longest: int
    sampled: bool = True  # in the step: else they come with the data
    pair: bool = False  # a teacher's response beside each prompt's, for a discriminator

    def pack(self, tokens: int, extra: int = 0) -> Pack:
        """All packs of the batch in one: a tree's root is repeated in every pack that it is split over."""
        branches = self.samples + extra
        split = max(1, math.ceil(branches * self.response / max(1, tokens - self.prompt)))
        each = Tree(self.prompt, [self.response] * max(1, round(branches / split)), self.image)
        return Pack.of([each]).times(self.prompts * split * branches / (split * len(each.branches)))


class Work(NamedTuple):
    """FLOPs of one forward, 2 for a multiply-add; ``repeated``: of layers and blocks, which a recompute does again."""

    repeated: float
    other: float


def forward(model: Model, pack: Pack) -> Work:
    """Vision tower, projections, attention, the experts that a token takes, LM head."""
    text, vision = model.text, model.vision
    attention = 4 * pack.pairs * text.layers * text.heads * text.head_dim
    blocks = pack.patches * vision.depth * 2 * (4 * vision.hidden**2 + 2 * vision.hidden * vision.intermediate)
    blocks += 4 * pack.patch_pairs * vision.depth * vision.hidden
    wide = vision.merge * vision.hidden
    mergers = 2 * (1 + vision.taps) * pack.patches / vision.merge * (wide * wide + wide * vision.out)
    head = 0.0 if model.head else 2.0 * pack.predicted * text.embedding
    patches = 2 * pack.patches * vision.patch * vision.hidden
    return Work(2 * pack.tokens * text.active + attention + blocks, mergers + head + patches)


def trained(one: Trained, pack: Pack) -> float:
    """FLOPs of a forward and its backward."""
    work = forward(one.model, pack)
    return 3 * (work.repeated + work.other) + (work.repeated if one.checkpointing else 0.0)


def cache(model: Model, size: int = 2) -> float:
    """Bytes of a token's keys and values in all layers."""
    return 2.0 * model.text.layers * model.text.kv_heads * model.text.head_dim * size


def rollout(model: Model, batch: Batch, gpus: int, rows: int, gpu: GPU, e: Efficiency) -> float:
    """Seconds of sampling: prefill, then tokens of ``rows`` responses at a time, and the longest one to its end.

    Every token reads the weights once for all rows, and of each row its own cache; of a group its prompt's once.
    """
    text, own = model.text, batch.prompts * batch.samples / gpus
    prompts = max(batch.prompts / gpus, own / batch.samples)
    start = forward(model, Pack.of([Tree(batch.prompt, [], batch.image)]))
    prefill = prompts * (start.repeated + start.other) / (gpu.flops * e.flops)
    weights = text.active + text.embedding

    def token(active: float) -> float:
        keys = active * batch.response / 2 + math.ceil(active / batch.samples) * batch.prompt
        read = (2 * weights + keys * cache(model)) / (gpu.bandwidth * e.bytes)
        return max(read, 2 * weights * active / (gpu.flops * e.flops))

    active = min(rows, own)
    tail = max(0, batch.longest - batch.response)
    return prefill + own * batch.response / active * token(active) + tail * token(1)


def optimizer(count: int, setup: Setup, gpu: GPU, e: Efficiency) -> float:
    """Seconds of an update: gradient, weight, master and moments, read and written, and the gradient's norm."""
    share = count if setup.form == "none" else count / setup.gpus
    moved = {"none": 34.0 if setup.fused or setup.moments == "bfloat16" else 54.0}.get(setup.form, 44.0)
    if setup.offload:
        return share * max(6 / (gpu.bus * e.bytes), 30 / (HOST_BANDWIDTH * e.bytes))
    return share * moved / (gpu.bandwidth * e.bytes)


def exchange(count: int, setup: Setup, packs: float, gpu: GPU, e: Efficiency) -> float:
    """Seconds of collectives, as docs/scaling.md counts them, if none of it is hidden; ``packs``: of a rank."""
    n = setup.gpus
    sent = {"none": 8.0, "zero1": 6.0, "zero2": 4 * packs + 2, "zero3": 6 * packs, "fsdp2": 8 * packs}[setup.form]
    link = gpu.link if n <= NODE else min(gpu.link, NETWORK)
    return sent * count * (n - 1) / n / (link * e.bytes)


class Parts(NamedTuple):
    """Seconds of a step, by part; 0 where there is none."""

    rollout: float
    score: float  # the discriminator's forward
    update: float  # everything else of both models' gradients
    optimizer: float
    exchange: float
    host: float

    @property
    def total(self) -> float:
        return sum(self)


def parts(models: tuple[Trained, ...], setup: Setup, batch: Batch, tokens: int, gpu: GPU, e: Efficiency) -> Parts:
    """Of one step; the first of ``models`` is the one that samples, a discriminator comes after it."""
    rate, n = gpu.flops * e.flops, setup.gpus
    score = update = step = sent = 0.0
    for one in models:
        judge = bool(one.model.head)
        pack = batch.pack(tokens, extra=1 if judge and batch.pair else 0)
        work = forward(one.model, pack)
        first = (work.repeated + work.other) / rate / n
        if one.reference:
            update += first
            continue
        scored = judge and batch.sampled
        score += first if scored else 0.0
        update += trained(one, pack) / rate / n - (first if scored else 0.0)
        step += optimizer(one.count, setup, gpu, e)
        sent += exchange(one.count, setup, max(1.0, pack.tokens / tokens / n), gpu, e) if n > 1 else 0.0
    sampled = 0.0
    if batch.sampled:
        sampled = rollout(models[0].model, batch, n, rows_at_once(models, setup, batch, gpu), gpu, e)
    host = batch.prompts * e.prompt + batch.prompts * batch.samples * e.response
    return Parts(sampled, score, update, step, sent, host)


def rows_at_once(models: tuple[Trained, ...], setup: Setup, batch: Batch, gpu: GPU) -> int:
    """Responses for whose cache, at half of their limit, a GPU has room beside its states: at most 512, as the built-in
    sampler takes."""
    held: Need = need(models, setup, Pack.of([]))
    room = 0.85 * (gpu.memory - held.states - held.context)
    each = cache(models[0].model, setup.size) * (batch.longest / 2 + batch.prompt / batch.samples)
    own = math.ceil(batch.prompts * batch.samples / setup.gpus)
    return max(1, min(512, own, int(room // each)))
