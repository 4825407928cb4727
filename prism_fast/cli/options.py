"""Options and arguments that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prism_fast.cli.command_line import home

ConfigFile = Annotated[Path | None, typer.Option("--config", help="YAML file, or the name of a recipe.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key.path=value overrides, values in YAML.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in run.out.")]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Check settings, paths and memory, print the plan, start and write nothing. Exit status 0: in order, "
        "1: does not fit the memory, 2: something is wrong or missing.",
    ),
]
AcceptChanges = Annotated[bool, typer.Option("--accept-changes", help="--resume with other settings or data.")]

Columns = Annotated[list[str] | None, typer.Option("--column", help="ours=theirs, for a field of another name.")]
ImageFolders = Annotated[
    list[Path] | None,
    typer.Option("--image-folder", callback=home, help="Where else images may lie, and are looked for; / anywhere."),
]
CacheFolder = Annotated[
    Path | None,
    typer.Option(
        "--cache", callback=home, help="Folder where pieces of large row groups stay; else in TMPDIR, for once."
    ),
]

# The deepspeed launcher puts it before the command, others behind; LOCAL_RANK says the same.
LocalRank = Annotated[int | None, typer.Option("--local_rank", "--local-rank", hidden=True)]
