"""The body of a response by HTTP -> what the teacher said, and what it counts."""

from __future__ import annotations

import json
from typing import Any, NamedTuple


class Tokens(NamedTuple):
    """Of a request, or of many: what was read, what was written."""

    input: int
    output: int

    def plus(self, other: Tokens) -> Tokens:
        return Tokens(self.input + other.input, self.output + other.output)


class Answer(NamedTuple):
    """One choice of a chat completion.

    >>> Answer("<caption>3; 7</caption>...", "stop", Tokens(412, 96))
    """

    text: str
    finish: str  # as the server calls it: stop, length, content_filter, ...; "refusal" where it refuses
    usage: Tokens | None  # None where the server does not say


def read_answer(body: bytes) -> Answer | str:
    """The answer in a body, or what is wrong with the body. A content of several parts is their texts together."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return "not JSON"
    try:
        choice = found["choices"][0]
        message = choice["message"]
        content = message["content"] if "content" in message or not message.get("refusal") else ""
        finish = choice.get("finish_reason") or "stop"
    except (KeyError, IndexError, TypeError, AttributeError):
        return "no choices[0].message.content"
    text = _text(content)
    if text is None or not isinstance(finish, str):
        return "choices[0] holds what is no text"
    refused = message.get("refusal") and not text.strip()
    return Answer(text, "refusal" if refused else finish, _usage(found.get("usage")))


def _text(content: Any) -> str | None:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return None
    pieces = [part.get("text") for part in content if isinstance(part, dict) and part.get("type", "text") == "text"]
    texts = [piece for piece in pieces if isinstance(piece, str)]
    return "".join(texts) if len(texts) == len(pieces) else None


def _usage(usage: Any) -> Tokens | None:
    if not isinstance(usage, dict):
        return None
    counts = [usage.get("prompt_tokens"), usage.get("completion_tokens")]
    whole = [count for count in counts if isinstance(count, int) and not isinstance(count, bool) and count >= 0]
    return Tokens(*whole) if len(whole) == len(counts) else None
