"""The updater that a run's settings ask for, and DeepSpeed's; the only importer of deepspeed.

Nothing else knows how weights are updated. Every form has the same calls: the updater itself is the way into a
micro-step's forward, ``backward(loss)`` adds gradients up, ``step()`` updates. Losses are shares of the whole batch's
loss: gradients are summed, over packs and over processes.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prism_fast import ranks
from prism_fast.config import ClusterConfig, OptimizerConfig
from prism_fast.files import write_json
from prism_fast.models.backbone import TreeModel
from prism_fast.records import DataError
from prism_fast.steps.adamw import torch_adamw
from prism_fast.steps.backprop import Backprop
from prism_fast.steps.updater import FSDPUpdater, Updater, shape_of


class DeepSpeedUpdater(Updater):
    """DeepSpeed's ZeRO 1, 2 or 3 around the same AdamW. Touches private names, so deepspeed is pinned.

    ``micro``: backward calls since the last step; DeepSpeed's own ``step`` fails without any.
    """

    lockstep = True
    every_module = True  # its buckets and its trace want all gradients, in the same order, every time

    def __init__(
        self, module: TreeModel, config: OptimizerConfig, total_steps: int, cluster: ClusterConfig, file: Path | None
    ):
        deepspeed = import_deepspeed()
        Backprop.__init__(self, module)
        self.config, self.total_steps, self.steps, self.micro = config, total_steps, 0, 0
        self.stage = int(cluster.sharding.removeprefix("zero"))
        low_precision = module.dtype != torch.float32
        exact = {name: p.detach().clone() for name, p in module.named_parameters() if name in module.always_fp32}
        trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        self.names, self.parameters = [name for name, _ in trained], [p for _, p in trained]
        self.mastered = frozenset(self.names) - module.always_fp32 if low_precision else frozenset()
        settings = deepspeed_config(cluster, config, module.dtype, module.device, ranks.world())
        if file is not None and ranks.is_first():
            write_json(file, settings, indent=1)
        if self.stage == 3:
            deepspeed.utils.set_z3_leaf_modules(module, list(module.gathered_at_once()))
        try:
            self.engine, self.optimizer, *_ = deepspeed.initialize(
                model=module,
                optimizer=torch_adamw(self.parameters, config, fused=config.offload),
                config=settings,
                dist_init_required=False,
            )
        except (ValueError, TypeError, AssertionError, deepspeed.DeepSpeedConfigError) as error:
            if not cluster.deepspeed:
                raise
            reason = " ".join(str(error).split())[:300]
            raise DataError(
                f"cluster.deepspeed: DeepSpeed {deepspeed.__version__} refuses it ({reason}); correct or leave out "
                f"{', '.join(cluster.deepspeed)}"
            ) from error
        for name, parameter in zip(self.names, self.parameters):  # in bf16 the engine has rounded them
            if low_precision and name in exact:
                deepspeed.utils.safe_set_full_fp32_param(parameter, exact[name])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.engine(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        self.micro += 1
        self.engine.backward(loss * ranks.world())  # DeepSpeed takes the mean over processes

    def step(self) -> float:
        """As `Updater.step`. A parameter without a gradient counts as one whose gradient is 0."""
        if not self.micro:
            self.next_step()
            return 0.0
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        self.micro = 0
        self.steps += 1
        return float(norm)

    def next_step(self) -> None:
        if self.micro:
            self.optimizer.zero_grad()
            if self.stage == 2:  # gradients that are reduced already, which zero_grad leaves
                for kept in (self.optimizer.averaged_gradients, self.optimizer.all_grad_tensors):
                    for group in kept:
                        kept[group] = None
                self.optimizer.micro_step_id = -1
        self.micro = 0
        self.steps += 1

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        if self.stage < 3:
            yield
            return
        from deepspeed.runtime.zero.stage3 import unwrap_model_for_generation

        with unwrap_model_for_generation(self.engine):  # gathers once, and takes the hooks off meanwhile
            yield

    def stream(self) -> Iterator[tuple[str, Tensor]]:
        if self.stage < 3:
            for name, value in super().stream():
                yield name, self._exact(name, value)
            return
        import deepspeed

        for unit in _units(self.module):
            with deepspeed.zero.GatheredParameters([p for _, p in unit]):
                whole = [(name, p.detach().clone()) for name, p in unit]
            for name, value in whole:
                yield name, self._exact(name, value)

    def _exact(self, name: str, value: Tensor) -> Tensor:
        """The fp32 master of a weight that is fp32 whatever the model's dtype, as the engine has rounded it."""
        if name in self.module.always_fp32 and name in self.names:
            return _whole("get_full_fp32_param", self.module.get_parameter(name))
        return value

    def tensors(self, parts: int = 1) -> dict[str, Tensor]:
        share = ranks.Share(parts)
        steps = [state["step"] for p in self._flat() if (state := self.optimizer.optimizer.state.get(p))]
        if steps:
            self._link_moments()
        for name in self.names if steps else ():
            share.offer(f"step.{name}", steps[0])
        for key in (None, *(("exp_avg", "exp_avg_sq") if steps else ())):
            for name, value in self._wholes(key):
                share.offer(f"{key or 'master'}.{name}", value)
        return share.kept

    def _wholes(self, key: str | None) -> Iterator[tuple[str, Tensor]]:
        """(name, whole tensor) of a moment of every parameter, or of the masters, of which processes hold parts.

        DeepSpeed's own way is a sum over processes for each; here many are in one, where it can be (`ranks.buckets`).
        """
        named = [(n, p) for n, p in zip(self.names, self.parameters) if key is not None or n in self.mastered]
        if self.stage == 3:
            for name, parameter in named:
                what = "fp32_param" if key is None else "optimizer_state"
                yield name, _whole(f"get_full_{what}", parameter, *(() if key is None else (key,)))
            return
        for bucket in ranks.buckets(enumerate(p for _, p in named)):
            parameters = [named[i][1] for i in bucket]
            flat = torch.zeros(sum(p.numel() for p in parameters), device=parameters[0].device)
            parts = flat.split([p.numel() for p in parameters])
            for parameter, part in zip(parameters, parts):
                held = parameter._hp_mapping  # type: ignore[attr-defined]
                if held is not None:  # a part of it is this process's
                    at = held.lp_fragment_address
                    part[at.start : at.start + at.numel].copy_(held.get_hp_fragment(key).detach())
            ranks.add(flat)
            for i, part in zip(bucket, parts):
                yield named[i][0], part.view_as(named[i][1])

    def load(self, tensors: Mapping[str, Tensor], steps: int) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        self.steps = steps
        self._check(tensors)
        done = [tensors[f"step.{name}"] for name in self.names if f"step.{name}" in tensors]
        if done:  # a fresh engine has no moments
            for flat in self._flat():
                self.optimizer.optimizer.state[flat] = {
                    "step": torch.stack(done).max().clone(),
                    "exp_avg": torch.zeros_like(flat),
                    "exp_avg_sq": torch.zeros_like(flat),
                }
            self._link_moments()
        for name, parameter in zip(self.names, self.parameters):
            if name in self.mastered:
                safe_set_full_fp32_param(parameter, tensors[f"master.{name}"].to(parameter.device))
            for key in ("exp_avg", "exp_avg_sq") if done else ():
                value = tensors.get(f"{key}.{name}", torch.zeros(()))  # one that never had a gradient has none
                safe_set_full_optimizer_state(parameter, value.expand(shape_of(parameter)).contiguous(), key)

    def _flat(self) -> list[Tensor]:
        """This process's partitions, which AdamW updates; ZeRO 1 in bf16 is another class of DeepSpeed's."""
        names = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition")
        return next(getattr(self.optimizer, name) for name in names if hasattr(self.optimizer, name))

    def _link_moments(self) -> None:
        """ZeRO 1 and 2 link moments to parameters in the first group's first step: later groups have none then."""
        if self.stage < 3:
            self.optimizer._hp_optimizer_states_linked = False
            self.optimizer._lazy_init_hp_params_optimizer_state()


