"""A score server in a thread, and a client that can misbehave."""

import contextlib
import http.client
import json
import socket
import threading

from prism_fast.config import ServeConfig, load_config
from prism_fast.stages.serving.score_server import ScoreServer

GOOD = "<caption>3, 4</caption><think>3 + 4 = 7</think><answer>7</answer>"
OTHER = "<caption>one digit</caption><think>so</think><answer>1</answer>"
ASKED = {"records": [{"prompt": "What is the sum?", "responses": [GOOD]}]}


def config(folder, **changes):
    base = {"discriminator": {"path": str(folder / "discriminator")}, "port": 0, "tokens_per_pack": 512}
    return load_config(ServeConfig, None, base={**base, **changes})


@contextlib.contextmanager
def running(folder, **changes):
    server = ScoreServer(config(folder, **changes))
    server.listen()
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield server
    finally:
        server.stop()
        thread.join(30)
        assert not thread.is_alive()


def post(server, asked, **headers):
    """(status, reply, headers) of a request by the standard library's client; ``asked``: JSON, or bytes as they are."""
    body = asked if isinstance(asked, bytes) else json.dumps(asked).encode()
    client = http.client.HTTPConnection("127.0.0.1", server.http.server_port, timeout=60)
    with contextlib.closing(client):
        client.request("POST", "/score", body, {"Content-Type": "application/json", **headers})
        response = client.getresponse()
        return response.status, json.loads(response.read()), response.headers


def connected(server):
    return socket.create_connection(("127.0.0.1", server.http.server_port), timeout=60)


def raw(server, sent):
    """(status, reply) of these bytes, and all that comes back until the server closes."""
    with connected(server) as connection:
        connection.sendall(sent)
        return answer(connection)


def answer(connection):
    found = b""
    while read := connection.recv(65_536):
        found += read
    head, _, body = found.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


def head(**headers):
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    return f"POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{lines}\r\n".encode()
