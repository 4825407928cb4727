"""prism_kernels inside ms-swift's GRPO: log-probs without logits, PRISM's advantage, a served discriminator as rewards.

A plugin of two lines, ``swift rlhf --rlhf_type grpo --external_plugins plugin.py ...``:

>>> from prism_kernels.integrations import ms_swift
>>> ms_swift.install(rule={"rule": "align", "format_penalty": 1.5})

Rewards: ``--reward_funcs prism_perception prism_reasoning prism_format_valid``, of a `prism-fast serve-discriminator`
that PRISM_SCORE_URL names; the column ``prism`` of the data set is what it reads.

B sequences, L tokens, K of them predicted and kept, V vocab size, H hidden; N responses of all processes.
"""

from __future__ import annotations

import http.client
import json
import logging
import os
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from importlib import import_module
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from prism_kernels.checks import wrong
from prism_kernels.group_advantage.api import multi_reward_advantage
from prism_kernels.integrations.hosts import check_version
from prism_kernels.linear_logprob.api import linear_logprob
from prism_kernels.linear_logprob.records import IGNORE

TESTED = ("4.6",)
URL = "http://127.0.0.1:8377"
COLUMN = "prism"  # of the data set: a record as the server takes it, as JSON, less the responses
# Whose rewards are what: the name by which ms-swift logs a reward function, its class's.
NAMES = {"perception": "PrismPerception", "reasoning": "PrismReasoning", "format_valid": "PrismFormatValid"}
SECONDS = 600.0  # to wait for a server that is busy or not up yet
CHANGES = ("final_logit_softcapping", "logit_scale", "logits_scaling", "output_multiplier", "lm_head_multiplier")

_LOGPS, _ADVANTAGES, _METHOD = "_get_logps_via_local_forward", "compute_advantages", "_compute_advantages"


class _Installed(NamedTuple):
    trainer: Any  # GRPOTrainer
    module: Any  # of its file
    theirs: dict[str, Any]  # what was replaced, by name


_installed: _Installed | None = None


def install(
    *,
    logprob: bool = True,
    advantage: bool = True,
    rule: Mapping[str, Any] | None = None,
    names: Mapping[str, str] | None = None,
    url: str | None = None,
    impl: str = "auto",
    untested: bool = False,
) -> None:
    """In this process, before the trainer is made; :func:`uninstall` undoes it.

    Each method that is replaced is called on four rows first, and compared with ms-swift's own. In a worker of a
    DataLoader, where ms-swift imports plugins again, this does nothing.

    Args:
        logprob: log-probs and entropies by linear_logprob; the head's forward is exchanged while the model's runs.
        advantage: :func:`~prism_kernels.multi_reward_advantage`, whatever advantage_estimator and scale_rewards say.
        rule: its keyword arguments.
        names: of the reward functions as ms-swift logs them, instead of :data:`NAMES`: perception, reasoning,
            format_valid (absent: every format is valid), accuracy (absent: no rule may read it).
        url: of the server; otherwise PRISM_SCORE_URL, or this machine.
        impl: implementation of linear_logprob, as everywhere.
        untested: take a version of ms-swift that is not in ``TESTED``.
    Raises:
        RuntimeError: another version, a second call, or a method that is gone or computes something else.
    """
    global _installed
    if torch.utils.data.get_worker_info() is not None:
        return
    check_version("ms-swift", TESTED, untested)
    if _installed is not None:
        raise RuntimeError("prism_kernels.integrations.ms_swift: install() was called already; uninstall() first")
    module: Any = import_module("swift.rlhf_trainers.grpo_trainer")
    rewards: Any = import_module("swift.rewards")
    trainer = getattr(module, "GRPOTrainer", None)
    found = {name: getattr(trainer, name, None) for name in (_LOGPS, _METHOD)}
    found[_ADVANTAGES] = getattr(module, _ADVANTAGES, None)
    for name, theirs in found.items():
        if theirs is None:
            raise RuntimeError(f"swift.rlhf_trainers.grpo_trainer has no {name}: this version of ms-swift moved it")
    logps = _logps_by(impl)
    advantages = _Advantages(found[_ADVANTAGES], dict(rule or {}), dict(names or NAMES))
    if logprob:
        _probe_logps(found[_LOGPS], logps)
    if advantage:
        _probe_advantages(advantages)
    if logprob:
        setattr(trainer, _LOGPS, logps)
    if advantage:
        setattr(trainer, _METHOD, advantages.around(found[_METHOD]))
        setattr(module, _ADVANTAGES, advantages)
    judge = _Served(url or os.environ.get("PRISM_SCORE_URL", URL))
    for side, name in NAMES.items():
        rewards.orms[f"prism_{side}"] = _reward_function(rewards.ORM, name, side, judge)
    _installed = _Installed(trainer, module, found)


