"""The verifiable reward: the judge of answers or a function of your own, the format, the length."""

from __future__ import annotations

import os
import re
from typing import Annotated, Literal

from pydantic import Field, field_validator

from prism_fast.config.values import NUMBER, Node, Tokens, Weight
from prism_fast.settings import got


class OverlongConfig(Node):
    """DAPO's soft penalty: rises linearly to -factor over the last ``buffer`` tokens before the limit."""

    buffer: Tokens = Field(4096, description="tokens before rollout.max_response_tokens, and no more than these")
    factor: Weight = Field(1.0, description="penalty at the limit")


class OwnReward(Node):
    """A reward function of your own in place of the judge of answers: docs/training.md, "A reward of your own"."""

    function: str | None = Field(None, description="module:name or path.py:name; null: the judge of answers")
    replaces: Literal["accuracy", "reward"] = Field(
        "accuracy", description="accuracy: 0 to 1, weighed as the judge's; reward: all of it"
    )
    seconds: Annotated[float, Field(gt=0, le=86_400), NUMBER] = Field(
        10.0, description="of CPU time a call may take; ten times that by the clock"
    )
    memory_gib: Annotated[float, Field(gt=0, le=1024), NUMBER] = Field(4.0, description="of address space, GiB")

    @field_validator("function")
    @classmethod
    def _name(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch(r"(?:[\w.]+|.+\.py):[A-Za-z_]\w*", name):
            raise ValueError(f"expected module:name or path.py:name, got {got(name)}")
        return name if name is None else os.path.expanduser(name)


BY_THE_JUDGE = OwnReward()


class RewardConfig(Node):
    """The verifiable reward: what is right, what is well formed, and what is too long."""

    accuracy_weight: Weight = Field(0.8, description="of a right answer")
    format_weight: Weight = Field(0.2, description="of a valid format")
    overlong: OverlongConfig | None = Field(None, description="DAPO's penalty of long responses; null: none")
    reward: OwnReward = Field(OwnReward(), description="a function of your own in place of the judge")
