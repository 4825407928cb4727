"""Gradients -> weights: AdamW, schedule and clipping; in one process, summed over several, or sharded by FSDP2."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from prism_fast import ranks
from prism_fast.config import OptimizerConfig
from prism_fast.models.backbone import TreeModel
from prism_fast.steps.adamw import MOMENTS, is_wide, open_adamw
from prism_fast.steps.backprop import Backprop


class Updater(Backprop):
    """AdamW over the trainable parameters of a module, in one process or with gradients summed over several.

    Parameters of less than fp32 are updated in fp32, and their gradients add up in fp32 over the packs of a step: a
    hook takes each one as it comes (`main_grad`). Weight decay applies to matrices only (norms, biases and the scalar
    head have none).
    """

    def __init__(self, module: nn.Module, config: OptimizerConfig, total_steps: int):
        super().__init__(module)
        self.config, self.total_steps, self.steps = config, total_steps, 0
        self.names, self.parameters = [], []
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                self.names.append(name)
                self.parameters.append(parameter)
        self.mastered = frozenset(name for name, p in zip(self.names, self.parameters) if not is_wide(p))
        for parameter in self.parameters:
            add_up_in_fp32(parameter)
        self.optimizer = open_adamw(self.parameters, config)

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        return self.config.lr * learning_rate_factor(self.steps, self.total_steps, self.config)

    def step(self) -> float:
        """One optimizer step from the gradients of the parameters, which it clears; returns their global norm (L2).

        A norm that is not finite leaves the weights as they are; the caller sees it in the returned value.
        """
        gradients = self._reduced([main_grad(p) for p in self.parameters])
        norm = self._norm([gradient for gradient in gradients if gradient is not None])
        self.optimizer.step(gradients, clip_factor(norm, self.config.clip_norm), self.lr)
        self.next_step()
        return float(norm)

    def _reduced(self, gradients: list[Tensor | None]) -> list[Tensor | None]:
        """Gradients of this process -> those of all."""
        return ranks.add_gradients(gradients, self.parameters)

    def _norm(self, grads: list[Tensor]) -> Tensor:
        if not grads:
            return torch.zeros(())
        return torch.linalg.vector_norm(torch.stack([g.float().norm() for g in grads]))

    def next_step(self) -> None:
        """Clears the gradients and moves the schedule on; by itself it skips an update."""
        for parameter in self.parameters:
            parameter.grad = None
            if not is_wide(parameter):  # or one that becomes bf16 later would count as hooked
                setattr(parameter, MAIN_GRAD, None)
        self.steps += 1

    def tensors(self, parts: int = 1) -> dict[str, Tensor]:
        """What a checkpoint keeps: moments by parameter name, and the masters of low-precision parameters, in fp32.

        Whole tensors, whatever the form, copied to hosts: a call of all processes, of which the first ``parts`` get
        about as many bytes each. All of a sharded optimizer's state together is more than any of their devices holds.
        """
        share = ranks.Share(parts)
        for i, name in enumerate(self.names):
            if name in self.mastered:
                share.offer(f"master.{name}", self.optimizer.master(i))
            for key, value in self.optimizer.moments(i).items():
                share.offer(f"{key}.{name}", value)
        return share.kept

    def load(self, tensors: Mapping[str, Tensor], steps: int) -> None:
        """Restores what :meth:`tensors` gave; the module's weights are restored by their own checkpoint.

        ``tensors`` may read each from a file when it is asked for: no more than a parameter's are held at a time.

        Raises ValueError where tensors are missing, or of another shape or dtype, or not finite.
        """
        self.steps = steps
        self._check(tensors)
        with torch.no_grad():
            for i, name in enumerate(self.names):
                master = tensors[f"master.{name}"] if name in self.mastered else None
                found = {key: tensors[f"{key}.{name}"] for key in MOMENTS if f"{key}.{name}" in tensors}
                self.optimizer.load(i, master, found)

    def _check(self, tensors: Mapping[str, Tensor]) -> None:
        for name, parameter in zip(self.names, self.parameters):
            keys = [f"{key}.{name}" for key in MOMENTS]
            wanted = keys if any(key in tensors for key in keys) else []
            wide = torch.promote_types(parameter.dtype, torch.float32)
            for key in [*wanted, *([f"master.{name}"] if name in self.mastered else [])]:
                shape = () if key.startswith("step.") else tuple(shape_of(parameter))
                held = tensors.get(key)
                if held is None:
                    raise ValueError(f"no {key}")
                if tuple(held.shape) != shape or not (held.dtype == wide or key.startswith("step.")):
                    raise ValueError(f"{key} is {tuple(held.shape)} in {held.dtype}, expected {shape} in {wide}")
                if not held.isfinite().all():
                    raise ValueError(f"{key} is not finite")


class FSDPUpdater(Updater):
    """Weights, gradients and optimizer sharded by torch's FSDP2; the shards are fp32, and are their own masters.

    What it computes is what `Updater` does: a parameter without a gradient in any process is not updated.
    """

    lockstep = True

    def __init__(self, module: TreeModel, config: OptimizerConfig, total_steps: int):
        self.compute = module.dtype
        ranks.shard(module.float(), module.gathered_at_once(), compute=self.compute)
        super().__init__(module, config, total_steps)
        if self.compute != torch.float32:  # what a model's directory keeps is rounded
            self.mastered = frozenset(self.names) - module.always_fp32

    def backward(self, loss: Tensor) -> None:
        (loss * ranks.world()).backward()  # FSDP2 takes the mean over processes

    def _reduced(self, gradients: list[Tensor | None]) -> list[Tensor | None]:
        return gradients  # by each backward

    def _norm(self, grads: list[Tensor]) -> Tensor:
        # In fp64 without a copy: a word embedding's would take gigabytes.
        norms = [torch.linalg.vector_norm(ranks.local(grad), dtype=torch.float64) for grad in grads]
        squares = torch.stack(norms).square().sum().cpu() if norms else torch.zeros((), dtype=torch.float64)
        ranks.add(squares)
        return squares.sqrt()

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        units = [m for m in self.module.modules() if hasattr(m, "unshard")]
        self.module.set_reshard_after_forward(False)
        for unit in units:
            unit.unshard()
        try:
            yield
        finally:
            self.module.set_reshard_after_forward(True)
            self.module.set_reshard_after_forward(False, recurse=False)  # FSDP2's own way with a root
            for unit in units:
                unit.reshard()

    def stream(self) -> Iterator[tuple[str, Tensor]]:
        for name, value in super().stream():
            yield name, value.to(self.compute) if name not in self.module.always_fp32 else value


MAIN_GRAD = "main_grad"  # of a parameter of less than fp32: the sum of its gradients, fp32


def add_up_in_fp32(parameter: nn.Parameter) -> None:
    """From now on a gradient of a low-precision parameter goes into its `main_grad` as it comes, and is freed.

    Sums of 46 packs in bf16 err 3 to 4 times more than the gradients themselves. The sum is the parameter's, as
    ``grad`` is: two updaters of one module share it.
    """
    if not is_wide(parameter) and not hasattr(parameter, MAIN_GRAD):
        setattr(parameter, MAIN_GRAD, None)
        parameter.register_post_accumulate_grad_hook(_take)


def main_grad(parameter: nn.Parameter) -> Tensor | None:
    """The sum of a parameter's gradients since the last step, at least fp32."""
    _take(parameter)  # a module that was pickled or copied may have lost the hook
    return parameter.grad if is_wide(parameter) else getattr(parameter, MAIN_GRAD)


def _take(held: Tensor) -> None:
    if held.grad is None or is_wide(held):  # a module may have become fp32 since
        return
    total = getattr(held, MAIN_GRAD)
    setattr(held, MAIN_GRAD, held.grad.float() if total is None else total.add_(held.grad))
    held.grad = None


def clip_factor(norm: Tensor, longest: float) -> Tensor:
    """What gradients of this global norm are multiplied by, fp64, where the norm is; NaN where that is not finite."""
    factor = (longest / (norm.double() + 1e-6)).clamp(max=1.0)
    return torch.where(norm.isfinite(), factor, math.nan)


def learning_rate_factor(step: int, total: int, config: OptimizerConfig) -> float:
    """Linear warm-up over ``warmup_ratio`` of the steps, then constant or a cosine to 0."""
    warmup = config.warmup_ratio * total
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if config.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1.0, total - warmup)))


def shape_of(parameter: Any) -> torch.Size:
    """Of the whole parameter, also where ZeRO 3 has left nothing of it."""
    return getattr(parameter, "ds_shape", parameter.shape)