def uninstall() -> None:
    """Put ms-swift's own methods back. Does nothing where :func:`install` was not called."""
    global _installed
    if _installed is None:
        return
    for name in (_LOGPS, _METHOD):
        setattr(_installed.trainer, name, _installed.theirs[name])
    setattr(_installed.module, _ADVANTAGES, _installed.theirs[_ADVANTAGES])
    for side in NAMES:
        import_module("swift.rewards").orms.pop(f"prism_{side}", None)
    _installed = None


# ---- log-probs


def _logps_by(impl: str) -> Any:
    """GRPOTrainer's method: what its forward calls logits are log-probs and entropies, from the head's own module."""

    def _get_logps_via_local_forward(
        self: Any,
        model: Any,
        model_inputs: dict[str, Any],
        logits_to_keep: int,
        input_ids: Tensor,
        compute_entropy: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, K) log-probs and entropies or None; one row of all sequences where the template is free of padding.

        Predictions of padding are not computed: 0, and nothing reads them.
        """
        if "use_cache" in self.model_kwarg_keys:
            model_inputs["use_cache"] = False
        if "logits_to_keep" in self.model_kwarg_keys:
            model_inputs["logits_to_keep"] = logits_to_keep + 1
        targets = input_ids[:, -logits_to_keep:]
        mask = model_inputs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.shape == input_ids.shape:
            targets = targets.masked_fill(mask[:, -logits_to_keep:] == 0, IGNORE)
        head = _head(model)

        def forward(hidden: Tensor) -> Tensor:
            """(B, at least K + 1, H) -> (B, K, 2), with no logits; or (B, K, 1)."""
            rows = hidden[:, -(logits_to_keep + 1) : -1]
            device = hidden.device.type
            if torch.is_autocast_enabled(device):
                rows = rows.to(torch.get_autocast_dtype(device))
            bias = None if head.bias is None else head.bias.to(rows.dtype)
            with torch.autocast(device, enabled=False):
                out = linear_logprob(
                    rows.flatten(0, 1), head.weight.to(rows.dtype), targets.flatten(), bias=bias,
                    temperature=self.temperature, with_entropy=compute_entropy, impl=impl,
                )  # fmt: skip
            made = [out.logprob] if out.entropy is None else [out.logprob, out.entropy]
            return torch.stack(made, dim=-1).unflatten(0, targets.shape)

        head.forward = forward
        try:
            found = model(**model_inputs).logits
        finally:
            del head.forward
        if found.shape[:2] != targets.shape or found.shape[2] != 1 + compute_entropy:
            raise _refusal(f"its forward makes {tuple(found.shape)} of what the head gives")
        return found[..., 0], found[..., 1] if compute_entropy else None

    return _get_logps_via_local_forward


def _head(model: Any) -> Any:
    """The module whose weight makes logits, for which linear_logprob can stand. Raises RuntimeError."""
    while isinstance(getattr(model, "module", None), nn.Module):  # DistributedDataParallel, an engine
        model = model.module
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or not head.weight.is_floating_point():
        raise _refusal(f"its head is a {type(head).__name__}, not a plain Linear (an adapter, quantised?)")
    if "forward" in vars(head):
        raise _refusal("the forward of its head is replaced by someone's hooks (device_map over several devices?)")
    if hasattr(head.weight, "ds_id"):
        raise _refusal("its head is sharded by ZeRO 3, which gathers it around the forward alone; use ZeRO 2")
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    changed = [name for name in CHANGES if getattr(config, name, None) not in (None, 1, 1.0)]
    if changed:
        raise _refusal(f"it changes its logits ({changed[0]} = {getattr(config, changed[0])})")
    return head


def _refusal(why: str) -> RuntimeError:
    return RuntimeError(f"prism_kernels.integrations.ms_swift: model: {why}; install(logprob=False) leaves it as it is")


class _Four(nn.Module):
    """As much of a model as the method reads: (1, 5) tokens -> logits of the last K + 1."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embed, self.lm_head, self.config = nn.Embedding(12, 8), nn.Linear(8, 12), SimpleNamespace()
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, input_ids: Tensor, logits_to_keep: int, **others: Any) -> Any:
        return SimpleNamespace(logits=self.lm_head(self.embed(input_ids)[:, -logits_to_keep:]))


