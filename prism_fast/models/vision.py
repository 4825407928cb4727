"""The vision tower: transformers' own but for its attention, which takes all images in one call.

The host plans the tower's work by the sizes of the images, and nothing in it waits for a device.
Dimensions: P patches of all images of a pack, H hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.qwen3_vl import modeling_qwen3_vl as dense
from transformers.models.qwen3_vl_moe import modeling_qwen3_vl_moe as sparse
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
)

from prism_fast.records import to_device
from prism_kernels import TreeLayout, segment_attention


class VisionAttention(nn.Module):
    """Patches see those of their own image alone, or of their own frame."""

    qkv: nn.Linear
    proj: nn.Linear
    num_heads: int
    scaling: float

    def forward(self, x: Tensor, *, position_embeddings: tuple[Tensor, Tensor], images: TreeLayout, **_: Any) -> Tensor:
        """x (P, H) -> as x; ``images``: a root for each. What else transformers' blocks pass on is not needed."""
        q, k, v = self.qkv(x).view(x.shape[0], 3, self.num_heads, -1).unbind(1)
        q, k = dense.apply_rotary_pos_emb_vision(q, k, *position_embeddings)
        return self.proj(segment_attention(q, k, v, images, scale=self.scaling).flatten(1))


OURS = {dense.Qwen3VLVisionAttention: VisionAttention, sparse.Qwen3VLMoeVisionAttention: VisionAttention}


def own_vision(visual: nn.Module) -> None:
    """Gives the attention of a Qwen3-VL(-MoE) vision tower its class here, in place; it then needs :func:`planned`."""
    for module in visual.modules():
        module.__class__ = OURS.get(type(module), type(module))


def planned(visual: Any, grid: Tensor, device: torch.device) -> dict[str, Any]:
    """What a tower makes of the images' sizes ``grid`` (images, 3), on the host, as keyword arguments of its forward.

    By transformers' own functions; what a device reads goes there without waiting.
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
    start = get_vision_cu_seqlens(grid)
    lengths = start.diff().tolist()
    return {
        "cu_seqlens": start,
        "images": TreeLayout.build(lengths, [-1] * len(lengths)).to(device, non_blocking=True),
        **{name: to_device(value, device) for name, value in moved.items()},
    }
