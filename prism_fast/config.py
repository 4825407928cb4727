"""One frozen, validated configuration tree per command. Unknown keys are errors.

A stage reads a YAML file and ``key.path=value`` overrides; recipes/*.yaml hold the published settings and the demo's.
``base: NAME`` at the top of a file names a recipe that it lies over.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from prism_fast.records import DataError
from prism_kernels import PolicyObjective
from prism_kernels.group_advantage.rules import RULES

RECIPES = Path(__file__).parent / "recipes"


class Node(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelConfig(Node):
    path: Path
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on a GPU, float32 on a CPU
    freeze_vision: bool = False
    freeze_embeddings: bool = False
    activation_checkpointing: bool = False


class DataConfig(Node):
    files: tuple[Path, ...] = Field(min_length=1)
    eval_files: tuple[Path, ...] = ()
    skip_bad_records: int = Field(0, ge=0)
    max_prompt_tokens: int = Field(2048, gt=0)
    system_prompt: str | None = None  # put before prompts that have none

    @property
    def reading(self) -> dict[str, Any]:
        """Options of data/formats.py's readers."""
        return {"skip_bad": self.skip_bad_records, "system_prompt": self.system_prompt}


class OptimizerConfig(Node):
    lr: float = Field(gt=0)
    schedule: Literal["cosine", "constant"] = "constant"
    warmup_ratio: float = Field(0.0, ge=0, lt=1)
    weight_decay: float = Field(0.01, ge=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.999, ge=0, lt=1)
    clip_norm: float = Field(1.0, gt=0)


class RunConfig(Node):
    out: Path
    seed: int = 0
    threads: int | None = Field(None, gt=0)  # torch threads on a CPU; resuming bit for bit needs the same number
    tokens_per_pack: int = Field(16384, gt=0)
    eval_every: int = Field(0, ge=0)  # steps; 0: only at the end
    save_every: int = Field(100, ge=0)  # steps; 0: only at the end
    keep_last: int = Field(2, ge=1)
    tracker: Literal["none", "wandb", "tensorboard"] = "none"
    deterministic: bool = True  # bit-for-bit repeatable on a CPU


class Sampling(Node):
    """How a policy answers a prompt: what steps/sampler.py reads, in every place that samples."""

    samples: int = Field(1, gt=0)  # responses per prompt
    temperature: float = Field(1.0, ge=0)  # 0: the most probable token
    max_response_tokens: int = Field(gt=0)
    rows_at_once: int = Field(512, gt=0)  # responses that are sampled together


class EvalConfig(Sampling):
    temperature: float = Field(0.0, ge=0)
    max_response_tokens: int = Field(2048, gt=0)
    limit: int | None = Field(None, gt=0)  # prompts; None: all


class RolloutConfig(Sampling):
    prompts_per_step: int = Field(gt=0)
    samples: int = Field(16, gt=0)
    temperature: float = Field(1.0, gt=0)
    max_response_tokens: int = Field(6144, gt=0)


class WatchConfig(Node):
    """When to warn (prism_fast/run/alerts.py): a condition that holds for ``patience`` steps in a row."""

    patience: int = Field(20, gt=0)
    entropy_floor: float = Field(0.1, ge=0, le=1)  # fraction of the entropy of the first steps
    saturation: float = Field(0.98, ge=0, le=1)  # discriminator accuracy
    format_floor: float = Field(0.5, ge=0, le=1)  # format validity
    format_margin: float = Field(0.2, ge=0, le=1)  # below the best format validity so far


class SFTConfig(Node):
    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig
    run: RunConfig
    eval: EvalConfig = EvalConfig()
    batch_size: int = Field(64, gt=0)  # samples per step
    max_tokens: int = Field(8192, gt=0)  # prompt and response
    epochs: float | None = Field(None, gt=0)
    steps: int | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _length(self):
        return _one_length(self)


class UpcycleConfig(Node):
    model: ModelConfig  # dense
    out: Path
    num_experts: int = Field(4, ge=2)
    top_k: int = Field(2, ge=1)
    expert_noise: float = Field(0.01, ge=0)
    router_std: float = Field(0.02, ge=0)
    seed: int = 0

    @model_validator(mode="after")
    def _fits(self):
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k = {self.top_k} is more than num_experts = {self.num_experts}")
        return self


class WarmupConfig(Node):
    discriminator: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig
    run: RunConfig
    watch: WatchConfig = WatchConfig()
    batch_size: int = Field(64, gt=0)  # records per step; a record is a caption pair and a reasoning pair
    max_tokens: int = Field(8192, gt=0)  # prompt and one part
    balance_coef: float = Field(0.01, ge=0)
    epochs: float | None = Field(None, gt=0)
    steps: int | None = Field(None, gt=0)
    eval_fraction: float = Field(0.1, gt=0, lt=1)  # records kept for pair accuracy, unless data.eval_files are given
    head_dropout: float = Field(0.0, ge=0, lt=1)  # compat: 0.1

    @model_validator(mode="after")
    def _length(self):
        return _one_length(self)


