"""The gated activation of an MLP, SwiGLU."""

from prism_kernels.swiglu.api import swiglu

__all__ = ["swiglu"]
