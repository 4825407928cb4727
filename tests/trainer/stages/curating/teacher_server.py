"""A teacher behind HTTP, on this machine: it looks at the picture, and answers as the digits' teacher does.

What it does to a request is a script's: `act(entry) -> str`, one of the names of `ACTS`, with an argument after a
colon ("429:30"). It knows nothing of the client. Every request is in `log`, with the time of the clock it was given.

`python -m tests.trainer.stages.curating.teacher_server ALIGNMENT.parquet PORT` serves until Ctrl-C; one request in
three goes wrong in one way or another.
"""

from __future__ import annotations

import base64
import io
import json
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from PIL import Image

from prism_fast.data.formats import read_align
from prism_fast.data.images import open_image

USAGE = {"prompt_tokens": 50, "completion_tokens": 20, "total_tokens": 70}


@dataclass
class Entry:
    """One request: who asked what, when, and what became of it."""

    number: int
    time: float
    prompt: str  # picture and question
    times: int  # how often this prompt was asked before
    body: dict
    headers: dict
    path: str
    act: str = ""
    replied: bool = False  # all of the reply was handed to the system


def picture(image: Image.Image) -> bytes:
    return image.convert("RGB").tobytes()


class _Quiet(ThreadingHTTPServer):
    daemon_threads, block_on_close = True, False

    def handle_error(self, *_) -> None:
        """A client that is gone, as one that was killed."""


class TeacherServer:
    """Knows the prompts of an alignment file. Use as a context; `url` is what teacher.url takes."""

    def __init__(self, file: Path, act: Callable[[Entry], str] = lambda entry: "answer", now=time.monotonic, port=0):
        self.act, self.now = act, now
        self.log: list[Entry] = []
        self.lock = threading.Lock()
        self.free = threading.Event()  # lets "hang" go on
        self.knows = {}
        for sample in read_align(file):
            text = sample.messages[-1].content.replace("<image>", "")
            pixels = picture(open_image(sample.images[0], sample.place))
            self.knows[pixels, text] = (sample.place, sample.teacher_caption + "\n" + sample.teacher_reasoning)
        self._server = _Quiet(("127.0.0.1", port), Handler)
        self._server.teacher = self
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> TeacherServer:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.free.set()
        self._server.shutdown()
        self._server.server_close()

    def look(self, body: dict) -> tuple[str, str]:
        """(prompt, answer), by the picture and the question alone."""
        (turn,) = [turn for turn in body["messages"] if turn["role"] == "user"]
        text = "".join(part["text"] for part in turn["content"] if part["type"] == "text")
        (url,) = [part["image_url"]["url"] for part in turn["content"] if part["type"] == "image_url"]
        head, data = url.split(",")
        assert head in ("data:image/png;base64", "data:image/jpeg;base64")
        return self.knows[picture(Image.open(io.BytesIO(base64.b64decode(data)))), text]

    @property
    def acts(self) -> list[str]:
        return [entry.act for entry in self.log]

    def asked(self) -> dict[str, int]:
        """How often each prompt was."""
        counts: dict[str, int] = {}
        for entry in self.log:
            counts[entry.prompt] = counts.get(entry.prompt, 0) + 1
        return counts


def completion(content, finish="stop", **more) -> dict:
    message = {"role": "assistant", "content": content, **more}
    choice = {"index": 0, "message": message, "finish_reason": finish}
    return {"id": "x", "object": "chat.completion", "choices": [choice], "usage": USAGE}


def wrong(text: str) -> str:
    return text[: text.index("<answer>")] + "<answer>999</answer>"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def do_POST(self) -> None:
        server: TeacherServer = self.server.teacher
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt, text = server.look(body)
        with server.lock:
            times = sum(entry.prompt == prompt for entry in server.log)
            entry = Entry(len(server.log), server.now(), prompt, times, body, dict(self.headers), self.path)
            entry.act = server.act(entry)
            server.log.append(entry)
        name, _, argument = entry.act.partition(":")
        try:
            if name.isdigit():
                self.refuse(int(name), argument)
            else:
                ACTS[name](self, text, argument)
            entry.replied = True
        except OSError:
            self.close_connection = True

    def send(self, body, status: int = 200, **headers) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)
        self.wfile.flush()

    def refuse(self, status: int, after: str) -> None:
        """429, 429:30 (Retry-After), 503:Wed, 21 Oct 2065 07:28:00 GMT, 401, ...; says the key, as some servers do."""
        said = f"not now; you sent {self.headers.get('Authorization')}"
        error = {"message": said, "code": after if after.isidentifier() else "overloaded"}
        more = {"Retry_After": after} if after and not after.isidentifier() else {}
        self.send({"error": error}, status, **more)

    def drop(self, text: str, _) -> None:
        """Nothing comes, and the connection ends."""
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)
        raise OSError

    def begin(self, text: str) -> None:
        """Half of a body."""
        data = json.dumps(completion(text)).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2])
        self.wfile.flush()

    def reset(self, text: str, _) -> None:
        """Half a body comes, then the connection is reset."""
        self.begin(text)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        raise OSError

    def cut(self, text: str, _) -> None:
        """Half a body comes, then the connection ends in order."""
        self.begin(text)
        self.drop(text, _)

    def hang(self, text: str, _) -> None:
        """Answers when the test lets it, or never."""
        self.server.teacher.free.wait(30)
        self.send(completion(text))


