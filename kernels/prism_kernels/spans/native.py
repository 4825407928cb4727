"""find_tag_spans in C++ (csrc/spans.cpp)."""

from __future__ import annotations

from collections.abc import Sequence

from prism_kernels.native import library
from prism_kernels.spans.arguments import check_tokens


def find_tag_spans(
    token_ids: Sequence[int], token_bytes: Sequence[bytes], markers: tuple[bytes, ...]
) -> list[tuple[int, int]] | None:
    try:
        return library().find_tag_spans(token_ids, token_bytes, markers)
    except (IndexError, TypeError):
        check_tokens(token_ids, token_bytes)  # says what and where
        raise