def open_updater(
    module: TreeModel,
    config: OptimizerConfig,
    total_steps: int,
    cluster: ClusterConfig | None = None,
    out: Path | None = None,
    name: str = "",
) -> Updater:
    """The updater that ``cluster.sharding`` asks for.

    ``out``: the folder for deepspeed.json, or of a run's second model, NAME, for deepspeed_NAME.json.
    """
    sharding = "none" if cluster is None else cluster.sharding
    if config.moments != "float32" and sharding.startswith("zero"):
        raise DataError(
            f"optimizer.moments = {config.moments}: cluster.sharding = {sharding} is DeepSpeed's, which keeps them in "
            "float32; set float32, or cluster.sharding to none or fsdp2"
        )
    if sharding == "none":
        return Updater(module, config, total_steps)
    if not ranks.grouped():
        raise DataError(
            f"cluster.sharding = {sharding}: the process group is not there; start with prism-fast or torchrun"
        )
    if sharding == "fsdp2":
        return FSDPUpdater(module, config, total_steps)
    assert cluster is not None
    file = None if out is None else out / f"deepspeed{name and f'_{name}'}.json"
    return DeepSpeedUpdater(module, config, total_steps, cluster, file)


def deepspeed_config(
    cluster: ClusterConfig, optimizer: OptimizerConfig, dtype: torch.dtype, device: torch.device, world: int
) -> dict[str, Any]:
    """DeepSpeed's configuration, generated from ours; ``cluster.deepspeed`` lies over it."""
    zero: dict[str, Any] = {
        "stage": int(cluster.sharding.removeprefix("zero")),
        "contiguous_gradients": True,
        "reduce_bucket_size": 200_000_000,
        # DeepSpeed refuses it for ZeRO 1 where the caller says when gradients are complete.
        "overlap_comm": device.type == "cuda" and cluster.sharding != "zero1",
        # All weights are sharded: with leaf modules, small ones that stay are fetched again and again.
        "stage3_param_persistence_threshold": 0,
        # ZeRO 3 would replace torch.nn.functional.linear for the whole process, a reference model's too.
        "memory_efficient_linear": False,
    }
    if optimizer.offload:
        # Torch rounds pinned memory up to a power of two: of a 4B model that doubles it, by 42 GB.
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    made: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # packs; how many there are in a step is the trainer's to say
        "gradient_accumulation_steps": 1,
        "train_batch_size": world,
        "managed_gradient_accumulation": False,
        "gradient_clipping": optimizer.clip_norm,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
        "steps_per_print": 2**31,
    }
    if dtype == torch.bfloat16:
        made["bf16"] = {"enabled": True, "check_grad_overflow": True}
        made["data_types"] = {"grad_accum_dtype": "fp32"}
    return _over(made, cluster.deepspeed)


