"""What every training stage has: optimizer, processes, the run's own settings, and when it warns."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from prism_fast.config.values import NUMBER, Count, Every, Node, Part, Place, Seed, Share, Small
from prism_fast.settings import got

MAX_THREADS = 256


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


class WatchConfig(Node):
    """When to warn (prism_fast/run/alerts.py): a condition that holds for ``patience`` steps in a row."""

    patience: Annotated[int, Field(ge=1, le=10**6), NUMBER] = Field(20, description="steps that a condition must hold")
    entropy_floor: Share = Field(0.1, description="share of the entropy of the first steps")
    saturation: Share = Field(0.98, description="discriminator's accuracy")
    format_floor: Share = Field(0.5, description="share of responses with a valid format")
    format_margin: Share = Field(0.2, description="below the best share of valid formats so far")
