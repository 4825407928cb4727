"""What a GPU machine lacks: how it is fetched and installed, and that nothing else is missing there."""

import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from benchmarks.catalog import CATALOG
from benchmarks.gpu import probe, wheels
from benchmarks.gpu.parts import STAGES, chosen, parts
from benchmarks.gpu.wheels import WHEELS, Wheel
from benchmarks.gpu.without import block
from benchmarks.harness import processes
from benchmarks.harness.machine import ROOT
from prism_kernels.dispatch import choose
from tests.kernels.tree_attention.fake_flash import FakeFlash

CPU = torch.device("cpu")
PURE = Wheel("absent-package", "1.2", "absent_module")


def test_exactly_the_list_is_fetched_and_what_fails_is_named(monkeypatch, tmp_path):
    asked = []

    def pip(command):
        asked.append(command)
        name, _, version = command[-1].partition("==")
        if name == "hjson":
            return "no matching distribution"
        (tmp_path / f"{name.replace('-', '_')}-{version}-py3-none-any.whl").write_bytes(b"x")
        return ""

    monkeypatch.setattr(wheels, "_run", pip)
    (tmp_path / "another-1.0-py3-none-any.whl").touch()
    failed = wheels.fetch(tmp_path)
    assert [command[-1] for command in asked] == [wheel.pin for wheel in WHEELS]
    assert all("--no-deps" in command and str(tmp_path) in command for command in asked)
    assert failed == [
        "hjson==3.1.0: no matching distribution", "another-1.0-py3-none-any.whl: not in the list; remove it",
    ]  # fmt: skip
    asked.clear()
    wheels.fetch(tmp_path)
    assert [command[-1] for command in asked] == ["hjson==3.1.0"]  # the others are there
    monkeypatch.setattr(wheels, "LIMIT_BYTES", 3)
    assert "expected at most 0 MB" in wheels.fetch(tmp_path)[-1]


def make_wheel(folder):
    name = "absent_package-1.2"
    with zipfile.ZipFile(folder / f"{name}-py3-none-any.whl", "w") as file:
        file.writestr("absent_module.py", "HERE = True\n")
        file.writestr(f"{name}.dist-info/METADATA", "Metadata-Version: 2.1\nName: absent-package\nVersion: 1.2\n")
        file.writestr(f"{name}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{name}.dist-info/RECORD", "")


def test_what_is_missing_is_installed_aside(tmp_path):
    make_wheel(tmp_path)
    site = tmp_path / "site"
    lines = wheels.install(tmp_path, site, [PURE, Wheel("never-made", "1", "never_made")])
    assert lines[0] == f"wheels: installed into {site}: absent-package" and (site / "absent_module.py").exists()
    assert "not installed, and not in" in lines[1] and "never-made" in lines[1] and "benchmarks.gpu.wheels" in lines[1]
    assert not wheels.is_there(PURE) and wheels.is_there(Wheel("torch", "1", "torch"))  # of any version


def test_a_wheel_that_does_not_install_is_told(tmp_path):
    (tmp_path / "absent_package-1.2-py3-none-any.whl").write_bytes(b"no archive")
    (line,) = wheels.install(tmp_path, tmp_path / "site", [PURE])
    assert line.startswith("wheels: ERROR") and "\n" not in line


def run_without(site, code, *words):
    environment = processes.environment()
    environment["PYTHONPATH"] = os.pathsep.join([str(site), environment["PYTHONPATH"]])
    return subprocess.run([sys.executable, *words, *code], env=environment, cwd=ROOT, capture_output=True, text=True)


def test_blocked_modules_come_from_the_wheels_or_not_at_all(tmp_path):
    (tmp_path / "pydantic.py").write_text("FROM_A_WHEEL = True\n")
    block(["pydantic", "hypothesis"], tmp_path)
    code = "import pydantic, jinja2; assert pydantic.FROM_A_WHEEL\nimport hypothesis"
    done = run_without(tmp_path, ["-c", code])
    assert done.returncode == 1 and done.stderr.strip().endswith("ModuleNotFoundError: No module named 'hypothesis'")


