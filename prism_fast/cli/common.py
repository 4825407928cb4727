"""What commands share between their options and their end: settings, the dry run, bars and tables, what was made."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import typer
from rich.console import Console
from rich.table import Table

from prism_fast.cli.command_line import alone, place, quiet_libraries


def settings_of(cls, config: Path | None, overrides: list[str] | None, dry_run: bool = False, resume: bool = False):
    """The configuration of a command that opens models. ``dry_run`` ends the command."""
    from prism_fast.config import CONFIGS, load_config

    rank, world = place()
    say = print if rank == 0 else lambda *_, **__: None
    settings = load_config(cls, config, overrides or (), note=lambda text: say(f"note: {text}"))
    if not hasattr(settings, "cluster"):
        alone()
    if dry_run:
        stage = next(name for name, each in CONFIGS.items() if each is cls)
        dry_run_of(stage, settings, config, Console(highlight=False, quiet=rank > 0), world, resume)
    models = [getattr(settings, name).path for name in ("model", "policy", "discriminator") if hasattr(settings, name)]
    models += getattr(settings, "policies", ())
    files = settings.data.files if hasattr(settings, "data") else ()
    say(f"loading {', '.join(map(str, (*models, *files)))}", flush=True)
    quiet_libraries()
    return settings


def dry_run_of(
    stage: str, settings, config: Path | None, console: Console, processes: int = 1, resume: bool = False
) -> NoReturn:
    """Tells what a command with these settings would hold and lack, and ends with the status of that."""
    from prism_fast.data.kinds import glance
    from prism_fast.run import dry_run

    hint = "" if config is None else config.stem
    end_dry_run(dry_run.dry_run(stage, settings, glance, processes=processes, resume=resume, hint=hint), console)


def end_dry_run(found, console: Console) -> NoReturn:
    show_sections(console, found.sections)
    for note in found.notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    status = found.status
    end = "it would not fit the memory" if status else "in order"
    console.print(f"dry run: {end}; nothing was started or written")
    raise typer.Exit(status)


def say_done(stage: str, made: Path, config: Path | None, figures: str = "") -> None:
    from prism_fast.run.what_next import after

    print(f"done: {made}  {figures}".rstrip())
    for line in after(stage, made, "" if config is None else config.stem):
        print(f"next: {line}")


@contextlib.contextmanager
def responses_bar(console: Console, what: str = "responses") -> Iterator[Callable[[int, int], None]]:
    """A bar of the responses that are sampled: (done, in total) moves it."""
    from rich.progress import Progress

    with Progress(console=console) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def show_sections(console: Console, sections) -> None:
    for section in sections:
        console.print(section.title, style="bold")
        show_table(console, section.heads, section.rows)
        for note in section.notes:
            console.print(note)


def show_table(console: Console, heads: list[str], rows: list[list[str]]) -> None:
    table = Table(*heads)
    for row in rows:
        table.add_row(*row)
    console.print(table)
