"""prism-fast doctor: what this machine has, and what runs on it."""

from __future__ import annotations

import os

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer()


@app.command()
def doctor() -> None:
    """Hardware, versions, and which implementation each op uses and why."""
    from prism_fast.models.captured import capture_of_decoding
    from prism_fast.run.environment import build_locks, environment, tools
    from prism_kernels import which_impl

    console = Console()
    facts = environment()
    for name, value in facts.items():
        if name != "packages":
            console.print(f"{name:10} {value}", highlight=False)
    for name, value in facts["packages"].items():
        console.print(f"{name:14} {value or 'not installed'}", highlight=False)
    for name, value in tools().items():
        console.print(f"{name:14} {value or 'not found'}", highlight=False)
    table = Table("op", "implementation", "why")
    for op, (impl, reason) in which_impl().items():
        table.add_row(op, impl, reason)
    console.print(table)
    implementation, reason = which_impl()["adamw_step"]
    if implementation == "reference" and "PRISM_IMPL" not in reason:
        said = f"optimizer: torch.optim.AdamW, as only the definition of adamw_step runs here ({reason})"
        console.print(said, markup=False, highlight=False, soft_wrap=True)
    console.print(f"a token of sampling: {capture_of_decoding()}", highlight=False)
    for line in build_locks(os.environ):
        console.print(f"warning: {line}", markup=False, highlight=False, soft_wrap=True)