def _probe_logps(theirs: Any, ours: Any) -> None:
    """Values and gradients of four rows by both methods. Raises RuntimeError where they differ."""
    model, tokens = _Four(), torch.tensor([[3, 1, 4, 1, 5]])
    trainer = SimpleNamespace(
        model_kwarg_keys=("logits_to_keep",), temperature=0.7, template=SimpleNamespace(padding_free=False)
    )
    found: list[Any] = []
    for method in (theirs, ours):
        try:
            logprob, entropy = method(trainer, model, {"input_ids": tokens}, 4, tokens, compute_entropy=True)
            gradients = torch.autograd.grad((logprob * logprob + 0.3 * entropy).sum(), list(model.parameters()))
        except (TypeError, ValueError, AttributeError, KeyError) as error:
            raise RuntimeError(f"ms-swift's {_LOGPS} takes or gives other things than this one ({error})") from error
        found.append((logprob, entropy, *gradients))
    for name, his, mine in zip(("log-prob", "entropy", "d hidden", "d weight", "d bias"), *found):
        if his.shape != mine.shape or not torch.allclose(his, mine, rtol=1e-4, atol=1e-4):
            raise RuntimeError(f"ms-swift's {_LOGPS} computes another {name} than this one")


# ---- advantages


class _Advantages:
    """In the place of ``compute_advantages``, which sees no names: `around` keeps the calling trainer's."""

    def __init__(self, theirs: Any, rule: dict[str, Any], names: dict[str, str]):
        self.theirs, self.rule, self.names = theirs, rule, names
        self._columns: Sequence[str] = ()
        unknown = set(names) - {*NAMES, "accuracy"}
        if unknown or not {"perception", "reasoning"} <= names.keys():
            raise wrong("names", "perception, reasoning and maybe format_valid, accuracy", ", ".join(names))

    def around(self, method: Any) -> Any:
        def _compute_advantages(trainer: Any, *args: Any, **kwargs: Any) -> Any:
            if getattr(trainer, "dynamic_num_samples", False):
                raise RuntimeError("PRISM's advantage: not for a changing number of samples (several turns)")
            self._columns = trainer.reward_func_names
            try:
                return method(trainer, *args, **kwargs)
            finally:
                self._columns = ()

        return _compute_advantages

    def __call__(
        self, rewards_per_func: Tensor, reward_weights: Tensor, num_generations: int, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """(N, functions) -> (N,) advantages, and ms-swift's own rewards, which it logs."""
        _, rewards = self.theirs(rewards_per_func, reward_weights, num_generations, **options)
        if options.get("kl_in_reward") and options.get("beta"):
            raise RuntimeError("PRISM's advantage: no divergence in the reward; set kl_in_reward to false")
        for name in self.names.values():
            if name not in self._columns:
                raise wrong("reward_funcs", f"one that is logged as {name}", ", ".join(self._columns))
        column = {what: rewards_per_func[:, self._columns.index(name)] for what, name in self.names.items()}
        valid = column.get("format_valid")
        advantages = multi_reward_advantage(
            column["perception"],
            column["reasoning"],
            torch.arange(len(rewards_per_func), device=rewards_per_func.device) // num_generations,
            format_valid=None if valid is None else valid > 0,
            accuracy=column.get("accuracy"),
            **self.rule,
        )
        return advantages, rewards


def _probe_advantages(ours: _Advantages) -> None:
    """Two groups of two by ms-swift's own rule, which ours with one weight is too. Raises RuntimeError."""
    rewards, weights = torch.tensor([[1.0, 2.0], [3.0, 1.0], [2.0, 5.0], [0.5, 0.0]]), torch.tensor([1.0, 0.0])
    try:
        theirs, logged = ours.theirs(
            rewards_per_func=rewards, reward_weights=weights, num_generations=2, advantage_estimator="grpo",
            scale_rewards="group", kl_in_reward=False, beta=0.0, kl_values=None,
        )  # fmt: skip
    except (TypeError, ValueError) as error:
        raise RuntimeError(f"ms-swift's {_ADVANTAGES} takes or gives other things than this one ({error})") from error
    mine = multi_reward_advantage(
        rewards[:, 0], rewards[:, 1], torch.tensor([0, 0, 1, 1]), perception_weight=1.0, reasoning_weight=0.0, eps=1e-4
    )
    if not (torch.equal(logged, rewards[:, 0]) and torch.allclose(theirs, mine, rtol=1e-4, atol=1e-4)):
        raise RuntimeError(f"ms-swift's {_ADVANTAGES} groups or normalises otherwise than it did")


# ---- rewards


class _Served:
    """Scores of a batch by the server, asked for once: by the first of the three functions that reads them."""

    def __init__(self, url: str):
        self.url = url
        self._found: tuple[Any, list[dict[str, Any]]] | None = None
        self._unread: set[str] = set()

    def __call__(self, side: str, completions: Sequence[Any], records: Sequence[Any] | None) -> list[float | None]:
        if records is None or not all(isinstance(text, str) for text in (*completions, *records)):
            raise RuntimeError(
                f"rewards for ms-swift: expected texts as completions, and a column {COLUMN} in the data set: "
                'JSON as {"prompt": ..., "images": [{"path": ...}], "teacher_response": ...}'
            )
        batch = (tuple(completions), tuple(records))
        if self._found is None or self._found[0] != batch or side not in self._unread:
            asked = [{**json.loads(record), "responses": [text]} for text, record in zip(*batch)]
            self._found, self._unread = (batch, ask(self.url, {"records": asked})["records"]), set(NAMES)
        self._unread.discard(side)
        pairs = [found["clamped"][0] for found in self._found[1]]
        if side == "format_valid":
            return [float(pair is not None) for pair in pairs]
        return [None if pair is None else pair[side == "reasoning"] for pair in pairs]


def ask(url: str, request: dict[str, Any]) -> dict[str, Any]:
    """The reply of `prism-fast serve-discriminator`. Waits where it is busy (503) or not up; else RuntimeError."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    body, until, told = json.dumps(request).encode(), time.monotonic() + SECONDS, False
    while True:
        posted = urllib.request.Request(f"{url}/score", body, {"Content-Type": "application/json"})
        try:
            with opener.open(posted, timeout=SECONDS) as reply:
                return json.load(reply)
        except urllib.error.HTTPError as error:
            why, pause = error.read().decode(errors="replace").strip(), error.headers.get("Retry-After")
            if error.code != 503 or time.monotonic() > until:
                raise RuntimeError(f"{url}: {error.code}: {why}") from None
            time.sleep(float(pause or 1))
        except (OSError, http.client.HTTPException) as error:
            if time.monotonic() > until:
                why = f"{url}: no answer ({error}); is prism-fast serve-discriminator running?"
                raise RuntimeError(why) from None
            if not told:
                logging.getLogger(__name__).warning(
                    "%s: no answer yet (%s), asking for %.0f s more", url, error, SECONDS
                )
            told = True
            time.sleep(1)


def _reward_function(base: Any, name: str, side: str, judge: _Served) -> type:
    """A class of ms-swift's ORM: it makes one object of it, and logs it by the class's name."""

    def __call__(self: Any, completions: Sequence[Any], **columns: Any) -> list[float | None]:
        return judge(side, completions, columns.get(COLUMN))

    return type(name, (base,), {"__call__": __call__, "__doc__": f"{side} by the served discriminator"})


if __name__.startswith("_swift_external_"):  # the name that ms-swift makes up for a plugin
    raise RuntimeError(
        "--external_plugins puts a plugin's folder before all others, and beside this file stand a trl.py and a "
        "transformers.py; give it a file of your own that calls prism_kernels.integrations.ms_swift.install()"
    )
