"""`prism-fast data pairs`, `data filter` and `data curate`: what makes data files of models' answers."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from prism_fast.config.inputs import DataConfig, ModelConfig
from prism_fast.config.reward import OwnReward
from prism_fast.config.sampling import ENGINE, Engine, SamplerStart, Sampling, VLLMConfig
from prism_fast.config.values import (
    NUMBER,
    Count,
    Node,
    Part,
    Place,
    Positive,
    Price,
    Samples,
    Seed,
    Share,
    Temperature,
    Tokens,
)


class HardNegativesConfig(Node):
    """Warm-up records whose student's side is the teacher's own text with something in it made wrong."""

    share: Part = Field(0.0, description="of the records that are written; 0: none, as published")
    kinds: tuple[Literal["number", "object", "word", "image"], ...] = Field(
        ("number", "object", "word", "image"),
        min_length=1,
        description="what is made wrong, one of these in each part; image: another image's text",
    )


RECOMMENDED_HARD_NEGATIVES = 0.5  # their share by --hard-negatives


class PairsConfig(Sampling):
    """`prism-fast data pairs`: roll out a policy on the teacher's prompts and write warm-up pairs."""

    model: ModelConfig
    data: DataConfig  # alignment files
    out: Place = Field(description="the file of JSON lines to write, which must be new")
    limit: Count | None = Field(None, description="prompts that are answered; null: all")
    hard_negatives: HardNegativesConfig = HardNegativesConfig()
    temperature: Positive = Field(1.0, description="of sampling")
    max_response_tokens: Tokens = Field(6144, description="a longer response is cut")
    engine: Engine = Field("builtin", description=ENGINE)
    vllm: VLLMConfig = VLLMConfig()
    seed: Seed = Field(0, description="of sampling")

    @property
    def sampler(self) -> SamplerStart:
        return SamplerStart.of(self, self.model, self.data, self)


class FilterConfig(Sampling):
    """`prism-fast data filter`: keep the prompts whose pass rate over k rollouts lies in [low, high]."""

    model: ModelConfig
    data: DataConfig  # RLVR files
    out: Place = Field(description="the parquet file to write, which must be new")
    samples: Samples = Field(8, description="responses per prompt")
    low: Share = Field(0.2, description="smallest pass rate that is kept")
    high: Share = Field(0.8, description="largest pass rate that is kept")
    keep: Count | None = Field(None, description="at most so many prompts; null: all")
    limit: Count | None = Field(None, description="prompts tried; null: all")
    temperature: Positive = Field(1.0, description="of sampling")
    max_response_tokens: Tokens = Field(8192, description="a longer response is cut")
    engine: Engine = Field("builtin", description=ENGINE)
    vllm: VLLMConfig = VLLMConfig()
    seed: Seed = Field(0, description="of sampling")

    @property
    def sampler(self) -> SamplerStart:
        return SamplerStart.of(self, self.model, self.data, self)

    @field_validator("high")
    @classmethod
    def _range(cls, high: float, info: ValidationInfo) -> float:
        low, samples = info.data.get("low", high), info.data.get("samples", 1)
        if low > high:
            raise ValueError(f"low = {low} is above high = {high}")
        if not any(low <= right / samples <= high for right in range(samples + 1)):
            raise ValueError(f"no pass rate of {samples} samples lies from low = {low} to {high}; take more samples")
        return high


