"""`make gpu` without a GPU: its parts, how they run at once and in turn, what it refuses; the scripts of the parts."""

import json
import os
import re
import subprocess
import sys
import tarfile
import time

import pytest
import torch

from benchmarks.catalog import CATALOG
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import run, sanitize
from benchmarks.gpu.parts import ELSEWHERE, STAGE_SECONDS, STAGES, STRESS, Part, by_stage, chosen, parts
from benchmarks.harness import document, processes
from benchmarks.harness.machine import ROOT

CPU = torch.device("cpu")


def test_gpu_driver_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert gpu.main(["--dry-run", "--part", "nothing"]) == 2
    assert "expected some of" in capsys.readouterr().err


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_fits_ten_minutes(stage):
    """With what the driver needs before and after, and the seconds in which a part that is out of time may write."""
    batches = run.batches(chosen(parts(dry_run=False), [stage]))
    seconds = sum(max(part.seconds for part in batch) for batch in batches)
    assert seconds <= STAGE_SECONDS <= 600 - 2 * run.GRACE_SECONDS - 20
    assert batches[0][0].name == "build"  # it is left out where it is built


def test_what_counts_most_comes_first():
    """A whole step of a 4B policy, once there is an extension; then attention, and the step of both models."""
    batches = run.batches(chosen(parts(dry_run=False), ["first"]))
    assert [part.name for part in batches[0]] == ["build", "probe"]
    names = [batch[0].name for batch in batches[1:]]
    assert names[:3] == ["first-rlvr", "first-attention", "first-align"] and "stress" in names
    (step,), (attention,) = batches[1:3]
    assert step.command[2:5] == ("benchmarks", "step", "--device") and step.writes and attention.writes
    assert sum(max(part.seconds for part in batch) for batch in batches[:2]) <= 240


def test_checks_run_at_once_and_speeds_alone():
    build, checks = run.batches(chosen(parts(dry_run=False), ["checks"]))
    assert [part.name for part in build] == ["build"]
    assert {part.name.partition("-")[0] for part in checks} == {"tests", "memcheck", "racecheck"}
    _, *benchmarks = run.batches(chosen(parts(dry_run=False), ["speed"]))
    assert all(len(batch) == 1 and batch[0].writes for batch in benchmarks)
    assert len(benchmarks) == sum(bool(entry.part) and not entry.asked for entry in CATALOG.values())


def test_without_names_every_stage_has_a_total_of_its_own():
    every = chosen(parts(dry_run=False), [])
    stages = by_stage(every, [])
    assert [part for stage in stages for part in stage] == every and len(stages) == 3
    assert [stage[-1].groups[0] for stage in stages] == list(STAGES)
    assert by_stage(every[3:5], ["moe"]) == [every[3:5]]


def test_gpu_parts_by_name_and_group():
    every = parts(dry_run=False)

    def names(*given):
        return {part.name for part in chosen(every, given)}

    checks = {f"{check}-{op}" for check in ("tests", "memcheck", "racecheck") for op in ("moe", "advantage")}
    assert names("moe") == checks | {"bench-moe", "bench-advantage", "bench-discriminator"}
    assert names("first") == {"build", "probe", "stress"} | {name for name in names(*STAGES) if "first-" in name}
    assert names("linear") == {"tests-linear", "memcheck-linear", "racecheck-linear", "bench-linear", "bench-policy"}
    assert names("sanitizer") == names("memcheck", "racecheck") and len(names("memcheck")) == 8
    assert [(part.name, part.seconds) for part in chosen(every, ["bench-moe=300"])] == [("bench-moe", 300.0)]
    seconds = {part.name: part.seconds for part in chosen(every, ["benchmarks=200", "bench-moe=300"])}
    assert seconds["bench-moe"] == 300 and seconds["bench-linear"] == 200
    with pytest.raises(ValueError, match="moe=fast"):
        chosen(every, ["moe=fast"])


def test_every_test_of_the_gpu_is_in_one_part():
    """An op's folder in its own part, the rest in "tests-other"."""
    every = {part.name: part.command for part in parts(dry_run=False)}
    ops = ("advantage", "linear", "moe", "attention", "rms_norm", "swiglu", "update")
    folders = [every[f"tests-{op}"][-1] for op in ops]
    assert [*folders, *ELSEWHERE] == [word for word in every["tests-other"] if word.startswith("tests/")]
    marked = [path.parent.name for path in (ROOT / "tests").glob("*/conftest.py")]
    assert {f"tests/{name}" for name in marked if name in ("embed", "eval", "vllm")} == set(ELSEWHERE)
    for folder in folders:
        assert list((ROOT / folder).glob("test_*.py"))
    assert folders == [entry.tests for entry in CATALOG.values() if entry.tests and entry.part]


def test_the_stress_tests_are_there():
    for place in STRESS:
        file, _, name = place.partition("::")
        path = ROOT / file
        assert path.exists() and (not name or f"def {name}(" in path.read_text()), place


@pytest.fixture
def kept_path(monkeypatch):
    """A dry run changes the environment of what it starts."""
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))


