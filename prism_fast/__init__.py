"""prism_fast: PRISM post-training of large multimodal models, performance first."""

__version__ = "0.1.0"


class DataError(ValueError):
    """Bad input from outside. The message is one line: place (file:record), field, what was expected, remedy."""
