"""The next token of every row: Gumbel-max with noise from a counter, and its log-prob."""

from prism_kernels.sample_tokens.api import sample_tokens

__all__ = ["sample_tokens"]
