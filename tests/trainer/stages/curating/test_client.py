"""The client against a server of its own: what is tried again, how long it waits, and what it never says."""

import asyncio
import logging

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_fast.config import TeacherConfig
from prism_fast.data.formats import read_rlvr
from prism_fast.demo.digits import DemoSizes, write_demo_data
from prism_fast.records import DataError
from prism_fast.stages.curating.answer import Answer, Tokens
from prism_fast.stages.curating.client import Failed, Teacher, retry_after
from prism_fast.stages.curating.pace import Halt, Halted, Pace
from prism_fast.stages.curating.request import body_of
from tests.trainer.stages.curating.teacher_server import MALFORMED, USAGE, TeacherServer

KEY = "sk-very-secret"
MOST = Tokens(100, 200)


class FakeClock:
    """Time passes where somebody sleeps, and nowhere else."""

    def __init__(self):
        self.time, self.sleeps = 0.0, []

    def now(self):
        return self.time

    async def sleep(self, seconds):
        self.sleeps.append(seconds)
        self.time += seconds
        await asyncio.sleep(0)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write_demo_data(tmp_path_factory.mktemp("data"), 0, DemoSizes(sft=1, align=6, rlvr=1, eval=1)).align


class Asked:
    """What came of one question, or several after another, to a server that acts by a script."""

    def __init__(self, file, *script, questions=1, **settings):
        self.clock, self.lost, self.found = FakeClock(), 0, []
        acts = iter(script)
        with TeacherServer(file, lambda entry: next(acts, "answer"), self.clock.now) as self.server:
            settings = {"url": self.server.url, "model": "digits", "key_variable": "K", "concurrency": 4, **settings}
            self.config = TeacherConfig(**settings)
            asyncio.run(self._ask(file, questions))

    async def _ask(self, file, questions):
        data = read_rlvr(file)
        self.halt = Halt(self.clock)
        pace = Pace(self.config, self.clock, self.halt)
        async with Teacher(self.config, KEY, pace, self.halt, 0) as self.teacher:

            async def one(index):
                try:
                    return await self.teacher.ask(body_of(data[index], self.config), MOST, self.lose)
                except (Failed, DataError, Halted) as error:
                    return error

            self.found = [await one(index) for index in range(questions)]

    def lose(self):
        self.lost += 1

    @property
    def times(self):
        return [entry.time for entry in self.server.log]


def test_it_asks_as_the_api_has_it_and_reads_the_answer(file):
    asked = Asked(file, "answer", body={"reasoning_effort": "low"}, limit_name="max_completion_tokens")
    (answer,) = asked.found
    (entry,) = asked.server.log
    assert answer.text.startswith("<caption>") and answer.finish == "stop"
    assert answer.usage == (USAGE["prompt_tokens"], USAGE["completion_tokens"])
    assert entry.path == "/v1/chat/completions" and entry.headers["Authorization"] == f"Bearer {KEY}"
    assert entry.body["model"] == "digits" and entry.body["max_completion_tokens"] == 8192
    assert entry.body["temperature"] == 1.0 and entry.body["reasoning_effort"] == "low"
    assert [turn["role"] for turn in entry.body["messages"]] == ["system", "user"]
    assert "Use XML." not in str(entry.body["messages"])  # the record's own system prompt is for the student


def test_without_a_key_none_is_sent(file):
    with TeacherServer(file) as server:
        config = TeacherConfig(url=server.url, model="digits")

        async def ask():
            clock = FakeClock()
            async with Teacher(config, None, Pace(config, clock, Halt(clock)), Halt(clock), 0) as teacher:
                return await teacher.ask(body_of(read_rlvr(file)[0], config), MOST, lambda: None)

        assert isinstance(asyncio.run(ask()), Answer)
    assert "Authorization" not in server.log[0].headers


@pytest.mark.parametrize("act", ["429", "500", "502", "503", "529", "408", "drop", "reset", "cut", *MALFORMED])
def test_what_may_pass_is_tried_again(file, act):
    asked = Asked(file, act, act, "answer")
    assert isinstance(asked.found[0], Answer) and asked.server.acts == [act, act, "answer"]
    assert asked.lost == (0 if act.isdigit() else 2)  # an answer that broke off may have been paid
    assert sum(asked.teacher.troubles.values()) == 2


def test_waits_double_with_jitter_and_end(file):
    asked = Asked(file, *["500"] * 9, retries=5, backoff_seconds=2, longest_wait_seconds=20)
    assert len(asked.server.log) == 6 and isinstance(asked.found[0], Failed)
    waits = [after - before for before, after in zip(asked.times, asked.times[1:])]
    for wait, longest in zip(waits, [2, 4, 8, 16, 20]):
        assert longest / 2 <= wait <= longest
    assert len({wait / longest for wait, longest in zip(waits, [2, 4, 8, 16, 20])}) == 5
    assert "status 500" in str(asked.found[0])


def test_a_server_that_asks_for_a_wait_gets_it_from_all(file):
    asked = Asked(file, "429:30", questions=3, backoff_seconds=1)
    assert asked.times == [0, 30, 30, 30]
    asked = Asked(file, "503:40", questions=2, retries=0)  # the one that was refused does not come again: another does
    assert asked.times == [0, 40] and isinstance(asked.found[0], Failed) and isinstance(asked.found[1], Answer)


