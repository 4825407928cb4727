"""The advantage rules as rows of numbers, and the records that go with them: what api and implementations share.

All rules are one formula (docs/method.md 4), in which a response is right, wrong (W) or of invalid format (F), exactly
one of the three; r is the verifiable reward, gate and share are numbers by the kind of response::

    A = GN(share r - fine) + k A_align gate - penalty

A new rule is one line of :data:`RULES`, and its line in docs/method.md 4.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Reward(NamedTuple):
    """What GN normalises: r of every response, less a fine."""

    invalid: float = 1.0  # the share of r that an invalid response keeps; right and wrong ones keep all of it
    fine: tuple[float, float] = (0.0, 0.0)  # times wrong_penalty where wrong, times format_penalty where invalid


class Rule(NamedTuple):
    """How a rule treats right, wrong and invalid responses."""

    gate: tuple[float, float, float]  # factor of A_align for a right, a wrong and an invalid response
    penalty: tuple[float, float] = (0.0, 0.0)  # times wrong_penalty where wrong, times format_penalty where invalid
    reward: Reward | None = None  # None: the verifiable reward is no term
    scaled: bool = True  # k = align_coef; else 1

    @property
    def reads_accuracy(self) -> bool:
        """Whether a right and a wrong response can differ. If not, a valid response counts as right."""
        return self.reward is not None or self.gate[0] != self.gate[1] or self.penalty[0] != 0


RULES: dict[str, Rule] = {
    "align": Rule(gate=(1, 1, 1), penalty=(0, 1), scaled=False),
    "penalised": Rule(gate=(1, 1, 1), penalty=(1, 1)),
    "gated": Rule(gate=(1, 0, 0), penalty=(1, 1)),
    "verified": Rule(gate=(1, 0, 0), reward=Reward()),
    "verified_penalised": Rule(gate=(1, 0, 0), reward=Reward(fine=(1, 1))),
    "signed": Rule(gate=(1, -1, 0), reward=Reward(invalid=0, fine=(1, 1))),
}


class Coefficients(NamedTuple):
    """Weights of the terms, named as in the public signature."""

    perception_weight: float
    reasoning_weight: float
    align_coef: float
    wrong_penalty: float
    format_penalty: float
    accuracy_weight: float
    format_weight: float
    eps: float
    min_std: float


class Responses(NamedTuple):
    """The arguments of one call, checked."""

    perception: Tensor  # (B,) floating
    reasoning: Tensor  # (B,) floating
    group_ids: Tensor  # (B,) int64 or int32
    format_valid: Tensor | None  # (B,), 0 means invalid; None: all are valid
    accuracy: Tensor | None  # (B,), 0 means wrong; None where the rule does not read it
