"""prism-fast bench: the benchmarks of a clone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import typer

from prism_fast import DataError

app = typer.Typer()

CLONE = Path(__file__).resolve().parents[2]  # where the package lies in a clone; benchmarks/ is not installed


# Every argument is the benchmark's own, --help too: what ships knows nothing of what does not.
@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def bench(context: typer.Context) -> None:
    """Time, memory and error of an op beside its peers, or of a whole step (needs a clone): bench OP --help."""
    if not (CLONE / "benchmarks" / "__main__.py").is_file():
        raise DataError(
            f"bench: {CLONE} holds no benchmarks/, which is not part of the installed package; run it from a clone "
            "(git clone, pip install -e ., prism-fast bench ...)"
        )
    # The clone's benchmarks/ must win over anything installed under that name, and over the current folder's, which
    # python would put first; so this is `python -m benchmarks`, without that folder.
    start = "import runpy, sys; del sys.path[0]; runpy.run_module('benchmarks', run_name='__main__', alter_sys=True)"
    path = [str(CLONE), str(CLONE / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    sys.stdout.flush()
    benchmark = subprocess.Popen(
        [sys.executable, "-c", start, *context.args], env={**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    )
    try:
        status = benchmark.wait()
    except KeyboardInterrupt:  # a terminal has sent it to the benchmark too, which ends by itself
        try:
            status = benchmark.wait(timeout=10)
        except subprocess.TimeoutExpired:
            benchmark.terminate()
            status = benchmark.wait()
    sys.exit(status if status >= 0 else 128 - status)
