"""The benchmark harness: its statistics, what it refuses, what it writes, and RESULTS.md."""

import importlib
import json
import signal
import statistics
import subprocess
import time
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks.catalog import CATALOG, load
from benchmarks.harness import compare, lengths, machine, measure, op, peers, run
from benchmarks.harness.document import RESULTS, exit_status, validate
from benchmarks.harness.measure import Summary, Timer, Unavailable
from benchmarks.harness.op import Contender, Problem, Tolerance
from benchmarks.harness.run import Options
from benchmarks.report import results, targets, tested
from prism_kernels import tuned_options

CPU = torch.device("cpu")
QUICK = Options(device=CPU, rounds=3, memory=False)
SOMEWHERE = {"device": "NVIDIA H200", "kind": "cuda", "python": "3.12", "threads": 1, "packages": {"torch": "2.11"}}


def test_quartiles_are_those_of_the_standard_library():
    values = torch.rand(37).tolist()
    summary = Summary.of(values)
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    assert (summary.low, summary.median, summary.high) == pytest.approx((low, middle, high))
    assert Summary.of([2.0]) == Summary(2.0, 2.0, 2.0, 1)
    with pytest.raises(ValueError, match="at least one"):
        Summary.of([])


def test_contenders_take_turns_and_one_that_raises_leaves():
    calls = []

    def fails():
        calls.append("c")
        if len(calls) > 9:
            raise MemoryError("no more")

    class Once(Timer):
        def repeats(self, call):
            return 1

    timer = Once(CPU)
    contenders = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b"), "c": fails}
    samples, failed = measure.interleave(contenders, timer, seconds=0.0, rounds=4, warmups=1)
    assert set(samples) == {"a", "b"} and all(len(values) == 4 for values in samples.values())
    assert failed == {"c": "MemoryError: no more"}
    assert "".join(calls[3:6]) == "abc" and "".join(calls[6:9]) == "cba"  # after a warm-up of each


def test_lengths_are_log_normal():
    """Of 40,000: mean 1 to five times the deviation of a mean, and 0.45 of the logarithm likewise."""
    random, count = torch.Generator().manual_seed(1), 40_000
    drawn = torch.tensor(lengths.factors(count, 0.45, random), dtype=torch.float64)
    assert (
        abs(drawn.mean() - 1) < 5 * 0.475 * count**-0.5
        and abs(drawn.log().std() - 0.45) < 5 * 0.45 * (2 * count) ** -0.5
    )
    before = random.get_state()
    assert lengths.factors(3, 0.0, random) == [1.0] * 3 and torch.equal(random.get_state(), before)
    assert lengths.scaled(9, 0.01) == 1 and lengths.scaled(200, 1.5) == 300


def test_what_was_measured_is_kept_after_every_round():
    seen = []
    calls = {"a": lambda: None, "b": lambda: None}
    samples, _ = measure.interleave(calls, Timer(CPU), 0.0, 3, keep=lambda some, failed: seen.append(
        {name: len(values) for name, values in some.items()}))  # fmt: skip
    assert seen == [{"a": count, "b": count} for count in (1, 2, 3)] and len(samples["a"]) == 3


def problem(ours=1.0, peer=1.0, **changes):
    def contender(name, value, role):
        return Contender(name, lambda: lambda: {"y": torch.full((4,), value)}, role)

    def missing():
        raise Unavailable("not installed (nobody)")

    rows = [contender("ours", ours, "ours"), contender("peer", peer, "peer"), Contender("absent", missing)]
    given = {"name": "p", "title": "P", "shape": {"T": 4}, "flops": 8.0, "bytes": 16.0, "contenders": rows}
    given["truth"] = lambda: {"y": torch.ones(4, dtype=torch.float64)}
    given["tolerances"] = {"y": Tolerance("max", 1e-3, 1e-1)}
    return Problem(**(given | changes))


