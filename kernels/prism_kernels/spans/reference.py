"""find_tag_spans in plain Python: the definition."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, pairwise

from prism_kernels.spans.arguments import check_tokens


def find_tag_spans(
    token_ids: Sequence[int], token_bytes: Sequence[bytes], markers: tuple[bytes, ...]
) -> list[tuple[int, int]] | None:
    check_tokens(token_ids, token_bytes)
    pieces = [token_bytes[token] for token in token_ids]
    text = b"".join(pieces)
    if any(text.count(marker) != 1 for marker in markers):
        return None
    begins = [text.index(marker) for marker in markers]
    if any(left > right for left, right in pairwise(begins)):
        return None
    elements = [
        (begins[i], begins[i + 1] + len(markers[i + 1]))  # bytes, from the opening tag to the end of the closing one
        for i in range(0, len(markers), 2)
    ]
    edges = [0, *(edge for element in elements for edge in element), len(text)]
    if any(text[edges[i] : edges[i + 1]].strip() for i in range(0, len(edges), 2)):
        return None
    piece_ends = list(accumulate(map(len, pieces)))
    return [(bisect_right(piece_ends, first), bisect_right(piece_ends, last - 1) + 1) for first, last in elements]
