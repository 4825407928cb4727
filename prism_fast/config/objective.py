"""What the gradients are of: advantages, the discriminator's step, the policy objective."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, field_validator

from prism_fast.config.sampling import ENGINE_CAP
from prism_fast.config.values import NUMBER, Node, Share, Tokens, Weight
from prism_fast.settings import got

if TYPE_CHECKING:
    from prism_kernels import PolicyObjective


class AdvantageConfig(Node):
    """Arguments of prism_kernels.multi_reward_advantage."""

    rule: str = Field("align", description="a row of the table in docs/method.md 4")
    perception_weight: Weight = Field(0.5, description="of the captions' scores")
    reasoning_weight: Weight = Field(0.5, description="of the reasonings' scores")
    align_coef: Weight = Field(1.0, description="of the alignment term, in rules that scale it")
    wrong_penalty: Weight = Field(1.0, description="taken off a wrong answer")
    format_penalty: Weight = Field(1.5, description="taken off an invalid format")
    accuracy_weight: Weight = Field(1.0, description="of a right answer, in rules with a verifiable reward")
    format_weight: Weight = Field(1.0, description="of a valid format, in rules with a verifiable reward")
    min_std: Weight = Field(
        0.0,
        description="smallest std that a group's scores are divided by; 0 (published): any spread becomes 1",
    )

    @field_validator("rule")
    @classmethod
    def _rule(cls, rule: str) -> str:
        from prism_kernels.group_advantage.rules import RULES

        if rule not in RULES:
            raise ValueError(f"expected one of {', '.join(RULES)}, got {got(rule)}")
        return rule


class CompatConfig(Node):
    """Behaviour of the reference implementation where it differs, for parity runs. Everything off: ``fixed``."""

    format: Literal["fixed", "compat"] = Field(
        "fixed", description="compat: the reference's expression, which accepts repeated tags"
    )
    clamp_in_loss: bool = Field(False, description="scores clamped inside the discriminator's loss too")
    teacher_token_limit: Tokens | None = Field(None, description="teacher parts cut to so many tokens; reference: 512")
    clamp_around_zero: bool = Field(
        False, description="the advantage's scores clamped to +- score_clamp as they are, not around the teacher's"
    )
    text_positions: bool = Field(False, description="1-D positions in the discriminator")


class DiscriminatorStep(Node):
    """What the discriminator's step of the adversarial stage reads: which parts it takes, and its loss."""

    max_part_tokens: Tokens = Field(6144, description="a longer part of a response is invalid, of a teacher an error")
    score_clamp: Annotated[float, Field(gt=0, le=10**4), NUMBER] = Field(
        10.0, description="the advantage's scores are at most so far from the teacher's of their prompt"
    )
    score_penalty: Weight = Field(0.001, description="times the mean square of the four scores")
    length_correction: Weight = Field(0.0, description="score - this * log(1 + tokens of the part)")
    balance_coef: Weight = Field(0.0, description="times the load-balancing loss of the experts; published: 0")
    compat: CompatConfig = CompatConfig()


class ObjectiveConfig(Node):
    """The policy objective: a named one, and what differs from it. Its ranges are within PolicyObjective's."""

    name: Literal["grpo", "dapo", "gspo", "dr_grpo"] = Field("grpo", description="docs/method.md 5")
    clip_low: Share | None = Field(None, description="ratios below 1 - this are clipped; null: the named one's")
    clip_high: Annotated[float, Field(ge=0, le=100), NUMBER] | None = Field(
        None, description="ratios above 1 + this are clipped; null: the named one's"
    )
    kl_coef: Annotated[float, Field(ge=0, le=100), NUMBER] = Field(0.0, description="needs reference.path")
    kl_estimator: Literal["k1", "k2", "k3"] = Field("k3", description="of the KL term")
    entropy_coef: Annotated[float, Field(ge=-100, le=100), NUMBER] = Field(0.0, description="of the entropy bonus")
    importance_cap: Annotated[float, Field(ge=0, le=10**6), NUMBER] | None = Field(
        None,
        description=f"largest weight between sampler and trainer; 0: no such weight; null: {ENGINE_CAP:g} where "
        "rollout.engine is another than builtin or rollout.overlap is 1, else 0",
    )

    def build(self, max_length: int, cap: float | None = None) -> PolicyObjective:
        """``cap``: the importance cap where none is set (`RolloutConfig.importance_cap`)."""
        from prism_kernels import PolicyObjective

        changes = {k: v for k, v in self.model_dump(exclude={"name"}).items() if v is not None}
        changes["importance_cap"] = changes.get("importance_cap", cap) or None
        if self.name == "dr_grpo":
            return PolicyObjective.dr_grpo(max_length, **changes)
        return getattr(PolicyObjective, self.name)(**changes)
