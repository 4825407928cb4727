"""Which tokens hold each element of a tagged response."""

from prism_kernels.spans.api import find_tag_spans

__all__ = ["find_tag_spans"]