def test_error_and_reason_stand_beside_the_time():
    result = op.run_problem("module", problem(peer=1.05), QUICK, Timer(CPU))
    ours, peer, absent = result["rows"]
    assert result["status"] == "ok" and ours["samples"] == 3 and ours["errors"]["y"]["value"] == 0
    assert peer["errors"]["y"]["value"] == pytest.approx(0.05, rel=1e-5) and peer["times_ours"] > 0
    assert absent["status"] == "unavailable" and absent["reason"] == "not installed (nobody)"


@pytest.mark.parametrize("wrong", [1.01, float("nan")])
def test_no_speed_where_ours_is_wrong(wrong):
    result = op.run_problem("module", problem(ours=wrong), QUICK, Timer(CPU))
    assert result["status"] == "refused" and "differs from float64" in result["reason"]
    assert not any("median_s" in row for row in result["rows"])
    assert exit_status({"tests": None, "problems": [result]}) == 1
    json.dumps(result, allow_nan=False)


def test_no_speed_for_a_wrong_peer_alone():
    result = op.run_problem("module", problem(peer=2.0), QUICK, Timer(CPU))
    ours, peer, _ = result["rows"]
    assert result["status"] == "ok" and "median_s" in ours
    assert peer["status"] == "wrong" and "median_s" not in peer


