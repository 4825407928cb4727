"""HTTP by the standard library: one JSON request on a connection, within limits of time, size and number."""

from __future__ import annotations

import contextlib
import io
import json
import re
import select
import socket
import sys
import threading
import time
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prism_fast.config import ServeConfig
from prism_fast.stages.serving.asked import Refused

RETRY_SECONDS = 1
# Seconds, bytes: of a refused body, read so that the client sees the answer. A client whose sending breaks off takes
# the server for one that is gone, and comes again; so the bytes are more than anyone sends by mistake.
LINGER = (5.0, 1 << 26)
Answer = Callable[[bytes, Callable[[], bool]], dict[str, Any]]  # (body, is the client still there?) -> reply


class Server(ThreadingHTTPServer):
    """``answer`` is called in a thread of each request; ``health`` too. Binds, and listens after `server_activate`."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, config: ServeConfig, answer: Answer, health: Callable[[], dict[str, Any]]):
        self.config, self.answer, self.health = config, answer, health
        self._room = threading.Semaphore(config.max_connections)
        self._open, self._open_changed = 0, threading.Condition()
        self.address_family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
        super().__init__((config.host, config.port), _Handler, bind_and_activate=False)
        try:
            self.server_bind()
        except BaseException:
            self.server_close()
            raise

    def server_bind(self) -> None:
        """Without a look-up of the host's full name, which may wait for a name server."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = self.config.host, self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._room.acquire(blocking=False):
            with contextlib.suppress(OSError):
                request.setblocking(False)
                request.send(_FULL)
            self.shutdown_request(request)
            return
        with self._open_changed:
            self._open += 1
        try:
            super().process_request(request, client_address)
        except BaseException:  # no thread
            self._left()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._left()

    def _left(self) -> None:
        self._room.release()
        with self._open_changed:
            self._open -= 1
            self._open_changed.notify_all()

    def wait_for_answers(self, seconds: float) -> None:
        """Until connections that are open have their answers."""
        with self._open_changed:
            self._open_changed.wait_for(lambda: not self._open, seconds)

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exception() if sys.version_info >= (3, 11) else sys.exc_info()[1]
        if not isinstance(error, OSError):  # a client that is gone
            print(f"warning: a request failed: {type(error).__name__}: {error}", file=sys.stderr)


class _Handler(BaseHTTPRequestHandler):
    server: Server  # type: ignore[assignment]
    server_version, sys_version = "prism-fast", ""

    def setup(self) -> None:
        super().setup()
        self.rfile.close()
        arriving = _Arriving(self.connection, self.server.config.read_seconds)
        self.rfile = io.BufferedReader(arriving)  # type: ignore[assignment]
        self._unread = False

    def finish(self) -> None:
        with contextlib.suppress(OSError):
            super().finish()
        if self._unread:
            self._linger()

    def do_GET(self) -> None:
        self._reply(self._health)

    def do_POST(self) -> None:
        self._unread = True
        self._reply(self._score)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """As JSON too, where the request itself cannot be read."""
        self._unread, self.request_version = True, "HTTP/1.0"
        status = HTTPStatus(code)
        self._send(status, {"error": message or status.phrase})

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _reply(self, make: Callable[[], dict[str, Any]]) -> None:
        try:
            self._send(HTTPStatus.OK, make())
        except Refused as refused:
            self._send(refused.status, {"error": str(refused)})
        except OSError:  # the client is gone
            raise
        except Exception:  # `Server.handle_error` says what
            self._send(HTTPStatus.INTERNAL_SERVER_ERROR, {"error": "the request failed; see the server's output"})
            raise

    def _health(self) -> dict[str, Any]:
        if self.path != "/health":
            raise Refused(HTTPStatus.NOT_FOUND, "no such page; POST /score, GET /health")
        return self.server.health()

    def _score(self) -> dict[str, Any]:
        if self.path != "/score":
            raise Refused(HTTPStatus.NOT_FOUND, "no such page; POST /score, GET /health")
        if self.headers.get_content_type() != "application/json":  # which a page of a browser may not send unasked
            raise Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "expected Content-Type: application/json")
        return self.server.answer(self._body(), self._is_there)

    def _body(self) -> bytes:
        most = self.server.config.max_body_mib << 20
        lengths = self.headers.get_all("Content-Length", [])
        if "Transfer-Encoding" in self.headers or not lengths:
            raise Refused(HTTPStatus.LENGTH_REQUIRED, "expected a Content-Length, and no Transfer-Encoding")
        if len(lengths) > 1 or not re.fullmatch(r"[0-9]{1,18}", lengths[0]):
            raise Refused(HTTPStatus.BAD_REQUEST, "Content-Length: expected one whole number")
        length = int(lengths[0])
        if length > most:
            raise Refused(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"{length:,} bytes are over max_body_mib ({most:,}); send fewer"
            )
        try:
            body = self.rfile.read(length)
        except TimeoutError:
            raise Refused(HTTPStatus.REQUEST_TIMEOUT, "the request did not arrive within read_seconds") from None
        if len(body) < length:
            raise Refused(HTTPStatus.BAD_REQUEST, f"{len(body):,} bytes arrived of {length:,}")
        self._unread = False
        return body

    def _is_there(self) -> bool:
        """Whether the client still holds its end open."""
        try:
            if not select.select([self.connection], [], [], 0)[0]:
                return True
            self.connection.settimeout(self.server.config.read_seconds)
            return self.connection.recv(1, socket.MSG_PEEK) != b""
        except (OSError, ValueError):
            return False

    def _send(self, status: HTTPStatus, reply: dict[str, Any]) -> None:
        body = json.dumps(reply, allow_nan=False).encode() + b"\n"
        self.connection.settimeout(self.server.config.read_seconds)
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        if status == HTTPStatus.SERVICE_UNAVAILABLE:
            self.send_header("Retry-After", str(RETRY_SECONDS))
        self.end_headers()
        self.wfile.write(body)

    def _linger(self) -> None:
        """Reads on a little: a connection that is closed upon unread bytes is reset, and its answer lost."""
        until, left = time.monotonic() + LINGER[0], LINGER[1]
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            while left > 0 and (seconds := until - time.monotonic()) > 0:
                self.connection.settimeout(seconds)
                if not (read := self.connection.recv(min(left, 65_536))):
                    return
                left -= len(read)


class _Arriving(io.RawIOBase):
    """A connection as a file that ends in TimeoutError after so many seconds, however slowly bytes drop in."""

    def __init__(self, connection: socket.socket, seconds: float):
        self._connection, self._until = connection, time.monotonic() + seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self._until - time.monotonic()
        if left <= 0:
            raise TimeoutError("the request did not arrive in time")
        self._connection.settimeout(left)
        return self._connection.recv_into(buffer)


_BUSY = b'{"error": "too many connections (max_connections); come again"}\n'
_FULL = (
    b"HTTP/1.0 503 Service Unavailable\r\nContent-Type: application/json\r\nConnection: close\r\n"
    b"Retry-After: %d\r\nContent-Length: %d\r\n\r\n%s" % (RETRY_SECONDS, len(_BUSY), _BUSY)
)
