"""The check that names what is wrong with the tokens of a sequence."""

from __future__ import annotations

from collections.abc import Sequence
from operator import index
from typing import Any

from prism_kernels.checks import wrong


def check_tokens(token_ids: Any, token_bytes: Sequence[bytes]) -> None:
    """Raises ValueError for the first token that is no id of ``token_bytes``, or whose entry is not bytes."""
    if not isinstance(token_bytes, (list, tuple)):
        raise wrong("token_bytes", "a list of bytes by token id", type(token_bytes).__name__)
    if not isinstance(token_ids, (list, tuple)):
        raise wrong("token_ids", "a sequence of integers of one dimension", type(token_ids).__name__)
    for position, token in enumerate(token_ids):
        try:
            number = index(token)
        except TypeError:
            raise wrong("token_ids", "integers", f"{token!r} at position {position}") from None
        if not 0 <= number < len(token_bytes):
            expected = f"ids in [0, {len(token_bytes)}), of token_bytes"
            raise wrong("token_ids", expected, f"id {number} at position {position}")
        if not isinstance(token_bytes[number], bytes):
            raise wrong(f"token_bytes[{number}]", "bytes", type(token_bytes[number]).__name__)
