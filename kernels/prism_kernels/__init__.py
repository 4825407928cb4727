"""Kernels of PRISM post-training. Importable with torch alone; every op names its implementations (``which_impl()``)."""

from prism_kernels.dispatch import Impl, which_impl
from prism_kernels.tree_attention.api import tree_attention
from prism_kernels.tree_attention.layout import TreeLayout

__all__ = [
    "Impl",
    "TreeLayout",
    "tree_attention",
    "which_impl",
]