class TeacherConfig(Node):
    """A model that is asked over HTTP, by the API of OpenAI's chat completions. Prices are in any one currency."""

    url: str = Field(description="what stands before /chat/completions", examples=["https://api.openai.com/v1"])
    model: str = Field(min_length=1, max_length=256, description="its name there")
    key_variable: str | None = Field(
        None, description="name of the environment variable that holds the key, which is never written; null: no key"
    )
    system_prompt: str | None = Field(
        None, description="in place of a record's own, for the teacher alone; null: one that asks for the format"
    )
    temperature: Temperature | None = Field(1.0, description="of sampling; null: the server's")
    max_response_tokens: Tokens = Field(8192, description="a longer answer is cut, and rejected")
    limit_name: Literal["max_tokens", "max_completion_tokens"] = Field(
        "max_tokens", description="what the server calls max_response_tokens"
    )
    body: dict[str, Any] = Field({}, description="further keys of a request, as {reasoning_effort: low}")
    concurrency: Annotated[int, Field(ge=1, le=1024), NUMBER] = Field(8, description="requests under way at once")
    requests_per_minute: Annotated[float, Field(gt=0, le=1e6), NUMBER] | None = Field(
        None, description="that are begun; null: any number"
    )
    tokens_per_minute: Count | None = Field(
        None, description="of prompts and answers; until an answer is there, the most that it may have; null: any"
    )
    timeout_seconds: Annotated[float, Field(gt=0, le=86_400), NUMBER] = Field(300.0, description="of one request")
    retries: Annotated[int, Field(ge=0, le=100), NUMBER] = Field(6, description="of a request that fails")
    backoff_seconds: Annotated[float, Field(gt=0, le=3600), NUMBER] = Field(
        1.0, description="wait before the first retry, twice that before the next, each less up to a half at random"
    )
    longest_wait_seconds: Annotated[float, Field(gt=0, le=86_400), NUMBER] = Field(
        600.0, description="longest wait before a retry; a server that asks for more ends the command"
    )
    failures_in_a_row: Count = Field(10, description="prompts whose retries are used up, after which the command ends")
    input_price: Price | None = Field(None, description="of a million tokens of prompts; null: costs are not counted")
    output_price: Price | None = Field(None, description="of a million tokens of answers")
    budget: Price | None = Field(
        None, description="most that all requests of this out may cost; needs prices; null: no limit"
    )
    image_tokens: Tokens = Field(4096, description="most tokens that an image counts, for the bounds of costs")

    # No message repeats the value: it may be a key, or hold one.
    @field_validator("key_variable")
    @classmethod
    def _named(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch(r"[A-Za-z_]\w{0,127}", name, re.ASCII):
            raise ValueError("expected the name of an environment variable, not the key itself")
        return name

    @field_validator("url")
    @classmethod
    def _address(cls, url: str) -> str:
        if not re.fullmatch(r"https?://[^\s/?#@]+(/[^\s?#@]*)?", url):
            raise ValueError("expected http://HOST/PATH or https://HOST/PATH, without a user, a query or a key")
        return url.rstrip("/").removesuffix("/chat/completions")

    @field_validator("body")
    @classmethod
    def _ours(cls, body: dict[str, Any]) -> dict[str, Any]:
        ours = {"model", "messages", "stream", "n", "temperature", "max_tokens", "max_completion_tokens"}
        owned = sorted(ours & body.keys())
        if owned:
            raise ValueError(f"{', '.join(owned)}: set by the command; leave out, and set its own keys instead")
        return body

    @field_validator("budget")
    @classmethod
    def _priced(cls, budget: float | None, info: ValidationInfo) -> float | None:
        if budget is not None and None in (info.data.get("input_price", 0), info.data.get("output_price", 0)):
            raise ValueError("needs teacher.input_price and teacher.output_price")
        return budget


class RatesConfig(Sampling):
    """A policy whose pass rate says which prompts are hard; its responses are the students of warm-up pairs."""

    model: ModelConfig
    samples: Samples = Field(8, description="responses per prompt")
    temperature: Positive = Field(1.0, description="of sampling")
    max_response_tokens: Tokens = Field(6144, description="a longer response is cut")
    engine: Engine = Field("builtin", description=ENGINE)
    vllm: VLLMConfig = VLLMConfig()


class CurateConfig(Node):
    """`prism-fast data curate`: ask a teacher about hard prompts, and keep the answers that are right."""

    teacher: TeacherConfig
    data: DataConfig  # RLVR or alignment files
    out: Place = Field(description="folder for the journal, the files and the report; goes on with what is in it")
    rates: RatesConfig | None = Field(None, description="measured by a policy; null: extra_info.pass_rate of records")
    max_pass_rate: Share | None = Field(0.25, description="largest pass rate of a hard prompt; null: all prompts are")
    limit: Count | None = Field(None, description="records that are looked at; null: all")
    samples: Samples = Field(4, description="answers that a prompt gets at most", validate_default=True)
    right: Samples = Field(1, description="right answers after which a prompt is not asked about again")
    min_accuracy: Share = Field(1.0, description="accuracy of a right answer, where a function of your own says it")
    reward: OwnReward = Field(OwnReward(), description="a function of your own in place of the judge")
    seed: Seed = Field(0, description="of the policy's sampling, and of waits")

    @field_validator("samples")
    @classmethod
    def _differ(cls, samples: int, info: ValidationInfo) -> int:
        teacher = info.data.get("teacher")
        if samples > 1 and teacher is not None and teacher.temperature == 0:
            raise ValueError("teacher.temperature = 0 gives the same answer every time; set samples=1")
        return samples

    @field_validator("right")
    @classmethod
    def _enough(cls, right: int, info: ValidationInfo) -> int:
        if right > info.data.get("samples", right):
            raise ValueError(f"expected at most samples = {info.data['samples']}, got {right}")
        return right