def test_a_busy_machine_is_timed_by_the_seconds_of_the_process(monkeypatch, capsys):
    with monkeypatch.context() as played:
        played.setattr(time, "process_time", iter([1.0, 4.0]).__next__)
        assert Timer(CPU, busy=True).once(lambda: None) == 3.0
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert command.main(["advantage", "--device", "cpu", "--shape", "tiny", "--peers", "", "--dry-run", "--busy"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["clock"] == "process" and "CPU seconds of the process" in results.render([found])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with pytest.raises(SystemExit):
        command.main(["advantage", "--device", "cpu", "--busy"])
    assert "got 2 threads" in capsys.readouterr().err


class Bench:
    """A benchmark of one problem."""

    op = "some"

    def __init__(self, found):
        self.found = found

    def dtypes(self, options):
        return {}

    def results(self, options, keep):
        yield op.run_problem("module", self.found, options, Timer(CPU), keep)


class Count:
    """A contender's call, which acts at the ``last``; two warm-ups, a check and a look at its length are before."""

    def __init__(self, last, act):
        self.left, self.act = last, act

    def __call__(self):
        self.left -= 1
        if self.left == 0:
            self.act()
        time.sleep(2e-3)  # long enough for one call a sample
        return {"y": torch.ones(4)}


def with_second(act, last):
    first = Contender("ours", lambda: lambda: (time.sleep(2e-3), {"y": torch.ones(4)})[1], "ours")
    return problem(contenders=[first, Contender("peer", lambda: Count(last, act))])


def test_an_interrupted_benchmark_keeps_its_rounds(tmp_path, capsys):
    path = tmp_path / "result.json"
    found = with_second(lambda: signal.raise_signal(signal.SIGINT), 1 + 2 + 1 + 3)
    document = run.run(Bench(found), Options(device=CPU, rounds=9, memory=False, json_path=path))
    assert not document["complete"] and exit_status(document) == 130 and "interrupted" in capsys.readouterr().err
    assert document == json.loads(path.read_text())
    assert [row["samples"] for row in document["problems"][0]["rows"]] == [2, 2]
    validate(document)
    assert "cut off" in results.render([document | {"environment": SOMEWHERE}])


def test_a_contender_that_fails_late_leaves_no_times(tmp_path):
    def fail():
        raise MemoryError("no more")

    kept = []
    found = op.run_problem("module", with_second(fail, 1 + 2 + 1 + 3), Options(device=CPU, rounds=5, memory=False),
                           Timer(CPU), lambda result: kept.append(json.loads(json.dumps(result))))  # fmt: skip
    assert [["median_s" in row for row in result["rows"]] for result in kept] == [[True, True]] * 2 + [
        [True, False]
    ] * 3
    assert found["rows"][1] == {"name": "peer", "role": "peer", "status": "failed", "reason": "MemoryError: no more",
                                "errors": found["rows"][1]["errors"]}  # fmt: skip
    validate(document(problems=[found]))


def test_failing_tests_of_the_op_stop_everything(tmp_path, monkeypatch):
    (tmp_path / "red").mkdir()
    (tmp_path / "red" / "test_red.py").write_text("def test_red():\n    assert False\n")
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    cache = tmp_path / "cache" / "passed.json"
    verdict = run.run_tests("red", cache)
    assert verdict["status"] == "failed" and not cache.exists()
    assert exit_status({"tests": verdict, "problems": []}) == 1
    assert run.run_tests("absent", cache)["status"] == "not run"


def test_passing_tests_run_again_only_after_a_change(tmp_path, monkeypatch):
    test, cache = tmp_path / "green" / "test_green.py", tmp_path / "passed.json"
    test.parent.mkdir()
    count = "import pathlib\ndef test_green():\n    pathlib.Path('runs').open('a').write('x')\n"
    test.write_text(count)
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    for _ in range(2):
        assert run.run_tests("green", cache)["status"] == "passed"
    assert (tmp_path / "runs").read_text() == "x"
    test.write_text(count + "# changed\n")
    assert run.run_tests("green", cache)["status"] == "passed"
    assert (tmp_path / "runs").read_text() == "xx"


def test_peak_memory_is_seen_and_freed_memory_hides_nothing():
    torch.ones(16 << 20)  # freed: 64 MB that the process may keep
    peak, outputs = measure.rss_peak_bytes(lambda: {"y": (torch.ones(16 << 20) * 2).sum()})
    assert 2 * 64e6 <= peak < 200e6 and outputs == 4


def test_saved_for_backward_counts_each_storage_once():
    x = torch.randn(100, requires_grad=True)
    assert measure.saved_bytes(lambda: (x.exp() * 2).sum(), [x]) == 400


def test_command_line_ends_with_json(capsys, tmp_path):
    path = tmp_path / "a.json"
    arguments = ["advantage", "--device", "cpu", "--shape", "tiny", "--peers", "loop", "--rounds", "2", "--dry-run"]
    assert command.main([*arguments, "--json", str(path), "--plot", str(tmp_path / "a.png"), "--no-memory"]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    validate(document)
    assert document == json.loads(path.read_text())
    names = [row["name"] for row in document["problems"][0]["rows"]]
    assert "prism" in names and "loop over groups" in names and "torch eager, index_add" not in names
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("words", [[], *([op] for op in CATALOG)], ids=["all", *CATALOG])
def test_help_names_every_benchmark_and_what_one_takes(words, capsys):
    with pytest.raises(SystemExit) as end:
        command.main([*words, "--help"])
    shape = "mini" if words == ["rollout"] else "tiny"
    shown, names = capsys.readouterr().out, ("--device", "--shape", "--json", shape) if words else CATALOG
    assert end.value.code == 0 and all(name in shown for name in names)
    about = importlib.import_module(f"benchmarks.{CATALOG[words[0]].module}") if words else command
    assert about.__doc__ and about.__doc__.splitlines()[0] in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["advantage", "--shape", "Q=1"], "expected one of published"),
        (["advantage", "--shape", "B=x"], "expected int"),
        (["nothing"], "invalid choice"),
        (["moe", "--problem", "nothing"], "invalid choice: 'nothing'"),
        (["policy", "--save", "--dry-run"], "made from tested results"),
        (["advantage", "--save", "--no-tests"], "made from tested results"),
        (["advantage", "--save", "--dry-run"], "made from tested results"),
        (["advantage", "--save", "--base", "HEAD"], "compares commits"),
        (["advantage", "--busy", "--base", "HEAD"], "without --base"),
    ],
)
def test_bad_arguments_are_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        command.main([*arguments, "--device", "cpu"])
    printed = capsys.readouterr().err
    assert error.value.code == 2 and message in printed and printed.count("\n") == 1


