"""The loss of a causal language model of transformers without its logits, inside the model's own forward.

The model's forward runs as it is, with two of its parts exchanged for the length of the call: its head gives logits of
no width, and its loss function calls the head's module for the loss. So whatever the forward does besides (images,
router losses, its outputs) stays the model's, and hooks that gather the head's weights run around the one product.

B sequences, L tokens each, V vocab size, H hidden.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from prism_kernels.checks import describe, wrong
from prism_kernels.dispatch import Impl
from prism_kernels.linear_logprob.api import _OPS, linear_cross_entropy
from prism_kernels.linear_logprob.records import IGNORE

Model = Any  # a module of transformers, with attributes that nn.Module does not declare

# What models do to their logits, by the name in the text configuration: logits = softcap(scale * head(hidden)).
SOFTCAP = "final_logit_softcapping"
MULTIPLIERS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
DIVISOR = "logits_scaling"


class FusedLoss:
    """A model's forward with the loss of :func:`~prism_kernels.linear_cross_entropy`, looked at before it is installed.

    Raises ValueError or RuntimeError as `transformers.apply_prism_kernels` does.
    """

    def __init__(self, model: Model, impl: str):
        if impl != Impl.AUTO and impl not in _OPS["linear_cross_entropy"].table:
            known = ", ".join(map(str, _OPS["linear_cross_entropy"].table))
            raise wrong("impl", f"auto or one of {known}", repr(impl))
        self.model, self.stock = model, type(model).forward
        self.head_name = _head_name(model)
        for name, module in (("model", model), (self.head_name, getattr(model, self.head_name))):
            if "forward" in vars(module):
                raise ValueError(
                    f"model: the forward of {name} is replaced already, by apply_prism_kernels or by someone's hooks "
                    "(accelerate's device_map over several devices); remove() the first patch, or the hooks"
                )
        self.forward = _fused_forward(self.stock, self.head_name, _logits_of(model, impl))
        _probe(model, self.stock, self.forward, self.head_name)

    def install(self) -> None:
        self.model.forward = types.MethodType(self.forward, self.model)

    def remove(self) -> None:
        if getattr(vars(self.model).get("forward"), "__func__", None) is self.forward:
            del self.model.forward


class _Logits(NamedTuple):
    """softcap * tanh(scale * head(hidden) / softcap), and who computes the loss of them."""

    scale: float
    softcap: float | None
    impl: str


def _logits_of(model: Model, impl: str) -> _Logits:
    text = model.config.get_text_config()
    scale = next((value for name in MULTIPLIERS if (value := getattr(text, name, None)) is not None), 1.0)
    divisor = getattr(text, DIVISOR, None)
    return _Logits(float(scale if divisor is None else scale / divisor), getattr(text, SOFTCAP, None), impl)


def _head_name(model: Model) -> str:
    """The attribute that holds the head. Raises ValueError where it is no plain linear layer."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    name = next((name for name, module in model.named_children() if module is head), None)
    if head is None or name is None or not hasattr(model, "loss_function"):
        raise wrong("model", "a causal language model of transformers with a head", type(model).__name__)
    if type(head) is not nn.Linear:
        raise ValueError(
            f"model: the head {name} is a {type(head).__name__}; expected a plain linear layer (an adapter on the head "
            "needs its own forward: leave the head out of it, or pass cross_entropy=False)"
        )
    if head.weight.numel() == 0:
        raise ValueError(
            f"model: the weight of {name} is empty, sharded by ZeRO 3; call apply_prism_kernels inside "
            "deepspeed.zero.GatheredParameters([weight])"
        )
    return name


def _fused_forward(stock: Callable, head_name: str, head_logits: _Logits) -> Callable:
    """In place of ``stock``, with its signature, which Trainer and generate read. Holds no model: copies share it."""
    signature = inspect.signature(stock)

    @functools.wraps(stock)
    def forward(self: Model, *args: Any, **kwargs: Any) -> Any:
        if not self.training or signature.bind_partial(self, *args, **kwargs).arguments.get("labels") is None:
            return stock(self, *args, **kwargs)
        with _exchanged(self, head_name, head_logits) as calls:
            output = stock(self, *args, **kwargs)
        if calls != ["head", "loss"]:
            raise RuntimeError(
                f"{type(self).__name__}.forward called {', '.join(calls) or 'neither head nor loss_function'}; "
                "expected its head, then self.loss_function, once each: pass cross_entropy=False"
            )
        return output if isinstance(output, tuple) else replace(output, logits=None)

    return forward


