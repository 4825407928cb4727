"""Dimensions of the models and of a pack, as far as the plan's arithmetic goes: from a config.json, without weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from prism_fast.records import DataError


class Text(NamedTuple):
    """Of a Qwen3-VL language model, as config.json has them; ``experts``: of every layer."""

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
    def layer(self) -> int:
        """Parameters of a layer."""
        heads = self.heads + self.kv_heads
        attention = 2 * self.hidden * heads * self.head_dim + 2 * self.head_dim  # q and o, k and v; norms of q and k
        router = self.hidden * self.experts if self.experts > 1 else 0
        return attention + 3 * self.hidden * self.intermediate * self.experts + router + 2 * self.hidden

    @property
    def embedding(self) -> int:
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        return self.embedding * (1 if self.tied else 2) + self.layers * self.layer + self.hidden

    @property
    def active(self) -> int:
        """Parameters of all layers that a token meets."""
        idle = 3 * self.hidden * self.intermediate * (self.experts - self.top_k)
        return self.layers * (self.layer - idle)


class Vision(NamedTuple):
    """Of its vision tower; ``taps``: layers whose features go into the language model (DeepStack)."""

    hidden: int
    depth: int
    intermediate: int
    out: int
    taps: int = 3
    positions: int = 2304
    patch: int = 3 * 2 * 16 * 16  # channels, frames, height, width
    merge: int = 4  # patches that become one token
    heads: int = 16

    @property
    def block(self) -> int:
        """Parameters of a block."""
        h, i = self.hidden, self.intermediate
        return (3 * h * h + 3 * h) + (h * h + h) + (h * i + i) + (i * h + h) + 4 * h

    @property
    def parameters(self) -> int:
        h, wide = self.hidden, self.merge * self.hidden
        mlp = (wide * wide + wide) + (wide * self.out + self.out)
        mergers = (mlp + 2 * h) + self.taps * (mlp + 2 * wide)
        return self.patch * h + h + self.positions * h + self.depth * self.block + mergers


class Model(NamedTuple):
    text: Text
    vision: Vision
    head: int = 0  # numbers of the discriminator's, which has no LM head in its passes

    @property
    def parameters(self) -> int:
        return self.text.parameters + self.vision.parameters + self.head

    @classmethod
    def of(cls, config: Any) -> Model:
        """From what config.json holds: a dictionary, or transformers' object. Raises DataError where it lacks one."""
        whole = config if isinstance(config, dict) else config.to_dict()
        try:
            t, v = whole["text_config"], whole["vision_config"]
            experts = t.get("num_experts") or t.get("num_local_experts") or 1  # as published, as transformers writes it
            text = Text(
                t["hidden_size"], t["num_hidden_layers"],
                t["moe_intermediate_size"] if experts > 1 else t["intermediate_size"],
                t["num_attention_heads"], t["num_key_value_heads"], bool(whole.get("tie_word_embeddings", False)),
                experts, t["num_experts_per_tok"] if experts > 1 else 1, t["vocab_size"],
                t.get("head_dim") or t["hidden_size"] // t["num_attention_heads"],
            )  # fmt: skip
            merge = v["spatial_merge_size"]
            vision = Vision(
                v["hidden_size"], v["depth"], v["intermediate_size"], v["out_hidden_size"],
                len(v["deepstack_visual_indexes"]), v["num_position_embeddings"],
                v["in_channels"] * v["temporal_patch_size"] * v["patch_size"] ** 2, merge * merge, v["num_heads"],
            )  # fmt: skip
        except (KeyError, TypeError) as error:
            raise DataError(f"config.json: {error}: not there; expected the configuration of a Qwen3-VL") from None
        return cls(text, vision, text.hidden if experts > 1 else 0)


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


class Tree(NamedTuple):
    """Of a pack: a prompt of ``root`` tokens, ``image`` of them an image's, and the branches behind it."""

    root: int
    branches: Sequence[int]
    image: int = 0


class Pack(NamedTuple):
    """What a pass over a pack depends on. Packs add up where they are passed one after another."""

    tokens: float
    predicted: float  # rows of the LM head
    patches: float
    segments: float
    keys: float  # that a branch's copy of its root's and its own has, of all branches: a CPU's attention makes them
    scores: float  # of all branches: its tokens times these keys, which a CPU's attention masks
    pairs: float  # (query, key) that attention visits, at half of a causal square
    patch_pairs: float

    @classmethod
    def of(cls, trees: Iterable[Tree], merge: int = 4) -> Pack:
        """``merge``: patches that become one token."""
        total = [0.0] * len(cls._fields)
        for root, branches, image in trees:
            patches, keys = merge * image, [root + branch for branch in branches]
            own = (
                root + sum(branches), sum(branches), patches, 1 + len(branches), sum(keys),
                sum(branch * key for branch, key in zip(branches, keys)),
                root * root / 2 + sum(branch * (root + branch / 2) for branch in branches), patches * patches,
            )  # fmt: skip
            total = [held + more for held, more in zip(total, own)]
        return cls(*total)

    def times(self, factor: float) -> Pack:
        return Pack(*(factor * value for value in self))
