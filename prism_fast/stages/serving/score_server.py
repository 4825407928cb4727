"""A discriminator behind HTTP: requests are read in threads of their own, the model runs in one."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from hashlib import blake2b
from http import HTTPStatus
from typing import Any

from prism_fast.config import ServeConfig
from prism_fast.models.backbone import local_directory
from prism_fast.models.load import open_discriminator
from prism_fast.records import DataError
from prism_fast.stages.serving.asked import Refused, read_request
from prism_fast.stages.serving.http import Server
from prism_fast.stages.serving.waiting import LOOK, Line, Waiting
from prism_fast.steps.judging import Verdict, question, verdicts
from prism_kernels.group_advantage.rules import RULES

ENCODERS = 2  # requests whose texts and images are worked out at once, beside the model's own work
LAST_ANSWERS = 5.0  # seconds in which clients take what was worked out when the server stops


class ScoreServer:
    """Bound when it is made; after `listen`, `run` answers in the calling thread, until `stop` (from anywhere)."""

    def __init__(self, config: ServeConfig):
        """Raises DataError for an address that is not to be had or not meant, and a model that does not open."""
        self.config = config
        if RULES[config.advantage.rule].reads_accuracy:
            raise DataError(f"advantage.rule={config.advantage.rule}: reads right answers, which a server has not")
        self._line, self._encoders, self._stop = Line(config.max_waiting), threading.Semaphore(ENCODERS), False
        self.answered = 0
        loopback = is_loopback(config.host)
        if not loopback and not config.expose:
            raise DataError(f"host={config.host}: other machines reach it; set expose=true too, if they may score")
        with _one_line_for(config):
            self.http = Server(config, self._answer, self._health)
        try:
            self.module, self.chat = open_discriminator(config.discriminator)
        except BaseException:
            self.http.server_close()
            raise
        self.module.eval()
        head = self.module.head.detach().float().cpu().numpy().tobytes()
        self.checkpoint = {
            "path": str(local_directory(config.discriminator.path).resolve()),
            "head": blake2b(head, digest_size=8).hexdigest(),  # another after every update
            "dtype": str(self.module.dtype).removeprefix("torch."),
        }

    @property
    def url(self) -> str:
        host = f"[{self.config.host}]" if ":" in self.config.host else self.config.host
        return f"http://{host}:{self.http.server_port}"

    def stop(self) -> None:
        self._stop = True

    def listen(self) -> None:
        """Raises DataError. From here on clients are heard, and answered by `run`."""
        with _one_line_for(self.config):
            self.http.server_activate()
        threading.Thread(target=self.http.serve_forever, args=(LOOK,), daemon=True).start()

    def run(self) -> None:
        try:
            while not self._stop:
                if taken := self._line.take(self.config.tokens_per_pack, LOOK):
                    self._judge(taken)
        finally:
            self._line.close()
            self.http.shutdown()
            self.http.server_close()
            self.http.wait_for_answers(LAST_ANSWERS)

    def _judge(self, taken: list[Waiting]) -> None:
        questions = [item for request in taken for item in request.questions]
        try:
            found = verdicts(self.module, questions, self.config)
        except (RuntimeError, ValueError, MemoryError) as error:  # no memory: these are told, and the server goes on
            told = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            print(f"warning: a pass of {len(questions)} records failed: {told}", file=sys.stderr)
            for request in taken:
                request.answer(Refused(HTTPStatus.INTERNAL_SERVER_ERROR, "the pass failed; see the server's output"))
            return
        for request in taken:
            own, found = found[: len(request.questions)], found[len(request.questions) :]
            good = all(map(_is_finite, own))
            request.answer(own if good else Refused(HTTPStatus.INTERNAL_SERVER_ERROR, "a score is not finite"))
        self.answered += len(taken)

    def _answer(self, body: bytes, is_there: Callable[[], bool]) -> dict[str, Any]:
        with self._encoders:
            asked = read_request(body, self.config)
            try:
                questions = [question(sample, texts, self.chat, self.config) for sample, texts in asked]
            except DataError as error:
                raise Refused(HTTPStatus.BAD_REQUEST, str(error)) from None
        request = Waiting(questions)
        self._line.join(request)
        until = time.monotonic() + self.config.answer_seconds
        while (found := request.wait(LOOK)) is None:
            if time.monotonic() > until or not is_there():
                request.given_up = True
                raise Refused(HTTPStatus.SERVICE_UNAVAILABLE, "not answered within answer_seconds; come again")
        return {"records": [verdict._asdict() for verdict in found], "checkpoint": self.checkpoint}

    def _health(self) -> dict[str, Any]:
        return {"status": "ok", "checkpoint": self.checkpoint, "waiting": len(self._line), "answered": self.answered}


def _is_finite(verdict: Verdict) -> bool:
    sides = (verdict.perception, verdict.reasoning, verdict.reward, verdict.advantage, verdict.teacher or [])
    return all(math.isfinite(number) for side in sides for number in side if number is not None)


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@contextlib.contextmanager
def _one_line_for(config: ServeConfig) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        used = error.errno == errno.EADDRINUSE
        why = "another process listens there" if used else error.strerror or str(error)
        raise DataError(f"host={config.host} port={config.port}: {why}; take another port, or host") from None
