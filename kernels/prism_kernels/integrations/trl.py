"""prism_kernels inside TRL: the log-probs of its trainers, and PRISM's advantage for GRPOTrainer.

>>> from prism_kernels.integrations import trl as prism_trl
>>> prism_trl.install()                                            # before any trainer; uninstall() undoes it
>>> class Trainer(prism_trl.PrismAdvantage, GRPOTrainer): ...
>>> Trainer(model, reward_funcs=[perception, reasoning, format_valid], ...)

N rows (tokens), H hidden, V vocab size, B responses of all processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from prism_kernels.checks import wrong
from prism_kernels.group_advantage.api import multi_reward_advantage
from prism_kernels.integrations.hosts import check_version
from prism_kernels.linear_logprob.api import linear_logprob

TESTED = ("1.16",)
# What TRL's function computes besides log-probs where it is asked, in the order of its results; unasked: all of it.
OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


class ChunkedLogProb:
    """In place of TRL's ``ChunkedLogProbFunction``: the same ``apply``, on :func:`~prism_kernels.linear_logprob`."""

    def __init__(self, theirs: Any, impl: str):
        self.theirs, self.impl = theirs, impl

    def apply(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        *others: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """hidden (N, H), weight (V, H), targets (N,) -> log-probs, then OUTPUTS, each (N,), None where nobody asks.

        ``others``: soft cap, logit scale, names of outputs. Raises RuntimeError for weights that ZeRO 3 shards.
        """
        defaults: list[Any] = [None, 1.0, OUTPUTS]
        softcap, logit_scale, outputs = [*others, *defaults[len(others) :]]
        if hasattr(weight, "ds_id"):
            raise RuntimeError(
                "prism_kernels.integrations.trl: the head's weight is sharded by ZeRO 3, which gathers it around the "
                "forward and not around this function's backward; use ZeRO 2 or FSDP2, or uninstall()"
            )
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        with torch.autocast(device, enabled=False):
            out = linear_logprob(
                hidden, weight, targets, bias=bias, temperature=temperature, softcap=softcap,
                with_entropy="entropy" in outputs, impl=self.impl, logit_scale=logit_scale,
                also=[name for name in OUTPUTS[1:] if name in outputs],
            )  # fmt: skip
        return out.logprob, out.entropy, out.log_sum_sq_probs, out.mean_logits, out.is_top1


def install(*, impl: str = "auto", untested: bool = False) -> None:
    """Log-probs and entropies of GRPO, RLOO, DPO, KTO, SFT and their kin by linear_logprob, in this process.

    They all go through one function of ``trl.trainer.utils``, which is replaced. It is called on four rows first and
    compared with TRL's own.

    Args:
        impl: implementation of the op, as everywhere.
        untested: take a version of TRL that is not in ``TESTED``.
    Raises:
        RuntimeError: another version, a second call, or a function that gives something else than TRL's.
    """
    check_version("trl", TESTED, untested)
    utils: Any = import_module("trl.trainer.utils")

    theirs = getattr(utils, "_ChunkedLogProbFunction", None)
    if isinstance(theirs, ChunkedLogProb):
        raise RuntimeError("prism_kernels.integrations.trl: install() was called already; uninstall() first")
    if theirs is None:
        raise RuntimeError("trl.trainer.utils has no _ChunkedLogProbFunction: this version of TRL moved it")
    ours = ChunkedLogProb(theirs, impl)
    _probe(ours)
    utils._ChunkedLogProbFunction = ours


def uninstall() -> None:
    """Put TRL's own function back. Does nothing where :func:`install` was not called."""
    utils: Any = import_module("trl.trainer.utils")

    found = getattr(utils, "_ChunkedLogProbFunction", None)
    if isinstance(found, ChunkedLogProb):
        utils._ChunkedLogProbFunction = found.theirs


def _probe(ours: ChunkedLogProb) -> None:
    """Values and gradients of four rows by both functions. Raises RuntimeError where they differ."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((4, 8), (12, 8), (12,))
    targets = torch.randint(12, (4,), generator=generator)
    drawn = [torch.randn(shape, generator=generator) for shape in shapes]
    z = 0.5 * (drawn[0] @ drawn[1].T + drawn[2])
    targets[1:3] = z[1:3].argmax(-1)  # right guesses, too
    found: list[Any] = []
    for function in (ours.theirs, ours):
        inputs: list[Any] = [tensor.clone().requires_grad_() for tensor in drawn]
        try:
            outputs: Any = function.apply(*inputs, targets, 0.7, 5, 3.0, 0.5, ("log_probs", *OUTPUTS))
            logprob, entropy, squares, mean, top1 = outputs
            gradients = torch.autograd.grad((logprob * logprob + 0.3 * entropy).sum(), inputs)
        except (TypeError, ValueError, RuntimeError) as error:
            raise RuntimeError(f"trl's log-prob function takes other arguments than this one ({error})") from error
        found.append((logprob, entropy, *gradients, squares, mean, top1.float()))
    names = ("log-prob", "entropy", "d hidden", "d weight", "d bias", "log sum of p^2", "mean logit", "first guess")
    for name, theirs, mine in zip(names, *found):
        if not torch.allclose(theirs, mine, rtol=1e-4, atol=1e-4):
            gap = float((theirs - mine).detach().abs().max())
            raise RuntimeError(f"trl's log-prob function computes another {name} than this one: {gap} apart")


class PrismAdvantage:
    """Mix-in for TRL's GRPOTrainer: advantages by :func:`~prism_kernels.multi_reward_advantage`.

    >>> class Trainer(PrismAdvantage, GRPOTrainer):
    ...     prism_rule = {"rule": "align", "format_penalty": 1.5}

    Reward functions are found by their names (``__name__``). A reward of None (NaN) counts where the format is invalid
    only. TRL's own advantage is computed as well, and not used; what it logs as advantages are these.
    """

    prism_perception = "perception"
    prism_reasoning = "reasoning"
    prism_format_valid: str | None = "format_valid"
    prism_accuracy: str | None = None
    prism_rule: dict[str, Any] = {}  # noqa: RUF012  # read only: keyword arguments of multi_reward_advantage
    prism_untested = False  # take a version of TRL that is not in TESTED

    def __init__(self, *args: Any, **kwargs: Any):
        check_version("trl", TESTED, self.prism_untested)
        parent: Any = super()
        parent.__init__(*args, **kwargs)
        self._prism_rewards: Tensor | None = None
        for name in self._prism_names():
            if name not in self._trl.reward_func_names:
                raise wrong("reward_funcs", f"a function named {name}", ", ".join(self._trl.reward_func_names))

    @property
    def _trl(self) -> Any:
        return self  # a GRPOTrainer, which this class does not know

    def _prism_names(self) -> list[str]:
        names = (self.prism_perception, self.prism_reasoning, self.prism_format_valid, self.prism_accuracy)
        return [name for name in names if name is not None]

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        """(B, functions), of all processes."""
        parent: Any = super()
        rewards = self._prism_rewards = parent._calculate_rewards(*args, **kwargs)
        return rewards

    def _generate_and_score_completions(self, inputs: Sequence[Any]) -> dict[str, Any]:
        parent: Any = super()
        self._prism_rewards = None
        out = parent._generate_and_score_completions(inputs)
        if self._prism_rewards is None or out["advantages"].dim() != 1:
            raise RuntimeError("trl's GRPOTrainer computes rewards elsewhere in this version: PrismAdvantage cannot")
        advantages = self._prism_advantages(self._prism_rewards)
        mine = len(out["advantages"])
        first = self._trl.accelerator.process_index * mine
        logged = self._trl._logs["advantages"]
        for _ in range(min(len(logged), len(advantages))):
            logged.pop()
        logged.extend(advantages.tolist())
        out["advantages"] = advantages[first : first + mine].to(out["advantages"])
        return out

    def _prism_advantages(self, rewards: Tensor) -> Tensor:
        """(B, functions) -> (B,)."""
        trainer = self._trl
        per_group = trainer.num_generations if trainer.model.training else trainer.num_generations_eval
        groups = torch.arange(len(rewards), device=rewards.device) // per_group
        named = dict(zip(trainer.reward_func_names, rewards.unbind(1)))
        valid, accuracy = self.prism_format_valid, self.prism_accuracy
        return multi_reward_advantage(
            named[self.prism_perception],
            named[self.prism_reasoning],
            groups,
            format_valid=None if valid is None else named[valid] > 0,
            accuracy=None if accuracy is None else named[accuracy],
            **self.prism_rule,
        )
