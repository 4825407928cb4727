"""Several processes on one machine, with a time limit: each runs a list of cases, the first one reports."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 900  # for one launch; a process that hangs is killed then, and what it was doing is printed


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def environment(rank: int, world: int, port: int) -> dict[str, str]:
    """As torchrun sets it; world 0: one process that was started by itself."""
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    kept |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "PYTHONFAULTHANDLER": "1"}
    if world:
        kept |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
        kept |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return kept


def launch(
    command: Sequence[str], world: int, *, seconds: float = SECONDS, environ: Mapping[str, str] | None = None
) -> list[subprocess.CompletedProcess[str]]:
    """``python COMMAND`` in ``world`` processes (0: one, by itself); their ends, by rank.

    As under torchrun the others are ended when one fails. What outlives ``seconds``, or that by 15 s, is killed, and
    prints its stacks.
    """
    port = free_port()
    # Files, not pipes: nobody reads while they run, and one whose pipe is full would wait for ever.
    said = [(tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")) for _ in range(max(1, world))]  # noqa: SIM115
    started = [
        subprocess.Popen(
            [sys.executable, *command],
            env={**environment(rank, world, port), **(environ or {})},
            stdout=out,
            stderr=errors,
            text=True,
            cwd=ROOT,
        )
        for rank, (out, errors) in enumerate(said)
    ]
    end = time.monotonic() + seconds
    failed = False
    while any(process.poll() is None for process in started) and time.monotonic() < end:
        if not failed and any(process.poll() not in (None, 0) for process in started):
            failed, end = True, min(end, time.monotonic() + 15)
            for process in started:
                process.terminate()
        time.sleep(0.05)
    for process in started:
        if process.poll() is None:
            process.send_signal(signal.SIGABRT)  # faulthandler prints the stacks
    ends = []
    for process, files in zip(started, said):
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        texts = []
        for file in files:
            with file:
                file.seek(0)
                texts.append(file.read())
        ends.append(subprocess.CompletedProcess(command, process.returncode, *texts))
    return ends


def play(module: str, cases: Sequence[Mapping[str, Any]], world: int, folder: Path) -> list[dict[str, Tensor]]:
    """The results of each case of a scenario module, as its first process found them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cases.json").write_text(json.dumps(list(cases)))
    ends = launch(["-m", module, str(folder)], world)
    said = "".join(f"\nrank {rank}: status {end.returncode}\n{end.stderr[-4000:]}" for rank, end in enumerate(ends))
    assert not any(end.returncode for end in ends), said
    return [load_file(folder / f"{i}.safetensors") for i in range(len(cases))]