@pytest.mark.parametrize("name", ["linear_logprob", "advantage", "moe", "tree_attention"])
def test_every_peer_has_a_row_with_its_reason(name):
    bench = load(name)
    problems = bench.problems(bench.shapes["tiny"][0], CPU)
    assert tuple(problem.name for problem in problems) == bench.names
    for found in problems:
        for contender in found.contenders:
            row = op._prepare(contender).row
            assert row["status"] in ("ok", "unavailable"), row
            if row["status"] == "unavailable":
                assert row["reason"].startswith(("not installed (", "needs a GPU")), row
        assert any(c.role == "ours" for c in found.contenders) and any(c.role == "peer" for c in found.contenders)


def test_published_shapes_of_the_lm_head():
    named = {
        c.name
        for p in load("linear_logprob").problems({"T": 4, "H": 8, "V": 50, "dtype": "fp32"}, CPU)
        for c in p.contenders
    }
    wanted = ("torch eager", "torch.compile", "Liger fused linear CE", "Liger fused linear GRPO", "Liger scaled CE")
    wanted += ("cut-cross-entropy", "quack-kernels", "verl", "TRL chunked head")
    assert all(any(name.startswith(part) for name in named) for part in wanted)


def test_absent_package():
    with pytest.raises(Unavailable, match=r"not installed \(some-peer\)"):
        peers.need("surely_absent.kernels", "some-peer")
    with pytest.raises(Unavailable, match=r"not installed \(some-peer\)"):
        peers.need("surely_absent.deep.kernels", "some-peer", alone=True)
    with pytest.raises(Unavailable, match="needs a GPU"):
        peers.need("json", "json", CPU)


def document(**changes):
    prism = {"name": "prism", "role": "ours", "status": "ok", "samples": 5, "times_limit": 1.1}
    prism |= {"median_s": 2.0, "low_s": 1.9, "high_s": 2.1}
    verl = {"name": "verl linear_cross_entropy (Triton)", "role": "peer", "status": "ok", "samples": 5}
    verl |= {"median_s": 4.8, "low_s": 4.7, "high_s": 4.9, "times_ours": 2.4}
    shape = {"T": 8192, "H": 2560, "V": 151936, "dtype": "bf16"}
    found = {"name": "policy_loss", "title": "policy loss", "shape": shape, "flops": 1.0, "bytes": 1.0, "status": "ok"}
    environment = SOMEWHERE
    result = {
        "schema": 1,
        "op": "linear_logprob",
        "date": "2026-01-02T03:04:05Z",
        "commit": "abc",
        "limits": {},
        "tests": None,
    }
    return {**result, "environment": environment, "problems": [{**found, "rows": [prism, verl]}], **changes}


def test_results_without_measurements_say_so():
    text = results.render([])
    cells = [line for line in text.splitlines() if line.startswith("| ") and "must" not in line]
    assert len(cells) == len(targets.TARGETS) and all(results.EMPTY in line for line in cells)


def test_results_are_read_from_files(tmp_path):
    folder = tmp_path / "results" / "nvidia-h200"
    folder.mkdir(parents=True)
    (folder / "a.json").write_text(json.dumps(document(**BENCH)))
    older = document(date="2025-01-01T00:00:00Z", commit="old", **BENCH)
    older["problems"][0]["rows"][0]["times_limit"] = 9.0
    (folder / "b.json").write_text(json.dumps(older))
    for found in (document(), older):
        tests = {**checked("ok"), "commit": found["commit"]}
        (folder / f"tests-{found['commit']}.json").write_text(json.dumps(tests))
    results.write(tmp_path / "results", tmp_path / "RESULTS.md")
    text = (tmp_path / "RESULTS.md").read_text()
    assert "| verl: its time over ours | >= 2.30x |  | 2.40x | yes | NVIDIA H200, 2026-01-02, abc |" in text
    line = next(line for line in text.splitlines() if line.startswith("| policy loss forward + backward, over F3"))
    assert "1.10x | yes" in line  # must 1.15, stretch 1.05; the newest result counts
    assert f"| {results.EMPTY} |" in text
    assert "policy loss" in text and "torch 2.11" in text


