"""Public function: contract, checks, dispatch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from prism_kernels.checks import plain, shown, wrong
from prism_kernels.dispatch import Impl, Implementation, Op
from prism_kernels.native import need_native

_HOST = ("cpu", "cuda")  # host work, whatever device the tensors are on

_FIND_TAG_SPANS = Op(
    "find_tag_spans",
    [
        Implementation(Impl.NATIVE, "prism_kernels.spans.native:find_tag_spans", _HOST, need_native),
        Implementation(Impl.REFERENCE, "prism_kernels.spans.reference:find_tag_spans", _HOST),
    ],
)


def find_tag_spans(
    token_ids: Sequence[int],
    token_bytes: Sequence[bytes],
    tags: Sequence[str] = ("caption", "think", "answer"),
    *,
    impl: str = "auto",
) -> list[tuple[int, int]] | None:
    """The tokens that hold each element ``<tag>...</tag>`` of one sequence, or None where the format is invalid.

    ``token_ids``: (T,) integers, a list or a tensor. ``token_bytes``: the bytes of every token by id, ``b""`` for
    end-of-turn and padding. Returns one half-open ``(start, end)`` per tag, in order, tags included: ``start`` is the
    token with the first byte of the opening tag, ``end - 1`` the token with the last byte of the closing tag. Tags may
    be split over tokens; neighbouring spans share a token where it ends one element and begins the next.

    Valid (docs/method.md 2): each opening and closing tag occurs exactly once, in the order of ``tags``, and only
    ASCII white space (space, \\t, \\n, \\v, \\f, \\r) stands outside the elements. Elements may be empty. O(T + bytes).

    >>> pieces = [b"<a>", b"x", b"</a", b"> <b", b">y</b>", b""]
    >>> find_tag_spans([0, 1, 2, 3, 4, 5], pieces, tags=("a", "b"))
    [(0, 4), (3, 5)]

    Raises ValueError, naming the argument: an id outside ``token_bytes`` (with its position), an entry that is not
    bytes, ``tags`` that are empty, repeated, or hold other characters than letters, digits, ``_``, ``-`` and ``.``.
    """
    _, run = _FIND_TAG_SPANS.select(impl)
    if not isinstance(tags, (list, tuple)) or not all(isinstance(tag, str) for tag in tags):
        raise wrong("tags", "a sequence of at least one tag name", shown(tags))
    return run(plain(token_ids), token_bytes, _markers(tuple(tags)))


@lru_cache(maxsize=16)
def _markers(tags: tuple[str, ...]) -> tuple[bytes, ...]:
    """("a", "b") -> (b"<a>", b"</a>", b"<b>", b"</b>")"""
    if not tags:
        raise wrong("tags", "a sequence of at least one tag name", repr(tags))
    for tag in tags:
        if not re.fullmatch(r"[A-Za-z0-9_.\-]+", tag):
            raise wrong("tags", "names of ASCII letters, digits, '_', '-' and '.'", repr(tag))
    if len(set(tags)) != len(tags):
        raise wrong("tags", "every name once", repr(tags))
    return tuple(marker for tag in tags for marker in (f"<{tag}>".encode(), f"</{tag}>".encode()))
