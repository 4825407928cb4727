"""`prism-fast eval` and `probe`: what a policy answers right, what a discriminator knows; and its scores by HTTP."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from prism_fast.config.inputs import DataConfig, ModelConfig
from prism_fast.config.objective import AdvantageConfig, DiscriminatorStep
from prism_fast.config.reward import OwnReward
from prism_fast.config.sampling import ENGINE, Engine, EvalConfig, SamplerStart, Sampling, VLLMConfig
from prism_fast.config.values import (
    NUMBER,
    Batch,
    Count,
    Node,
    Place,
    Places,
    Positive,
    Samples,
    Seed,
    Temperature,
    Tokens,
)


class EvaluateConfig(Node):
    model: ModelConfig
    data: DataConfig
    reward: OwnReward = Field(OwnReward(), description="a function of your own in place of the judge")
    eval: EvalConfig = EvalConfig()
    engine: Engine = Field("builtin", description=ENGINE)
    vllm: VLLMConfig = VLLMConfig()
    out: Place = Field(description="the file of figures and responses to write")
    seed: Seed = Field(0, description="of sampling")

    @property
    def sampler(self) -> SamplerStart:
        return SamplerStart.of(self, self.model, self.data, self.eval)


class BenchmarksConfig(Node):
    """`prism-fast eval --lmms TASKS`: lmms-eval asks and judges."""

    policies: Places = Field(min_length=1, description="folder of a Hugging Face model, or a list of them")
    out: Place = Field(description="folder of results; what is finished in it is not run again")
    engine: Literal["transformers", "vllm"] = Field("transformers", description="who answers; vllm: needs that package")
    vllm: VLLMConfig = VLLMConfig(gpu_memory_utilization=0.8)
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of the weights under transformers; auto: bfloat16 on a GPU, else float32"
    )
    system_prompt: str | None = Field(
        None, description="in place of a task's own system prompt, put before every question; null: the task's, or none"
    )
    max_response_tokens: Tokens = Field(8192, description="in place of the task's; a longer response is cut")
    temperature: Temperature = Field(0.0, description="0: the most probable token")
    top_p: Annotated[float, Field(gt=0, le=1), NUMBER] = Field(1.0, description="of sampling; 1: all words")
    no_answer: Literal["wrong", "whole"] = Field(
        "wrong",
        description="a response without exactly one answer element; wrong: nothing of it is judged; whole: all of it, "
        "as for a model that never learned the format",
    )
    include: Place | None = Field(
        None, description="folder of tasks in lmms-eval's format, whose code is run; they come before its own"
    )
    limit: Count | None = Field(None, description="questions of a task, to try it; null: all")
    batch_size: Batch = Field(1, description="questions answered together")
    processes: Annotated[int, Field(ge=1, le=1024), NUMBER] = Field(
        1, description="processes, each with a GPU of its own, that share a task's questions"
    )


class ProbeConfig(DiscriminatorStep, Sampling):
    """`prism-fast probe`: does a discriminator know what is right, or what is long and well formed?"""

    discriminator: ModelConfig
    policy: ModelConfig  # whose responses it scores
    data: DataConfig  # alignment files
    out: Place = Field(description="the file of figures to write, which must be new")
    truth: Literal["answers", "teacher"] = Field(
        "answers",
        description="a part is right where its answer is; teacher: where it says what the teacher's does, which must "
        "then be right in caption and steps",
    )
    limit: Count | None = Field(256, description="prompts; null: all")
    samples: Annotated[int, Field(ge=2, le=4096), NUMBER] = Field(8, description="responses per prompt, to compare")
    temperature: Positive = Field(1.0, description="of sampling")
    max_response_tokens: Tokens = Field(6144, description="a longer response is cut")
    tokens_per_pack: Annotated[int, Field(ge=1, le=2**24), NUMBER] = Field(16384, description="tokens in one forward")
    engine: Engine = Field("builtin", description=ENGINE)
    vllm: VLLMConfig = VLLMConfig()
    seed: Seed = Field(0, description="of sampling")

    @property
    def sampler(self) -> SamplerStart:
        return SamplerStart.of(self, self.policy, self.data, self)


class ServeConfig(DiscriminatorStep):
    """`prism-fast serve-discriminator`: scores of a discriminator by HTTP, for a trainer of another environment."""

    discriminator: ModelConfig
    host: str = Field("127.0.0.1", min_length=1, max_length=255, description="address to listen at")
    port: Annotated[int, Field(ge=0, le=65535), NUMBER] = Field(8377, description="to listen at; 0: any free one")
    expose: bool = Field(False, description="whether host may be one that other machines reach: whoever does may score")
    image_folder: Place | None = Field(
        None, description="folder in which images may be named by path; null: images come in the request alone"
    )
    system_prompt: str | None = Field(None, description="put before prompts that have none; null: nothing")
    advantage: AdvantageConfig = AdvantageConfig()
    tokens_per_pack: Annotated[int, Field(ge=1, le=2**24), NUMBER] = Field(16384, description="tokens in one forward")
    max_prompt_tokens: Tokens = Field(8192, description="a longer prompt, its images included, is refused")
    max_body_mib: Annotated[int, Field(ge=1, le=1024), NUMBER] = Field(8, description="MiB of a request, or an image")
    max_responses: Samples = Field(256, description="of one request")
    max_characters: Annotated[int, Field(ge=1, le=2**24), NUMBER] = Field(65536, description="of one text")
    max_images: Annotated[int, Field(ge=0, le=1024), NUMBER] = Field(16, description="of one request")
    max_pixels: Annotated[int, Field(ge=1, le=2**26), NUMBER] = Field(
        2**24, description="of an image, by its header: a larger one is not decoded"
    )
    max_waiting: Annotated[int, Field(ge=1, le=4096), NUMBER] = Field(
        64, description="requests that wait for the model; a further one is told to come again (503, Retry-After)"
    )
    max_connections: Annotated[int, Field(ge=1, le=4096), NUMBER] = Field(128, description="open at once")
    read_seconds: Annotated[float, Field(gt=0, le=3600), NUMBER] = Field(10.0, description="for a request to arrive")
    answer_seconds: Annotated[float, Field(gt=0, le=86400), NUMBER] = Field(
        120.0, description="that a request waits for the model, then it is told to come again"
    )
