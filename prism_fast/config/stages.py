"""The training stages, and what of their settings must fit together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field, ValidationInfo, field_validator

from prism_fast.config.inputs import DataConfig, ModelConfig
from prism_fast.config.objective import AdvantageConfig, DiscriminatorStep, ObjectiveConfig
from prism_fast.config.reward import RewardConfig
from prism_fast.config.sampling import DynamicSamplingConfig, EvalConfig, RolloutConfig, SamplerStart
from prism_fast.config.training import ClusterConfig, OptimizerConfig, RunConfig, WatchConfig
from prism_fast.config.values import NUMBER, Batch, Epochs, Node, Part, Place, Seed, Small, Steps, Tokens, Weight

if TYPE_CHECKING:
    from prism_kernels import PolicyObjective


def _length(steps: int | None, info: ValidationInfo) -> int | None:
    """Either epochs or steps."""
    if "epochs" in info.data and (info.data["epochs"] is None) == (steps is None):
        if steps is None:
            raise ValueError("missing, set steps or epochs")
        raise ValueError(f"steps = {steps} and epochs = {info.data['epochs']:g} are both set, unset one with =null")
    return steps


class SFTConfig(Node):
    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig
    run: RunConfig
    cluster: ClusterConfig = ClusterConfig()
    eval: EvalConfig = EvalConfig()
    batch_size: Batch = Field(64, description="samples of one step")
    max_tokens: Tokens = Field(8192, description="prompt and response; a longer one is an error")
    epochs: Epochs | None = Field(None, description="times through the data; either this or steps")
    steps: Steps | None = Field(None, description="either this or epochs", validate_default=True)

    _length = field_validator("steps")(_length)


class UpcycleConfig(Node):
    model: ModelConfig  # dense
    out: Place = Field(description="folder of the discriminator, which must be new")
    num_experts: Annotated[int, Field(ge=2, le=512), NUMBER] = Field(4, description="experts of every layer")
    top_k: Annotated[int, Field(ge=1, le=512), NUMBER] = Field(2, description="experts that a token goes through")
    expert_noise: Small = Field(0.01, description="relative noise on the experts")
    router_std: Small = Field(0.02, description="spread of the router's weights")
    seed: Seed = Field(0, description="of noise and router")

    @field_validator("top_k")
    @classmethod
    def _fits(cls, top_k: int, info: ValidationInfo) -> int:
        if top_k > info.data.get("num_experts", top_k):
            raise ValueError(f"top_k = {top_k} is more than num_experts = {info.data['num_experts']}")
        return top_k


class WarmupConfig(Node):
    discriminator: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig
    run: RunConfig
    cluster: ClusterConfig = ClusterConfig()
    watch: WatchConfig = WatchConfig()
    batch_size: Batch = Field(64, description="records of one step; a record is a caption pair and a reasoning pair")
    max_tokens: Tokens = Field(8192, description="prompt and one part; a longer one is an error")
    balance_coef: Weight = Field(0.01, description="times the load-balancing loss of the experts")
    epochs: Epochs | None = Field(None, description="times through the data; either this or steps")
    steps: Steps | None = Field(None, description="either this or epochs", validate_default=True)
    eval_fraction: Annotated[float, Field(gt=0, lt=1), NUMBER] = Field(
        0.1, description="share of the records kept for pair accuracy, unless data.eval_files are given"
    )
    head_dropout: Part = Field(0.0, description="of the score head; the reference's: 0.1")

    _length = field_validator("steps")(_length)


def _responses_fit(run: RunConfig, info: ValidationInfo) -> RunConfig:
    """A response at its limit is packed with its prompt."""
    rollout = info.data.get("rollout")
    per_pack = run.tokens_per_pack
    if rollout is not None and per_pack != "auto" and per_pack <= rollout.max_response_tokens:
        raise ValueError(
            f"tokens_per_pack = {per_pack} holds no prompt with a response of rollout.max_response_tokens = "
            f"{rollout.max_response_tokens}; raise the one or lower the other"
        )
    return run


class AlignConfig(DiscriminatorStep):
    policy: ModelConfig
    discriminator: ModelConfig
    data: DataConfig
    rollout: RolloutConfig
    policy_optimizer: OptimizerConfig
    discriminator_optimizer: OptimizerConfig
    run: RunConfig
    cluster: ClusterConfig = ClusterConfig()
    steps: Steps = Field(description="updates of policy and discriminator")
    advantage: AdvantageConfig = AdvantageConfig()
    eval: EvalConfig = EvalConfig()
    watch: WatchConfig = WatchConfig()

    _fits = field_validator("run")(_responses_fit)

    @property
    def sampler(self) -> SamplerStart:
        return SamplerStart.of(self.rollout, self.policy, self.data, self.rollout, self.eval)

    @property
    def objective(self) -> PolicyObjective:
        from prism_kernels import PolicyObjective

        return PolicyObjective.grpo(importance_cap=self.rollout.importance_cap)


class RLVRConfig(RewardConfig):
    policy: ModelConfig
    data: DataConfig
    rollout: RolloutConfig
    optimizer: OptimizerConfig
    run: RunConfig
    cluster: ClusterConfig = ClusterConfig()
    steps: Steps = Field(description="updates of the policy")
    objective: ObjectiveConfig = ObjectiveConfig()
    dynamic_sampling: DynamicSamplingConfig | None = Field(None, description="DAPO's, of prompts; null: off")
    reference: ModelConfig | None = Field(None, description="needed by objective.kl_coef", validate_default=True)
    eval: EvalConfig = EvalConfig()
    watch: WatchConfig = WatchConfig()

    _fits = field_validator("run")(_responses_fit)

    @property
    def sampler(self) -> SamplerStart:
        return SamplerStart.of(self.rollout, self.policy, self.data, self.rollout, self.eval)

    @field_validator("rollout")
    @classmethod
    def _buffer(cls, rollout: RolloutConfig, info: ValidationInfo) -> RolloutConfig:
        overlong = info.data.get("overlong")
        if overlong is not None and overlong.buffer > rollout.max_response_tokens:
            raise ValueError(
                f"overlong.buffer = {overlong.buffer} is more than max_response_tokens = "
                f"{rollout.max_response_tokens}, which penalises every response"
            )
        return rollout

    @field_validator("reference")
    @classmethod
    def _reference(cls, reference: ModelConfig | None, info: ValidationInfo) -> ModelConfig | None:
        if reference is None and "objective" in info.data and info.data["objective"].kl_coef:
            raise ValueError("objective.kl_coef needs a reference policy: set reference.path")
        return reference