def import_deepspeed() -> Any:
    """deepspeed, with what keeps its start quiet and quick. Raises DataError where it is not installed, or another."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    os.environ["LOCAL_RANK"] = str(local_rank_for_deepspeed())
    try:
        import deepspeed
    except ImportError as error:
        raise DataError(
            f"cluster.sharding: zero needs deepspeed ({error}); pip install 'prism-fast[cluster]', or take fsdp2"
        ) from error
    from deepspeed.runtime import config

    if not hasattr(config, "get_managed_gradient_accumulation"):
        raise DataError(f"deepspeed {deepspeed.__version__}: too old; pip install 'prism-fast[cluster]', or take fsdp2")
    # Compiled at the first start: it takes minutes, and leaves a lock that hangs the next start where it is killed.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def local_rank_for_deepspeed() -> int:
    """The number of this process's GPU, which DeepSpeed takes from LOCAL_RANK.

    One process without a launcher, or SLURM, does not set it; one that is shown a single GPU may have another there.
    """
    here, visible = ranks.place(os.environ), torch.cuda.device_count()
    return ranks.own_gpu(here, visible) if visible else here.local_rank


def _over(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    made = copy.deepcopy(under)
    for key, value in over.items():
        deeper = isinstance(value, dict) and isinstance(made.get(key), dict)
        made[key] = _over(made[key], value) if deeper else copy.deepcopy(value)
    return made


def _whole(what: str, parameter: Tensor, *key: str) -> Tensor:
    """DeepSpeed's ``safe_get_full_...`` of a parameter that it trains: a call of all processes."""
    import deepspeed

    value = getattr(deepspeed.utils, f"safe_{what}")(parameter, *key)
    if value is None:
        raise RuntimeError(f"deepspeed {deepspeed.__version__}: no {what} of a parameter; install the pinned version")
    return value


def _units(module: TreeModel) -> Iterator[list[tuple[str, nn.Parameter]]]:
    """Parameters by name, in the pieces that are gathered at once; a tied one is in the first."""
    seen: set[int] = set()
    named = list(module.named_parameters())
    for unit in [m for m in module.modules() if isinstance(m, module.gathered_at_once())]:
        inside = {id(p) for p in unit.parameters()}
        yield [(name, p) for name, p in named if id(p) in inside]
        seen |= inside
    for name, parameter in named:
        if id(parameter) not in seen:
            yield [(name, parameter)]
