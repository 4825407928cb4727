"""Trees into packs of a fixed capacity, items onto ranks of equal load."""

from prism_kernels.packing.api import balance, pack_trees
from prism_kernels.packing.arguments import PackCost

__all__ = ["PackCost", "balance", "pack_trees"]
