"""The benchmark harness: its statistics, what it refuses, what it writes, and the GPU driver without a GPU."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import compare, gpu, harness, make_results, measure, peers, targets
from benchmarks.harness import Contender, Options, Problem, Tolerance
from benchmarks.measure import Summary, Timer, Unavailable
from prism_kernels import tables

CPU = torch.device("cpu")
QUICK = Options(device=CPU, rounds=3, memory=False)


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
    result = harness.run_problem("op", problem(peer=1.05), QUICK, Timer(CPU))
    ours, peer, absent = result["rows"]
    assert result["status"] == "ok" and ours["samples"] == 3 and ours["errors"]["y"]["value"] == 0
    assert peer["errors"]["y"]["value"] == pytest.approx(0.05, rel=1e-5) and peer["times_ours"] > 0
    assert absent["status"] == "unavailable" and absent["reason"] == "not installed (nobody)"


@pytest.mark.parametrize("wrong", [1.01, float("nan")])
def test_no_speed_where_ours_is_wrong(wrong):
    result = harness.run_problem("op", problem(ours=wrong), QUICK, Timer(CPU))
    assert result["status"] == "refused" and "differs from float64" in result["reason"]
    assert not any("median_s" in row for row in result["rows"])
    assert harness.exit_status({"tests": None, "problems": [result]}) == 1
    json.dumps(result, allow_nan=False)


def test_no_speed_for_a_wrong_peer_alone():
    result = harness.run_problem("op", problem(peer=2.0), QUICK, Timer(CPU))
    ours, peer, _ = result["rows"]
    assert result["status"] == "ok" and "median_s" in ours
    assert peer["status"] == "wrong" and "median_s" not in peer


def test_failing_tests_of_the_op_stop_everything(tmp_path, monkeypatch):
    (tmp_path / "test_red.py").write_text("def test_red():\n    assert False\n")
    monkeypatch.setattr(harness.machine, "ROOT", tmp_path)
    cache = tmp_path / "cache" / "passed.json"
    verdict = harness.run_tests(["test_red.py"], cache)
    assert verdict["status"] == "failed" and not cache.exists()
    assert harness.exit_status({"tests": verdict, "problems": []}) == 1
    assert harness.run_tests(["test_absent.py"], cache)["status"] == "not run"


def test_passing_tests_run_again_only_after_a_change(tmp_path, monkeypatch):
    test, cache = tmp_path / "test_green.py", tmp_path / "passed.json"
    count = "import pathlib\ndef test_green():\n    pathlib.Path('runs').open('a').write('x')\n"
    test.write_text(count)
    monkeypatch.setattr(harness.machine, "ROOT", tmp_path)
    for _ in range(2):
        assert harness.run_tests(["test_green.py"], cache)["status"] == "passed"
    assert (tmp_path / "runs").read_text() == "x"
    test.write_text(count + "# changed\n")
    assert harness.run_tests(["test_green.py"], cache)["status"] == "passed"
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
    harness.validate(document)
    assert document == json.loads(path.read_text())
    names = [row["name"] for row in document["problems"][0]["rows"]]
    assert "prism" in names and "loop over groups" in names and "torch eager, index_add" not in names
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["advantage", "--shape", "Q=1"], "expected one of published"),
        (["advantage", "--shape", "B=x"], "expected int"),
        (["nothing"], "invalid choice"),
    ],
)
def test_bad_arguments_are_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        command.main([*arguments, "--device", "cpu"])
    printed = capsys.readouterr().err
    assert error.value.code == 2 and message in printed and printed.count("\n") == 1


@pytest.mark.parametrize("op", ["linear_logprob", "advantage", "moe"])
def test_every_peer_has_a_row_with_its_reason(op):
    module = command.load(op)
    for found in module.problems(module.SHAPES["tiny"][0], CPU):
        for contender in found.contenders:
            row = harness._prepare(contender).row
            assert row["status"] in ("ok", "unavailable"), row
            if row["status"] == "unavailable":
                assert row["reason"].startswith(("not installed (", "needs a GPU")), row
        assert any(c.role == "ours" for c in found.contenders) and any(c.role == "peer" for c in found.contenders)


def test_published_shapes_of_the_lm_head():
    named = {
        c.name
        for p in command.load("linear_logprob").problems({"T": 4, "H": 8, "V": 50, "dtype": "fp32"}, CPU)
        for c in p.contenders
    }
    wanted = ("torch eager", "torch.compile", "Liger fused linear CE", "Liger fused linear GRPO", "Liger scaled CE")
    wanted += ("cut-cross-entropy", "quack-kernels", "verl", "TRL chunked head")
    assert all(any(name.startswith(part) for name in named) for part in wanted)


def test_absent_package():
    with pytest.raises(Unavailable, match=r"not installed \(some-peer\)"):
        peers.need("surely_absent.kernels", "some-peer")
    with pytest.raises(Unavailable, match=r"not installed \(some-peer\)"):
        peers.need_alone("surely_absent.deep.kernels", "some-peer")
    with pytest.raises(Unavailable, match="needs a GPU"):
        peers.need("json", "json", CPU)


def document(**changes):
    prism = {"name": "prism", "role": "ours", "status": "ok", "samples": 5, "times_limit": 1.1}
    prism |= {"median_s": 2.0, "low_s": 1.9, "high_s": 2.1}
    verl = {"name": "verl linear_cross_entropy (Triton)", "role": "peer", "status": "ok", "samples": 5}
    verl |= {"median_s": 4.8, "low_s": 4.7, "high_s": 4.9, "times_ours": 2.4}
    shape = {"T": 8192, "H": 2560, "V": 151936, "dtype": "bf16"}
    found = {"name": "policy_loss", "title": "policy loss", "shape": shape, "flops": 1.0, "bytes": 1.0, "status": "ok"}
    environment = {
        "device": "NVIDIA H200",
        "kind": "cuda",
        "python": "3.12",
        "threads": 1,
        "packages": {"torch": "2.11"},
    }
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
    text = make_results.render([])
    cells = [line for line in text.splitlines() if line.startswith("| ") and "must" not in line]
    assert len(cells) == len(targets.TARGETS) and all(make_results.EMPTY in line for line in cells)


def test_results_are_read_from_files(tmp_path):
    folder = tmp_path / "results" / "nvidia-h200"
    folder.mkdir(parents=True)
    (folder / "a.json").write_text(json.dumps(document()))
    older = document(date="2025-01-01T00:00:00Z", commit="old")
    older["problems"][0]["rows"][0]["times_limit"] = 9.0
    (folder / "b.json").write_text(json.dumps(older))
    make_results.write(tmp_path / "results", tmp_path / "RESULTS.md")
    text = (tmp_path / "RESULTS.md").read_text()
    assert "| verl: its time over ours | >= 2.30x |  | 2.40x | yes | NVIDIA H200, 2026-01-02, abc |" in text
    line = next(line for line in text.splitlines() if line.startswith("| policy loss forward + backward, over F3"))
    assert "1.10x | yes" in line  # must 1.15, stretch 1.05; the newest result counts
    assert f"| {make_results.EMPTY} |" in text
    assert "policy loss" in text and "torch 2.11" in text


def test_results_refuse_a_speed_that_was_refused(tmp_path):
    bad = document()
    bad["problems"][0]["status"] = "refused"
    folder = tmp_path / "x"
    folder.mkdir()
    (folder / "bad.json").write_text(json.dumps(bad))
    with pytest.raises(ValueError, match=r"bad\.json.*shows a speed"):
        make_results.read(tmp_path)


def test_gpu_driver_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert gpu.main(["--dry-run", "--part", "nothing"]) == 2
    assert "expected some of" in capsys.readouterr().err


def test_gpu_parts_fit_the_time():
    every = gpu.parts(dry_run=False)
    default = gpu.chosen(every, [])
    assert {"build", "tests-gpu", "linear", "moe", "advantage", "memcheck", "racecheck"} <= {p.name for p in default}
    assert all(part.seconds <= gpu.TOTAL_SECONDS / 2 for part in default)
    assert {part.name for part in gpu.chosen(every, ["sanitizer"])} == {"memcheck", "racecheck"}
    assert [(part.name, part.seconds) for part in gpu.chosen(every, ["moe=300"])] == [("moe", 300.0)]
    with pytest.raises(ValueError, match="moe=fast"):
        gpu.chosen(every, ["moe=fast"])


def test_dry_run_of_one_part(tmp_path):
    assert gpu.main(["--dry-run", "--part", "advantage", "--results", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*-advantage.json")
    found = json.loads(path.read_text())
    harness.validate(found)
    assert found["part"]["status"] == "ok" and found["problems"][0]["status"] == "ok"


@pytest.mark.parametrize(
    ("code", "status"), [("import time; time.sleep(60)", "timeout"), ("raise SystemExit(3)", "failed")]
)
def test_a_part_that_fails_leaves_a_result(code, status, tmp_path):
    path = tmp_path / "r.json"
    outcome = gpu.run_part(
        gpu.Part("p", (sys.executable, "-c", f"print('begun', flush=True); {code}"), 9), path, 2, "abc"
    )
    found = json.loads(path.read_text())
    harness.validate(found)
    assert outcome["status"] == found["part"]["status"] == status and outcome["tail"][0] == "begun"


def test_tests_out_of_time_leave_their_counts(tmp_path):
    """pytest writes its report when it is interrupted."""
    (tmp_path / "test_slow.py").write_text("import time\ndef test_a(): pass\ndef test_b(): time.sleep(60)\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    command = (
        sys.executable,
        "-m",
        "pytest",
        str(tmp_path),
        "-c",
        str(tmp_path / "pytest.ini"),
        "-p",
        "no:cacheprovider",
    )
    part = gpu.Part("p", (*command, "--junitxml", "{xml}"), 9, "tests")
    outcome = gpu.run_part(part, tmp_path / "r.json", 6, "abc")
    assert outcome["status"] == "timeout" and outcome["tests"]["passed"] == 1


def test_junit_tells_failures_from_what_was_not_collected(tmp_path):
    path = tmp_path / "j.xml"
    path.write_text(
        '<testsuites><testsuite><testcase classname="a" name="ok"/>'
        '<testcase classname="a" name="red"><failure message="no">x</failure></testcase>'
        '<testcase classname="" name="tests.test_x"><error message="collection failure">'
        "E   ModuleNotFoundError: No module named 'pydantic'\n</error></testcase></testsuite></testsuites>"
    )
    counts = gpu._junit(path)
    assert (counts["passed"], counts["failed"]) == (1, 1)
    assert counts["not collected"] == ["tests.test_x: No module named 'pydantic'"]


def test_tables(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    default = {"BLOCK": 1024, "num_warps": 4}
    assert tables.tuned("op", "k", default) == default and tables.asked()["op", "k"] == default
    path = tables.table_path("op", "NVIDIA Test 9")
    path.parent.mkdir(parents=True)
    entry = {"options": {"BLOCK": 2048}, "us": 1.0, "default_us": 2.0}
    path.write_text(json.dumps({"gpu": "NVIDIA Test 9", "entries": {"k": entry, "bad": {"options": {"TILE": 1}}}}))
    assert tables.gpus("op") == ["NVIDIA Test 9"]
    with tables.as_if("NVIDIA Test 9"):
        assert tables.tuned("op", "k", default) == {"BLOCK": 2048, "num_warps": 4}
        with tables.forced("op", "k", {"num_warps": 8}):
            assert tables.tuned("op", "k", default) == {"BLOCK": 1024, "num_warps": 8}
        with tables.as_if(""):
            assert tables.tuned("op", "k", default) == default
        with pytest.raises(ValueError, match="TILE"):
            tables.tuned("op", "bad", default)


def test_checked_in_tables_fit_their_gpu():
    for path in Path(tables.ROOT).glob("*/tables/*.json"):
        table = json.loads(path.read_text())
        assert tables.table_path(path.parent.parent.name, table["gpu"]) == path
        assert all({"options", "us", "default_us"} <= set(entry) for entry in table["entries"].values())


@pytest.mark.slow
def test_comparing_with_a_commit(tmp_path):
    with pytest.raises(ValueError, match="knows no commit"), compare.checkout("no-such-revision", harness.machine.ROOT):
        pass
    if subprocess.run(["git", "rev-parse", "HEAD"], cwd=harness.machine.ROOT, capture_output=True).returncode:
        pytest.skip("this copy is no git repository")
    options = Options(device=CPU, shapes=[{"B": 16, "N": 4}], rounds=2)
    found = compare.compare("advantage", "HEAD", options)
    harness.validate(found)
    ours, base = found["problems"][0]["rows"]
    assert ours["samples"] == base["samples"] == 2 and base["name"] == "base HEAD" and base["times_ours"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "printed"),
    [
        (["benchmarks.sanitize", "--device", "cpu", "--only", "linear_policy_loss"], "0 failed"),
        (["benchmarks.tune", "--dry-run", "--op", "linear_logprob"], "linear_logprob, gradient 4: default"),
    ],
)
def test_scripts_of_a_gpu_in_the_interpreter(script, printed):
    pytest.importorskip("triton")
    root = harness.machine.ROOT
    paths = os.pathsep.join([str(root), str(root / "kernels")])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-m", *script], env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert printed in done.stdout
