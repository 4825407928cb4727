"""The teacher behind HTTP: one question, tried again where that may help.

Tried again: what never came or broke off, 408, 409, 425, 429, 5xx, and bodies that hold no answer. Refused for this
prompt alone: any other 4xx. Ends the command: a key, an address or an account that the server does not take.
"""

from __future__ import annotations

import asyncio
import email.utils
import random
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import httpx2

from prism_fast import printable
from prism_fast.config import TeacherConfig
from prism_fast.records import DataError
from prism_fast.stages.curating.answer import Answer, Tokens, read_answer
from prism_fast.stages.curating.pace import Halt, Pace

MAX_BODY = 16 << 20  # bytes of a response
AGAIN = {408, 409, 425, 429}  # and 5xx
NEVER = {301, 302, 303, 307, 308, 401, 402, 403, 404, 405}  # whatever the prompt
NO_MONEY = ("insufficient_quota", "billing_hard_limit_reached")  # codes of a 429 that no wait helps
NOT_SENT = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout, httpx2.UnsupportedProtocol)


class Failed(Exception):
    """No answer to this prompt."""


class Trouble(NamedTuple):
    """Why a try gave no answer."""

    name: str  # what it is counted as
    detail: str = ""
    wait: float = 0.0  # seconds that the server asks for
    paid: bool = False  # maybe
    again: bool = True


class Teacher:
    """``key`` goes into one header, and what the server says is shown without it."""

    def __init__(self, config: TeacherConfig, key: str | None, pace: Pace, halt: Halt, seed: int):
        self.config, self._key, self._pace, self._halt = config, key, pace, halt
        self._random = random.Random(seed)
        self.troubles: Counter[str] = Counter()
        headers = {"Content-Type": "application/json", "Accept": "application/json", "Accept-Encoding": "identity"}
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        limits = httpx2.Limits(max_connections=config.concurrency, max_keepalive_connections=config.concurrency)
        self._client = httpx2.AsyncClient(headers=headers, limits=limits, timeout=config.timeout_seconds)

    async def __aenter__(self) -> Teacher:
        return self

    async def __aexit__(self, *_: Any) -> None:
        await self._client.aclose()

    async def ask(self, body: bytes, most: Tokens, lose: Callable[[], None]) -> Answer:
        """``lose`` is called for every try that may have been paid and gave nothing. Raises Failed, Halted where the
        command ends before a try begins, and DataError where no other prompt would fare better."""
        trouble = Trouble("")
        for attempt in range(self.config.retries + 1):
            if attempt:
                await self._halt.sleep(self._backoff(attempt, trouble))
            await self._pace.turn(most)
            found = await self._try(body)
            if isinstance(found, Answer):
                self._pace.settle(most, found.usage or most)
                return found
            trouble = found
            self.troubles[trouble.name] += 1
            if trouble.paid:
                lose()
            else:
                self._pace.settle(most, Tokens(0, 0))
            if not trouble.again:
                break
            if trouble.wait > self.config.longest_wait_seconds:
                raise DataError(
                    f"{self.config.url}: {trouble.name}, asks for a wait of {trouble.wait:g} s, over teacher."
                    f"longest_wait_seconds = {self.config.longest_wait_seconds:g}; go on later by the same command"
                )
            self._pace.hold(trouble.wait)
        raise Failed(f"{trouble.name}{trouble.detail and ': ' + trouble.detail}")

    def _backoff(self, attempt: int, trouble: Trouble) -> float:
        """Doubled at each retry, up to half of it less at random, so that those who failed together do not come again
        together; at least what the server asked for."""
        longest = min(self.config.backoff_seconds * 2.0 ** (attempt - 1), self.config.longest_wait_seconds)
        return max(trouble.wait, longest * self._random.uniform(0.5, 1.0))

    async def _try(self, body: bytes) -> Answer | Trouble:
        try:
            response, data = await asyncio.wait_for(self._post(body), self.config.timeout_seconds)
        except (asyncio.TimeoutError, httpx2.TimeoutException) as error:
            return Trouble("timeout", paid=not isinstance(error, NOT_SENT))
        except (httpx2.TransportError, httpx2.DecodingError) as error:
            return Trouble(_words(type(error).__name__), self._shown(str(error)), paid=not isinstance(error, NOT_SENT))
        if response.status_code == 200:
            answer = read_answer(data) if data is not None else "too large"
            return answer if isinstance(answer, Answer) else Trouble("malformed body", answer, paid=True)
        return self._refused(response, data or b"")

    async def _post(self, body: bytes) -> tuple[httpx2.Response, bytes | None]:
        pieces, size = [], 0
        async with self._client.stream("POST", f"{self.config.url}/chat/completions", content=body) as response:
            async for piece in response.aiter_bytes():
                size += len(piece)
                if size > MAX_BODY:
                    return response, None
                pieces.append(piece)
        return response, b"".join(pieces)

    def _refused(self, response: httpx2.Response, data: bytes) -> Trouble:
        status, detail = response.status_code, self._shown(data[:4096].decode(errors="replace"))
        if status in NEVER or (status == 429 and any(code in detail for code in NO_MONEY)):
            keyed = self.config.key_variable or "no key"
            raise DataError(
                f"{self.config.url}: status {status} ({detail}); correct teacher.url, teacher.model or the key "
                f"(teacher.key_variable: {keyed})"
            )
        again = status in AGAIN or status >= 500
        wait = retry_after(response.headers.get("retry-after", ""), time.time()) if again else 0.0
        return Trouble(f"status {status}", detail, wait, again=again)

    def _shown(self, text: str) -> str:
        text = text.replace(self._key, "[key]") if self._key else text
        return printable(" ".join(text.split()))[:200]


def retry_after(value: str, now: float) -> float:
    """Seconds that a Retry-After asks for, as a number or a date; 0 for what is neither."""
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - now
        except (ValueError, TypeError, OverflowError):
            return 0.0
    return min(seconds, 1e9) if seconds > 0 else 0.0


def _words(name: str) -> str:
    """RemoteProtocolError -> remote protocol error."""
    return "".join(f" {letter.lower()}" if letter.isupper() else letter for letter in name).strip()
