"""One frozen, validated configuration tree per command. Unknown keys are errors.

A stage reads a YAML file and ``key.path=value`` overrides; recipes/*.yaml hold the published settings and the demo's.
``base: NAME`` at the top of a file names a recipe that it lies over. How they are read: `prism_fast/settings.py`.
Every key is described here; docs/settings.md (dev/settings_page.py) and `prism-fast config` tell it from here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator

from prism_fast.settings import RECIPES, got, load_config, merge, parse_overrides, read_yaml

if TYPE_CHECKING:
    from prism_kernels import PolicyObjective

__all__ = ["RECIPES", "load_config", "merge", "parse_overrides", "read_yaml"]  # with everything that is defined here

MAX_THREADS = 256
MIN_TEMPERATURE = 0.01  # logits divided by less leave the range of their numbers
MAX_RESPONSES = 2**20  # of one step


class Node(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def _no_truth(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"expected a number, got {got(value)}")
    return value


def _place(value: Any) -> Any:
    """A path as people write it: not empty, ~ is the home folder."""
    if not isinstance(value, (str, Path)):
        quoted = " (in quotes it is one)" if isinstance(value, (int, float)) else ""
        raise ValueError(f"expected a path, got {got(value)}{quoted}")
    text = str(value)
    if not text.strip() or not text.replace(" ", "").isprintable():
        raise ValueError(f"expected a path, got {got(value)}")
    try:
        return Path(value).expanduser() if text.startswith("~") else value
    except RuntimeError as error:
        raise ValueError(f"{got(value)}: {error}") from None


def _places(value: Any) -> Any:
    return [value] if isinstance(value, (str, Path)) else value


def _temperature(value: float) -> float:
    if 0 < value < MIN_TEMPERATURE:
        raise ValueError(f"expected 0 (the most probable token) or at least {MIN_TEMPERATURE}, got {value}")
    return value


NUMBER = BeforeValidator(_no_truth)  # after the bounds: it hides from the JSON schema what comes after it
Place = Annotated[Path, BeforeValidator(_place)]
Places = Annotated[tuple[Place, ...], BeforeValidator(_places)]
Count = Annotated[int, Field(ge=1, le=10**9), NUMBER]
Steps = Annotated[int, Field(ge=1, le=10**8), NUMBER]
Epochs = Annotated[float, Field(gt=0, le=10**4), NUMBER]
Every = Annotated[int, Field(ge=0, le=10**8), NUMBER]
Batch = Annotated[int, Field(ge=1, le=2**16), NUMBER]
Tokens = Annotated[int, Field(ge=1, le=2**20), NUMBER]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1), NUMBER]  # stages derive others from it, and all fit 63 bits
Share = Annotated[float, Field(ge=0, le=1), NUMBER]
Part = Annotated[float, Field(ge=0, lt=1), NUMBER]
Small = Annotated[float, Field(ge=0, le=10), NUMBER]
Samples = Annotated[int, Field(ge=1, le=4096), NUMBER]
Weight = Annotated[float, Field(ge=0, le=1000), NUMBER]
Price = Annotated[float, Field(ge=0, le=1e9), NUMBER]
Temperature = Annotated[float, Field(ge=0, le=100), NUMBER, AfterValidator(_temperature)]
Positive = Annotated[float, Field(ge=MIN_TEMPERATURE, le=100), NUMBER]
Engine = Literal["builtin", "vllm"]

ENGINE = "who samples; builtin: the trainer's own sampler; vllm: needs that package"
ENGINE_CAP = 2.0  # of importance weights where an engine samples, or older weights do, unless another is set
# What serving engines take besides the temperature, and no sampling here does.
OTHER_DISTRIBUTION = (
    "is refused: it samples from another distribution than the policy's, so log-probabilities, ratios and gradients "
    "would be those of another policy; leave it out"
)


class ModelConfig(Node):
    path: Place = Field(description="folder of a Hugging Face model, or its name on the hub")
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="auto: bfloat16 on a GPU, else float32")
    freeze_vision: bool = Field(False, description="do not train the vision encoder")
    freeze_embeddings: bool = Field(False, description="do not train the word embeddings")
    activation_checkpointing: bool = Field(False, description="compute activations twice, to keep fewer of them")


class DataConfig(Node):
    files: Places = Field(min_length=1, description="files, folders or patterns; images relative to their file")
    eval_files: Places = Field((), description="held-out data of the same kind of file")
    skip_bad_records: Annotated[int, Field(ge=0, le=10**9), NUMBER] = Field(0, description="bad records to pass over")
    max_prompt_tokens: Tokens = Field(2048, description="a longer prompt, its images included, is an error")
    system_prompt: str | None = Field(None, description="put before prompts that have none; null: nothing")
    columns: dict[str, str] = Field(
        {},
        description="our name of a field: the files' name, as {images: picture, reward_model.ground_truth: answer}",
    )
    image_folders: Places = Field(
        (), description="where else than in its file's folder an image may lie, links followed; /: anywhere"
    )
    cache: Place | None = Field(
        None, description="folder for what is made once of large files; null: run.out/cache, outside training none"
    )

    image_cache: Annotated[int, Field(ge=0, le=2**24), NUMBER] = Field(
        512, description="MiB of processed images that each process of a training run keeps, to use them again"
    )

    workers: Annotated[int, Field(ge=0, le=256), NUMBER] | Literal["auto"] = Field(
        "auto",
        description="processes that encode the next batch; 0: none; auto: a quarter of the cores, 1 to 8, none for a "
        "process with one core",
    )

    @property
    def reading(self) -> dict[str, Any]:
        """Options of data/formats.py's readers."""
        return {
            "skip_bad": self.skip_bad_records,
            "system_prompt": self.system_prompt,
            "columns": self.columns,
            "cache": self.cache,
            "image_folders": self.image_folders,
        }

    def beside(self, out: Path) -> DataConfig:
        """The same with the cache of a run in ``out``, where no other is given."""
        return self if self.cache is not None else self.model_copy(update={"cache": out / "cache"})