class AdvantageConfig(Node):
    """Arguments of prism_kernels.multi_reward_advantage."""

    rule: str = "align"  # a row of the kernel's table of rules
    perception_weight: float = 0.5
    reasoning_weight: float = 0.5
    align_coef: float = 1.0
    wrong_penalty: float = 1.0
    format_penalty: float = 1.5
    accuracy_weight: float = 1.0
    format_weight: float = 1.0

    @field_validator("rule")
    @classmethod
    def _rule(cls, rule: str) -> str:
        if rule not in RULES:
            raise ValueError(f"expected one of {', '.join(RULES)}, got {rule!r}")
        return rule


class CompatConfig(Node):
    """Behaviour of the reference implementation where it differs, for parity runs. Everything off: ``fixed``."""

    format: Literal["fixed", "compat"] = "fixed"  # compat: the reference's expression, which accepts repeated tags
    clamp_in_loss: bool = False  # scores clamped inside the discriminator's loss too
    teacher_token_limit: int | None = Field(None, gt=0)  # teacher parts cut to so many tokens (512)
    text_positions: bool = False  # 1-D positions in the discriminator


class DiscriminatorStep(Node):
    """What the discriminator's step of the adversarial stage reads: which parts it takes, and its loss."""

    max_part_tokens: int = Field(6144, gt=0)
    score_clamp: float = Field(10.0, gt=0)
    score_penalty: float = Field(0.001, ge=0)  # times the mean square of the four scores
    length_correction: float = Field(0.0, ge=0)  # score - this * log(1 + tokens of the part)
    compat: CompatConfig = CompatConfig()


class AlignConfig(DiscriminatorStep):
    policy: ModelConfig
    discriminator: ModelConfig
    data: DataConfig
    rollout: RolloutConfig
    policy_optimizer: OptimizerConfig
    discriminator_optimizer: OptimizerConfig
    run: RunConfig
    steps: int = Field(gt=0)
    advantage: AdvantageConfig = AdvantageConfig()
    eval: EvalConfig = EvalConfig()
    watch: WatchConfig = WatchConfig()


class ObjectiveConfig(Node):
    """The policy objective: a named one, and what differs from it."""

    name: Literal["grpo", "dapo", "gspo", "dr_grpo"] = "grpo"
    clip_low: float | None = None
    clip_high: float | None = None
    kl_coef: float = Field(0.0, ge=0)
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    entropy_coef: float = 0.0
    importance_cap: float | None = Field(None, gt=0)

    def build(self, max_length: int) -> PolicyObjective:
        changes = {k: v for k, v in self.model_dump(exclude={"name"}).items() if v is not None}
        if self.name == "dr_grpo":
            return PolicyObjective.dr_grpo(max_length, **changes)
        return getattr(PolicyObjective, self.name)(**changes)


class OverlongConfig(Node):
    """DAPO's soft penalty: rises linearly to -factor over the last ``buffer`` tokens before the limit."""

    buffer: int = Field(4096, gt=0)
    factor: float = Field(1.0, ge=0)


class DynamicSamplingConfig(Node):
    """DAPO: groups whose accuracies are all equal are dropped and replaced by new prompts."""

    generation_factor: int = Field(3, gt=0)  # prompts generated at once, in training batches
    max_tries: int = Field(10, gt=0)


