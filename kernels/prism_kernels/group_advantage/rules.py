"""Names of the advantage rules (docs/method.md 4) and their coefficients: what api and implementations share."""

from __future__ import annotations

from typing import NamedTuple

# "align" alone reads no accuracy.
RULES = ("align", "penalised", "gated", "verified", "verified_penalised", "signed")


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