EVERYTHING = """
import importlib
from benchmarks.catalog import CATALOG, load
from benchmarks.gpu import __main__, probe, sanitize, tune, wheels
for op in CATALOG:
    load(op)
try:
    import datasets
except ModuleNotFoundError:
    print("all there")
"""


@pytest.mark.slow
def test_with_the_wheels_nothing_is_missing(tmp_path):
    """All that parts import, and all tests that they collect, where packages that the machine has never had are those
    of the list or none: copies of this environment's stand for installed wheels."""
    for wheel in WHEELS:
        spec = importlib.util.find_spec(wheel.module)
        if wheel.absent and spec is not None:
            place = Path(spec.origin).parent if spec.submodule_search_locations else Path(spec.origin)
            (tmp_path / place.name).symlink_to(place)
    block(wheels.blocked(), tmp_path)
    done = run_without(tmp_path, ["-c", EVERYTHING])
    assert done.stdout.strip().endswith("all there"), done.stderr
    collect = ["-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", "-m", "gpu or slow", "tests"]
    done = run_without(tmp_path, collect)
    assert done.returncode == 0, done.stdout[-2000:]


def test_the_driver_needs_torch_alone(tmp_path):
    """Without wheels it still says what it would do."""
    block([*wheels.blocked(), "transformers", "triton", "numpy", "PIL"], tmp_path)
    done = run_without(tmp_path, ["-m", "benchmarks.gpu", "--list"])
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(parts(dry_run=False))


@pytest.mark.parametrize("dry_run", [False, True])
def test_every_part_has_a_command_that_is_there(dry_run):
    for part in chosen(parts(dry_run), [*STAGES, "tune", "train-4b"]):
        python, *words = part.command
        assert python == sys.executable and part.seconds > 0
        if words[0] == "-m":
            assert importlib.util.find_spec(words[1]) is not None
        if words[1:2] == ["benchmarks"]:
            assert words[2] in CATALOG and "{json}" in words and part.writes
        if words[1:2] == ["pytest"]:
            assert "{xml}" in words
            assert all((ROOT / word.partition("::")[0]).exists() for word in words if word.startswith("tests"))


# ---- probes, on a library's stand-in


class Aten:
    def __init__(self, nothing=float("inf"), base=1.0):
        flash = FakeFlash(nothing)
        self._flash_attention_backward = flash.backward

        def forward(*given, **named):
            out, lse, *more = flash.forward(*given, **named)
            return out, lse * base, *more

        self._flash_attention_forward = forward


@pytest.mark.parametrize(("aten", "said"), [(Aten(), "ok: "), (Aten(float("-inf")), "ok: "), (Aten(base=1.44), "base")])
def test_the_probe_of_flash_holds_for_what_the_kernels_rely_on(monkeypatch, capsys, aten, said):
    monkeypatch.setattr(probe, "_aten", lambda: aten)
    torch.manual_seed(0)
    failed = probe.run([probe.flash_on_device], CPU)
    printed = capsys.readouterr().out
    assert said in printed and bool(failed) == ("NOT AS EXPECTED" in printed) == (said == "base")


def test_another_schema_is_named(monkeypatch, capsys):
    assert probe.run([probe.flash_schema], CPU) == 0
    monkeypatch.setitem(probe.FLASH, "_flash_attention_backward", "grad_out query key value another")
    assert probe.run([probe.flash_schema], CPU) == 1
    printed = capsys.readouterr().out
    assert "aten::_flash_attention_backward" in printed and "expected it to begin with grad_out query" in printed
    remedy = probe.REMEDIES["flash_schema"]
    assert f"remedy: {remedy}\n" in printed
    monkeypatch.setenv(*remedy.split("=", 1))
    assert choose("tree_attention", "auto", "cpu") == choose("segment_attention", "auto", "cpu") == "sdpa"


def test_the_other_probes_say_what_a_cpu_lacks(capsys):
    """None stops the others."""
    assert probe.run([probe.fp32_out, probe.grouped_mm, probe.what_is_here], CPU) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "NOT AS EXPECTED: NotImplementedError" in lines[0] and "ok: off by" in lines[1] and "ok: Python" in lines[2]
