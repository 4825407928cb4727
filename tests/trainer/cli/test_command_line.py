"""What all commands share: threads that wait, Ctrl-C, and how each of them ends."""

import os
import subprocess
import sys

import pytest

from tests.trainer.test_cli import run

WAYS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


@pytest.mark.parametrize(("user", "left"), [({}, [None, "10000", "1"]), ({WAYS[0]: "ACTIVE"}, ["ACTIVE", None, None])])
def test_threads_spin_briefly_unless_the_user_says_how(user, left):
    """Told before torch is loaded, which reads it once."""
    code = (
        "import os, sys; from prism_fast import cli\n"
        "sys.argv = ['prism-fast', '--help']\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        f"print([os.environ.get(name) for name in {WAYS!r}], file=sys.stderr)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name not in WAYS} | user
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stderr == f"{left}\n"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["sfft"], "prism-fast: No such command 'sfft'"),
        (["--bogus"], "prism-fast: No such option: --bogus"),
        (["sft", "--bogus"], "prism-fast sft: No such option: --bogus"),
        (["demo"], "prism-fast demo: Missing option '--out'"),
        (["demo", "--out", "x", "--seed", "-1"], "prism-fast demo: Invalid value for '--seed'"),
        (["demo", "--out", "x", "--seed", str(2**70)], "prism-fast demo: Invalid value for '--seed'"),
        (["data", "chekc"], "prism-fast data: No such command 'chekc'"),
    ],
)
def test_a_wrong_command_line_is_one_line(words, says, capsys, monkeypatch):
    status, out, err = run(capsys, monkeypatch, *words)
    assert status == 2 and err.startswith(f"error: {says}") and err.count("\n") == 1 and not out


def test_an_interrupted_command_says_so(monkeypatch, capsys, tmp_path):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("prism_fast.data.check.check", interrupted)
    status, _, err = run(capsys, monkeypatch, "data", "check", tmp_path / "x.json")
    assert status == 130 and err.startswith("stopped; ")


SLOW = """
import os, signal, sys
class Slow:  # an import during which Ctrl-C is pressed
    def find_spec(self, name, *_):
        if name == sys.argv[1]:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Slow())
from prism_fast.__main__ import main
words = ["model.path=m", "data.files=d", "optimizer.lr=1e-3", "steps=1", "run.out=" + sys.argv[2]]
sys.argv = ["prism-fast", "sft", *words]
main()
"""


@pytest.mark.parametrize("module", ["typer", "prism_fast.cli", "pydantic", "torch"])
def test_ctrl_c_while_libraries_are_imported_is_one_line(module, tmp_path):
    code = SLOW.replace("sys.argv[1]", repr(module)).replace("sys.argv[2]", repr(str(tmp_path / "run")))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 130 and done.stderr == "stopped; what was not saved by a checkpoint is lost\n", (
        done.stderr
    )
    assert not (tmp_path / "run").exists()


def test_a_disk_that_refuses_is_one_line(capsys, monkeypatch):
    def refuse(*args):
        raise OSError(28, "No space left on device", "runs/eval.json")

    monkeypatch.setattr("prism_fast.run.environment.environment", refuse)
    status, _, err = run(capsys, monkeypatch, "doctor")
    assert status == 2 and err.startswith("error: runs/eval.json: No space left on device; ") and err.count("\n") == 1
