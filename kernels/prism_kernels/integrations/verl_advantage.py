"""PRISM's advantage as verl's rules ``prism`` and ``prism_group``; what `verl.py` registers.

verl hands a rule the total reward of every response and no more. The separate rewards come from PrismTrainer, which
runs verl's own code around this one, by way of a context variable.

B responses (rows of a batch), T tokens of the longest, R sessions: the agent loop of a session may give several rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prism_kernels.checks import wrong
from prism_kernels.group_advantage.api import group_normalize, multi_reward_advantage


@dataclass(frozen=True)
class Settings:
    """``algorithm.prism`` of a run's configuration; every key is optional.

    Args:
        perception, reasoning, format_valid, accuracy: names of the rewards that a reward function's dictionary, or the
            judge, gives. format_valid, accuracy: None where there is none.
        judge: ``module:name`` of what makes the judge (`PrismTrainer`); None: a reward function gives the scores.
        judge_options: its keyword arguments.
        columns: keyword argument of the judge -> field of the batch, beside ``completion_ids``.
        rule: keyword arguments of :func:`~prism_kernels.multi_reward_advantage`.
    """

    perception: str = "perception"
    reasoning: str = "reasoning"
    format_valid: str | None = "format_valid"
    accuracy: str | None = None
    judge: str | None = None
    judge_options: Mapping[str, Any] = field(default_factory=dict)
    columns: Mapping[str, str] = field(default_factory=dict)
    rule: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(algorithm: Any) -> Settings:
        """From verl's ``algorithm`` node. Raises ValueError for an unknown key."""
        node = algorithm.get("prism", None) if algorithm is not None else None
        given = dict(_plain(node or {}))
        _known("algorithm.prism", given, list(Settings.__dataclass_fields__))
        parameters = inspect.signature(multi_reward_advantage).parameters.values()
        numbers = [
            p.name for p in parameters if p.kind == p.KEYWORD_ONLY and p.name not in ("format_valid", "accuracy")
        ]
        _known("algorithm.prism.rule", given.get("rule", {}), numbers)
        return Settings(**given)

    def advantages(self, named: Mapping[str, Tensor], groups: Tensor) -> Tensor:
        """Of responses with these rewards by name. Raises ValueError for a value of ``rule`` that is none."""
        valid, accuracy = self.format_valid, self.accuracy
        return multi_reward_advantage(
            named[self.perception],
            named[self.reasoning],
            groups,
            format_valid=None if valid is None else named[valid] > 0,
            accuracy=None if accuracy is None else named[accuracy],
            **self.rule,
        )

    def names(self) -> list[str]:
        return [
            name for name in (self.perception, self.reasoning, self.format_valid, self.accuracy) if name is not None
        ]


def _plain(node: Any) -> Any:
    """A node of Hydra's configuration as dictionaries and lists."""
    if isinstance(node, Mapping):
        return {name: _plain(value) for name, value in node.items()}
    return [_plain(value) for value in node] if isinstance(node, Sequence) and not isinstance(node, str) else node


def _known(node: str, given: Mapping[str, Any], keys: Sequence[str]) -> None:
    for key in given:
        if key not in keys:
            raise wrong(f"{node}.{key}", f"one of {', '.join(keys)}", "an unknown key")


@dataclass
class Scores:
    """Rewards of a batch by name, (R,) each, and which of these R the batch's rows show: those of one session share."""

    named: dict[str, Tensor]
    of_row: Tensor  # (B,) int64
    read: bool = False


# What PrismTrainer knows while verl's code runs, which hands an advantage rule the total reward alone.
SCORES: ContextVar[Scores | None] = ContextVar("prism_scores", default=None)


def prism(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Any,
    config: Any = None,
    non_tensor_batch: Mapping[str, Any] | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor]:
    """verl's advantage rule ``prism``: :func:`~prism_kernels.multi_reward_advantage` of the separate rewards.

    They come from :class:`PrismTrainer`, or from ``non_tensor_batch``, which verl's legacy trainer hands to the rule
    named gdpo alone: ``ADV_ESTIMATOR_REGISTRY["gdpo"] = prism``.

    Args:
        token_level_rewards, response_mask: (B, T). index: (B,) groups, any values. config: verl's ``algorithm`` node.
    Returns:
        Advantages and returns, (B, T), the same tensor, 0 where the mask is.
    Raises:
        ValueError: a reward that nobody gave. RuntimeError: no separate rewards at all.
    """
    settings, scores = Settings.of(config), SCORES.get()
    if scores is None:
        if non_tensor_batch is None:
            raise RuntimeError(
                "prism_kernels.integrations.verl: verl hands this rule the total reward alone; set "
                "trainer.v1.trainer_mode=prism, or algorithm.adv_estimator=prism_group to normalise the total"
            )
        given = {name: non_tensor_batch[name] for name in settings.names() if name in non_tensor_batch}
        scores = Scores(tensors(given, settings, len(response_mask)), torch.arange(len(response_mask)))
    scores.read = True
    of_row = scores.of_row.to(response_mask.device)
    groups = _groups(index, response_mask)
    of_session = torch.zeros(int(of_row.max()) + 1, dtype=torch.int64, device=of_row.device).index_copy(
        0, of_row, groups
    )
    named = {name: value.to(response_mask.device) for name, value in scores.named.items()}
    return _of_tokens(settings.advantages(named, of_session)[of_row], response_mask)


