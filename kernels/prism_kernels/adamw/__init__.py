"""AdamW over many tensors at once, with bf16 weights that are exact to fp32."""

from prism_kernels.adamw.api import adamw_step
from prism_kernels.adamw.remainder import join_master, split_master

__all__ = ["adamw_step", "join_master", "split_master"]
