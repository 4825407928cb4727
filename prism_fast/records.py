"""One record type per arrow of the flow.

    data --Sample--> chat --Prompt--> sampler --Rollout--> discriminator's step --Scores--> advantage --(B,)--> loss
    both models read PackedTree

Dimensions: T tokens of a pack, P prompt tokens, S segments, R predicted tokens, B responses, G prompts (groups).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prism_fast import DataError as DataError  # part of this vocabulary; defined where no torch is needed
from prism_fast import metric_names as names
from prism_kernels import QueryRows, RoutingStats, TreeLayout


@dataclass(frozen=True)
class Message:
    """One turn. ``content`` holds one ``<image>`` placeholder per image, in order.

    >>> Message("user", "<image>What is the sum?")
    """

    role: str  # "system" | "user" | "assistant"
    content: str


@dataclass(frozen=True)
class ImageRef:
    """An image that has not been opened yet: encoded bytes, or a path (resolved against the data file's folder)."""

    data: bytes | None = None
    path: Path | None = None


class Seen(NamedTuple):
    """Of a prompt whose images one process has decoded, what the others need to plan with it.

    >>> Seen(grid=[[1, 8, 12]], image_keys=prompt.image_keys)
    """

    grid: list[list[int]]  # Prompt.image_grid_thw
    image_keys: tuple[bytes, ...]  # Prompt.image_keys


@dataclass(frozen=True)
class Sample:
    """One validated record of any of the four published files (docs/method.md 6). Fields a format lacks are None.

    >>> Sample(place="train.jsonl:3", messages=(Message("user", "<image>Sum?"),),
    ...        images=(ImageRef(path=Path("3.png")),),
    ...        response="<caption>3, 4</caption><think>3 + 4 = 7</think><answer>7</answer>")
    """

    place: str  # "file:record", for messages to a person
    messages: tuple[Message, ...]  # the prompt: all turns before the response
    images: tuple[ImageRef, ...] = ()
    response: str | None = None  # SFT demonstration
    teacher_caption: str | None = None  # perception part, tags included
    teacher_reasoning: str | None = None  # reasoning part (think and answer elements), tags included
    student_caption: str | None = None  # warm-up pairs
    student_reasoning: str | None = None
    gold: str | None = None  # reward_model.ground_truth
    equivalents: tuple[str, ...] = ()  # reward_model.equivalent_answers
    question_type: str = "all"  # extra_info.question_type where there is one, else data_source
    data_source: str = ""
    pass_rate: float | None = None  # extra_info.pass_rate: share of a policy's responses that are right
    seen: Seen | None = None  # what another process has found out about the prompt's images


@dataclass(frozen=True)
class Prompt:
    """A rendered and tokenised prompt, images preprocessed; ends with the start of the assistant's turn.

    ``key`` hashes token ids **and** images: two prompts share a root only where both are equal (docs/method.md 7).
    """

    input_ids: Tensor  # (P,) int64, image placeholders expanded to one token per merged patch
    pixel_values: Tensor | None  # (patches, channels * temporal * patch * patch) fp32
    image_grid_thw: Tensor | None  # (images, 3) int64, in patches
    key: bytes = b""
    place: str = ""  # "file:record" of the sample, for messages to a person
    decode: Callable[[], Tensor] | None = None  # gives the pixels, where another process has looked at them
    image_keys: tuple[bytes, ...] = ()  # a hash of each image's file; (): equal images are not told

    def __len__(self) -> int:
        return self.input_ids.numel()

    def pixels(self) -> Tensor | None:
        """``pixel_values``, decoded now where this process does not hold them. May raise DataError."""
        return self.pixel_values if self.decode is None else self.decode()


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A copy for which the host does not wait. From pageable memory it would: for all that a GPU has still to do."""
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


@dataclass(frozen=True)
class PackedTree:
    """Roots and branches in one token stream without padding: ``[root][branch][branch]...[root][branch]...``.

    A branch's first token is predicted by the last token of its root; every branch restarts its positions after the
    root. Two prompts of lengths 3 and 2 with branches (2, 1) and (2)::

        input_ids       a a a | b b | c | d d | e e          T = 10
        segment         0 0 0   1 1   2   3 3   4 4          prefix = [-1, 0, 0, -1, 3]
        position (t)    0 1 2   3 4   3   0 1   2 3
        target_row              3 4   5         8 9          (R = 5)
        predict_row             2 3   2         7 8          row whose hidden state predicts target_row's token
        sequence_start  [0, 2, 3, 5]                         branches, as offsets into the R predicted tokens
        readout_row     [4, 5, 9]                            last token of every branch
        label           [0, 1, 2]                            the caller's number of every branch

    What the caller has by label is had by branch as ``advantages[packed.label]``, and what a model gives by branch goes
    back as ``score_of_part[packed.label] = score``; take the label before ``to(device)`` where these are on the host.
    """

    input_ids: Tensor  # (T,) int64
    position_ids: Tensor  # (3, T) int64: t, h, w
    layout: TreeLayout
    segment_kind: Tensor  # (T,) int32, KIND_* of pack/tree.py
    pixel_values: Tensor | None  # (patches, D) fp32
    image_grid_thw: Tensor | None  # (images, 3) int64, always on the host, which plans the vision tower's work by it
    image_row: Tensor  # (image tokens,) int64: rows of the stream that hold image features
    target_row: Tensor  # (R,) int64
    predict_row: Tensor  # (R,) int64
    sequence_start: Tensor  # (branches + 1,) int32
    readout: QueryRows  # readout_row, which the host keeps too
    label: Tensor  # (branches,) int64: whose a branch is, as its tree says
    image_feature: Tensor | None = None  # (image tokens,) int64: which feature a row of image_row takes, as an image
    # that stands in several places is there once; None: each takes its own, in order

    @property
    def num_tokens(self) -> int:
        return self.input_ids.numel()

    @property
    def readout_row(self) -> Tensor:
        """(branches,) int64."""
        return self.readout.row

    @property
    def target_ids(self) -> Tensor:
        """(R,) int64: the predicted tokens."""
        return self.input_ids[self.target_row]

    def branch_of(self, labels: int) -> Tensor:
        """(labels,) int64: the branch that carries each label below ``labels``, -1 where none does."""
        branch = torch.full((labels,), -1, device=self.label.device)
        branch[self.label] = torch.arange(len(self.label), device=self.label.device)
        return branch

    def pinned(self) -> PackedTree:
        """In page-locked memory, where a GPU's copies start from; needs CUDA."""
        held = {name: value.pin_memory() for name, value in vars(self).items() if isinstance(value, Tensor)}
        return PackedTree(**{**vars(self), **held})

    def to(self, device: torch.device | str) -> PackedTree:
        """On a device, for which the host does not wait. What is small enough for that is copied as it is."""
        moved = {
            name: to_device(value, device) if isinstance(value, Tensor) else value.to(device, non_blocking=True)
            for name, value in vars(self).items()
            if isinstance(value, (Tensor, TreeLayout, QueryRows)) and name != "image_grid_thw"
        }
        return PackedTree(**{**vars(self), **moved})


@dataclass(frozen=True)
class Rollout:
    """N sampled responses of each of G prompts, flat in group order (B = G * N).

    >>> Rollout(prompts=[p], group=torch.tensor([0, 0]), response_ids=[ids0, ids1], logprob=[lp0, lp1],
    ...         text=["<caption>...", "..."], finished=torch.tensor([True, False]))
    """

    prompts: Sequence[Prompt]  # G
    group: Tensor  # (B,) int64: index into prompts
    response_ids: Sequence[Tensor]  # B x (L_i,) int64, end-of-turn included where the response finished
    logprob: Sequence[Tensor]  # B x (L_i,) fp32, of the distribution that was sampled from
    text: Sequence[str]  # B, end-of-turn removed
    finished: Tensor  # (B,) bool: stopped at end-of-turn before the length limit
    tokens_by_rank: tuple[int, ...] = ()  # that each process sampled, of all that were sampled for it

    def __len__(self) -> int:
        return len(self.response_ids)

    @property
    def num_tokens(self) -> int:
        """Sampled tokens, end-of-turn included."""
        return sum(len(ids) for ids in self.response_ids)

    @property
    def mean_length(self) -> float:
        """Sampled tokens per response."""
        return self.num_tokens / len(self)

    def select_groups(self, groups: Sequence[int]) -> Rollout:
        """These groups, renumbered in the order given."""
        rows = self.rows_of_groups(groups)
        counts = torch.tensor([int((self.group == g).sum()) for g in groups], dtype=torch.int64)
        return Rollout(
            prompts=[self.prompts[g] for g in groups],
            group=torch.arange(len(groups)).repeat_interleave(counts),
            response_ids=[self.response_ids[i] for i in rows],
            logprob=[self.logprob[i] for i in rows],
            text=[self.text[i] for i in rows],
            finished=self.finished[rows],
            tokens_by_rank=self.tokens_by_rank,
        )

    def rows_of_groups(self, groups: Sequence[int]) -> list[int]:
        """Indices of the responses of these groups, group by group."""
        return [i for g in groups for i in (self.group == g).nonzero().flatten().tolist()]

    @staticmethod
    def concatenate(rollouts: Sequence[Rollout]) -> Rollout:
        """Rollouts after one another, groups renumbered."""
        offsets = itertools.accumulate((len(r.prompts) for r in rollouts[:-1]), initial=0)
        return Rollout(
            prompts=[p for r in rollouts for p in r.prompts],
            group=torch.cat([r.group + offset for r, offset in zip(rollouts, offsets)]),
            response_ids=[x for r in rollouts for x in r.response_ids],
            logprob=[x for r in rollouts for x in r.logprob],
            text=[x for r in rollouts for x in r.text],
            finished=torch.cat([r.finished for r in rollouts]),
            tokens_by_rank=tuple(map(sum, zip(*(r.tokens_by_rank for r in rollouts)))),
        )

    def fault(self) -> str | None:
        """Names the first response whose log-probs are not finite: the policy that sampled it is broken."""
        for i, logprob in enumerate(self.logprob):
            if not logprob.isfinite().all():
                return f"a log-prob of response {i} is not finite"
        return None


class Fault(NamedTuple):
    """Why a step's update was skipped, and the records of its batch.

    >>> Fault("a gradient is not finite", ("sft.json:3", "sft.json:9"))
    """

    what: str
    records: tuple[str, ...]  # "file:record" each


class Judgement(NamedTuple):
    """What the discriminator makes of one pack. Tuples of tensors alone: whoever shards a model looks into its output.

    Of a pack with three branches, of a model with two layers of four experts::

        score  [0.31, -0.12, 1.1]
        stats  (RoutingStats(counts (7, 4), prob_sum (7, 4)), RoutingStats(counts (7, 4), prob_sum (7, 4)))
    """

    score: Tensor  # (branches,) fp32: head of the hidden state at each branch's last token, in stream order
    stats: tuple[RoutingStats, ...]  # of every layer, by pack.KIND_NAMES


@dataclass(frozen=True)
class Experience:
    """Rewarded responses (B), by the verifiable reward.

    >>> Experience(rollout, reward=torch.tensor([1.0, 0.2]), accuracy=torch.tensor([1.0, 0.0]),
    ...            format_valid=torch.tensor([True, True]))
    """

    rollout: Rollout
    reward: Tensor  # (B,) fp32, overlong penalty included
    accuracy: Tensor  # (B,) fp32 in {0, 1}
    format_valid: Tensor  # (B,) bool
    late: int = 0  # answers without a verdict (see reward/answer/), of all that were judged for it
    costly: int = 0  # answers beyond the judge's limits, likewise

    def select_groups(self, groups: Sequence[int]) -> Experience:
        """These groups, renumbered in the order given."""
        rows = self.rollout.rows_of_groups(groups)
        chosen = self.rollout.select_groups(groups)
        return Experience(
            chosen, self.reward[rows], self.accuracy[rows], self.format_valid[rows], self.late, self.costly
        )

    @staticmethod
    def concatenate(batches: Sequence[Experience]) -> Experience:
        """Batches after one another, groups renumbered."""
        return Experience(
            Rollout.concatenate([b.rollout for b in batches]),
            torch.cat([b.reward for b in batches]),
            torch.cat([b.accuracy for b in batches]),
            torch.cat([b.format_valid for b in batches]),
            sum(b.late for b in batches),
            sum(b.costly for b in batches),
        )


@dataclass(frozen=True)
class Lesson:
    """What the adversarial stage knows of one prompt before a policy answers it: its record, and the teacher's parts.

    >>> Lesson(sample, prompt, teacher=(chat.encode_part("<caption>3, 4</caption>"),
    ...                                 chat.encode_part("<think>3 + 4 = 7</think><answer>7</answer>")))
    """

    sample: Sample
    prompt: Prompt
    teacher: tuple[Tensor, Tensor]  # tokens of the caption and of the reasoning, (L,) int64 each


@dataclass(frozen=True)
class PairRecord:
    """One warm-up record, encoded: what the teacher and what a student said to a prompt.

    >>> PairRecord(prompt, teacher=(torch.tensor([7, 8, 9]), torch.tensor([4, 5])),
    ...            student=(torch.tensor([7, 9]), torch.tensor([4])))
    """

    prompt: Prompt
    teacher: tuple[Tensor, Tensor]  # tokens of the caption and of the reasoning, (L,) int64 each
    student: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Scores:
    """The discriminator's scores of one batch: students by response, teachers by prompt; unclamped.

    With G = 1, N = 2 and the second response invalid (it is not scored: 0 and format_valid False)::

        perception [0.31, 0.0]  reasoning [-0.12, 0.0]  teacher_perception [1.1]  teacher_reasoning [0.9]
    """

    perception: Tensor  # (B,) fp32
    reasoning: Tensor  # (B,) fp32
    teacher_perception: Tensor  # (G,) fp32
    teacher_reasoning: Tensor  # (G,) fp32
    format_valid: Tensor  # (B,) bool


@dataclass
class StepStats:
    """What one optimizer step reports. A metric that had nothing to measure is absent, never invented."""

    step: int
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)  # by part: metric_names.PARTS
    tokens: dict[str, int] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """The line of metrics.jsonl."""
        line: dict[str, Any] = {"step": self.step, **self.metrics}
        line.update({names.seconds(part): value for part, value in self.seconds.items()})
        line.update({names.tokens(part): value for part, value in self.tokens.items()})
        return line