class OptimizerConfig(Node):
    """AdamW."""

    lr: Annotated[float, Field(gt=0, le=1), NUMBER] = Field(description="learning rate, after the warm-up")
    schedule: Literal["cosine", "constant"] = Field("constant", description="cosine: falls to 0 at the last step")
    warmup_ratio: Part = Field(0.0, description="share of the steps in which lr rises")
    weight_decay: Small = Field(0.01, description="of matrices, not of vectors")
    beta1: Part = Field(0.9, description="decay of the first moment")
    beta2: Part = Field(0.999, description="decay of the second moment")
    clip_norm: Annotated[float, Field(gt=0, le=1e12), NUMBER] = Field(1.0, description="longest gradient")
    moments: Literal["float32", "bfloat16"] = Field(
        "float32", description="dtype of both moments; bfloat16 is rounded at random; not with cluster.sharding=zero*"
    )
    offload: bool = Field(False, description="keep the optimizer's state in host memory, and update there")


# Keys of DeepSpeed's configuration that follow from other settings, or that the trainer relies on.
DEEPSPEED_OWNED = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "managed_gradient_accumulation",
    "gradient_clipping",
    "gradient_allreduce_op",
    "gradient_predivide_factor",
    "prescale_gradients",
    "optimizer",
    "scheduler",
    "bf16",
    "fp16",
    "amp",
    "data_types",
    "checkpoint",
    "activation_checkpointing",
    "zero_force_ds_cpu_optimizer",
    "zero_allow_untested_optimizer",
)
DEEPSPEED_OWNED_ZERO = ("stage", "offload_optimizer", "offload_param", "stage3_param_persistence_threshold")


