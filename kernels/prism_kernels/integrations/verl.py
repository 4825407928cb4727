"""prism_kernels inside verl: its fused log-prob, PRISM's advantage, and a trainer that carries a discriminator.

    VERL_USE_EXTERNAL_MODULES=prism_kernels.integrations.verl python -m verl.trainer.main_ppo ...

or nothing at all: verl loads the entry point ``verl.plugins`` of the installed package in every process of it.
Importing this module where verl is installed is :func:`install`, since an import is all that either of the two does.

N tokens, H hidden, V vocab size, B responses (rows of a batch), T tokens of the longest response.
"""

from __future__ import annotations

import logging
import os
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prism_kernels.checks import wrong
from prism_kernels.integrations.hosts import check_version
from prism_kernels.integrations.verl_advantage import (
    RULES,
    SCORES,
    Scores,
    Settings,
    column,
    from_reward_function,
    prism_group,
    sessions,
    tensors,
)
from prism_kernels.linear_logprob.api import linear_logprob

TESTED = ("0.9.1",)
UNTESTED = "PRISM_VERL_UNTESTED"  # =1: take another version, where an import installs
BACKENDS = ("torch", "triton", "liger")  # verl's closed list; by another name it says that it skips, and goes on
_HERE = "prism_kernels.integrations.verl"


# The log-prob.


