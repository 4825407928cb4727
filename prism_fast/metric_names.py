"""Every name in metrics.jsonl, once, and how values of parts of a batch (packs, ranks) become that of the whole.

A name is a string that knows its reduction: ``{LOSS: 0.4}`` is written as ``{"loss": 0.4}``. A metric that had nothing
to measure is absent.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

SIDES = ("perception", "reasoning")  # the two parts of a response that have a score each


class Metric(str):
    """A name. ``combine`` takes (value, weight) of every part of a batch, and gives None where all weights are 0.

    A weight is the number of things that a part's value was measured on.
    """

    def combine(self, parts: Iterable[tuple[float, float]]) -> float | None:
        measured = [(value, weight) for value, weight in parts if weight]
        return self._combine(measured) if measured else None

    def _combine(self, measured: list[tuple[float, float]]) -> float:
        raise NotImplementedError


class Mean(Metric):
    """A mean ``over`` things that a part counts: its weight.

    >>> Mean("entropy", over="sampled tokens").combine([(1.0, 3), (2.0, 1)])
    1.25
    """

    over: str

    def __new__(cls, name: str, *, over: str) -> Mean:
        made = super().__new__(cls, name)
        made.over = over
        return made

    def __getnewargs_ex__(self) -> tuple[tuple[str], dict[str, str]]:  # for copies, and for other processes
        return (str(self),), {"over": self.over}

    def _combine(self, measured: list[tuple[float, float]]) -> float:
        return sum(value * weight for value, weight in measured) / sum(weight for _, weight in measured)


class Sum(Metric):
    """What parts add up to: a count, or a loss of which every part holds a share, its denominator being the batch's."""

    def _combine(self, measured: list[tuple[float, float]]) -> float:
        return sum(value for value, _ in measured)


class Max(Metric):
    """The largest of any part."""

    def _combine(self, measured: list[tuple[float, float]]) -> float:
        return max(value for value, _ in measured)


class Whole(Metric):
    """Known from the whole batch alone, and equal wherever it is known. Raises ValueError where parts differ."""

    def _combine(self, measured: list[tuple[float, float]]) -> float:
        first = measured[0][0]
        if any(value != first for value, _ in measured):
            raise ValueError(f"{self}: expected one value everywhere, got {[value for value, _ in measured]}")
        return first


# Every stage
LOSS = Sum("loss")
LEARNING_RATE = Whole("lr")
GRAD_NORM = Whole("grad_norm")  # L2, before clipping
SKIPPED_UPDATES = Whole("skipped_updates")  # in a row, for numbers that are not finite; told where it is not 0
TOKENS_PER_SECOND = Whole("tokens_per_second")  # of all parts of a step together, from their reduced values

# Runs of several processes alone: the largest of any rank over the mean of ranks, of a whole step; 1 is even. From the
# values of all ranks by `max_over_mean`, so known on every rank alike.
RANKS = {of: Whole(f"balance/{of}") for of in ("cpu_seconds", "sampled_tokens")}

# Every stage; of all models that it trains, and until a step's end each process has its own.
HALVED_PACKS = Sum("packs_halved")  # did not fit in memory; told where it is not 0
HOST_WAIT = Max("host_wait")  # seconds in which a step waited for the host to build its next pack
OWN = (HALVED_PACKS, HOST_WAIT)

# Responses
REWARD = Mean("reward", over="responses")
ACCURACY = Mean("accuracy", over="responses")
FORMAT_VALID = Mean("format_valid", over="responses")
RESPONSE_LENGTH = Mean("response_length", over="responses")  # tokens
PART_LENGTH = {side: Mean(f"tokens_of/{side}", over="valid responses") for side in SIDES}
JUDGE_LATE = Sum("judge/late")  # answers without a verdict, twice; they count as not right
JUDGE_COSTLY = Sum("judge/too_costly")  # answers whose comparison is beyond the judge's limits; so do they

# The policy's step
ZERO_ADVANTAGE = Mean("zero_advantage", over="responses")
ENTROPY = Mean("entropy", over="sampled tokens")  # nats
SAMPLER_GAP_MEAN = Mean("sampler_gap/mean", over="trained tokens")  # |log-prob of the trainer - of the sampler|
SAMPLER_GAP_MAX = Max("sampler_gap/max")
KL_REF = Mean("kl_ref", over="trained tokens")  # to the reference policy
# Of responses that older weights sampled, where the gap to the sampler has the distance of the weights in it
OFF_POLICY_KL = Mean("off_policy/kl", over="trained tokens")  # of the sampler's to this policy: exp(d) - d - 1
OFF_POLICY_CLIPPED = {
    side: Mean(f"off_policy/clipped_{side}", over="trained tokens") for side in ("low", "high")
}  # ratios beyond the objective's bounds, whose tokens have no gradient
OVERLAP_SECONDS = Max("overlap/seconds")  # that the next batch took, while this one trained

# Dynamic sampling
DROPPED_GROUPS = Sum("dropped_groups")
MISSING_GROUPS = Sum("missing_groups")
GENERATION_BATCHES = Max("generation_batches")