class ClusterConfig(Node):
    """How the processes of a run share models and work; in one process nothing of it is read."""

    sharding: Literal["none", "zero1", "zero2", "zero3", "fsdp2"] = Field(
        "none",
        description="what each process holds a part of: none: nothing; zero1: optimizer; zero2: and gradients; zero3, "
        "fsdp2: and weights. zero* need deepspeed",
    )
    timeout_minutes: Annotated[float, Field(gt=0, le=10_000), NUMBER] = Field(
        30.0, description="longest wait for another process, after which the run ends"
    )
    deepspeed: dict[str, Any] = Field(
        {}, description="keys over the generated DeepSpeed configuration, OUT/deepspeed.json"
    )

    @field_validator("deepspeed")
    @classmethod
    def _not_owned(cls, keys: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        if keys and not info.data.get("sharding", "zero1").startswith("zero"):
            raise ValueError(f"sharding = {info.data['sharding']} has no DeepSpeed; set sharding to zero1, 2 or 3")
        zero = keys.get("zero_optimization", {})
        if not isinstance(zero, dict):
            raise ValueError(f"zero_optimization: expected keys, got {got(zero)}")
        owned = [key for key in DEEPSPEED_OWNED if key in keys]
        owned += [f"zero_optimization.{key}" for key in DEEPSPEED_OWNED_ZERO if key in zero]
        if owned:
            raise ValueError(f"{', '.join(owned)}: set by the trainer; leave out, and set its own keys instead")
        return keys


class RunConfig(Node):
    """What every stage has."""

    out: Place = Field(description="folder for everything that the run writes")
    seed: Seed = Field(0, description="of order, sampling and new weights")
    threads: Annotated[int, Field(ge=1, le=MAX_THREADS), NUMBER] | None = Field(
        None, description="torch threads on a CPU, null: one per core; resuming bit for bit needs the same number"
    )
    tokens_per_pack: Annotated[int, Field(ge=1, le=2**24), NUMBER] | Literal["auto"] = Field(
        16384,
        description="tokens in one forward; more is faster and takes more memory; auto: the most that the memory has "
        "room for when the run begins, by count",
    )
    eval_every: Every = Field(0, description="steps; 0: only at the end")
    save_every: Every = Field(100, description="steps; 0: only at the end")
    keep_last: Count = Field(2, description="checkpoints that are kept, beside the best")
    save_in_background: bool = Field(
        True, description="checkpoints are written while the next steps run, from a copy in host memory"
    )
    max_skipped_updates: Every = Field(
        10, description="updates in a row that are skipped, for numbers that are not finite, before it stops; 0: never"
    )
    tracker: Literal["none", "wandb", "tensorboard"] = Field("none", description="where else metrics go")
    deterministic: bool | None = Field(
        None, description="the same bits every time, on a GPU too, where it is slower; null: on a CPU alone"
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


class WatchConfig(Node):
    """When to warn (prism_fast/run/alerts.py): a condition that holds for ``patience`` steps in a row."""

    patience: Annotated[int, Field(ge=1, le=10**6), NUMBER] = Field(20, description="steps that a condition must hold")
    entropy_floor: Share = Field(0.1, description="share of the entropy of the first steps")
    saturation: Share = Field(0.98, description="discriminator's accuracy")
    format_floor: Share = Field(0.5, description="share of responses with a valid format")
    format_margin: Share = Field(0.2, description="below the best share of valid formats so far")


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


class OverlongConfig(Node):
    """DAPO's soft penalty: rises linearly to -factor over the last ``buffer`` tokens before the limit."""

    buffer: Tokens = Field(4096, description="tokens before rollout.max_response_tokens, and no more than these")
    factor: Weight = Field(1.0, description="penalty at the limit")


class DynamicSamplingConfig(Node):
    """DAPO: groups whose accuracies are all equal are dropped and replaced by new prompts."""

    generation_factor: Annotated[int, Field(ge=1, le=100), NUMBER] = Field(
        3, description="prompts generated at once, in training batches"
    )
    max_tries: Annotated[int, Field(ge=1, le=100), NUMBER] = Field(10, description="generations for one step")


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
    out: Place = Field(description="the file to write, which must be new")
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
    out: Place = Field(description="the file to write, which must be new")
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


CONFIGS: dict[str, type[Node]] = {
    "sft": SFTConfig,
    "upcycle": UpcycleConfig,
    "pairs": PairsConfig,
    "warmup": WarmupConfig,
    "align": AlignConfig,
    "filter": FilterConfig,
    "curate": CurateConfig,
    "rlvr": RLVRConfig,
    "eval": EvaluateConfig,
    "benchmarks": BenchmarksConfig,
    "probe": ProbeConfig,
    "serve-discriminator": ServeConfig,
}
