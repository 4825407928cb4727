"""prism_kernels inside transformers: one call for a model, two names in transformers' registries.

>>> from prism_kernels.integrations.transformers import apply_prism_kernels
>>> patch = apply_prism_kernels(model)          # then Trainer(model=model, ...) as ever; patch.remove() undoes it

Importing this module registers ``experts_implementation="prism"`` (`transformers_moe`) and
``attn_implementation="prism_tree"`` with its mask (`transformers_tree`).
"""

from __future__ import annotations

from typing import Any

from torch import nn

from prism_kernels.checks import flag, wrong
from prism_kernels.integrations.hosts import check_version
from prism_kernels.integrations.transformers_loss import FusedLoss
from prism_kernels.integrations.transformers_moe import (
    EXPERTS_IMPLEMENTATION,
    MoePatch,
    experts_forward,
    has_experts,
    patch_moe,
)
from prism_kernels.integrations.transformers_tree import TREE_IMPLEMENTATION, tree_forward, tree_mask

__all__ = [
    "EXPERTS_IMPLEMENTATION",
    "TESTED",
    "TREE_IMPLEMENTATION",
    "MoePatch",
    "PrismPatch",
    "apply_prism_kernels",
    "experts_forward",
    "patch_moe",
    "tree_forward",
    "tree_mask",
]

TESTED = ("5.17", "5.19", "5.24")


def apply_prism_kernels(
    model: nn.Module,
    cross_entropy: bool = True,
    experts: bool = True,
    *,
    impl: str = "auto",
    untested: bool = False,
) -> PrismPatch:
    """Train a transformers model on these kernels. Changes the model in place; before Trainer, FSDP or PEFT wrap it.

    Args:
        model: a causal language model of transformers, with images or without, or a PEFT model around one.
        cross_entropy: a forward in training mode with labels makes its loss from hidden states, by
            :func:`~prism_kernels.linear_cross_entropy`, and no logits: the output's ``logits`` is None. Labels,
            ``num_items_in_batch``, soft caps and logit scales, router losses and tied heads are as before. Evaluation,
            generation and a forward without labels stay the model's own. A batch without a single label gives 0 where
            transformers gives NaN.
        experts: run a mixture of experts on these kernels (:func:`patch_moe`); a dense model has none, and stays.
        impl: implementation of the ops, as everywhere.
        untested: take a version of transformers that is not in ``TESTED``.

    Returns:
        The patch: ``moe`` (a :class:`MoePatch` or None) and ``remove()``.

    Raises:
        ValueError: a model without a plain linear head, one that is patched already or whose forward someone replaced,
            experts that these kernels do not compute (pass ``experts=False``).
        RuntimeError: another version of transformers; a model whose loss, probed on four rows, is not what comes out
            of its own forward (pass ``cross_entropy=False``).
    """
    check_version("transformers", TESTED, untested)
    if not isinstance(model, nn.Module):
        raise wrong("model", "a torch module", type(model).__name__)
    of_peft: Any = getattr(model, "get_base_model", None)
    inner = model if of_peft is None else of_peft()
    loss = FusedLoss(inner, impl) if flag("cross_entropy", cross_entropy) else None
    moe = patch_moe(inner, impl=impl) if flag("experts", experts) and has_experts(inner) else None
    if loss is not None:  # last: a refusal leaves the model as it was
        loss.install()
    return PrismPatch(loss, moe)


class PrismPatch:
    """A patched model; see :func:`apply_prism_kernels`."""

    def __init__(self, loss: FusedLoss | None, moe: MoePatch | None):
        self.moe, self._loss = moe, loss

    def remove(self) -> None:
        """Put the model's own code back. Parameters stay as they are. A second call does nothing."""
        if self._loss is not None:
            self._loss.remove()
        if self.moe is not None:
            self.moe.remove()
