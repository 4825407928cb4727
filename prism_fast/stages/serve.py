"""`prism-fast serve-discriminator`: a trained discriminator's scores by HTTP, until SIGTERM or Ctrl-C."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator

from prism_fast.config import ServeConfig
from prism_fast.stages.serving.score_server import ScoreServer, is_loopback


def serve(config: ServeConfig) -> None:
    """Raises DataError as `ScoreServer` does."""
    server = ScoreServer(config)
    if not is_loopback(config.host):
        print(f"WARNING: {config.host} is open to other machines: whoever reaches it may score", file=sys.stderr)
    with _until_a_signal(server.stop):
        server.listen()
        path, head = server.checkpoint["path"], server.checkpoint["head"]
        print(f"serving {path} (head {head}) at {server.url}: POST /score, GET /health", flush=True)
        server.run()
    print(f"stopped: {server.answered} requests were answered")


@contextlib.contextmanager
def _until_a_signal(stop: Callable[[], None]) -> Iterator[None]:
    before = {number: signal.signal(number, lambda *_: stop()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