def checked(status="failed", **counts):
    """What `make gpu` writes of the tests beside document()."""
    counts = {"passed": 7, "failed": 0, "skipped": 0, "unfinished": 0, "failures": [], "not collected": []} | counts
    part = {"name": "tests-linear", "status": status, "seconds": 9.0, "tail": [], "tests": counts}
    return document(op="tests-linear", problems=[], part=part)


BENCH = {"part": {"name": "bench-linear", "status": "ok", "seconds": 9.0, "tail": []}}
TARGET = next(
    target for target in targets.TARGETS if target.quantity.startswith("policy loss forward + backward, over F3")
)


def test_no_speed_is_shown_of_an_op_whose_tests_failed():
    red = checked(failed=1, failures=["tests.test_linear_logprob::test_a: no"])
    text = results.render([document(**BENCH), red])
    line = next(line for line in text.splitlines() if line.startswith(f"| {TARGET.quantity}"))
    assert f"| {tested.REFUSED} |  |" in line and "| prism |" not in text and "4.8 s" not in text
    assert f"dtype bf16)\n{tested.REFUSED}\n" in text
    assert "tests: failed (7 passed, 1 failed)" in text and "test_linear_logprob::test_a" in text
    assert targets.look_up(TARGET, [document(**BENCH), red])[0] is None


def test_tests_count_that_ran_on_the_same_commit_and_device_last():
    red, green = checked(failed=1), checked("ok")
    bench = document(**BENCH)
    elsewhere = {**red, "environment": {**red["environment"], "device": "NVIDIA H100"}}
    later = {**green, "date": "2026-02-02T00:00:00Z"}
    for beside, status in (
        ([red], "failed"),
        ([green], "passed"),
        ([red, later], "passed"),
        ([{**red, "commit": "abd"}, elsewhere], "not run"),
        ([], "not run"),
        ([checked("timeout")], "not finished"),
        ([checked("timeout", passed=0)], "not run"),
        (
            [checked("failed", passed=3, **{"not collected": ["tests.test_x: No module named 'hypothesis'"]})],
            "not finished",
        ),
    ):
        assert tested.tests_of(bench, [bench, *beside])[0] == status, beside
    crashed = checked()
    del crashed["part"]["tests"]
    assert tested.refused(bench, [crashed])
    own = document(tests={"status": "passed", "summary": "9 passed"})
    assert tested.tests_of(own, [red]) == ("passed", "9 passed")
    step = document(problems=[{**document()["problems"][0], "checked": {"layers": 4}}], **BENCH)
    assert tested.tests_of(step, [])[0] == "passed"


def test_results_say_where_the_tests_were_not_run():
    text = results.render([document()])
    assert "\ntests: not run\n" in text and "abc; tests: not run |" in text


def test_results_in_this_tree_are_made_from_its_measurements():
    written = results.PAGE.read_text()
    assert written == results.render(results.read(RESULTS)), "run python -m benchmarks.report.results"


def test_results_refuse_a_speed_that_was_refused(tmp_path):
    bad = document()
    bad["problems"][0]["status"] = "refused"
    folder = tmp_path / "x"
    folder.mkdir()
    (folder / "bad.json").write_text(json.dumps(bad))
    with pytest.raises(ValueError, match=r"bad\.json.*shows a speed"):
        results.read(tmp_path)