def drip(handler: Handler, text: str, _) -> None:
    """A byte now and then."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    while not handler.server.teacher.free.wait(0.02):
        handler.wfile.write(b" ")
        handler.wfile.flush()


def body(make: Callable[[str], object], status: int = 200) -> Callable[[Handler, str, str], None]:
    return lambda handler, text, _: handler.send(make(text), status)


def without(text: str, *path) -> dict:
    made = completion(text)
    inner = made
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    return made


ACTS: dict[str, Callable[[Handler, str, str], None]] = {
    "answer": body(completion),
    "wrong": body(lambda text: completion(wrong(text))),
    "says": lambda handler, text, said: handler.send(completion(said)),
    "slow": lambda handler, text, seconds: (time.sleep(float(seconds)), handler.send(completion(text))),
    "drop": Handler.drop,
    "reset": Handler.reset,
    "cut": Handler.cut,
    "hang": Handler.hang,
    "drip": drip,
    "length": body(lambda text: completion(text[: len(text) // 2], "length")),
    "filtered": body(lambda text: completion("", "content_filter")),
    "refusal": body(lambda text: completion(None, refusal="I can't help with that.")),
    "sorry": body(lambda text: completion("I'm sorry, but I can't help with that.")),
    "empty": body(lambda text: completion("")),
    "null": body(lambda text: completion(None)),
    "parts": body(lambda text: completion([{"type": "text", "text": text[:9]}, {"type": "text", "text": text[9:]}])),
    "picture": body(lambda text: completion([{"type": "image_url", "image_url": {"url": "x"}}])),
    "fenced": body(lambda text: completion(f"```xml\n{text}\n```")),
    "no usage": body(lambda text: without(text, "usage")),
    "odd usage": body(lambda text: {**completion(text), "usage": {"prompt_tokens": "50", "completion_tokens": -1}}),
    "no finish": body(lambda text: without(text, "choices", 0, "finish_reason")),
    # Bodies that are no chat completion.
    "not json": body(lambda text: b"<html>502 Bad Gateway</html>"),
    "half json": body(lambda text: json.dumps(completion(text)).encode()[:-40]),
    "nothing": body(lambda text: b""),
    "bytes": body(lambda text: b"\xff\xfe\x00"),
    "deep": body(lambda text: b"[" * 100_000),
    "a list": body(lambda text: [completion(text)]),
    "null body": body(lambda text: b"null"),
    "no choices": body(lambda text: without(text, "choices")),
    "choices empty": body(lambda text: {**completion(text), "choices": []}),
    "choices text": body(lambda text: {**completion(text), "choices": text}),
    "choice null": body(lambda text: {**completion(text), "choices": [None]}),
    "no message": body(lambda text: without(text, "choices", 0, "message")),
    "no content": body(lambda text: without(text, "choices", 0, "message", "content")),
    "content number": body(lambda text: completion(7)),
    "content object": body(lambda text: completion({"text": text})),
    "part number": body(lambda text: completion([{"type": "text", "text": 7}])),
    "finish list": body(lambda text: completion(text, ["stop"])),
    "error in 200": body(lambda text: {"error": {"message": "overloaded", "code": 529}}),
}
MALFORMED = [*ACTS][[*ACTS].index("not json") :]


def main(file: str, port: str) -> None:
    """Serves, and says at the end how often it was asked."""
    odd = ["429:1", "wrong", "reset", "fenced", "500", "length", "not json", "parts"]

    def act(entry: Entry) -> str:
        return odd[entry.number // 3 % len(odd)] if entry.number % 3 == 2 else "answer"

    with TeacherServer(Path(file), act, port=int(port)) as server:
        print(f"teacher.url={server.url}", flush=True)
        signal.sigwait({signal.SIGINT, signal.SIGTERM})
        print(f"{len(server.log)} requests, {len(server.asked())} prompts")


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    main(*sys.argv[1:])
