"""What the LM-head operators refuse."""

from __future__ import annotations

import torch


def check_once_differentiated() -> None:
    """For a backward that autograd could not differentiate again: with create_graph=True it runs with grad enabled."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "the LM-head ops have no second derivative (create_graph=True); use impl='reference' for one"
        )
