"""How a policy answers prompts, in every place that samples, and what starts its sampler."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import Field, ValidationInfo, field_validator

from prism_fast.config.inputs import DataConfig, ModelConfig
from prism_fast.config.values import NUMBER, Batch, Count, Node, Positive, Samples, Temperature, Tokens

Engine = Literal["builtin", "vllm"]
MAX_RESPONSES = 2**20  # of one step
ENGINE = "who samples; builtin: the trainer's own sampler; vllm: needs that package"
ENGINE_CAP = 2.0  # of importance weights where an engine samples, or older weights do, unless another is set
# What serving engines take besides the temperature, and no sampling here does.
OTHER_DISTRIBUTION = (
    "is refused: it samples from another distribution than the policy's, so log-probabilities, ratios and gradients "
    "would be those of another policy; leave it out"
)


class VLLMConfig(Node):
    """Where engine is vllm: one engine for each process, on the device that it trains on."""

    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="of its weights; auto: the policy's")
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1), NUMBER] = Field(
        0.4, description="share of a GPU's memory, on a CPU of the host's, for its weights and caches"
    )
    max_model_len: Tokens | None = Field(
        None, description="longest prompt and response together; null: the longest that other settings allow"
    )
    enforce_eager: bool = Field(False, description="no compilation and no CUDA graphs: starts sooner, samples slower")
    weights: Literal["auto", "shared", "ipc", "folder"] = Field(
        "auto",
        description="how new weights go over; shared: through host memory; ipc: through the GPU's, which both compute "
        "on; folder: by files; auto: ipc on a GPU, else shared",
    )


class Sampling(Node):
    """How a policy answers a prompt: what steps/sampler.py reads, in every place that samples."""

    refused: ClassVar[Mapping[str, str]] = dict.fromkeys(
        (
            "top_p",
            "top_k",
            "min_p",
            "typical_p",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
            "no_repeat_ngram_size",
            "logit_bias",
        ),
        OTHER_DISTRIBUTION,
    )
    samples: Samples = Field(1, description="responses per prompt")
    temperature: Temperature = Field(1.0, description="0: the most probable token")
    max_response_tokens: Tokens = Field(description="a longer response is cut")
    rows_at_once: Batch | Literal["auto"] = Field(
        "auto", description="responses that are sampled together; auto: as many as memory has room for"
    )


class EvalConfig(Sampling):
    """How held-out prompts are answered."""

    temperature: Temperature = Field(0.0, description="0: the most probable token", validate_default=True)
    max_response_tokens: Tokens = Field(2048, description="a longer response is cut")
    limit: Count | None = Field(None, description="prompts; null: all")

    @field_validator("temperature")
    @classmethod
    def _differ(cls, temperature: float, info: ValidationInfo) -> float:
        samples = info.data.get("samples", 1)
        if temperature == 0 and samples > 1:
            raise ValueError(f"0 gives samples = {samples} times the same response; set it above 0, or samples=1")
        return temperature


class RolloutConfig(Sampling):
    """How a step's responses are sampled."""

    prompts_per_step: Batch = Field(description="prompts of one step")
    samples: Annotated[int, Field(ge=2, le=4096), NUMBER] = Field(
        16, description="responses per prompt, which are compared with each other"
    )
    temperature: Positive = Field(1.0, description="of sampling, and of the log-probabilities that are trained on")
    max_response_tokens: Tokens = Field(6144, description="a longer response is cut")
    engine: Engine = Field("builtin", description=f"{ENGINE}; evaluations during the run take it too")
    vllm: VLLMConfig = VLLMConfig()
    overlap: Annotated[int, Field(ge=0, le=1), NUMBER] = Field(
        0, description="1: a step's responses are sampled while the step before it trains, from weights one step older"
    )

    @field_validator("prompts_per_step")
    @classmethod
    def _fits(cls, prompts: int, info: ValidationInfo) -> int:
        if prompts * info.data.get("samples", 1) > MAX_RESPONSES:
            raise ValueError(f"expected prompts_per_step times samples at most {MAX_RESPONSES} responses a step")
        return prompts

    @property
    def sampled(self) -> dict[str, Any]:
        """What the policy's gradient must know of how responses were sampled: `steps.policy_step.policy_gradient`."""
        return {"temperature": self.temperature, "off_policy": self.overlap > 0}

    @property
    def importance_cap(self) -> float | None:
        """Where no other is set: an engine rounds otherwise than the trainer, and older weights are another policy."""
        return None if self.engine == "builtin" and not self.overlap else ENGINE_CAP


class SamplerStart(NamedTuple):
    """What starts the sampler of a command."""

    engine: Engine
    vllm: VLLMConfig
    folder: Path  # of the model
    longest: int  # tokens of a prompt and its response
    overlap: int = 0  # steps by which its weights are older than those that train

    @classmethod
    def of(cls, chosen: Any, model: ModelConfig, data: DataConfig, *answered: Sampling) -> SamplerStart:
        """``chosen`` has engine and vllm, and maybe overlap; ``answered``: how prompts of ``data`` are."""
        longest = data.max_prompt_tokens + max(each.max_response_tokens for each in answered)
        return cls(chosen.engine, chosen.vllm, model.path, longest, getattr(chosen, "overlap", 0))


class DynamicSamplingConfig(Node):
    """DAPO: groups whose accuracies are all equal are dropped and replaced by new prompts."""

    generation_factor: Annotated[int, Field(ge=1, le=100), NUMBER] = Field(
        3, description="prompts generated at once, in training batches"
    )
    max_tries: Annotated[int, Field(ge=1, le=100), NUMBER] = Field(10, description="generations for one step")