def test_a_wait_longer_than_is_allowed_ends_the_command(file):
    asked = Asked(file, "429:7200", questions=1, longest_wait_seconds=600)
    assert isinstance(asked.found[0], DataError) and "7200" in str(asked.found[0]) and len(asked.server.log) == 1


def test_retry_after_is_a_number_or_a_date():
    now = 1_445_412_420.0  # Wed, 21 Oct 2015 07:27:00 GMT
    assert retry_after("120", now) == 120 and retry_after("0.5", now) == 0.5
    assert retry_after("Wed, 21 Oct 2015 07:28:00 GMT", now) == 60
    for nothing in ("", "soon", "-5", "nan", "Wed, 21 Oct 2015 07:26:00 GMT", "Wed, 99 Oct 2015", "١٢x"):
        assert retry_after(nothing, now) == 0, nothing
    assert retry_after("inf", now) == 1e9


@pytest.mark.parametrize("status", ["400", "413", "422"])
def test_what_is_wrong_with_one_prompt_is_not_tried_again(file, status):
    asked = Asked(file, status, "answer", questions=2)
    assert isinstance(asked.found[0], Failed) and isinstance(asked.found[1], Answer)
    assert asked.server.acts == [status, "answer"] and asked.lost == 0


@pytest.mark.parametrize("status", ["401", "403", "404", "402", "307", "429:insufficient_quota"])
def test_what_no_prompt_will_change_ends_the_command_without_the_key(file, status, caplog, capsys):
    caplog.set_level(logging.DEBUG)
    asked = Asked(file, status)
    said = str(asked.found[0])
    assert isinstance(asked.found[0], DataError) and f"status {status[:3]}" in said and len(asked.server.log) == 1
    assert "[key]" in said and "\n" not in said
    assert KEY not in said + caplog.text + "".join(capsys.readouterr())


@pytest.mark.parametrize("act", ["hang", "drip"])
def test_an_answer_that_does_not_come_is_given_up_and_asked_for_again(file, act):
    asked = Asked(file, act, "answer", timeout_seconds=0.5)
    assert asked.server.acts == [act, "answer"] and isinstance(asked.found[0], Answer) and asked.lost == 1
    assert asked.teacher.troubles == {"timeout": 1}


def test_a_server_that_is_not_there_costs_nothing(file):
    with TeacherServer(file) as gone:
        pass
    asked = Asked(file, url=gone.url, retries=2)
    assert isinstance(asked.found[0], Failed) and asked.lost == 0 and len(asked.clock.sleeps) == 2


def test_requests_keep_their_rate(file):
    assert Asked(file, questions=6, requests_per_minute=30).times == [0, 2, 4, 6, 8, 10]


def test_many_who_come_together_keep_the_rate():
    async def turns():
        clock, began = FakeClock(), []
        pace = Pace(TeacherConfig(url="http://x", model="m", requests_per_minute=30), clock, Halt(clock))

        async def one():
            await pace.turn(MOST)
            began.append(clock.now())

        await asyncio.gather(*(one() for _ in range(50)))
        return began

    assert asyncio.run(turns()) == [2.0 * i for i in range(50)]


def test_tokens_keep_their_rate_and_what_is_not_used_is_free_again(file):
    """Until an answer is there a request counts the most that it may have, 300 tokens; then its 70."""
    asked = Asked(file, questions=4, tokens_per_minute=600)
    assert asked.times == pytest.approx([0, 7, 14, 21])
    silent = Asked(file, *["no usage"] * 4, questions=4, tokens_per_minute=600)
    assert silent.times == pytest.approx([0, 30, 60, 90])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 5000), st.integers(0, 90)), min_size=2, max_size=12))
def test_no_span_of_time_has_more_than_the_rates_allow(requests):
    """(tokens, seconds until the next comes): what began before t and is not yet worked off is one request at most."""

    async def turns():
        clock, began = FakeClock(), []
        config = TeacherConfig(url="http://x", model="m", requests_per_minute=20, tokens_per_minute=3000)
        pace = Pace(config, clock, Halt(clock))
        for tokens, pause in requests:
            await pace.turn(Tokens(tokens, 0))
            began.append(clock.now())
            clock.time += pause
        return began

    began = asyncio.run(turns())
    for i in range(len(began)):
        for j in range(i + 1, len(began)):
            span = began[j] - began[i] + 1e-6
            assert sum(tokens for tokens, _ in requests[i:j]) <= 3000 * span / 60 and j - i <= 20 * span / 60


def test_a_retry_keeps_the_rate_too(file):
    asked = Asked(file, "500", "answer", "answer", questions=2, requests_per_minute=1, backoff_seconds=1)
    assert asked.times == [0, 60, 120]


def test_who_waits_wakes_when_the_command_ends(file):
    async def wait():
        clock = FakeClock()
        halt = Halt(clock)
        clock.sleep = lambda seconds: asyncio.sleep(3600)
        asyncio.get_running_loop().call_soon(halt.now, "enough")
        with pytest.raises(Halted):
            await halt.sleep(3600)
        with pytest.raises(Halted):
            await Pace(TeacherConfig(url="http://x", model="m"), clock, halt).turn(MOST)

    asyncio.run(wait())
