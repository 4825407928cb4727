"""The vision tower: transformers' own, fed with what the host plans from the images' sizes, so that nothing in it waits.

Dimensions: P patches of all images of a pack.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
)


def planned(visual: Any, grid: Tensor, device: torch.device) -> dict[str, Tensor]:
    """What a tower's forward would compute of the images' sizes ``grid`` (images, 3), as keyword arguments.

    By transformers' own functions, on the host, where ``grid`` is; what a device reads goes there without waiting.
    """
    index, weight = get_vision_interpolation_indices_and_weights(
        grid,
        num_grid_per_side=visual.num_grid_per_side,
        mode=visual.interpolation_mode,
        align_corners=visual.interpolation_align_corners,
        spatial_merge_size=visual.config.spatial_merge_size,
    )
    position = get_vision_position_ids(grid, visual.spatial_merge_size)
    moved = {"interp_indices": index, "interp_weights": weight, "position_ids": position}  # (P, 4), (P, 4), (P, 2)
    return {
        "cu_seqlens": get_vision_cu_seqlens(grid),  # (frames + 1,) int32, read on the host alone
        **{name: value.to(device, non_blocking=True) for name, value in moved.items()},
    }
