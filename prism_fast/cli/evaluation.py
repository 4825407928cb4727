"""prism-fast eval | probe | serve-discriminator: what a policy or a discriminator is worth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from prism_fast.cli.command_line import interruptible
from prism_fast.cli.common import end_dry_run, responses_bar, settings_of, show_table
from prism_fast.cli.options import ConfigFile, DryRun, Overrides

app = typer.Typer()


def _amount(accuracy: float) -> str:
    """A share, or any number where a reward function of the user's own gives it."""
    return f"{accuracy:.1%}" if 0 <= accuracy <= 1 else f"{accuracy:.4g}"


@app.command("eval")
def evaluate(
    lmms: Annotated[
        str | None,
        typer.Option(metavar="TASKS", help="Tasks of lmms-eval, or paper, paper-math, paper-general, paper-rules."),
    ] = None,
    config: ConfigFile = None,
    dry_run: DryRun = False,
    overrides: Overrides = None,
) -> None:
    """Accuracy of a policy on held-out prompts: pass@1, mean of k, by question type; or on benchmarks, by lmms-eval."""
    if lmms is not None:
        return _benchmarks(lmms, config, dry_run, overrides)
    from prism_fast.config import EvaluateConfig
    from prism_fast.files import try_new

    settings = settings_of(EvaluateConfig, config, overrides, dry_run)
    try_new(settings.out)
    from prism_fast.stages.evaluate import evaluate_policy

    interruptible()
    console = Console()
    with responses_bar(console) as progress:
        result, held_out = evaluate_policy(settings, progress)
    table = Table("question type", "prompts", "pass@1" if settings.eval.samples == 1 else f"mean of {result.samples}")
    for kind, row in result.by_type.items():
        table.add_row(kind, str(int(row["count"]) // result.samples), _amount(row["accuracy"]))
    table.add_row("all", str(len(held_out)), _amount(result.accuracy), style="bold")
    console.print(table)
    for name, value in result.figures().items():
        console.print(f"{name} {value:.4g}")
    for line in held_out.skipped:
        console.print(f"skipped: {line}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"written: {settings.out}", soft_wrap=True)


def _benchmarks(words: str, config: Path | None, dry_run: bool, overrides: list[str] | None) -> None:
    from prism_fast.config import BenchmarksConfig
    from prism_fast.stages.lmms.benchmarks import tasks_of

    tasks = tasks_of(words)
    settings = settings_of(BenchmarksConfig, config, overrides)
    if dry_run:
        from prism_fast.run.dry_run import dry_benchmarks

        end_dry_run(dry_benchmarks(settings), Console(highlight=False))
    from prism_fast.stages.lmms.launch import evaluate_on
    from prism_fast.stages.lmms.table import table, write_table

    interruptible()
    console = Console(highlight=False)
    found = evaluate_on(settings, tasks, say=lambda text: console.print(text, markup=False, soft_wrap=True))
    heads, rows = table(found)
    show_table(console, heads, rows)
    write_table(settings.out / "table.md", heads, rows)
    console.print(
        f"written: {settings.out / 'table.md'}, and what it is made of beside it", markup=False, soft_wrap=True
    )


@app.command()
def probe(config: ConfigFile = None, dry_run: DryRun = False, overrides: Overrides = None) -> None:
    """Does a discriminator know content? Its scores beside what is right, apart from form and length."""
    from prism_fast.config import ProbeConfig
    from prism_fast.files import try_new

    settings = settings_of(ProbeConfig, config, overrides, dry_run)
    try_new(settings.out)
    from prism_fast.stages.probe import probe as run

    interruptible()
    console = Console()
    with responses_bar(console) as progress:
        found = run(settings, progress)
    aucs = ("auc", "auc_form", "auc_form_length", "pairs_form_length")
    rows = ("right", *aucs, "rank_right", "rank_form", "rank_length")
    table = Table("", "perception", "reasoning")
    for row in rows:
        shown = [found[side].get(row) for side in ("perception", "reasoning")]
        table.add_row(row, *("" if value is None else f"{value:.4g}" for value in shown))
    console.print(table)
    for line in found["alerts"]:
        console.print(f"warning: {line}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"written: {settings.out}", soft_wrap=True)


@app.command("serve-discriminator")
def serve_discriminator(config: ConfigFile = None, overrides: Overrides = None) -> None:
    """Scores of a discriminator by HTTP, for a trainer of another environment; listens on this machine alone."""
    from prism_fast.config import ServeConfig

    settings = settings_of(ServeConfig, config, overrides)
    from prism_fast.stages.serve import serve

    interruptible()
    serve(settings)
