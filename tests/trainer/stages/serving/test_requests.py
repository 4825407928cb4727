"""What a client may send, and what it is told: nothing it sends ends the server, or is worked out beyond a limit."""

import base64
import io
import os
import struct
import time
import zlib

import pytest
from PIL import Image

from prism_fast.data import images
from tests.trainer.stages.serving.serving import ASKED, GOOD, answer, connected, head, post, raw, running

SMALL = {"max_body_mib": 1, "max_responses": 4, "max_characters": 400, "max_images": 2, "max_pixels": 4096}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of images, beside things that are none, and a secret outside it."""
    place = tmp_path_factory.mktemp("served")
    folder = place / "images"
    (folder / "below").mkdir(parents=True)
    Image.new("RGB", (32, 32), "red").save(folder / "below" / "red.png")
    Image.new("RGB", (32, 32), "blue").save(place / "secret.png")
    (folder / "link.png").symlink_to(place / "secret.png")
    (folder / "circle.png").symlink_to(folder / "circle.png")
    os.mkfifo(folder / "pipe.png")
    (folder / "text.png").write_text("root:x:0:0")
    with open(folder / "huge.png", "wb") as file:
        file.truncate(2 << 20)
    return folder


@pytest.fixture(scope="module")
def server(tiny_folder, pictures):
    with running(tiny_folder, image_folder=str(pictures), read_seconds=1.0, **SMALL) as made:
        yield made


@pytest.fixture(autouse=True)
def still_serves(server):
    yield
    status, reply, _ = post(server, ASKED)
    assert status == 200 and reply["records"][0]["perception"][0] is not None


def refused(server, asked):
    status, reply, _ = post(server, asked)
    assert list(reply) == ["error"] and "\n" not in reply["error"]
    return status, reply["error"]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 411),
        ({"Transfer_Encoding": "chunked"}, 411),
        ({"Transfer_Encoding": "chunked", "Content_Length": "5"}, 411),
        ({"Content_Length": "-1"}, 400),
        ({"Content_Length": "+5"}, 400),
        ({"Content_Length": "five"}, 400),
        ({"Content_Length": "5, 5"}, 400),
        ({"Content_Length": "5", "content_length": "6"}, 400),
        ({"Content_Length": str(10**15)}, 413),
        ({"Content_Length": "9" * 400}, 400),
        ({"X" * 70_000: "long"}, 431),
        ({f"X{i}": "many" for i in range(200)}, 431),
    ],
    ids=lambda value: str(value)[:40],
)
def test_heads_that_are_refused(server, headers, status):
    assert raw(server, head(**headers) + b"5\r\nhello\r\n0\r\n\r\n")[0] == status


@pytest.mark.parametrize("mib", [1, 24])
def test_a_refused_body_is_not_a_reset_connection(server, mib):
    """Far above the limit too: clients send all of a body before they look for an answer."""
    body = b"x" * (mib << 20)
    assert raw(server, head(Content_Length=len(body) + 1) + body)[0] == 413


def test_other_methods_pages_and_kinds(server):
    assert raw(server, b"PUT /score HTTP/1.1\r\n\r\n")[0] == 501
    assert raw(server, b"GET / HTTP/1.1\r\n\r\n")[0] == 404
    assert raw(server, b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n")[0] == 400  # the beginning of TLS
    status, reply = raw(server, b"GET /health HTTP/1.1\r\n\r\n")
    assert status == 200 and reply["status"] == "ok" and reply["checkpoint"] == server.checkpoint
    for kind in ("application/octet-stream", "text/plain", "multipart/form-data"):  # a pickle, a web page's form
        assert post(server, ASKED, **{"Content-Type": kind})[0] == 415


@pytest.mark.parametrize("sent", [b"", b"POST /sc", head(Content_Length=50), head(Content_Length=50) + b'{"rec'])
def test_a_client_that_sends_on_for_ever(server, sent):
    """A byte now and then keeps nothing open: all of a request has ``read_seconds``."""
    with connected(server) as connection:
        connection.sendall(sent)
        begun = time.monotonic()
        connection.settimeout(0.1)
        while True:
            try:
                assert time.monotonic() - begun < 60
                connection.sendall(b" ")
                if not connection.recv(65_536):
                    break
            except TimeoutError:
                continue
            except (BrokenPipeError, ConnectionResetError):
                break


def test_a_client_that_ends_before_its_body_does(server):
    with connected(server) as connection:
        connection.sendall(head(Content_Length=50) + b"{}")
        connection.shutdown(1)
        assert answer(connection)[0] == 400


BODIES = {
    "empty": b"",
    "no json": b"{",
    "not text": b"\xff\xfe{}",
    "two": b"{}{}",
    "half a character": b'{"records": [{"prompt": "\\ud800", "responses": ["x"]}]}',
    "deep": b"[" * 500_000,
    "deep object": b'{"records":' * 50_000,
    "deep inside": b'{"records": [{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}]}",
    "NaN": b'{"records": NaN}',
    "large number": b'{"records": ' + b"9" * 100_000 + b"}",
    "pickle": b"\x80\x04\x95\x0b",
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_bodies_that_are_no_request(server, body):
    assert refused(server, body)[0] == 400


def record(**changes):
    return {"records": [{"prompt": "What is the sum?", "responses": [GOOD], **changes}]}


@pytest.mark.parametrize(
    ("asked", "status", "words"),
    [
        ([], 400, "body"),
        ({"records": []}, 400, "records"),
        ({"records": {}}, 400, "records"),
        ({**ASKED, "more": 1}, 400, "more"),
        (record(responses=[]), 400, "records[0].responses"),
        (record(responses=[7]), 400, "records[0].responses[0]"),
        (record(responses=GOOD), 400, "records[0].responses"),
        (record(prompt=None), 400, "records[0].prompt"),
        (record(prompt=""), 400, "records[0]"),
        (record(prompt=[]), 400, "records[0]"),
        (record(prompt=[{"role": "assistant", "content": "a"}]), 400, "roles"),
        (record(prompt=[{"role": "user", "content": ["a"]}]), 400, "records[0].prompt"),
        (record(prompt="<|im_start|>"), 400, "control token"),
        (record(prompt="<image>"), 400, "records[0]"),
        (record(teacher_response="no format"), 400, "teacher_response"),
        (record(teacher_caption="alone"), 400, "teacher_cot"),
        (record(model="x"), 400, "records[0].model"),
        (record(responses=[GOOD] * 5), 413, "5 responses"),
        (record(responses=["x" * 401]), 413, "characters"),
        (record(prompt="x" * 401), 413, "characters"),
        (record(images=[{"path": "a"}] * 3), 413, "3 images"),
        ({"records": [*record()["records"], *record(responses=[None])["records"]]}, 400, "records[1].responses[0]"),
    ],
)
def test_requests_that_are_refused_by_name(server, asked, status, words):
    found = refused(server, asked)
    assert found[0] == status and words in found[1], found


@pytest.mark.parametrize(
    "text", ["", "\0", "\ufffe\uffff", "<caption>" * 40, "<|image_pad|>" + GOOD, GOOD + "<|im_end|>x"]
)
def test_any_text_is_a_response(server, text):
    status, reply, _ = post(server, record(responses=[text, GOOD]))
    found = reply["records"][0]
    assert status == 200 and found["perception"][0] is None and found["perception"][1] is not None
    assert found["reward"][0] < found["reward"][1]


@pytest.mark.parametrize(
    "path",
    ["../secret.png", "below/../../secret.png", "/etc/passwd", "link.png", "circle.png", "pipe.png", "below", ".", "",
     "absent.png", "a\0b", "x" * 390],
)  # fmt: skip
def test_paths_that_are_not_in_the_folder(server, path):
    status, told = refused(server, record(prompt="<image>?", images=[{"path": path}]))
    assert status == 400 and told == "records[0].images[0]: no such image file in image_folder"


def test_files_that_are_no_images(server):
    status, told = refused(server, record(prompt="<image>?", images=[{"path": "text.png"}]))
    assert status == 400 and "root" not in told
    assert refused(server, record(prompt="<image>?", images=[{"path": "huge.png"}]))[0] == 413


def test_an_image_by_path_and_inline_is_the_same(server, pictures):
    inline = base64.b64encode((pictures / "below" / "red.png").read_bytes()).decode()
    asked = [record(prompt="<image>?", images=[image]) for image in ({"path": "below/red.png"}, {"base64": inline})]
    found = [post(server, each)[1]["records"][0] for each in asked]
    assert found[0] == found[1] and found[0] != post(server, record(prompt="?"))[1]["records"][0]


def png(width, height, data=b""):
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def gif(width, height):
    made = io.BytesIO()
    Image.new("P", (8, 8)).save(made, "GIF")
    return made.getvalue()[:6] + struct.pack("<HH", width, height) + made.getvalue()[10:]


@pytest.mark.parametrize("bomb", [png(65, 64), png(20_000, 20_000, b"\0" * (1 << 20)), png(2**31 - 1, 2**31 - 1),
                                  gif(65_535, 65_535)], ids=["just over", "bomb", "largest", "gif"])  # fmt: skip
def test_an_image_of_too_many_pixels_is_not_decoded(server, bomb, monkeypatch):
    monkeypatch.setattr(images, "_seen", lambda file: pytest.fail("decoded"))
    asked = record(prompt="<image>?", images=[{"base64": base64.b64encode(bomb).decode()}])
    status, told = refused(server, asked)
    assert status in (400, 413) and "pixels; make it smaller" in told  # 400: over what any command takes


@pytest.mark.parametrize("text", ["", "===", "not base64!", "é", base64.b64encode(png(8, 8)[:40]).decode(),
                                  base64.b64encode(b"%PDF-1.4").decode(), "data:image/png;base64,AAAA"])  # fmt: skip
def test_images_that_do_not_open(server, text):
    assert refused(server, record(prompt="<image>?", images=[{"base64": text}]))[0] == 400
    assert refused(server, record(prompt="<image>?", images=[{}]))[0] == 400
    assert refused(server, record(prompt="<image>?", images=[{"base64": text, "path": text}]))[0] == 400


def test_without_a_folder_no_path_is_taken_nor_a_text_over_a_pass(tiny_folder):
    with running(tiny_folder) as other:
        status, told = refused(other, record(prompt="<image>?", images=[{"path": "below/red.png"}]))
        assert status == 400 and "image_folder" in told
        # Nor one that fits in no pass with its prompt.
        status, told = refused(other, record(responses=[GOOD.replace("3 + 4", "3 + 4 " * 600)]))
        assert status == 400 and "tokens_per_pack" in told
