"""What doctor looks for besides hardware and versions."""

import os

from prism_fast.run.environment import build_locks, environment, tools


def test_locks_of_builds_that_were_killed_are_named(tmp_path):
    lock = tmp_path / "torch_extensions" / "py311_cpu" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    (lock.parent / "cpu_adam.so").touch()
    assert list(build_locks({"XDG_CACHE_HOME": str(tmp_path)})) == []
    lock.touch()
    os.utime(lock, (0, lock.stat().st_mtime - 7200))
    for environ in ({"XDG_CACHE_HOME": str(tmp_path)}, {"TORCH_EXTENSIONS_DIR": str(tmp_path / "torch_extensions")}):
        (line,) = build_locks(environ)
        assert line.startswith(f"{lock}: a build's lock, 120 minutes old; ") and "remove it" in line
    assert list(build_locks({"TORCH_EXTENSIONS_DIR": str(tmp_path / "none")})) == []


def test_tools_are_asked_for_their_versions(tmp_path, monkeypatch):
    for name, says in (
        ("nvcc", "nvcc: NVIDIA\nCuda compilation tools, release 13.0, V13.0.88\nBuild x"),
        ("ninja", "1.11"),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\necho '{says}'\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    found = tools()
    assert found["nvcc"] == "Cuda compilation tools, release 13.0, V13.0.88" and found["ninja"] == "1.11"
    (tmp_path / "ninja").write_bytes(b"\x7fELF")
    assert "does not run (OSError)" in tools()["ninja"]
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    assert tools()["nvcc"] is tools()["ninja"] is None
    assert "deepspeed" in environment()["packages"]