def prism_group(
    token_level_rewards: Tensor, response_mask: Tensor, index: Any, config: Any = None, **others: Any
) -> tuple[Tensor, Tensor]:
    """verl's advantage rule ``prism_group``: its GRPO by :func:`~prism_kernels.group_normalize`, without loops.

    Arguments and results as of :func:`prism`; ``algorithm.norm_adv_by_std_in_grpo`` is read.
    """
    by_std = True if config is None else config.get("norm_adv_by_std_in_grpo", True)
    total = token_level_rewards.sum(-1)
    scale = "std" if by_std else "none"
    return _of_tokens(group_normalize(total, _groups(index, response_mask), scale=scale), response_mask)


RULES = {"prism": prism, "prism_group": prism_group}


def left_to_the_judge(*samples: Any, **columns: Any) -> float:
    """verl's ``reward.custom_reward_function`` where a judge scores: it wants one for data that it does not know."""
    return 0.0


def _groups(index: Any, like: Tensor) -> Tensor:
    """(B,) names of groups -> their numbers."""
    _, numbers = np.unique(np.asarray([str(name) for name in index]), return_inverse=True)
    return torch.from_numpy(numbers.reshape(-1)).to(like.device)


def _of_tokens(advantages: Tensor, response_mask: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) -> twice (B, T). A masked token has 0, also where the advantage is NaN."""
    spread = advantages.unsqueeze(-1).expand(response_mask.shape).masked_fill(response_mask == 0, 0.0)
    return spread, spread


def tensors(given: Mapping[str, Any], settings: Settings, count: int) -> dict[str, Tensor]:
    """Values by name, (count,) fp32; None is NaN. Raises ValueError for a name that is missing, or another count."""
    missing = [name for name in settings.names() if name not in given]
    if missing:
        got = f"{', '.join(given) or 'none'}: no {', '.join(missing)}"
        raise wrong("algorithm.prism", f"rewards named {', '.join(settings.names())}", got)
    found = {}
    for name in settings.names():
        values = [float("nan") if value is None else float(value) for value in given[name]]
        if len(values) != count:
            raise wrong(f"algorithm.prism: {name}", f"one value for each of {count} responses", str(len(values)))
        found[name] = torch.tensor(values)
    return found


def from_reward_function(fields: Mapping[str, Any], settings: Settings) -> dict[str, list[Any]]:
    """The rewards that a reward function gave beside ``score``: a field each, or in ``reward_extra_info`` of a row."""
    rows = [(extra or {}).get("reward_extra_info", {}) for extra in column(fields, "extra_fields")]
    given = {}
    for name in settings.names():
        if name in fields:
            given[name] = column(fields, name)
        elif rows and all(name in row for row in rows):
            given[name] = [row[name] for row in rows]
    return given


def column(fields: Any, name: str) -> list[Any]:
    """One entry per row of a TensorDict's field, whatever it holds it by; none where the field is not there."""
    if name not in fields:
        return []
    value = fields.get(name)
    return list(value.unbind()) if isinstance(value, Tensor) and value.is_nested else value.tolist()


def sessions(keys: Sequence[str]) -> tuple[list[int], Tensor]:
    """Keys ``{uid}_{session}_{number}`` of rows -> the last row of each session, R of them; each row's session (B,)."""
    numbers: dict[str, int] = {}
    last: list[int] = []
    best: list[int] = []
    of_row = []
    for row, key in enumerate(keys):
        session, _, number = key.rpartition("_")
        if session not in numbers:
            numbers[session] = len(last)
            last.append(row)
            best.append(int(number))
        place = numbers[session]
        if int(number) > best[place]:
            last[place], best[place] = row, int(number)
        of_row.append(place)
    return last, torch.tensor(of_row, dtype=torch.int64)