def test_tables(tmp_path, monkeypatch):
    monkeypatch.setattr(tuned_options, "ROOT", tmp_path)
    default = {"BLOCK": 1024, "num_warps": 4}
    assert tuned_options.tuned("op", "k", default) == default and tuned_options.asked()["op", "k"] == default
    path = tuned_options.table_path("op", "NVIDIA Test 9")
    path.parent.mkdir(parents=True)
    entry = {"options": {"BLOCK": 2048}, "us": 1.0, "default_us": 2.0}
    path.write_text(json.dumps({"gpu": "NVIDIA Test 9", "entries": {"k": entry, "bad": {"options": {"TILE": 1}}}}))
    assert tuned_options.gpus("op") == ["NVIDIA Test 9"]
    with tuned_options.as_if("NVIDIA Test 9"):
        assert tuned_options.tuned("op", "k", default) == {"BLOCK": 2048, "num_warps": 4}
        with tuned_options.forced("op", "k", {"num_warps": 8}):
            assert tuned_options.tuned("op", "k", default) == {"BLOCK": 1024, "num_warps": 8}
        with tuned_options.as_if(""):
            assert tuned_options.tuned("op", "k", default) == default
        with pytest.raises(ValueError, match="TILE"):
            tuned_options.tuned("op", "bad", default)


def test_checked_in_tables_fit_their_gpu():
    for path in Path(tuned_options.ROOT).glob("*/tables/*.json"):
        table = json.loads(path.read_text())
        assert tuned_options.table_path(path.parent.parent.name, table["gpu"]) == path
        assert all({"options", "us", "default_us"} <= set(entry) for entry in table["entries"].values())


def test_a_comparison_is_refused_where_the_tests_fail(monkeypatch, capsys):
    asked = []
    verdict = {"status": "failed", "summary": "1 failed"}
    monkeypatch.setattr(run, "run_tests", lambda folder: (asked.append(folder), verdict)[1])
    monkeypatch.setattr(compare, "checkout", lambda *_: pytest.fail("nothing is checked out"))
    assert command.main(["advantage", "--base", "HEAD", "--device", "cpu"]) == 1
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["problems"] == [] and found["tests"] == verdict and asked == [CATALOG["advantage"].tests]


@pytest.mark.parametrize("wrong", [0, 1])
def test_a_comparison_is_refused_where_a_commit_is_wrong(wrong):
    class Worker:
        def __init__(self, name, right):
            self.name, self.right = name, right

        def ask(self, do, **_):
            assert do == "prepare"  # nothing is timed
            about = {"name": "p", "title": "P", "shape": {}, "flops": 1.0, "bytes": 1.0, "status": "ok"}
            row = {"status": "ok"} if self.right else {"status": "wrong", "reason": "differs from float64"}
            return {"row": {"name": "prism", "role": "ours", "errors": {}, **row}, "problem": about}

    found = compare.compare({}, [Worker("tree", wrong != 0), Worker("base", wrong != 1)], QUICK)
    assert found["status"] == "refused" and ("tree", "base")[wrong] in found["reason"]


def test_a_side_that_dies_while_it_is_timed_leaves_no_speed():
    class Worker:
        name = "this work tree"

        def ask(self, do, **_):
            if do == "time":
                raise RuntimeError("the process of this work tree ended")
            row = {"name": "prism", "role": "ours", "status": "ok", "errors": {}}
            about = {"name": "p", "title": "P", "shape": {}, "flops": 1.0, "bytes": 1.0, "status": "ok"}
            return {"row": row, "problem": about}

    class Other(Worker):
        name = "base"

        def ask(self, do, **_):
            return {"seconds": 1.0} if do == "time" else super().ask(do)

    found = compare.compare({}, [Worker(), Other()], QUICK)
    assert found["status"] == "refused" and "work tree ended" in found["reason"]
    assert not any("median_s" in row for row in found["rows"])


@pytest.mark.slow
def test_comparing_with_a_commit(tmp_path):
    with pytest.raises(ValueError, match="knows no commit"), compare.checkout("no-such-revision", machine.ROOT):
        pass
    if subprocess.run(["git", "rev-parse", "HEAD"], cwd=machine.ROOT, capture_output=True).returncode:
        pytest.skip("this copy is no git repository")
    options = Options(device=CPU, shapes=[{"B": 16, "N": 4}], rounds=2)
    found = run.run(compare.Comparison(load("advantage"), "HEAD"), options)
    validate(found)
    ours, base = found["problems"][0]["rows"]
    assert ours["samples"] == base["samples"] == 2 and base["name"] == "base HEAD" and base["times_ours"] > 0