@contextmanager
def _exchanged(model: Model, head_name: str, head_logits: _Logits) -> Iterator[list[str]]:
    """Inside, the model's head keeps its input, and its loss function makes the loss of that. Yields the calls."""
    head: nn.Linear = getattr(model, head_name)
    calls: list[str] = []
    kept: list[Tensor] = []

    def keep(hidden: Tensor) -> Tensor:
        calls.append("head")
        kept.append(hidden)
        return hidden.new_empty(*hidden.shape[:-1], 0)

    def loss(logits: Tensor, labels: Tensor, vocab_size: int | None = None, **kwargs: Any) -> Tensor:
        calls.append("loss")
        (hidden,) = kept
        if logits.shape != (*hidden.shape[:-1], 0):
            raise RuntimeError(f"{type(model).__name__}.forward reshapes its logits: pass cross_entropy=False")
        run = functools.partial(_loss, head, head_logits, labels=labels, **kwargs)
        head.forward = run  # the head's hooks run as around its own forward, and gather its weights
        try:
            return head(hidden)
        finally:
            del head.forward

    before = vars(model).get("_loss_function")
    vars(model)[head_name] = keep  # found before the module of that name, which stays where it is
    model.loss_function = loss
    try:
        yield calls
    finally:
        del vars(model)[head_name]
        if before is None:
            del model._loss_function
        else:
            model.loss_function = before


def _loss(
    head: nn.Linear,
    head_logits: _Logits,
    hidden: Tensor,
    *,
    labels: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = IGNORE,
    shift_labels: Tensor | None = None,
    **others: Any,
) -> Tensor:
    """transformers' ForCausalLMLoss of hidden (B, L, H) instead of logits; ``others`` it does not read either."""
    targets = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:] if shift_labels is None else shift_labels
    if targets.shape != hidden.shape[:-1]:
        raise wrong("labels", f"{tuple(hidden.shape[:-1])}, one for each hidden state", describe(targets))
    if hasattr(head.weight, "full_tensor"):  # a DTensor
        raise RuntimeError(
            "apply_prism_kernels: the head's weight is split over ranks within its call (tensor parallelism); expected "
            "a whole one, as FSDP2 gathers it: leave the head out of the plan, or pass cross_entropy=False"
        )
    targets = targets.reshape(-1).to(hidden.device)
    if ignore_index != IGNORE:
        targets = targets.masked_fill(targets == ignore_index, IGNORE)
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.weight.dtype
    weight, bias = head.weight.to(dtype), None if head.bias is None else head.bias.to(dtype)
    rows = hidden.reshape(-1, hidden.shape[-1]).to(dtype)
    count = num_items_in_batch.reshape(()) if isinstance(num_items_in_batch, Tensor) else num_items_in_batch
    return linear_cross_entropy(
        rows, weight, targets, normalizer=count, bias=bias, softcap=head_logits.softcap, impl=head_logits.impl,
        logit_scale=head_logits.scale,
    )  # fmt: skip


class _Body:
    """What stands for the output of a model's body: hidden states, and None wherever a forward looks besides."""

    def __init__(self, hidden: Tensor):
        self.last_hidden_state = hidden

    def __getitem__(self, index: int) -> Tensor:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        return None


def _probe(model: Model, stock: Callable, forward: Callable, head_name: str) -> None:
    """Both forwards on four rows behind the body, which does not run. Raises RuntimeError where their losses differ."""
    weight: Tensor = getattr(model, head_name).weight
    if weight.is_meta:
        return
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 5, weight.shape[1], generator=generator).to(weight)
    with torch.no_grad():
        hidden = hidden * (30 / nn.functional.linear(hidden, weight).abs().max())  # so that caps and scales show
    ids = torch.randint(weight.shape[0], (1, 5), generator=generator).to(weight.device)
    routers = {name: False for name in ("output_router_logits",) if name in inspect.signature(stock).parameters}
    for count in (None, 7):
        training = model.training
        vars(model).update({model.base_model_prefix: lambda *args, **kwargs: _Body(hidden), "training": True})
        try:
            with torch.no_grad():
                theirs, ours = (
                    float(run(model, input_ids=ids, labels=ids, num_items_in_batch=count, **routers).loss)
                    for run in (stock, forward)
                )
        except Exception as error:
            raise RuntimeError(
                f"{type(model).__name__}: its forward cannot be probed ({error}); pass cross_entropy=False"
            ) from error
        finally:
            del vars(model)[model.base_model_prefix]
            model.training = training
        limit = max(1e-4, 4 * torch.finfo(weight.dtype).eps) * (1 + abs(theirs))
        if not abs(ours - theirs) <= limit:
            raise RuntimeError(
                f"{type(model).__name__}: its loss on four rows is {theirs}, this one's {ours}: it does something to "
                "its logits that is not known here; pass cross_entropy=False"
            )
