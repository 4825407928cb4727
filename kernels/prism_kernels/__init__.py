"""Kernels of PRISM post-training. Importable with torch alone; every op names its implementations (``which_impl()``)."""

from prism_kernels.dispatch import Impl, which_impl

__all__ = [
    "Impl",
    "which_impl",
]