def test_dry_run_of_one_part(tmp_path, kept_path):
    files = ["--results", str(tmp_path / "machine"), "--archive", str(tmp_path / "all.tar.gz")]
    assert gpu.main(["--dry-run", "--part", "bench-advantage", "--wheels", str(tmp_path), *files]) == 0
    (path,) = tmp_path.glob("machine/*-advantage.json")
    found = json.loads(path.read_text())
    document.validate(found)
    assert found["part"]["status"] == "ok" and found["problems"][0]["status"] == "ok"
    with tarfile.open(tmp_path / "all.tar.gz") as packed:
        assert packed.getnames() == [f"machine/{path.name}"]
        assert json.load(packed.extractfile(f"machine/{path.name}")) == found


def test_results_are_packed_after_every_part(tmp_path):
    """Also while others of its batch still run."""
    folder, seen = tmp_path / "machine", []
    folder.mkdir()
    archive = run.Archive(tmp_path / "out" / "all.tar.gz", folder)

    def ended(future):
        archive.pack()
        with tarfile.open(archive.path) as packed:
            seen.append(sorted(name.rpartition("-")[2] for name in packed.getnames()))

    todo = [script("a", "pass", beside="x"), script("b", "import time; time.sleep(2)", beside="x"), script("c", "pass")]
    run.run_all(todo, folder, "abc", 60, ended)
    assert seen == [["a.json"], ["a.json", "b.json"], ["a.json", "b.json", "c.json"]]


@pytest.mark.parametrize(
    ("code", "status"), [("import time; time.sleep(60)", "timeout"), ("raise SystemExit(3)", "failed")]
)
def test_a_part_that_fails_leaves_a_result(code, status, tmp_path):
    path = tmp_path / "r.json"
    outcome = run.Runner().part(
        Part("p", (sys.executable, "-c", f"print('begun', flush=True); {code}"), 9), path, 2, "abc"
    )
    found = json.loads(path.read_text())
    document.validate(found)
    assert outcome["status"] == found["part"]["status"] == status and outcome["tail"][0] == "begun"


def script(name, code, seconds=20.0, beside="", **more):
    return Part(name, (sys.executable, "-c", code), seconds, beside=beside, **more)


MEET = """
import pathlib, sys, time
folder, mine, other = sys.argv[1:] if len(sys.argv) > 1 else {words!r}
pathlib.Path(folder, mine).touch()
began = time.monotonic()
while not pathlib.Path(folder, other).exists():
    assert time.monotonic() - began < 15, "alone"
    time.sleep(0.01)
"""


def test_checks_run_at_once_and_cost_each_other_nothing(tmp_path, capsys):
    """Two wait for each other; the third fails; what runs alone comes after them, by itself."""
    folder = tmp_path / "results"
    folder.mkdir()
    todo = [
        script("a", MEET.format(words=[str(tmp_path), "a", "b"]), beside="x"),
        script("b", MEET.format(words=[str(tmp_path), "b", "a"]) + "print('met')", beside="x"),
        script("c", "raise SystemExit(3)", beside="x"),
        script("d", "import pathlib, sys; pathlib.Path({!r}).touch()".format(str(tmp_path / "d"))),
    ]
    outcomes = run.run_all(todo, folder, "abc", total=60)
    assert [(found["name"], found["status"]) for found in outcomes] == [
        ("a", "ok"), ("b", "ok"), ("c", "failed"), ("d", "ok"),
    ]  # fmt: skip
    assert "[b] met" in capsys.readouterr().out
    assert len(list(folder.glob("*-abc-?.json"))) == 4
    assert [[part.name for part in batch] for batch in run.batches(todo)] == [["a", "b", "c"], ["d"]]


def test_a_part_takes_what_is_left_over_and_no_more(tmp_path):
    """a is sure of 1 s of 12 and has 12 - 9; what b is sure of stays."""
    todo = [script("a", "import time; time.sleep(60)", 1), script("b", "pass", 9)]
    first, second = run.run_all(todo, tmp_path, "abc", total=12)
    assert first["status"] == "timeout" and 1 <= first["budget_seconds"] <= 3
    assert second["status"] == "ok" and 3 < second["budget_seconds"] <= 9


def test_what_has_no_time_left_says_so(tmp_path):
    todo = [script("a", "pass"), script("b", "pass")]
    assert [found["status"] for found in run.run_all(todo, tmp_path, "abc", total=1)] == ["not run", "not run"]


def test_an_interrupt_stops_what_runs_and_keeps_its_result(tmp_path, monkeypatch):
    begun = [tmp_path / "begun-a", tmp_path / "begun-b"]

    def interrupted(futures):
        while not all(path.exists() for path in begun):
            time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "wait", interrupted)
    slow = "import pathlib, time; print('begun', flush=True); pathlib.Path({!r}).touch(); time.sleep(60)"
    todo = [script(name, slow.format(str(path)), beside="x") for name, path in zip("ab", begun)]
    outcomes = run.run_all([*todo, script("c", "pass")], tmp_path, "abc", 90)
    assert [found["status"] for found in outcomes] == ["interrupted", "interrupted", "not run"]
    assert json.loads(next(tmp_path.glob("*-a.json")).read_text())["part"]["tail"][0] == "begun"


