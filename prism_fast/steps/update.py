"""Gradients -> weights: AdamW with fp32 master weights, schedule and clipping.

The one place where a sharded or distributed engine plugs in; nothing else knows how weights are updated.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from prism_fast.config import OptimizerConfig

MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # AdamW's state of a parameter


class Updater:
    """AdamW over the trainable parameters of a module.

    Parameters of less than fp32 have an fp32 master copy, which the optimizer updates and the parameter rounds. Weight
    decay applies to matrices only (norms, biases and the scalar head have none).
    """

    def __init__(self, module: nn.Module, config: OptimizerConfig, total_steps: int):
        self.config, self.total_steps, self.steps = config, total_steps, 0
        self.names, self.parameters = [], []
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                self.names.append(name)
                self.parameters.append(parameter)
        self.masters = [p if p.dtype in (torch.float32, torch.float64) else p.detach().float() for p in self.parameters]
        matrices = [m for m in self.masters if m.dim() >= 2]
        others = [m for m in self.masters if m.dim() < 2]
        groups = [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        self.adamw = torch.optim.AdamW(
            [g for g in groups if g["params"]], lr=config.lr, betas=(config.beta1, config.beta2), foreach=True
        )

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        return self.config.lr * learning_rate_factor(self.steps, self.total_steps, self.config)

    def step(self) -> float:
        """One optimizer step from the gradients of the parameters, which it clears; returns their global norm (L2).

        A norm that is not finite leaves the weights as they are; the caller sees it in the returned value.
        """
        grads = [p.grad for p in self.parameters if p.grad is not None]
        norm = float(torch.linalg.vector_norm(torch.stack([g.float().norm() for g in grads]))) if grads else 0.0
        if math.isfinite(norm):
            scale = min(1.0, self.config.clip_norm / (norm + 1e-6))
            for parameter, master in zip(self.parameters, self.masters):
                if parameter.grad is None:
                    master.grad = None
                else:
                    master.grad = parameter.grad.to(master.dtype).mul_(scale)
            for group in self.adamw.param_groups:
                group["lr"] = self.lr
            self.adamw.step()
            with torch.no_grad():
                for parameter, master in zip(self.parameters, self.masters):
                    if master is not parameter:
                        parameter.copy_(master)
                        master.grad = None
        self.next_step()
        return norm

    def next_step(self) -> None:
        """Clears the gradients and moves the schedule on; by itself it skips an update."""
        for parameter in self.parameters:
            parameter.grad = None
        self.steps += 1

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps: moments by parameter name, and the masters of low-precision parameters."""
        kept = {}
        for name, parameter, master in zip(self.names, self.parameters, self.masters):
            if master is not parameter:
                kept[f"master.{name}"] = master
            for key, value in self.adamw.state.get(master, {}).items():
                kept[f"{key}.{name}"] = value
        return kept

    def load(self, tensors: dict[str, Tensor], steps: int) -> None:
        """Restores what :meth:`tensors` gave; the module's weights are restored by their own checkpoint.

        Raises ValueError where tensors are missing, or of another shape or dtype, or not finite.
        """
        self.steps = steps
        self._check(tensors)
        with torch.no_grad():
            for name, parameter, master in zip(self.names, self.parameters, self.masters):
                if master is not parameter:
                    master.copy_(tensors[f"master.{name}"])
                state = {
                    key: tensors[f"{key}.{name}"].to(master.device if key != "step" else "cpu").clone()
                    for key in MOMENTS
                    if f"{key}.{name}" in tensors
                }
                if state:
                    self.adamw.state[master] = state

    def _check(self, tensors: dict[str, Tensor]) -> None:
        for name, parameter, master in zip(self.names, self.parameters, self.masters):
            keys = [f"{key}.{name}" for key in MOMENTS]
            wanted = keys if any(key in tensors for key in keys) else []
            for key in [*wanted, *([f"master.{name}"] if master is not parameter else [])]:
                shape = () if key.startswith("step.") else tuple(master.shape)
                held = tensors.get(key)
                if held is None:
                    raise ValueError(f"no {key}")
                if tuple(held.shape) != shape or not (held.dtype == master.dtype or key.startswith("step.")):
                    raise ValueError(
                        f"{key} is {tuple(held.shape)} in {held.dtype}, expected {shape} in {master.dtype}"
                    )
                if not held.isfinite().all():
                    raise ValueError(f"{key} is not finite")


def learning_rate_factor(step: int, total: int, config: OptimizerConfig) -> float:
    """Linear warm-up over ``warmup_ratio`` of the steps, then constant or a cosine to 0."""
    warmup = config.warmup_ratio * total
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if config.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1.0, total - warmup)))
