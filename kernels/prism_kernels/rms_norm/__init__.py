"""RMSNorm, alone or behind a residual sum, and RMSNorm of attention heads followed by their rotation."""

from prism_kernels.rms_norm.api import qk_norm_rotate, rms_norm, rms_norm_rotate

__all__ = ["qk_norm_rotate", "rms_norm", "rms_norm_rotate"]
