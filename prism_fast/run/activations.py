"""Bytes that a pass over a pack keeps and needs besides weights, gradients and the optimizer's state: by count.

What autograd keeps of a layer is what its operators save: `KEPT` holds numbers a row, counted operator by operator on
tiny models (tests/trainer/run/test_activations.py), and exact in all dimensions. A peak is one of two moments: the LM
head's, when all that the layers keep is there beside a chunk of logits, or the first of the backward, the last layer's.

Dimensions: H hidden, I intermediate (times the experts that a token takes), Q = Hq D and K = Hkv D of the heads.
"""

from __future__ import annotations

from typing import NamedTuple

from prism_fast.run.dimensions import Model, Pack, Text, Vision

CPU_CHUNK = 48 << 20  # bytes of logits, as prism_kernels/linear_logprob/plan.py has them
GPU_CHUNK_DIVISOR = 30  # of the GPU's memory
FLASH_ROWS = 128  # to which FlashAttention's backward rounds every sequence up


class Numbers(NamedTuple):
    """A row's of a layer, in units of the model's dtype, by what they are as wide as."""

    hidden: float
    inner: float
    query: float = 0.0
    key: float = 0.0
    copied: float = 0.0  # a CPU's attention: keys and values once more for every branch, with its root's

    def of(self, text: Text, pack: Pack) -> float:
        query, key = text.heads * text.head_dim, text.kv_heads * text.head_dim
        row = self.hidden * text.hidden + self.inner * text.intermediate * text.top_k + self.query * query
        return pack.tokens * (row + self.key * key) + pack.keys * self.copied * key


# (device, experts, bytes of a number; 0: any) -> what is kept besides the layer's input, what its backward needs more.
KEPT: dict[tuple[str, bool, int], tuple[Numbers, Numbers]] = {
    ("cuda", False, 0): (Numbers(3, 3, 3, 3), Numbers(0, 2)),
    ("cuda", True, 0): (Numbers(3, 2, 3, 3), Numbers(2, 4)),
    ("cpu", True, 0): (Numbers(3, 2, 4, 3, 2), Numbers(4, 2.25)),
    # The definitions, which a policy on a CPU runs for their bits; in bf16 they keep what they compute in fp32.
    ("cpu", False, 4): (Numbers(5, 4, 5, 4, 2), Numbers(0, 2)),
    ("cpu", False, 2): (Numbers(10, 7, 7, 6, 2), Numbers(0, 5)),
}
PER_HEAD = {"cuda": 4, "cpu": 10}  # bytes a row: log-sum-exp, and on a CPU what finds NaN
BLOCK = {"cuda": (10, 2), "cpu": (11, 2)}  # of the vision tower's, in units of its dtype: hidden, intermediate
TOWER = (
    5  # hidden numbers a patch of patches, position embeddings and mergers, behind which 380 bytes lie for positions
)
POSITIONS = 380


class Activations(NamedTuple):
    """Bytes of one pass. ``flash`` is within the backward of a layer, and not a part of the sum."""

    layers: float  # what all layers keep, or their inputs under activation checkpointing
    vision: float
    throughout: float  # rotation, and on a CPU a mask
    inside: float  # a layer's backward, with what a recompute has open, beside gradients of the head
    head: float  # the LM head: chunk of logits, gradients of its weight and rows, what the last norm has made
    flash: float  # fp32 sums of the queries' gradients in FlashAttention's backward

    @property
    def peak(self) -> float:
        return self.layers + self.vision + self.throughout + max(self.inside, self.head)


def activations(
    model: Model, pack: Pack, *, device: str, size: int, checkpointing: bool, chunk: float = CPU_CHUNK
) -> Activations:
    """``device``: cpu or cuda; ``size``: bytes of a number; ``chunk``: of logits, on a GPU its memory / 30."""
    text = model.text
    kept, transient = _of_layer(text, pack, device, size)
    inputs = size * pack.tokens * text.hidden
    throughout = 2.0 * size * pack.tokens * text.head_dim
    if device == "cpu":  # a mask of bools for all layers, and of each the one that torch makes of it
        throughout += pack.scores
        kept += size * pack.scores
    flash = 4.0 * (pack.tokens + FLASH_ROWS * pack.segments) * text.heads * text.head_dim if device == "cuda" else 0.0
    inside = inputs + max(transient, _attention(text, pack, flash, size, kept))
    layers = text.layers * inputs
    if checkpointing:
        inside += kept + inputs
    else:
        layers += text.layers * kept
    head, gradients = _head(model, pack, device, size, chunk)
    head += (5 if device == "cpu" and size == 2 else 2) * inputs  # the last norm's, in a definition wider
    vision = _tower(model.vision, pack, device, size, checkpointing)
    return Activations(layers, vision, throughout, inside + gradients, head, flash)


def _of_layer(text: Text, pack: Pack, device: str, size: int) -> tuple[float, float]:
    experts = text.experts > 1
    kept, transient = KEPT.get((device, experts, 0)) or KEPT[device, experts, size]
    return size * kept.of(text, pack) + PER_HEAD[device] * pack.tokens * text.heads, size * transient.of(text, pack)


def _attention(text: Text, pack: Pack, flash: float, size: int, kept: float) -> float:
    """What the backward of a GPU's attention needs beyond what is kept: by then the MLP's part of that is gone."""
    if not flash:
        return 0.0
    query, key = text.heads * text.head_dim, text.kv_heads * text.head_dim
    gradients = size * pack.tokens * (2 * 3 * query + 2 * 2 * key)  # two parts; of keys one for each query head
    gone = size * pack.tokens * (2 * text.hidden + (3 if text.experts == 1 else 2) * text.intermediate * text.top_k)
    return flash + gradients - min(gone, kept)


def _tower(vision: Vision, pack: Pack, device: str, size: int, checkpointing: bool) -> float:
    wide, inner = BLOCK[device]
    block = size * (wide * vision.hidden + inner * vision.intermediate) + 5 * vision.heads
    blocks = vision.depth * (size * vision.hidden if checkpointing else block)
    pixels = (4 if size == 4 else 4 + size) * vision.patch  # they come as fp32
    return pack.patches * (blocks + size * (TOWER + 2 * vision.taps) * vision.hidden + POSITIONS + pixels)


def _head(model: Model, pack: Pack, device: str, size: int, chunk: float) -> tuple[float, float]:
    """(bytes at the LM head, bytes of its gradients that wait for the backward)."""
    if model.head:
        return 0.0, 0.0
    text = model.text
    rows, weight, logits = pack.predicted * text.hidden, text.embedding, 4.0 * pack.predicted * text.vocab
    # The fp32 sum over chunks is rounded when the chunk is gone; a CPU's fp32 is its own result.
    rounded = 0 if size == 4 or logits <= chunk else size
    at_head = (4.0 + size) * rows + max(min(chunk, logits) + 4.0 * weight, (4.0 + rounded) * weight)
    # On a GPU the loss's gradient multiplies a copy, as nobody may look whether it is 1.
    return at_head, size * weight * (1 if device == "cpu" else 2)
