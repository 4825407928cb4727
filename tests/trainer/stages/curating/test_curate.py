"""`data curate` from the digits' hard prompts to what the stages train on, with a teacher behind HTTP."""

import asyncio
import contextlib
import json
import math
import os
import signal
import sys
import time
from dataclasses import replace

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from prism_fast import cli
from prism_fast.config import CurateConfig, load_config
from prism_fast.data.check import Reading, check
from prism_fast.data.formats import read_align, read_rlvr, read_warmup, write_rlvr
from prism_fast.records import DataError
from prism_fast.reward import verifiable_reward
from prism_fast.run.signals import Stopped
from prism_fast.stages.curate import curate
from prism_fast.stages.curating.plan import plan
from prism_fast.stages.curating.purse import cost
from prism_fast.stages.curating.request import most
from tests.tiny_run import PROCESSES, prepare, run_stage, settings
from tests.trainer.stages.curating.teacher_server import USAGE, TeacherServer
from tests.trainer.stages.curating.test_client import FakeClock

HARD, EASY = 0.0, 0.9


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny run's data and models; rlvr.parquet has the alignment file's prompts, of which every third is easy."""
    made = prepare(tmp_path_factory.mktemp("curate"))
    samples = [replace(s, pass_rate=EASY if i % 3 == 2 else HARD) for i, s in enumerate(align(made))]
    write_rlvr(made / "data" / "rates.parquet", samples)
    return made


def align(folder):
    return [*read_align(folder / "data" / "align.parquet")]


def tree_of(folder, server, out, **teacher):
    given = {"url": server.url, "model": "digits", "concurrency": 1, "input_price": 1.0, "output_price": 10.0}
    return {
        "teacher": {**given, **teacher},
        "data": {"files": [str(folder / "data" / "rates.parquet")]},
        "out": str(out),
    }


def run(tree, **more):
    return curate(load_config(CurateConfig, None, base=tree), say=lambda _: None, clock=FakeClock(), **more)


def serve(folder, act=lambda entry: "answer"):
    return TeacherServer(folder / "data" / "align.parquet", act)


def check_sums(report):
    assert report["records"] == sum(report["prompts"].values())
    assert report["requests"]["answered"] == sum(report["answers"].values())


def trained(out):
    """Steps of a run whose loss was a number."""
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [line["step"] for line in lines if any("loss" in key and math.isfinite(line[key]) for key in line)]


def test_right_answers_to_hard_prompts_become_files_that_stages_train_on(folder, tmp_path):
    said = iter(["fenced", "wrong", "length", "answer"])
    with serve(folder, lambda entry: next(said, "answer")) as server:
        report = run({**tree_of(folder, server, tmp_path / "out"), "samples": 2})
    assert report["complete"] and report["prompts"] == {
        **{"easy": 4, "kept": 7, "none_right": 1},
        **dict.fromkeys(("repeated", "failed", "not_asked", "bad"), 0),
    }
    assert report["answers"] == {"right": 7, "wrong answer": 1, "cut at the limit of tokens": 1}
    assert report["mended"] == {"fence": 1} and report["written"] == {"sft.json": 7, "alignment.parquet": 7}
    check_sums(report)
    assert report["tokens"]["counted"] == {
        "input": 9 * USAGE["prompt_tokens"],
        "output": 9 * USAGE["completion_tokens"],
    }
    assert report["cost"] == {"counted": pytest.approx(9 * (50 * 1 + 20 * 10) / 1e6), "assumed": 0}
    assert report == json.loads((tmp_path / "out" / "report.json").read_text())

    hard = [sample for i, sample in enumerate(align(folder)) if i % 3 != 2]
    lessons = read_align(tmp_path / "out" / "alignment.parquet")
    assert [s.messages for s in lessons] == [s.messages for s in hard[:1] + hard[2:]]
    assert all(verifiable_reward(s.teacher_caption + s.teacher_reasoning, s.gold).accuracy for s in lessons)
    assert [s.images for s in lessons] == [s.images for s in hard[:1] + hard[2:]] and lessons[0].pass_rate == HARD
    for name, kind in (("sft.json", "sft"), ("alignment.parquet", "alignment")):
        found = check(tmp_path / "out" / name, Console(quiet=True), reading=Reading(processes=0))
        assert (found.kind, found.bad) == (kind, 0)
    tree = settings(folder, "sft", tmp_path / "sft", data={"files": [str(tmp_path / "out" / "sft.json")]}, steps=2)
    run_stage("sft", tree)
    assert trained(tmp_path / "sft") == [1, 2]


def test_a_policy_says_what_is_hard_and_its_answers_are_the_students(folder, tmp_path):
    """Untrained, it is never right, and never in form: students are put in its place to be warmed up with."""
    rates = {"model": {"path": str(folder / "base")}, "samples": 2, "max_response_tokens": 4}
    with serve(folder) as server:
        tree = {**tree_of(folder, server, tmp_path / "out"), "rates": rates, "limit": 4}
        config = load_config(CurateConfig, None, base=tree)
        assert next(plan(config)).startswith("4 prompts at most")
        assert run(tree)["written"] == {"sft.json": 4, "alignment.parquet": 4}
        told = [*plan(config)]
        assert told[0] == "4 hard prompts of 4 records" and told[2].startswith("0 requests at most")
        partial = tmp_path / "out" / "rollouts.jsonl.partial"
        begun, block = map(json.loads, partial.read_text().splitlines())
        student = "<caption>digits</caption><think>so</think><answer>999</answer>"
        block["records"] = [[index, [student, "x"], lengths] for index, _, lengths in block["records"]]
        gold = read_rlvr(folder / "data" / "rates.parquet")[1].gold
        block["records"][1][1][1] = student.replace("999", gold)
        partial.write_text("".join(json.dumps(line) + "\n" for line in (begun, block)))
        assert next(plan(config)) == "3 hard prompts of 4 records"
        report = run(tree)
        assert len(server.log) == 4  # nothing again
    assert report["prompts"]["easy"] == 1 and report["written"]["warmup.jsonl"] == 3
    pairs = read_warmup(tmp_path / "out" / "warmup.jsonl")
    assert pairs[0].student_caption == "<caption>digits</caption>" and "999" not in pairs[0].teacher_reasoning
    data = {"files": [str(tmp_path / "out" / "warmup.jsonl")]}
    run_stage(
        "warmup", settings(folder, "warmup", tmp_path / "warmup", data=data, steps=2, batch_size=2, eval_fraction=0.4)
    )
    assert trained(tmp_path / "warmup") == [1, 2]


def test_counts_add_up_whatever_the_teacher_says(folder, tmp_path):
    said = ["filtered", "refusal", "sorry", "empty", "null", "says:<caption>3</caption>", "no usage", "odd usage"]
    said += ["parts", "picture", "no finish", "wrong", "says:", "400", "not json", "drop"]
    with serve(folder, lambda entry: said[entry.number % len(said)]) as server:
        report = run({**tree_of(folder, server, tmp_path / "out"), "samples": 3, "right": 2})
    check_sums(report)
    for act, reason in {"filtered": "refused", "sorry": "format: no caption element", "null": "empty"}.items():
        assert act in server.acts and report["answers"][reason] >= 1
    usages = sum(act in ("no usage", "odd usage") for act in server.acts)
    lost = sum(act in ("not json", "drop") for act in server.acts)
    assert report["requests"]["lost"] == lost
    assert report["tokens"]["counted"]["output"] == 20 * (report["requests"]["answered"] - usages)
    assert report["tokens"]["assumed"]["output"] == 8192 * (usages + lost)


def test_equal_prompts_are_asked_once(folder, tmp_path):
    twice = [*read_rlvr(folder / "data" / "rates.parquet")][:2] * 2
    write_rlvr(tmp_path / "twice.parquet", twice)
    with serve(folder) as server:
        tree = {**tree_of(folder, server, tmp_path / "out"), "data": {"files": [str(tmp_path / "twice.parquet")]}}
        assert [*plan(load_config(CurateConfig, None, base=tree))][1].startswith("8 requests at most")
        report = run(tree)
    assert report["prompts"]["repeated"] == 2 and report["prompts"]["kept"] == len(server.log) == 2


def test_a_budget_ends_it_before_it_is_broken_and_more_money_goes_on(folder, tmp_path):
    with serve(folder) as server:
        tree = tree_of(folder, server, tmp_path / "out", max_response_tokens=1000, image_tokens=100)
        config = load_config(CurateConfig, None, base=tree)
        first = next(plan(config)), [*plan(config)][2]
        assert first[0] == "8 hard prompts of 12 records" and first[1].startswith("cost at most ")
        tree["teacher"] |= {"budget": 0.0116, "concurrency": 4}  # an answer of 1,000 tokens is 0.01, one of 20 0.00025
        report = run(tree)
        asked = len(server.log)
        assert report["stopped"] == "the budget is used up" and not report["complete"]
        assert 0 < asked < 8 and report["cost"]["counted"] == pytest.approx(0.00025 * asked)
        dear = [cost(most(s, config.teacher), config.teacher) for i, s in enumerate(align(folder)) if i % 3 != 2]
        assert 0.00025 * (asked - 1) + min(dear) <= 0.0116 < 0.00025 * asked + max(dear)  # no other would have fitted
        assert report["prompts"]["not_asked"] == 8 - asked and report["prompts"]["kept"] == asked
        check_sums(report)
        tree["teacher"]["budget"] = 1.0
        report = run(tree)
        assert report["complete"] and len(server.log) == 8 and max(server.asked().values()) == 1
        assert report["written"]["sft.json"] == 8
        check_sums(report)
        tree = tree_of(folder, server, tmp_path / "poor", budget=1e-6)
        with pytest.raises(DataError, match=r"report.json: no answer was kept \(the budget is used up\)"):
            run(tree)


def test_requests_that_are_lost_count_against_the_budget(folder, tmp_path):
    with serve(folder, lambda entry: "reset" if entry.number > 1 else "answer") as server:
        tree = tree_of(folder, server, tmp_path / "out", max_response_tokens=1000, image_tokens=100, budget=0.05)
        report = run(tree)
    assert report["stopped"] == "the budget is used up" and report["requests"]["lost"] == len(server.log) - 2
    assert report["cost"]["counted"] + report["cost"]["assumed"] <= 0.05


def test_a_teacher_that_fails_again_and_again_ends_it_and_it_goes_on(folder, tmp_path):
    with serve(folder, lambda entry: "answer" if entry.number < 2 else "500") as server:
        tree = tree_of(folder, server, tmp_path / "out", retries=1, failures_in_a_row=3)
        with pytest.raises(DataError, match=r"3 prompts in a row failed .* the last by status 500"):
            run(tree)
        assert len(server.log) == 2 + 3 * 2
        server.act = lambda entry: "answer"
        assert run(tree)["prompts"]["kept"] == 8
        assert sum(act == "answer" for act in server.acts) == 8


def test_one_prompt_that_fails_is_counted_and_the_others_are_asked(folder, tmp_path):
    with serve(folder, lambda entry: "422" if entry.number == 3 else "answer") as server:
        report = run(tree_of(folder, server, tmp_path / "out"))
    assert report["prompts"]["failed"] == 1 and report["prompts"]["kept"] == 7
    check_sums(report)


def test_the_key_is_in_one_header_and_nowhere_else(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DIGITS_KEY", "sk-very-secret")
    with serve(folder, lambda entry: "429" if entry.number == 1 else "answer") as server:
        run(tree_of(folder, server, tmp_path / "out", key_variable="DIGITS_KEY"))
        server.act = lambda entry: "401"
        with pytest.raises(DataError) as refused:
            run(tree_of(folder, server, tmp_path / "other", key_variable="DIGITS_KEY"))
    assert {entry.headers["Authorization"] for entry in server.log} == {"Bearer sk-very-secret"}
    assert not any("secret" in str(entry.body) for entry in server.log)
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or b"secret" not in path.read_bytes(), path
    assert "secret" not in str(refused.value) + "".join(capsys.readouterr())
    monkeypatch.delenv("DIGITS_KEY")
    with pytest.raises(DataError, match="the environment has no DIGITS_KEY; export it"):
        run(tree_of(folder, server, tmp_path / "third", key_variable="DIGITS_KEY"))
    with pytest.raises(DataError, match="expected the name of an environment variable") as named:
        run(tree_of(folder, server, tmp_path / "third", key_variable="sk-very-secret"))
    assert "secret" not in str(named.value)


def in_a_process(tree, said):
    with open(said, "w", buffering=1) as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            curate(load_config(CurateConfig, None, base=tree))
        except Stopped as stop:
            print(stop)
            sys.exit(128 + stop.signum)


def begin(tree, said):
    process = PROCESSES.Process(target=in_a_process, args=(tree, str(said)), daemon=True)
    process.start()
    return process


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.is_alive() and time.monotonic() < end, "it ended, or hangs"
        time.sleep(0.01)


def answered(out):
    """Prompts in the journal, by whole lines."""
    file = out / "journal.jsonl"
    return sum(b'"what": "answer"' in line for line in file.read_bytes().splitlines(True)) if file.exists() else 0


def test_killed_it_asks_nothing_again_that_is_in_the_journal(folder, tmp_path):
    """Two requests hang while it is killed; what was answered before is asked once in all."""
    out = tmp_path / "out"
    with serve(folder, lambda entry: "hang" if entry.number in (4, 5) else "answer") as server:
        tree = tree_of(folder, server, out, concurrency=2)
        process = begin(tree, tmp_path / "said")
        wait_for(lambda: len(server.log) == 6 and answered(out) == 4, process)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        before = {entry.prompt for entry in server.log[:4]}
        hung = {entry.prompt for entry in server.log[4:]}
        report = run(tree)
        assert report["complete"] and report["prompts"]["kept"] == 8 and report["requests"]["answered"] == 8
        assert report["requests"]["lost"] == 2 and report["tokens"]["assumed"]["output"] == 2 * 8192
        assert all(server.asked()[prompt] == (1 if prompt in before else 2) for prompt in before | hung)
        assert len(server.log) == 8 + 2
    check_sums(report)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_waits_for_what_is_under_way_and_begins_nothing(folder, tmp_path, signum):
    out = tmp_path / "out"
    with serve(folder, lambda entry: "hang" if entry.number == 3 else "answer") as server:
        tree = tree_of(folder, server, out)
        process = begin(tree, tmp_path / "said")
        wait_for(lambda: len(server.log) == 4 and answered(out) == 3, process)
        os.kill(process.pid, signum)
        time.sleep(0.2)
        assert process.is_alive()  # it waits for the answer that is paid
        server.free.set()
        process.join(60)
        assert process.exitcode == 128 + signum and len(server.log) == 4 and answered(out) == 4
        assert (tmp_path / "said").read_text().strip().endswith("go on by the same command")
        assert not (out / "report.json").exists()
        assert run(tree)["complete"] and len(server.log) == 8 and max(server.asked().values()) == 1


def test_a_second_signal_ends_what_is_under_way(folder, tmp_path):
    with serve(folder, lambda entry: "hang" if entry.number == 1 else "answer") as server:
        process = begin(tree_of(folder, server, tmp_path / "out"), tmp_path / "said")
        wait_for(lambda: len(server.log) == 2, process)
        os.kill(process.pid, signal.SIGTERM)
        time.sleep(0.1)
        os.kill(process.pid, signal.SIGTERM)
        process.join(60)
        assert process.exitcode == 128 + signal.SIGTERM and answered(tmp_path / "out") == 1


def test_a_signal_wakes_who_waits(folder, tmp_path):
    with serve(folder, lambda entry: "429:300" if entry.number else "answer") as server:
        process = begin(tree_of(folder, server, tmp_path / "out"), tmp_path / "said")
        wait_for(lambda: len(server.log) == 2, process)
        os.kill(process.pid, signal.SIGTERM)
        process.join(60)
        assert process.exitcode == 128 + signal.SIGTERM and len(server.log) == 2


def command(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["prism-fast", "data", "curate", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code or 0, *capsys.readouterr()


def test_a_dry_run_says_how_many_and_how_much_and_asks_nothing(folder, tmp_path, monkeypatch, capsys):
    with serve(folder) as server:
        words = [f"teacher={{url: {server.url}, model: digits, input_price: 1, output_price: 10}}"]
        words += [f"data.files={folder / 'data' / 'rates.parquet'}", f"out={tmp_path / 'out'}", "samples=3"]
        status, out, err = command(monkeypatch, capsys, "--dry-run", *words)
        assert (status, err) == (0, "") and not (tmp_path / "out").exists() and not server.log
        assert "8 hard prompts of 12 records" in out and "24 requests at most" in out
        bound = float(out.partition("cost at most ")[2].split(";")[0])
        assert 24 * 8192 * 10 / 1e6 < bound < 24 * (8192 * 10 + 8192) / 1e6
        status, out, err = command(monkeypatch, capsys, *words)
        assert (status, err) == (0, "") and len(server.log) == 8
        assert "written    sft.json 8, alignment.parquet 8" in out
        assert f"model.path=Qwen/Qwen3-VL-4B-Instruct data.files={tmp_path / 'out'}/sft.json" in " ".join(out.split())
        status, out, err = command(monkeypatch, capsys, "--dry-run", *words)
        assert "8 answers are there" in out and "\n0 requests at most, 0 tokens" in out  # the first of each is right
        status, out, err = command(monkeypatch, capsys, "--dry-run", *words, "right=2")
        assert "\n16 requests at most" in out  # of the other two samples of each
        server.act = lambda entry: "wrong"
        assert command(monkeypatch, capsys, *words[:2], f"out={tmp_path / 'wrong'}", "samples=1")[0] == 2
        status, out, err = command(
            monkeypatch, capsys, "--dry-run", *words[:2], f"out={tmp_path / 'wrong'}", "samples=3"
        )
        assert "\n16 requests at most" in out  # no first one is right
        assert len(server.log) == 16
        words[2:] = [f"out={tmp_path / 'policy'}", f"rates.model.path={folder / 'base'}"]
        status, out, err = command(monkeypatch, capsys, "--dry-run", *words)
        assert (status, err) == (0, "") and "12 prompts at most" in out and "dry run: in order" in out
        words[-1] = f"rates.model.path={folder / 'no'}"
        status, out, err = command(monkeypatch, capsys, "--dry-run", *words)
        assert status == 2 and f"{folder / 'no'}: no such folder" in err


def test_bad_input_is_one_line(folder, tmp_path, monkeypatch, capsys):
    with serve(folder) as server:
        tree = tree_of(folder, server, tmp_path / "out")
        with pytest.raises(DataError, match=r"align.parquet.*: extra_info.pass_rate: missing; name its column"):
            run({**tree, "data": {"files": [str(folder / "data" / "align.parquet")]}})
        with pytest.raises(DataError, match="no answer was kept"):
            server.act = lambda entry: "wrong"
            run({**tree, "samples": 1, "out": str(tmp_path / "wrong")})
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "x").touch()
        with pytest.raises(DataError, match="holds other files and no journal"):
            run({**tree, "out": str(tmp_path / "full")})
        with pytest.raises(DataError, match=r"begun with other settings: model: 'digits' -> 'letters'"):
            run({**tree_of(folder, server, tmp_path / "wrong", model="letters"), "samples": 1})
    for url in ("https://user:secret@host/v1", "https://host/v1?key=secret", "host/v1", "ftp://host"):
        with pytest.raises(DataError, match="without a user, a query or a key") as error:
            run(tree_of(folder, server, tmp_path / "out", url=url))
        assert "secret" not in str(error.value)
    with pytest.raises(DataError, match=r"samples: teacher.temperature = 0 gives the same answer"):
        run(tree_of(folder, server, tmp_path / "out", temperature=0))
    with pytest.raises(DataError, match=r"needs teacher.input_price and teacher.output_price"):
        run(tree_of(folder, server, tmp_path / "out", budget=1, input_price=None))


def test_a_column_of_another_name_holds_the_rates(folder, tmp_path):
    lines = [
        {"prompt": f"{i} + 1?", "reward_model": {"ground_truth": str(i + 1)}, "solved": share}
        for i, share in enumerate([0.0, 0.25, 0.5, None])
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tree = {"teacher": {"url": "http://127.0.0.1:9", "model": "m"}, "out": str(tmp_path / "out")}
    data = {"files": [str(tmp_path / "p.jsonl")], "columns": {"extra_info.pass_rate": "solved"}, "skip_bad_records": 1}
    assert next(plan(load_config(CurateConfig, None, base={**tree, "data": data}))) == "2 hard prompts of 4 records"


def test_what_is_not_written_is_named_once(folder, tmp_path):
    table = pq.read_table(folder / "data" / "rates.parquet")
    noted = table.append_column("note", [["x"] * len(table)])
    pq.write_table(noted, folder / "data" / "noted.parquet")
    for name, told in (("rates", []), ("noted", ["not written, as the format has no place for them: note"])):
        said = []
        with serve(folder) as server:
            tree = {**tree_of(folder, server, tmp_path / name), "limit": 2}
            tree["data"] = {"files": [str(folder / "data" / f"{name}.parquet")]}
            curate(load_config(CurateConfig, None, base=tree), say=said.append, clock=FakeClock())
        assert said == ["2 hard prompts of 2 records", *told]


def test_asyncio_is_left_as_it_was(folder, tmp_path):
    """Handlers of signals are the caller's again."""
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]
    with serve(folder) as server:
        run(tree_of(folder, server, tmp_path / "out"))
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)] == before
    with pytest.raises(RuntimeError):
        asyncio.get_running_loop()
