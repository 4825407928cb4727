"""prism_fast: PRISM post-training of large multimodal models, performance first."""

__version__ = "0.1.0"
