"""Who answers a step's prompts: the trainer's own sampler, or an engine behind the same four calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from torch import Tensor

from prism_fast.config import SamplerStart, Sampling
from prism_fast.data.chat import Chat
from prism_fast.models.backbone import local_directory
from prism_fast.models.policy import Policy
from prism_fast.records import DataError, Prompt, Rollout
from prism_fast.steps.sampler_builtin import generate as generate
from prism_fast.steps.sampler_engine import EngineSampler
from prism_fast.steps.update import Backprop


class Answers(Protocol):
    """As much of a sampler as a step needs."""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, *, seed: int) -> Rollout: ...


class Sampler(Protocol):
    """Samples from the policy that an updater trains. Each is a call of all processes.

    ``Rollout.logprob`` is of the distribution that was sampled from: the policy's, over the words that it may say, at
    the temperature. So there is no other knob: top-p and its like would sample from another distribution.
    """

    @property
    def step(self) -> int | None:
        """That its weights came with; None before the first ``update``: they are those that the run begins with."""
        ...

    @property
    def apart(self) -> bool:
        """Whether the next ``generate`` leaves the trainer's weights alone, so that they may train meanwhile."""
        ...

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        seed: int,
        progress: Callable[[int], None] | None = None,
    ) -> Rollout:
        """``sampling.samples`` responses for each prompt; B = len(prompts) * samples, by prompt.

        ``progress`` is told the number of this process's finished responses.
        """
        ...

    def update(self, weights: Iterable[tuple[str, Tensor]], step: int) -> None:
        """From here on ``generate`` samples from these weights, `Updater.stream` after ``step`` steps."""
        ...

    def rest(self) -> None:
        """Gives an accelerator's memory back until the next ``update`` or ``generate``."""
        ...

    def close(self) -> None: ...


class BuiltinSampler:
    """`generate` on the trainer's own weights, so that nothing is to be updated: exact, and needs no other package."""

    apart = False

    def __init__(self, updater: Backprop, chat: Chat):
        self.updater, self.chat = updater, chat
        self.step: int | None = None

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        seed: int,
        progress: Callable[[int], None] | None = None,
    ) -> Rollout:
        with self.updater.gathered():
            return generate(self.updater.module, self.chat, prompts, sampling, seed=seed, progress=progress)

    def update(self, weights: Iterable[tuple[str, Tensor]], step: int) -> None:
        self.step = step  # none is taken from the stream, in any process

    def rest(self) -> None:
        pass

    def close(self) -> None:
        pass


class SnapshotSampler:
    """`generate` on a copy of the weights, whole in every process, which stays as it is while the trainer's change.

    ``policy``: the copy, of weights that the run begins with.
    """

    apart = True

    def __init__(self, policy: Policy, chat: Chat):
        self.policy, self.chat = policy.requires_grad_(False), chat
        self.step: int | None = None

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        seed: int,
        progress: Callable[[int], None] | None = None,
    ) -> Rollout:
        return generate(self.policy, self.chat, prompts, sampling, seed=seed, progress=progress)

    def update(self, weights: Iterable[tuple[str, Tensor]], step: int) -> None:
        own = dict(self.policy.named_parameters())
        for name, value in weights:
            own.pop(name).copy_(value)
        if own:
            raise RuntimeError(f"{len(own)} weights did not come, such as {min(own)}")
        self.step = step

    def rest(self) -> None:
        pass

    def close(self) -> None:
        pass


def open_sampler(
    start: SamplerStart, updater: Backprop, chat: Chat, saved: Path | None = None, say: Callable[[str], None] = print
) -> Sampler:
    """The sampler that a configuration names. Raises DataError where it cannot run.

    ``saved``: a checkpoint's folder of the model, where ``updater`` has its weights; ``say`` is told warnings.
    """
    folder = local_directory(saved or start.folder)
    if start.engine == "builtin" and start.overlap:
        return _snapshot(folder, updater, chat)
    if start.engine == "builtin":
        return BuiltinSampler(updater, chat)
    if find_spec(start.engine) is None:
        raise DataError(
            f"engine = {start.engine}: needs the package {start.engine}, which is not installed; "
            f"pip install 'prism-fast[{start.engine}]', or set engine=builtin"
        )
    from prism_fast.steps.sampler_vllm import VLLMEngine

    return EngineSampler(
        VLLMEngine(folder, updater.module, chat, start.vllm, longest=start.longest), updater, chat, say
    )


def _snapshot(folder: Path, updater: Backprop, chat: Chat) -> SnapshotSampler:
    policy: Policy = updater.module
    if policy.device.type == "cuda":
        raise DataError(
            "rollout.overlap = 1: on a GPU the built-in sampler would be in the trainer's way, for memory and for "
            "every kernel, and nobody has measured it; set rollout.engine=vllm, or rollout.overlap=0"
        )
    dtype = getattr(updater, "compute", policy.dtype)  # a sharded policy's parameters are fp32
    words = {"forbidden": chat.forbidden_ids, "words": chat.vocab_size}
    return SnapshotSampler(Policy.load(folder, **words, dtype=dtype, device=policy.device), chat)
