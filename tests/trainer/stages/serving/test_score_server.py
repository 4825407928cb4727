"""Scores by HTTP are the trainer's; requests share a pass, wait in a line of a certain length, and end."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch

from prism_fast.config import ModelConfig
from prism_fast.data.encode import lesson
from prism_fast.data.formats import read_align
from prism_fast.models.load import open_discriminator
from prism_fast.records import DataError, Rollout
from prism_fast.stages.serving import score_server
from prism_fast.stages.serving.score_server import ScoreServer
from prism_fast.steps.advantage import alignment_advantage
from prism_fast.steps.backprop import Backprop
from prism_fast.steps.discriminator_step import score_responses, student_parts
from tests.oracle import assert_same
from tests.trainer.stages.serving.serving import (
    ASKED,
    GOOD,
    OTHER,
    config,
    connected,
    head,
    post,
    raw,
    running,
)

TEXTS = [GOOD, "no tags", OTHER, GOOD.replace("7", "8")]
NUMBERS = (5, 2)  # of records


@pytest.fixture(scope="module")
def data(tiny_folder):
    return read_align([tiny_folder / "data" / "align.parquet"])


@pytest.fixture(scope="module")
def server(tiny_folder, tmp_path_factory):
    with running(tiny_folder, image_folder=str(tmp_path_factory.mktemp("images"))) as made:
        yield made


def as_record(server, sample, texts=TEXTS):
    """A sample of the demo as a client sends it, its images as files."""
    names = []
    for ref in sample.images:
        names.append(f"{len(os.listdir(server.config.image_folder))}.png")
        content = ref.data if ref.data is not None else ref.path.read_bytes()
        (server.config.image_folder / names[-1]).write_bytes(content)
    return {
        "prompt": [{"role": m.role, "content": m.content} for m in sample.messages],
        "images": [{"path": name} for name in names],
        "teacher_response": sample.teacher_caption + sample.teacher_reasoning,
        "responses": texts,
    }


def by_the_trainer(folder, settings, samples):
    """(scores, advantages) of TEXTS to each, as a step of alignment makes them."""
    module, chat = open_discriminator(ModelConfig(path=str(folder / "discriminator")))
    lessons = [lesson(s, chat, max_prompt_tokens=999, config=settings) for s in samples]
    texts, group = TEXTS * len(samples), torch.arange(len(samples)).repeat_interleave(len(TEXTS))
    ids = [chat.encode_response(text) for text in texts]
    rollout = Rollout([x.prompt for x in lessons], group, ids, [torch.zeros(len(i)) for i in ids], texts, group >= 0)
    parts = student_parts(rollout, chat, settings)
    scores = score_responses(Backprop(module.eval()), lessons, rollout, parts, settings, tokens_per_pack=512)
    return scores, alignment_advantage(scores, group, settings.advantage, settings)


def test_scores_and_advantages_are_the_trainers_bit_for_bit(tiny_folder, data, server):
    samples = [data[number] for number in NUMBERS]
    scores, advantages = by_the_trainer(tiny_folder, server.config, samples)
    status, reply, _ = post(server, {"records": [as_record(server, sample) for sample in samples]})
    assert status == 200 and reply["checkpoint"]["path"] == str((tiny_folder / "discriminator").resolve())
    found = reply["records"]
    for side in ("perception", "reasoning"):
        assert [found[i][side][1] for i in range(2)] == [None, None]
        mine = torch.tensor([x for each in found for x in each[side] if x is not None])
        assert torch.equal(mine, getattr(scores, side)[scores.format_valid]), side
    assert torch.equal(torch.tensor([each["teacher"] for each in found]).T[0], scores.teacher_perception)
    assert torch.equal(torch.tensor([x for each in found for x in each["advantage"]]), advantages)
    near = [torch.tensor([each["clamped"][0] for each in found])[:, side] for side in range(2)]
    assert torch.equal(near[0], scores.perception[[0, 4]]) and torch.equal(near[1], scores.reasoning[[0, 4]])
    # The reward: both sides less the teacher's, half each; an invalid response below what any valid one may have.
    margin = (scores.perception[:4] - scores.teacher_perception[0]) / 2
    margin = margin + (scores.reasoning[:4] - scores.teacher_reasoning[0]) / 2
    expected = torch.where(scores.format_valid[:4], margin, torch.tensor(-10 - 1.5))
    assert_same(torch.tensor(found[0]["reward"]), expected, 4, scale=12)


def test_scores_are_clamped_around_the_teachers(tiny_folder, data):
    with running(tiny_folder, score_clamp=0.01, image_folder=str(tiny_folder / "data")) as server:
        record = {"prompt": "?", "responses": TEXTS}
        taught = {**record, "teacher_response": data[0].teacher_caption + data[0].teacher_reasoning}
        free, held = post(server, {"records": [record, taught]})[1]["records"]
        assert max(abs(x) for pair in free["clamped"] if pair for x in pair) == pytest.approx(0.01)
        for pair in filter(None, held["clamped"]):
            assert pair == pytest.approx(held["teacher"], abs=0.010001)
        assert max(held["reward"]) <= 0.0101 and held["reward"][1] == pytest.approx(-0.01 - 1.5)


def test_requests_that_wait_together_are_one_pass(data, server, monkeypatch):
    """... and each has the scores that it has alone, as exactly as another order of the same sums is."""
    records = [as_record(server, data[number], [text]) for number in NUMBERS for text in TEXTS]
    alone = [post(server, {"records": [record]})[1]["records"][0] for record in records]
    passes, hold, held = held_passes(monkeypatch)
    found = {}
    threads = [ask(server, {"records": [records[0]]}, found, -1)]
    assert held.wait(30)  # the first is being worked out; the others come meanwhile
    threads += [ask(server, {"records": [record]}, found, i) for i, record in enumerate(records)]
    wait_until(lambda: len(server._line) == len(records))
    hold.set()
    [thread.join(60) for thread in threads]
    assert passes == [1, len(records)]
    terms = 4 * (160 + 320 + 512)  # layers, and the sums on the way through one
    for i, expected in enumerate(alone):
        status, reply, _ = found[i]
        for side in ("perception", "reasoning"):
            (mine,), (theirs,) = reply["records"][0][side], expected[side]
            assert status == 200 and (mine is None) == (theirs is None)
            if mine is not None:
                assert_same(torch.tensor([mine]), torch.tensor([theirs]), terms, scale=max(1.0, abs(theirs)))


def held_passes(monkeypatch):
    """(sizes of the passes, set to let them go on, set when the first is on its way)."""
    passes, hold, held, real = [], threading.Event(), threading.Event(), score_server.verdicts

    def slow(module, questions, settings):
        passes.append(len(questions))
        held.set()
        assert hold.wait(60)
        return real(module, questions, settings)

    monkeypatch.setattr(score_server, "verdicts", slow)
    return passes, hold, held


def ask(server, asked, found, name):
    thread = threading.Thread(target=lambda: found.__setitem__(name, post(server, asked)))
    thread.start()
    return thread


def wait_until(true, seconds=60):
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_full_line_says_when_to_come_again(tiny_folder, monkeypatch):
    passes, hold, held = held_passes(monkeypatch)
    with running(tiny_folder, max_waiting=2) as server:
        found = {}
        threads = [ask(server, ASKED, found, 0)]
        assert held.wait(30)
        threads += [ask(server, ASKED, found, i) for i in (1, 2)]
        wait_until(lambda: len(server._line) == 2)
        status, reply, headers = post(server, ASKED)
        assert status == 503 and int(headers["Retry-After"]) >= 1 and "max_waiting" in reply["error"]
        hold.set()
        [thread.join(60) for thread in threads]
        assert [found[i][0] for i in range(3)] == [200] * 3 and passes == [1, 2]


def test_too_many_connections_are_turned_away(tiny_folder):
    with running(tiny_folder, max_connections=3, read_seconds=60.0) as server:
        held = [connected(server) for _ in range(3)]
        wait_until(lambda: server.http._open == 3)
        status, reply = raw(server, b"")
        assert status == 503 and "max_connections" in reply["error"]
        held.pop().close()
        wait_until(lambda: server.http._open == 2)
        assert post(server, ASKED)[0] == 200
        [each.close() for each in held]
        storm = [connected(server) for _ in range(100)]
        [each.close() for each in storm]
        # Closed ones that are still to be accepted stand before it, and count until their end is read.
        wait_until(lambda: post(server, ASKED)[0] == 200)


def test_nothing_is_worked_out_for_a_client_that_is_gone(tiny_folder, monkeypatch):
    passes, hold, held = held_passes(monkeypatch)
    with running(tiny_folder) as server:
        found = {}
        thread = ask(server, ASKED, found, 0)
        assert held.wait(30)
        body = json.dumps(ASKED).encode()
        with connected(server) as gone:
            gone.sendall(head(Content_Length=len(body)) + body)
            wait_until(lambda: len(server._line) == 1)
            waiting = server._line._waiting[0]
        wait_until(lambda: waiting.given_up)
        hold.set()
        thread.join(60)
        assert found[0][0] == 200 and post(server, ASKED)[0] == 200
        assert passes == [1, 1]


def test_a_request_waits_so_long_and_no_longer(tiny_folder, monkeypatch):
    _, hold, _ = held_passes(monkeypatch)
    with running(tiny_folder, answer_seconds=0.5) as server:
        status, reply, headers = post(server, ASKED)
        assert status == 503 and headers["Retry-After"] and "answer_seconds" in reply["error"]
        hold.set()


def test_who_waits_when_it_stops_is_told_and_who_is_served_is_answered(tiny_folder, monkeypatch):
    _, hold, held = held_passes(monkeypatch)
    with running(tiny_folder) as server:
        found = {}
        threads = [ask(server, ASKED, found, 0)]
        assert held.wait(30)
        threads.append(ask(server, ASKED, found, 1))
        wait_until(lambda: len(server._line) == 1)
        server.stop()
        hold.set()
        [thread.join(60) for thread in threads]
        assert found[0][0] == 200 and found[1][0] == 503 and "stopping" in found[1][1]["error"]


@pytest.mark.parametrize("fault", [torch.OutOfMemoryError("no memory"), float("nan")])
def test_a_pass_that_fails_fails_alone(server, monkeypatch, capsys, fault):
    real = score_server.verdicts

    def broken(*given):
        if isinstance(fault, Exception):
            raise fault
        return [verdict._replace(reward=[fault]) for verdict in real(*given)]

    monkeypatch.setattr(score_server, "verdicts", broken)
    status, reply, _ = post(server, ASKED)
    assert status == 500 and list(reply) == ["error"]
    monkeypatch.undo()
    assert post(server, ASKED)[0] == 200
    capsys.readouterr()


def test_a_fault_of_the_servers_own_is_told_without_its_words(server, monkeypatch, capsys):
    monkeypatch.setattr(score_server, "read_request", lambda body, settings: {}["secret"])
    status, reply, _ = post(server, ASKED)
    monkeypatch.undo()
    assert status == 500 and "secret" not in reply["error"]
    wait_until(lambda: "KeyError: 'secret'" in capsys.readouterr().err)
    assert post(server, ASKED)[0] == 200


def test_addresses_that_are_refused_before_a_model_is_opened(tiny_folder, monkeypatch):
    monkeypatch.setattr(score_server, "open_discriminator", lambda given: pytest.fail("opened"))
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(DataError, match="another process listens there"):
            ScoreServer(config(tiny_folder, port=other.getsockname()[1]))
    for host in ("0.0.0.0", "::", "192.168.0.1"):
        with pytest.raises(DataError, match="expose=true"):
            ScoreServer(config(tiny_folder, host=host))
    with pytest.raises(DataError, match="take another port, or host"):
        ScoreServer(config(tiny_folder, host="203.0.113.1", expose=True))
    with pytest.raises(DataError, match="reads right answers"):
        ScoreServer(config(tiny_folder, advantage={"rule": "gated"}))


@pytest.mark.slow
def test_the_command_serves_until_sigterm(tiny_folder):
    command = [sys.executable, "-m", "prism_fast", "serve-discriminator", "port=0", "host=0.0.0.0", "expose=true"]
    given = f"discriminator.path={tiny_folder / 'discriminator'}"
    started = subprocess.Popen([*command, given], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        lines = [started.stdout.readline(), started.stdout.readline()]
        port = int(lines[1].partition("://0.0.0.0:")[2].partition(":")[0])
        with socket.create_connection(("127.0.0.1", port), timeout=60) as idle:  # keeps nothing up
            idle.sendall(b"GET /health HTTP/1.1\r\n\r\n")
            assert b'"status": "ok"' in b"".join(iter(lambda: idle.recv(4096), b""))
            started.send_signal(signal.SIGTERM)
            out, err = started.communicate(timeout=60)
    finally:
        started.kill()
    assert started.returncode == 0 and out == "stopped: 0 requests were answered\n"
    assert err.startswith("WARNING: 0.0.0.0 is open to other machines")
