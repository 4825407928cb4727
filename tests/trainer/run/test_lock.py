"""One process at a time in a folder; a dead one holds nothing."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from prism_fast.records import DataError
from prism_fast.run.lock import FolderLock

ROOT = Path(__file__).parents[3]
HOLD = """
import os, sys, time
from pathlib import Path
from prism_fast.run.lock import FolderLock
with FolderLock(Path(sys.argv[1])):
    child = os.fork()  # it outlives its parent, and must not hold the lock for it
    if child == 0:
        os.close(1)
        time.sleep(30)
        os._exit(0)
    print(child, flush=True)
    time.sleep(30)
"""


def test_a_folder_is_held_once_and_by_its_holder_alone(tmp_path):
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        text=True,
    )
    child = int(process.stdout.readline())
    try:
        with pytest.raises(DataError, match=rf"run: in use by process {process.pid} on .+ since .+; wait for it"):
            FolderLock(tmp_path / "run").__enter__()
        process.send_signal(signal.SIGKILL)
        process.wait()
        with FolderLock(tmp_path / "run"):
            assert str(os.getpid()) in (tmp_path / "run/run.lock").read_text()
    finally:
        os.kill(child, signal.SIGKILL)
        process.kill()
        process.wait()
        process.stdout.close()


def test_two_of_one_process_exclude_each_other(tmp_path):
    with FolderLock(tmp_path), pytest.raises(DataError, match="in use by process"):
        FolderLock(tmp_path).__enter__()
    with FolderLock(tmp_path):
        pass


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"pid": 1}'])
def test_a_holder_without_a_name_is_another_process(text, tmp_path):
    with FolderLock(tmp_path):
        (tmp_path / "run.lock").write_text(text)
        with pytest.raises(DataError, match="in use by another process"):
            FolderLock(tmp_path).__enter__()


def test_a_file_system_without_locks_holds_nothing(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("prism_fast.run.lock.fcntl.flock", refuse)
    with FolderLock(tmp_path) as lock:
        assert not lock.supported


def test_a_lock_file_that_is_a_folder_is_one_line(tmp_path):
    (tmp_path / "run.lock").mkdir()
    with pytest.raises(DataError, match=r"run\.lock: cannot be written"):
        FolderLock(tmp_path).__enter__()