# Alignment
POLICY_GRAD_NORM = Whole("grad_norm/policy")
DISCRIMINATOR_GRAD_NORM = Whole("grad_norm/discriminator")
DISCRIMINATOR_LOSS = Sum("loss/discriminator")
TEACHER_SCORE = {side: Mean(f"score/teacher_{side}", over="prompts") for side in SIDES}
STUDENT_SCORE = {side: Mean(f"score/student_{side}", over="valid responses") for side in SIDES}
DISCRIMINATOR_ACCURACY = {side: Mean(f"discriminator_accuracy/{side}", over="valid responses") for side in SIDES}
CLAMPED = {side: Mean(f"clamped/{side}", over="valid responses") for side in SIDES}  # further from the teacher's
SCORE_SPREAD = {side: Whole(f"score_spread/{side}") for side in SIDES}  # median std of a group's valid, clamped scores
ADVANTAGE_STD = Whole("advantage/std")
# How many pairs of equal form, one answer right and one wrong, have the right one score higher; how the ranks of scores
# in a group go with form or length, whichever more (steps/probe.py)
CONTENT = {side: Whole(f"content/{side}") for side in SIDES}
STYLE = {side: Whole(f"style/{side}") for side in SIDES}

# Both stages of the discriminator: a part with the teacher's very tokens, of which nothing tells it, counts as half
# right in accuracies, and has a loss of log 2 at least
EQUAL_PARTS = {side: Mean(f"equal_parts/{side}", over="valid responses") for side in SIDES}

# Warm-up
PAIR_LOSS = {side: Sum(f"loss/pair_{side}") for side in SIDES}
BALANCE_LOSS = Sum("loss/balance")
PAIR_ACCURACY = {side: Mean(f"pair_accuracy/{side}", over="pairs") for side in SIDES}

# Held-out figures
EVAL = "eval/"
EVAL_ACCURACY = Mean(f"{EVAL}{ACCURACY}", over="held-out responses")
EVAL_FORMAT_VALID = Mean(f"{EVAL}{FORMAT_VALID}", over="held-out responses")
EVAL_RESPONSE_LENGTH = Mean(f"{EVAL}{RESPONSE_LENGTH}", over="held-out responses")
EVAL_JUDGE_LATE = Sum(f"{EVAL}judge_late")
EVAL_JUDGE_COSTLY = Sum(f"{EVAL}judge_too_costly")
EVAL_PAIR_ACCURACY = {side: Mean(f"{EVAL}pair_accuracy_{side}", over="held-out pairs") for side in SIDES}


def eval_pass_at(samples: int) -> Metric:
    """Some response of ``samples`` is right."""
    return Mean(f"{EVAL}pass_at_{samples}", over="held-out prompts")


# Parts of a step, in its order, and those that go over tokens: a token counts once in each of them
PARTS = ("data", "rollout", "update_discriminator", "advantage", "update_policy", "update")
PARTS_OVER_TOKENS = ("rollout", "update_discriminator", "update_policy", "update")
SECONDS, TOKENS = "seconds/", "tokens/"


def seconds(part: str) -> Metric:
    return Max(f"{SECONDS}{part}")


def tokens(part: str) -> Metric:
    return Sum(f"{TOKENS}{part}")


def max_over_mean(values: Sequence[float]) -> float | None:
    """How much more than the mean the busiest rank has: 1 where all are equal; `RANKS`.

    ``values``: of every rank, in one order everywhere. None, as there is nothing to measure, in one process or where
    all values are 0.

    >>> max_over_mean([3.0, 1.0])
    1.5
    """
    total = math.fsum(values)
    return max(values) * len(values) / total if len(values) > 1 and total > 0 else None


def expert_load(layer: int, kind: str, expert: int) -> Metric:
    """The expert's share of the slots that tokens of a kind have in a layer."""
    return Mean(f"expert_load/{layer}/{kind}/{expert}", over="slots of the kind")


def expert_of(name: str) -> tuple[int, str, int] | None:
    """(layer, kind, expert) of a name that `expert_load` gives; None for others."""
    found = re.fullmatch(r"expert_load/(\d+)/([^/]+)/(\d+)", name)
    return (int(found[1]), found[2], int(found[3])) if found else None


def _declared() -> dict[str, Metric]:
    values = [*globals().values(), *map(seconds, PARTS), *map(tokens, PARTS_OVER_TOKENS)]
    found = [metric for value in values for metric in (value.values() if isinstance(value, dict) else [value])]
    return {str(metric): metric for metric in found if isinstance(metric, Metric)}


DECLARED = _declared()  # by name; without those of which there are as many as experts, or samples of an evaluation


def find(name: str) -> Metric | None:
    """The metric that a name in metrics.jsonl is of, or None where it is not declared here."""
    if name in DECLARED:
        return DECLARED[name]
    if (expert := expert_of(name)) is not None:
        return expert_load(*expert)
    pass_at = re.fullmatch(rf"{EVAL}pass_at_(\d+)", name)
    return eval_pass_at(int(pass_at[1])) if pass_at else None