def log_probs(
    hidden: Tensor, weight: Tensor, ids: Tensor, temperature: float = 1.0, *, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """What verl's ``FusedLinearForPPO`` computes: hidden (N, H) or (B, T, H), weight (V, H), ids (N,) or (B, T) ->
    log-probs in fp32 and entropies in the dtype of the logits, shaped as ids.

    Raises RuntimeError for a sharded weight, ValueError for what :func:`~prism_kernels.linear_logprob` refuses.
    """
    if hasattr(weight, "full_tensor"):
        raise RuntimeError(
            f"{_HERE}: the head's weight is a sharded DTensor here; shard it with the root module (FSDP2)"
        )
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    rows = hidden.reshape(-1, hidden.shape[-1]).to(dtype)
    with torch.autocast(device, enabled=False):
        out = linear_logprob(
            rows, weight.to(dtype), ids.reshape(-1).long(), temperature=float(temperature), with_entropy=True, impl=impl
        )
    assert out.entropy is not None
    return out.logprob.float().view(ids.shape), out.entropy.to(dtype).view(ids.shape)


def _fused_linear(theirs: Any, impl: str) -> Any:
    """verl's class with our forward where it would take its torch backend."""

    class FusedLinearForPPO(theirs):
        prism_theirs = theirs

        def forward(
            self, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0
        ) -> tuple[Tensor, Tensor]:
            if self.impl_backend != "torch":
                return super().forward(hidden_states, vocab_weights, input_ids, temperature)
            return log_probs(hidden_states, vocab_weights, input_ids, temperature, impl=impl)

    return FusedLinearForPPO


# The trainer.


class PrismTrainer:
    """Mix-in for verl's ``PPOTrainerSync``: PRISM's advantage, and a discriminator that is scored and trained.

    Registered as ``trainer.v1.trainer_mode=prism``; takes ``algorithm.adv_estimator=prism``, and `Settings` from
    ``algorithm.prism``. The separate rewards of a response are those that its reward function returned in a dictionary,
    or, with ``algorithm.prism.judge=module:name``, the judge's: ``judge = name(**judge_options)`` is made once, in the
    trainer's process, and between the log-probs and the advantage of every step called as
    ``judge(completion_ids=[[int]], log_metric=f(name, value), **columns)``, lists of one entry per response, to score
    them and learn from them. It returns ``{"perception": [float | None], "reasoning": ..., "format_valid": ...}``.
    ``judge.save(folder)`` and ``judge.load(folder)`` are called with each of the trainer's checkpoints.
    """

    def __init__(self, config: Any):
        self._prism_settings = _checked(config)
        parent: Any = super()
        parent.__init__(config)
        self._prism_judge = _judge(self._prism_settings)

    @property
    def trainer_mode(self) -> str:
        """What verl compares with "sync" to choose buffer, loader and checkpoints: not the name that we are under."""
        return "sync"

    @trainer_mode.setter
    def trainer_mode(self, name: str) -> None:
        pass

    @property
    def _verl(self) -> Any:
        return self  # a PPOTrainer, which this class does not know

    def _compute_advantage(self, batch: Any, metrics: dict[str, Any]) -> Any:
        parent: Any = super()
        scores = self._prism_scores(batch, metrics)
        token = SCORES.set(scores)
        try:
            out = parent._compute_advantage(batch, metrics)
        finally:
            SCORES.reset(token)
        if not scores.read:
            raise RuntimeError("verl computes advantages elsewhere in this version: PrismTrainer cannot")
        return out

    def _prism_scores(self, batch: Any, metrics: dict[str, Any]) -> Scores:
        """Rewards of each session's last row; rows that fill the batch up have 0, in a group of their own."""
        settings, judge = self._prism_settings, self._prism_judge
        last, of_row = sessions(batch.keys)
        real = [place for place, row in enumerate(last) if not batch.tags[row].get("is_padding", False)]
        keys = [batch.keys[last[place]] for place in real]
        if judge is None:
            fields = self._prism_fields(batch, keys, ["extra_fields", *settings.names()])
            given = from_reward_function(fields, settings)
        else:
            fields = self._prism_fields(batch, keys, ["responses", *settings.columns.values()])
            columns = {name: column(fields, place) for name, place in settings.columns.items()}
            ids = [[int(i) for i in row] for row in column(fields, "responses")]
            given = judge(completion_ids=ids, log_metric=metrics.__setitem__, **columns)
        found = tensors(given, settings, len(keys))
        for name, value in found.items():
            if not value.isnan().all():
                metrics[f"prism/{name}/mean"] = float(value.nanmean())
        filled = {
            name: torch.zeros(len(last)).index_copy(0, torch.tensor(real), value) for name, value in found.items()
        }
        if settings.format_valid is not None:
            filled[settings.format_valid][[place for place in range(len(last)) if place not in set(real)]] = 1.0
        return Scores(filled, of_row)

    def _prism_fields(self, batch: Any, keys: list[str], names: list[str]) -> Any:
        base: Any = import_module("verl.trainer.ppo.v1.trainer_base")
        return base.tq.kv_batch_get(keys=keys, partition_id=batch.partition_id, select_fields=names)

    def _save_checkpoint(self) -> None:
        parent: Any = super()
        if self._prism_judge is not None:  # first: verl's own ends by naming the checkpoint as the latest
            self._prism_judge.save(self._prism_folder())
        parent._save_checkpoint()

    def _load_checkpoint(self) -> None:
        parent: Any = super()
        parent._load_checkpoint()
        if self._prism_judge is not None and self._verl.global_steps > 0:
            trainer = self._verl.config.trainer
            resumed = trainer.resume_mode == "resume_path"
            folder = self._prism_folder(trainer.resume_from_path if resumed else None)
            if not folder.exists():
                raise RuntimeError(f"{folder}: this checkpoint holds no discriminator to go on from")
            self._prism_judge.load(folder)

    def _prism_folder(self, checkpoint: str | None = None) -> Path:
        step = f"{self._verl.config.trainer.default_local_dir}/global_step_{self._verl.global_steps}"
        return Path(checkpoint or step).absolute() / "discriminator"


def _checked(config: Any) -> Settings:
    """What the trainer needs of verl's configuration. Raises ValueError for what verl would take and not do."""
    algorithm = config.algorithm
    if str(algorithm.adv_estimator) != "prism":
        raise wrong(
            "algorithm.adv_estimator", "prism, with trainer.v1.trainer_mode=prism", str(algorithm.adv_estimator)
        )
    if algorithm.get("use_kl_in_reward", False):
        got = "True: PRISM's advantage reads the separate rewards, not the total that verl takes the divergence from"
        raise wrong("algorithm.use_kl_in_reward", "False", got, "or use actor_rollout_ref.actor.use_kl_loss")
    model = config.actor_rollout_ref.model
    backend = (model.get("fused_kernel_options", None) or {}).get("impl_backend", None)
    if model.get("use_fused_kernels", False) and backend not in BACKENDS:
        name = "actor_rollout_ref.model.fused_kernel_options.impl_backend"
        raise wrong(name, "torch, which is prism_kernels' here, triton or liger", str(backend))
    settings = Settings.of(algorithm)
    settings.advantages({name: torch.ones(2) for name in settings.names()}, torch.zeros(2, dtype=torch.int64))
    return settings


def _judge(settings: Settings) -> Any:
    """What ``algorithm.prism.judge`` names, made. Raises ValueError for a name that is none, RuntimeError elsewhere."""
    if settings.judge is None:
        return None
    module, _, name = settings.judge.partition(":")
    try:
        make = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        remedy = "prism_fast's own needs another transformers than verl: prism_kernels.integrations.judge:JudgeProcess"
        raise wrong("algorithm.prism.judge", "module:name", f"{settings.judge} ({error})", remedy) from error
    judge = make(**settings.judge_options)
    lacks = [method for method in ("__call__", "save", "load") if not callable(getattr(judge, method, None))]
    if lacks:
        raise wrong("algorithm.prism.judge", "an object to call, with save and load", f"one without {', '.join(lacks)}")
    return judge


# Into verl, and out of it.


def install(*, impl: str = "auto", untested: bool = False) -> None:
    """Put all of this into verl, in this process; importing this module has done so where verl is installed.

    Replaced: ``FusedLinearForPPO``, which every fused forward of verl (``use_fused_kernels=True``, torch backend)
    calls. It is called on four rows first and compared with verl's own, as is ``prism_group`` with verl's GRPO.
    Registered: these rules, and the trainer ``prism`` where what verl's v1 trainer needs is installed.

    Args:
        impl: implementation of the log-prob, as everywhere.
        untested: take a version of verl that is not in ``TESTED``.
    Raises:
        RuntimeError: another version, a second call, a name that verl moved or another took, or what gives something
            else than verl's.
    """
    check_version("verl", TESTED, untested)
    functional, algorithms = _modules()
    theirs = functional.FusedLinearForPPO
    if hasattr(theirs, "prism_theirs"):
        raise RuntimeError(f"{_HERE}: install() was called already, as importing this module does; uninstall() first")
    ours = _fused_linear(theirs, impl)
    _probe_log_probs(ours)
    _probe_rule(algorithms)
    entries: list[tuple[dict[str, Any], str, Any]] = []
    entries += [(algorithms.ADV_ESTIMATOR_REGISTRY, name, rule) for name, rule in RULES.items()]
    trainers = _trainers()
    if trainers is not None:
        trainer = type("PrismPPOTrainer", (PrismTrainer, trainers.PPOTrainerSync), {"__module__": __name__})
        entries.append((trainers.trainer_base.TRAINER_REGISTRY, "prism", trainer))
    for registry, name, _ in entries:
        if name in registry:
            raise RuntimeError(f"verl has something of another plugin under the name {name}: {registry[name]}")
    for registry, name, value in entries:
        registry[name] = value
    functional.FusedLinearForPPO = ours


def uninstall() -> None:
    """Put verl's own back and take our names out. Does nothing where :func:`install` was not called."""
    functional, algorithms = _modules()
    found = functional.FusedLinearForPPO
    if not hasattr(found, "prism_theirs"):
        return
    functional.FusedLinearForPPO = found.prism_theirs
    for name in RULES:
        algorithms.ADV_ESTIMATOR_REGISTRY.pop(name, None)
    trainers = _trainers()
    if trainers is not None:
        trainers.trainer_base.TRAINER_REGISTRY.pop("prism", None)


def _modules() -> tuple[Any, Any]:
    """verl's modules with what is replaced and where rules are registered. Raises RuntimeError where they moved."""
    functional: Any = import_module("verl.utils.experimental.torch_functional")
    algorithms: Any = import_module("verl.trainer.ppo.core_algos")
    _has((functional, "FusedLinearForPPO"), (algorithms, "ADV_ESTIMATOR_REGISTRY"))
    return functional, algorithms


def _has(*names: tuple[Any, str]) -> None:
    for owner, name in names:
        if not hasattr(owner, name):
            raise RuntimeError(f"{owner.__name__} has no {name}: this version of verl moved it")


def _trainers() -> Any:
    """verl's trainers; None where a package that these alone need is not installed."""
    try:
        trainers: Any = import_module("verl.trainer.ppo.v1")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "verl":
            raise RuntimeError(f"{error}: this version of verl moved it") from error
        return None
    _has((trainers.trainer_base, "tq"), (trainers.trainer_base, "TRAINER_REGISTRY"))
    _has(*((trainers.PPOTrainerSync, name) for name in ("_compute_advantage", "_save_checkpoint", "_load_checkpoint")))
    return trainers


def _probe_log_probs(ours: Any) -> None:
    """Values and gradients of four rows by both classes. Raises RuntimeError where they differ."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(shape, generator=generator) for shape in ((1, 4, 8), (12, 8))]
    ids = torch.randint(12, (1, 4), generator=generator)
    found: list[Any] = []
    for made in (ours.prism_theirs, ours):
        inputs: list[Any] = [tensor.clone().requires_grad_() for tensor in drawn]
        try:
            logprob, entropy = made(impl_backend="torch").forward(
                hidden_states=inputs[0], vocab_weights=inputs[1], input_ids=ids, temperature=0.7
            )
            gradients = torch.autograd.grad((logprob * logprob + 0.3 * entropy).sum(), inputs)
        except (TypeError, ValueError, RuntimeError) as error:
            raise RuntimeError(f"verl's FusedLinearForPPO takes other arguments than this one ({error})") from error
        found.append((logprob, entropy, *gradients))
    for name, theirs, mine in zip(("log-prob", "entropy", "d hidden", "d weight"), *found):
        _same("FusedLinearForPPO", name, theirs, mine)


def _probe_rule(algorithms: Any) -> None:
    """``prism_group`` of four responses by verl's GRPO and ours."""
    rewards, mask = torch.tensor([[0.0, 1.0], [0.5, 0.0], [0.0, 0.2], [3.0, 0.0]]), torch.tensor([[1, 1], [1, 0]] * 2)
    index = np.array(["a", "b", "b", "a"], dtype=object)
    try:
        theirs, _ = algorithms.compute_grpo_outcome_advantage(rewards, mask, index)
    except (AttributeError, TypeError) as error:
        raise RuntimeError(f"verl's GRPO takes other arguments than this rule ({error})") from error
    _same("GRPO", "advantage", theirs, prism_group(rewards, mask, index)[0])


def _same(what: str, name: str, theirs: Tensor, mine: Tensor) -> None:
    if theirs.shape != mine.shape:
        raise RuntimeError(f"verl's {what} gives {name} as {tuple(theirs.shape)}, this one as {tuple(mine.shape)}")
    if not torch.allclose(theirs, mine, rtol=1e-4, atol=1e-4):
        gap = float((theirs - mine).detach().abs().max())
        raise RuntimeError(f"verl's {what} computes another {name} than this one: {gap} apart")


def _on_import() -> None:
    """Both of verl's hooks only import. An error of an entry point it logs where nobody looks, and goes on without."""
    try:
        version("verl")
    except PackageNotFoundError:
        return
    try:
        install(untested=os.environ.get(UNTESTED) == "1")
    except Exception as error:
        raise SystemExit(
            f"{_HERE}: {error}; or {UNTESTED}=1 to insist on a version, VERL_USE_EXTERNAL_PLUGINS=none to go without"
        ) from error
    logging.getLogger(_HERE).warning("verl's torch backend of fused log-probs is prism_kernels' in this process")


_on_import()
