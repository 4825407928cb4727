"""prism-fast demo | sft | upcycle | warmup | align | rlvr: the stages, in miniature and one by one."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from prism_fast import DataError
from prism_fast.cli.command_line import alone, home, interruptible, place, quiet_libraries
from prism_fast.cli.common import say_done, settings_of
from prism_fast.cli.options import AcceptChanges, ConfigFile, DryRun, LocalRank, Overrides, Resume

app = typer.Typer()


@app.command()
def demo(
    out: Annotated[Path, typer.Option(callback=home, help="Folder for everything the demo writes; must be new.")],
    smoke: Annotated[bool, typer.Option("--smoke", help="A few steps of everything, at most 90 s.")] = False,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of data, model and sampling.")] = 0,
    compare: Annotated[
        bool, typer.Option("--compare", help="In its place: does alignment pay after a drift? All arms, several seeds.")
    ] = False,
    seeds: Annotated[int, typer.Option(min=1, max=100, help="Seeds of --compare, from --seed on.")] = 3,
    teacher_errors: Annotated[
        float, typer.Option(min=0, max=1, help="With --compare: share of the teacher's texts that are wrong.")
    ] = 0.0,
    preset: Annotated[str | None, typer.Option(help="Scenes: easy (default) or full.")] = None,
    resume: Resume = False,
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value over recipes/demo.yaml.")] = None,
) -> None:
    """PRISM in miniature on real images: all stages, summary.json and report.html."""
    alone()
    from prism_fast.config import merge, parse_overrides

    if teacher_errors and not compare:
        raise DataError("--teacher-errors: goes with --compare alone")
    quiet_libraries()
    given = {"smoke": smoke, "preset": preset, "resume": resume, "overrides": parse_overrides(overrides or ())}
    if compare:
        from prism_fast.demo.compare import compare as run_all

        if teacher_errors:
            given["overrides"] = merge(given["overrides"], {"compare": {"teacher_errors": teacher_errors}})
        interruptible()
        run_all(out, seeds=range(seed, seed + seeds), **given)
        return
    from prism_fast.demo.demo import demo as run

    interruptible()
    run(out, seed=seed, **given)


@app.command()
def sft(
    config: ConfigFile = None,
    resume: Resume = False,
    accept_changes: AcceptChanges = False,
    dry_run: DryRun = False,
    local_rank: LocalRank = None,
    overrides: Overrides = None,
) -> None:
    """Stage 1: supervised fine-tuning."""
    _stage("sft", config, overrides, resume=resume, accept_changes=accept_changes, dry_run=dry_run)


@app.command()
def upcycle(config: ConfigFile = None, dry_run: DryRun = False, overrides: Overrides = None) -> None:
    """Stage 2a: a dense model becomes a mixture-of-experts discriminator."""
    from prism_fast.config import UpcycleConfig

    settings = settings_of(UpcycleConfig, config, overrides, dry_run)
    from prism_fast.stages.upcycle import upcycle_directory

    interruptible()
    say_done("upcycle", upcycle_directory(settings), config)


@app.command()
def warmup(
    config: ConfigFile = None,
    resume: Resume = False,
    accept_changes: AcceptChanges = False,
    dry_run: DryRun = False,
    local_rank: LocalRank = None,
    overrides: Overrides = None,
) -> None:
    """Stage 2b: the discriminator learns from (teacher, student) pairs."""
    _stage("warmup", config, overrides, resume=resume, accept_changes=accept_changes, dry_run=dry_run)


@app.command()
def align(
    config: ConfigFile = None,
    resume: Resume = False,
    accept_changes: AcceptChanges = False,
    dry_run: DryRun = False,
    local_rank: LocalRank = None,
    overrides: Overrides = None,
) -> None:
    """Stage 2c: adversarial alignment."""
    _stage("align", config, overrides, resume=resume, accept_changes=accept_changes, dry_run=dry_run)


@app.command()
def rlvr(
    config: ConfigFile = None,
    resume: Resume = False,
    accept_changes: AcceptChanges = False,
    dry_run: DryRun = False,
    local_rank: LocalRank = None,
    overrides: Overrides = None,
) -> None:
    """Stage 3: reinforcement learning with verifiable rewards."""
    _stage("rlvr", config, overrides, resume=resume, accept_changes=accept_changes, dry_run=dry_run)


def _stage(
    stage: str,
    config: Path | None,
    overrides: list[str] | None,
    *,
    resume: bool,
    accept_changes: bool,
    dry_run: bool,
) -> None:
    from prism_fast.config import CONFIGS

    if accept_changes and not resume:
        raise DataError("--accept-changes: goes with --resume alone; a new run needs no leave")
    settings = settings_of(CONFIGS[stage], config, overrides, dry_run, resume)
    from prism_fast.run.launch import check_environment

    check_environment(settings.cluster.sharding, os.environ)
    run = getattr(importlib.import_module(f"prism_fast.stages.{stage}"), stage)
    interruptible()
    figures = run(settings, resume=resume, accept_changes=accept_changes)
    rank, world = place()
    if rank == 0:  # says what was made
        shown = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
        say_done(
            stage, settings.run.out / "final" / ("discriminator" if stage == "warmup" else "policy"), config, shown
        )
    if world > 1:
        # Everything is written. The interpreter's own end may meet threads of gloo or DeepSpeed that still run, and
        # "terminate called without an active exception" (seen once in many runs) would make a finished run look failed.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
