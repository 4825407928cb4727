"""The check that names what is wrong with the tokens of a sequence."""

from __future__ import annotations

from collections.abc import Sequence
from operator import index
from typing import Any


def check_tokens(token_ids: Any, token_bytes: Sequence[bytes]) -> None:
    """Raises ValueError for the first token that is no id of ``token_bytes``, or whose entry is not bytes."""
    if not isinstance(token_bytes, (list, tuple)):
        raise ValueError(f"token_bytes: got {type(token_bytes).__name__}, expected a list of bytes by token id")
    if not isinstance(token_ids, (list, tuple)):
        raise ValueError(f"token_ids: got {type(token_ids).__name__}, expected a sequence of integers of one dimension")
    for position, token in enumerate(token_ids):
        try:
            number = index(token)
        except TypeError:
            raise ValueError(f"token_ids: got {token!r} at position {position}, expected integers") from None
        if not 0 <= number < len(token_bytes):
            raise ValueError(
                f"token_ids: id {number} at position {position}, expected 0 <= id < {len(token_bytes)} (token_bytes)"
            )
        if not isinstance(token_bytes[number], bytes):
            raise ValueError(f"token_bytes: entry {number} is {type(token_bytes[number]).__name__}, expected bytes")
