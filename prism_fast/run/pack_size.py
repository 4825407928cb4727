"""run.tokens_per_pack = auto: the largest pack whose step fits the memory that is free, by the plan's arithmetic."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from prism_fast.config import AlignConfig, ModelConfig, OptimizerConfig, RLVRConfig, SFTConfig, WarmupConfig
from prism_fast.records import DataError
from prism_fast.run.dimensions import Model, Pack, Tree
from prism_fast.run.memory import Setup, Trained, largest, need

StageConfig = SFTConfig | WarmupConfig | AlignConfig | RLVRConfig
MOST = {"cpu": 16_384, "cuda": 65_536}  # tokens: a larger pack is hardly faster
PART = 0.9  # of the memory that is free; the rest is for what no formula knows
STEP = 256
IMAGES = 0.25  # share of a pack's tokens that are taken to be images', whatever the data have
M_MMAP_THRESHOLD, BLOCK = -3, 1 << 20


class Lengths(NamedTuple):
    """Limits of a stage: tokens of a prompt, of what follows it, and of the largest tree that must fit in one piece."""

    prompt: int
    branch: int
    longest: int

    @classmethod
    def of(cls, settings: StageConfig) -> Lengths:
        prompt = settings.data.max_prompt_tokens
        if isinstance(settings, AlignConfig):  # the teacher's parts go with every part of a tree, beside a student's
            branch = max(settings.rollout.max_response_tokens, settings.max_part_tokens)
            policy = prompt + settings.rollout.max_response_tokens
            return cls(prompt, branch, max(policy, prompt + 3 * settings.max_part_tokens))
        if isinstance(settings, RLVRConfig):
            branch = settings.rollout.max_response_tokens
            return cls(prompt, branch, prompt + branch)
        whole, parts = settings.max_tokens, 2 if isinstance(settings, WarmupConfig) else 1
        return cls(min(prompt, whole), whole, parts * whole)

    def pack(self, tokens: int) -> Pack:
        """A full one of the longest branches, which a CPU's masks are largest for, and of many images."""
        root = min(self.prompt, max(1, tokens // 2))
        tree = Tree(root, [max(1, min(self.branch, tokens - root))])
        full = Pack.of([tree])
        return full.times(tokens / full.tokens)._replace(patches=4 * IMAGES * tokens)


def choose(settings: StageConfig, modules: Mapping[str, Any], free: int, processes: int) -> int:
    """For a run of so many processes; ``free``: bytes that each of them finds beside the loaded ``modules``.

    On a CPU they are taken to share the host.
    """
    module = next(iter(modules.values()))
    memory = torch.cuda.get_device_properties(module.device).total_memory if module.device.type == "cuda" else 0
    setup = setup_of(settings, module, processes, memory)
    room = held_bytes(modules) + PART * free
    if setup.device == "cpu":
        copied = copied_bytes(modules) if settings.run.save_in_background else 0
        room = held_bytes(modules) + max(0.0, PART * free - copied) / processes
    trained = [trained_as(getattr(settings, name), Model.of(m.model.config), name) for name, m in modules.items()]
    return pack_limit(trained, setup, Lengths.of(settings), room)


def pack_limit(models: Sequence[Trained], setup: Setup, lengths: Lengths, room: float) -> int:
    """The largest tokens_per_pack with which a process needs at most ``room`` bytes in training.

    At most `MOST`, or what the longest tree takes; DataError where not even that fits.
    """
    most = max(MOST[setup.device], -(-lengths.longest // STEP) * STEP)
    context = need(models, setup, Pack.of([])).context if setup.device == "cuda" else 0.0
    found = largest(lambda n: need(models, setup, lengths.pack(n)).training - context, room, most, STEP)
    if found < min(lengths.longest, most):
        least = need(models, setup, lengths.pack(lengths.longest)).training - context
        raise DataError(
            f"run.tokens_per_pack = auto: by count {room / 1e9:.1f} GB hold packs of {found:,} tokens, and the longest "
            f"tree that the limits of lengths allow has {lengths.longest:,}, which takes {least / 1e9:.1f} GB; lower "
            "the limits, set activation_checkpointing=true, shard or offload, or set a number"
        )
    return found


def setup_of(settings: StageConfig, module: Any, processes: int, memory: float) -> Setup:
    """How a run holds its models; ``module``: the first of them, ``memory``: bytes of a whole GPU."""
    optimizer = optimizer_of(settings)
    return Setup(
        settings.cluster.sharding,
        processes,
        optimizer.offload,
        optimizer.moments,
        device=module.device.type,
        size=module.dtype.itemsize,
        memory=memory,
    )


def optimizer_of(settings: StageConfig) -> OptimizerConfig:
    """The first of its optimizers: the policy's, where there are two."""
    values = (getattr(settings, name) for name in type(settings).model_fields)
    return next(value for value in values if isinstance(value, OptimizerConfig))


def trained_as(settings: ModelConfig, model: Model, name: str) -> Trained:
    """``name``: of its settings in the stage's."""
    frozen = settings.freeze_vision, settings.freeze_embeddings
    return Trained(model, settings.activation_checkpointing, *frozen, reference=name == "reference")


def held_bytes(modules: Mapping[str, Any]) -> int:
    """Of weights that are there already, each tied one once."""
    return sum(p.numel() * p.element_size() for module in modules.values() for p in module.parameters())


def copied_bytes(modules: Mapping[str, Any]) -> int:
    """Of a checkpoint that is being written: all weights, and of what is trained the moments and masters, in fp32."""
    trained = [p for m in modules.values() for p in m.parameters() if p.requires_grad]
    return held_bytes(modules) + sum(p.numel() * (8 if p.element_size() >= 4 else 12) for p in trained)


def give_freed_blocks_back() -> bool:
    """From now on blocks of a megabyte and more go back to the system when they are freed; whether they do.

    glibc learns from the first large ones to keep blocks of up to 32 MiB in its heap, which then falls to pieces: the
    peak of a step was up to 1.36 times what its tensors took (dev/LOG.md), and no count could have told.
    """
    try:
        return bool(ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, BLOCK))
    except (OSError, AttributeError):  # not glibc: it has ways of its own
        return False