def test_benchmarks_take_the_remedy_that_a_probe_names(tmp_path, capsys):
    """Tests do not: they are to say what does not work."""
    show = "import os; print('with', os.environ.get('PRISM_IMPL'))"
    todo = [
        script("probe", "print('remedy: PRISM_IMPL=tree_attention=sdpa')"),
        script("bench-x", show, writes=True), script("tests-x", show),
    ]  # fmt: skip
    _, bench, tests = run.run_all(todo, tmp_path, "abc", 60)
    assert bench["tail"] == ["with tree_attention=sdpa"] and tests["tail"] == ["with None"]
    assert bench["environment"] == {"PRISM_IMPL": "tree_attention=sdpa"} and "environment" not in tests


def test_no_speed_is_printed_where_the_tests_failed(tmp_path, capsys):
    red = tmp_path / "test_red.py"
    red.write_text("def test_red():\n    assert False\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    pytest_command = ("-m", "pytest", str(red), "-c", str(tmp_path / "pytest.ini"), "-p", "no:cacheprovider")
    tests = Part("tests-x", (sys.executable, *pytest_command, "--junitxml", "{xml}"), 20)
    todo = [tests, script("bench-x", "print('1.5 TFLOP/s')", writes=True)]
    assert [found["status"] for found in run.run_all(todo, tmp_path, "abc", 60)] == ["failed", "ok"]
    printed = capsys.readouterr().out
    assert "no speed is shown" in printed and "TFLOP" not in printed


def test_tests_out_of_time_leave_their_counts(tmp_path):
    """pytest writes its report when it is interrupted."""
    (tmp_path / "test_slow.py").write_text("import time\ndef test_a(): pass\ndef test_b(): time.sleep(60)\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    command = ("-m", "pytest", str(tmp_path), "-c", str(tmp_path / "pytest.ini"), "-p", "no:cacheprovider")
    part = Part("p", (sys.executable, *command, "--junitxml", "{xml}"), 9)
    outcome = run.Runner().part(part, tmp_path / "r.json", 6, "abc")
    assert outcome["status"] == "timeout" and outcome["tests"]["passed"] == 1


def test_junit_tells_failures_from_what_was_not_collected(tmp_path):
    path = tmp_path / "j.xml"
    path.write_text(
        '<testsuites><testsuite><testcase classname="a" name="ok"/>'
        '<testcase classname="a" name="red"><failure message="no">x</failure></testcase>'
        '<testcase classname="" name="tests.test_x"><error message="collection failure">'
        "E   ModuleNotFoundError: No module named 'pydantic'\n</error></testcase></testsuite></testsuites>"
    )
    counts = run._junit(path)
    assert (counts["passed"], counts["failed"]) == (1, 1)
    assert counts["not collected"] == ["tests.test_x: No module named 'pydantic'"]


def interpreted(*words):
    """Standard output of a script in Triton's interpreter, which must be chosen before triton is imported."""
    pytest.importorskip("triton")
    environment = processes.environment(TRITON_INTERPRET="1")
    done = subprocess.run([sys.executable, *words], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_tuning_in_the_interpreter():
    printed = interpreted("-m", "benchmarks.gpu.tune", "--dry-run", "--op", "linear_logprob")
    assert "linear_logprob, gradient 4: default" in printed


RECORD_LAUNCHES = """
import sys
from triton.runtime.interpreter import InterpretedFunction
launched, run = set(), InterpretedFunction.run
InterpretedFunction.run = lambda self, *given, **named: (launched.add(self.fn.__name__), run(self, *given, **named))[1]
from benchmarks.gpu import sanitize
from prism_kernels.group_advantage import triton_kernel
triton_kernel.I_BLOCK = triton_kernel.J_BLOCK = 16  # more responses in a program, which takes milliseconds
status = sanitize.main(["--device", "cpu"])
print("launched:", *sorted(launched))
sys.exit(status)
"""


@pytest.mark.slow
def test_the_sanitizer_sees_every_kernel():
    """What is decorated and not named as a helper, by "_", is launched; and the sanitizer's filter names it."""
    pytest.importorskip("triton")
    sources = (ROOT / "kernels" / "prism_kernels").glob("*/*.py")
    decorated = {
        name
        for path in sources
        for name in re.findall(r"^@triton\.jit\b.*\n(?:@.*\n)*def ([a-z]\w*)", path.read_text(), re.MULTILINE)
    }
    *_, last = interpreted("-c", RECORD_LAUNCHES).splitlines()
    assert "moe_route_fwd_kernel" in decorated and set(last.split()[1:]) == decorated
    assert set(sanitize.kernel_names()) == decorated


def test_every_check_of_the_sanitizer_belongs_to_a_part():
    pytest.importorskip("triton")
    every = [part for part in parts(dry_run=False) if "memcheck" in part.groups]
    only = [part.command[part.command.index("--only") + 1] for part in every]
    for name in sanitize.checks(CPU):
        assert any(word in name for word in only), name
