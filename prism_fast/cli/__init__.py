"""prism-fast: demo | sft | upcycle | warmup | align | rlvr | eval | probe | serve-discriminator | report | data
| config | launch | plan | bench | doctor."""

from __future__ import annotations

import typer

from prism_fast.cli import bench, data, doctor, evaluation, runs, training
from prism_fast.cli.command_line import Commands, spin_briefly
from prism_fast.cli.options import LocalRank

app = typer.Typer(
    cls=Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__
)
for part in (training, evaluation, runs, bench, doctor):  # the order of the help text
    app.add_typer(part.app)
app.add_typer(data.app, name="data")


@app.callback()
def launched(local_rank: LocalRank = None) -> None:
    pass


def main() -> None:
    spin_briefly()
    app(prog_name="prism-fast")
