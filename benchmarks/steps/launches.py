"""Kernels that a GPU launches for one token of decoding, not captured: counted without one.

The step runs on tensors without storage, whose dispatch is a GPU's. An operator of torch that computes is a launch; of
an operator of ours the body runs, and every launch of a Triton kernel counts.
"""

from __future__ import annotations

import gc
from collections import Counter
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.steps.case import MINI, stock_model
from prism_fast.models.policy import Policy
from prism_fast.models.token_step import TokenStep
from prism_fast.steps.sampler_rows import LOGITS, Draws, Rows, Size
from prism_kernels.operators import Operator

ROWS = 64
NO_LAUNCH = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "detach")


class Launches(TorchDispatchMode):
    """``found``: launches by the operator's or the kernel's name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.operators = {found.overload: found for found in gc.get_objects() if type(found) is Operator}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in self.operators:
            operator = self.operators[func]
            with self:
                return operator.run(*operator.records(*args))
        has = torch._C._dispatch_has_kernel_for_dispatch_key
        if has(func.name(), "CompositeImplicitAutograd") and not has(func.name(), "CPU"):
            with self:
                return func.decompose(*args, **kwargs)
        name = func._schema.name.split("::")[1]
        if not func.is_view and name not in NO_LAUNCH:
            self.found[name] += 1
        return func(*args, **kwargs)


def launches_of(layers: int) -> Counter[str]:
    """Of one token of 64 rows by a model of so many layers, logits and sampling included."""
    from triton.runtime.jit import JITFunction

    meta = torch.device("meta")
    policy = Policy(stock_model(replace(MINI.dense(), layers=layers), torch.bfloat16, meta, seed=0))
    draws = Draws(temperature=1.0, seed=0, end=1, limit=256)
    with torch.no_grad(), mock.patch.dict(LOGITS, meta=LOGITS["cuda"]):
        rows = Rows(TokenStep(policy), Size(rows=ROWS, prompts=4, pages=99), draws)
        layout = rows._layout(ROWS)
        step = rows._step(layout)
        with Launches() as launches:
            launched = launches.found

            def launch(kernel: Any, *args: Any, **kwargs: Any) -> None:
                launched[kernel.fn.__name__] += 1

            with mock.patch.object(JITFunction, "run", launch):
                rows._advance(layout, step)
    return launched


def launches_of_a_token() -> dict[str, int]:
    """{"a layer", "besides"}."""
    two, three = (launches_of(layers).total() for layers in (2, 3))
    return {"a layer": three - two, "besides": two - 2 * (three - two)}


if __name__ == "__main__":
    print(launches_of_a_token(), dict(launches_of(3) - launches_of(2)))