class OwnReward(Node):
    """A reward function of your own in place of the judge of answers: docs/training.md, "A reward of your own"."""

    function: str | None = None  # module:name or path.py:name
    replaces: Literal["accuracy", "reward"] = "accuracy"  # accuracy: 0 to 1, weighed as ours; reward: all of it
    seconds: float = Field(10.0, gt=0, allow_inf_nan=False)  # of CPU time a call may take; ten times that by the clock
    memory_gib: float = Field(4.0, gt=0, allow_inf_nan=False)  # of address space

    @field_validator("function")
    @classmethod
    def _name(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch(r"(?:[\w.]+|.+\.py):[A-Za-z_]\w*", name):
            raise ValueError(f"expected module:name or path.py:name, got {name!r}")
        return name


BY_THE_JUDGE = OwnReward()


class RewardConfig(Node):
    """The verifiable reward: what is right, what is well formed, and what is too long."""

    accuracy_weight: float = Field(0.8, ge=0)
    format_weight: float = Field(0.2, ge=0)
    overlong: OverlongConfig | None = None
    reward: OwnReward = OwnReward()


class RLVRConfig(RewardConfig):
    policy: ModelConfig
    data: DataConfig
    rollout: RolloutConfig
    optimizer: OptimizerConfig
    run: RunConfig
    steps: int = Field(gt=0)
    objective: ObjectiveConfig = ObjectiveConfig()
    dynamic_sampling: DynamicSamplingConfig | None = None
    reference: ModelConfig | None = None  # needed by objective.kl_coef
    eval: EvalConfig = EvalConfig()
    watch: WatchConfig = WatchConfig()

    @model_validator(mode="after")
    def _reference(self):
        if self.objective.kl_coef and self.reference is None:
            raise ValueError("objective.kl_coef needs a reference policy: set reference.path")
        return self


class PairsConfig(Sampling):
    """`prism-fast data pairs`: roll out a policy on the teacher's prompts and write warm-up pairs."""

    model: ModelConfig
    data: DataConfig  # alignment files
    out: Path
    limit: int | None = Field(None, gt=0)  # prompts
    temperature: float = Field(1.0, gt=0)
    max_response_tokens: int = Field(6144, gt=0)
    seed: int = 0


class FilterConfig(Sampling):
    """`prism-fast data filter`: keep the prompts whose pass rate over k rollouts lies in [low, high]."""

    model: ModelConfig
    data: DataConfig  # RLVR files
    out: Path
    samples: int = Field(8, gt=0)
    low: float = Field(0.2, ge=0, le=1)
    high: float = Field(0.8, ge=0, le=1)
    keep: int | None = Field(None, gt=0)  # at most so many prompts
    limit: int | None = Field(None, gt=0)  # prompts tried
    temperature: float = Field(1.0, gt=0)
    max_response_tokens: int = Field(8192, gt=0)
    seed: int = 0

    @model_validator(mode="after")
    def _range(self):
        if self.low > self.high:
            raise ValueError(f"low = {self.low} is above high = {self.high}")
        return self


class EvaluateConfig(Node):
    model: ModelConfig
    data: DataConfig
    reward: OwnReward = OwnReward()
    eval: EvalConfig = EvalConfig()
    out: Path
    seed: int = 0


def _one_length(config):
    if (config.epochs is None) == (config.steps is None):
        raise ValueError("set either epochs or steps")
    return config


Config = TypeVar("Config", bound=BaseModel)


def load_config(
    cls: type[Config], file: Path | None, overrides: Sequence[str] = (), base: dict | None = None
) -> Config:
    """A validated configuration from a YAML file, then ``key.path=value`` overrides (values are YAML).

    ``file`` may also be the name of a recipe. Raises DataError in one line that names file, key and remedy.
    """
    tree: dict[str, Any] = dict(base or {})
    place = "configuration"
    if file is not None:
        path = Path(file)
        if not path.is_file() and (RECIPES / f"{file}.yaml").is_file():
            path = RECIPES / f"{file}.yaml"
        place = str(path)
        tree = merge(tree, read_yaml(path))
    tree = merge(tree, parse_overrides(overrides))
    try:
        return cls.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "(top level)"
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            message = f"unknown key; known here: {', '.join(_known(cls, first['loc'][:-1]))}"
        raise DataError(f"{place}: {key}: {message}{more}") from None


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """``key.path=value`` strings as one tree; values are YAML."""
    tree: dict[str, Any] = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise DataError(f"override {override!r}: expected key.path=value, for example run.seed=1")
        try:
            branch = yaml.safe_load(value)
        except yaml.YAMLError:
            raise DataError(f"override {override!r}: the value is not YAML; quote it") from None
        for name in reversed(key.split(".")):
            branch = {name: branch}
        tree = merge(tree, branch)
    return tree


def read_yaml(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The tree of a YAML file. A top-level ``base: NAME`` is a recipe (or file beside it) that the file lies over."""
    if path in seen:
        raise DataError(f"{path}: base: the files name each other in a circle; remove one of them")
    if not path.is_file():
        names = ", ".join(sorted(p.stem for p in RECIPES.glob("*.yaml")))
        raise DataError(f"{path}: no such configuration file; give a YAML file or a recipe ({names})")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise DataError(f"{path}{line}: not valid YAML; check indentation and quotes") from None
    if not isinstance(tree, dict):
        raise DataError(f"{path}: expected a mapping of keys at the top level, got {type(tree).__name__}")
    base = tree.pop("base", None)
    if base is None:
        return tree
    beside = path.parent / str(base)
    return merge(read_yaml(beside if beside.is_file() else RECIPES / f"{base}.yaml", (*seen, path)), tree)


def merge(low: dict[str, Any], high: dict[str, Any]) -> dict[str, Any]:
    """``high`` over ``low``, mappings merged key by key."""
    merged = dict(low)
    for key, value in high.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def _known(cls: type[BaseModel], path: tuple) -> list[str]:
    for name in path:
        inner = cls.model_fields[name].annotation if name in cls.model_fields else None
        options = [inner, *getattr(inner, "__args__", ())]
        cls = next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), cls)
    return sorted(cls.model_fields)
