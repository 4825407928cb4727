"""prism-fast report | config | launch | plan: what happened in a run, and what one would be and take."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from prism_fast import DataError
from prism_fast.cli.common import dry_run_of, show_sections, show_table
from prism_fast.cli.options import AcceptChanges, ConfigFile, DryRun, Overrides, Resume

app = typer.Typer()


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Folder of runs named sft, warmup, align, rlvr; or of one run.")],
) -> None:
    """What happened in a run and what to do about it, as a page: FOLDER/report.html."""
    from prism_fast.report.build import build_report
    from prism_fast.report.data import load_run

    if folder.is_dir() and not (found := load_run(folder)).metrics and not found.summary:
        raise DataError(f"{folder}: holds no run; name a run.out, or a folder of runs named sft, warmup, align, rlvr")
    print(f"written: {build_report(folder)}")


@app.command("config")
def show(
    stage: Annotated[
        str,
        typer.Argument(help="sft, upcycle, pairs, warmup, align, filter, rlvr, eval, probe or serve-discriminator."),
    ],
    config: ConfigFile = None,
    overrides: Overrides = None,
) -> None:
    """Every setting of a command with its value and meaning, as YAML that --config reads."""
    from prism_fast.config import CONFIGS
    from prism_fast.settings import show_config

    if stage not in CONFIGS:
        raise DataError(f"config: unknown stage {stage!r}; expected one of {', '.join(CONFIGS)}")
    print(show_config(CONFIGS[stage], config, overrides or ()), end="")


@app.command()
def launch(
    stage: Annotated[str, typer.Argument(help="sft, warmup, align or rlvr.")],
    nodes: Annotated[int, typer.Option(min=1, max=10_000, help="Machines.")] = 1,
    gpus: Annotated[int, typer.Option(min=1, max=64, help="GPUs of each, a process for every one.")] = 1,
    endpoint: Annotated[str, typer.Option(help="HOST or HOST:PORT of the first node, where all meet.")] = "",
    slurm: Annotated[bool, typer.Option("--slurm", help="A file for sbatch.")] = False,
    time: Annotated[str, typer.Option(help="HH:MM:SS that SLURM gives it; before the end it saves.")] = "",
    partition: Annotated[str, typer.Option(help="Of SLURM.")] = "",
    cpus: Annotated[int, typer.Option(min=1, max=1024, help="Cores for each GPU, from SLURM.")] = 8,
    config: ConfigFile = None,
    resume: Resume = False,
    accept_changes: AcceptChanges = False,
    dry_run: DryRun = False,
    overrides: Overrides = None,
) -> None:
    """Prints how a stage is started on several GPUs, for sh or sbatch; checks its settings, starts nothing."""
    from prism_fast.run import launch as plan

    plan.check_stage(stage)
    from prism_fast.config import CONFIGS, load_config

    settings = load_config(
        CONFIGS[stage], config, overrides or (), note=lambda text: print(f"note: {text}", file=sys.stderr)
    )
    flags = [flag for flag, given in (("--resume", resume), ("--accept-changes", accept_changes)) if given]
    words = [*([] if config is None else ["--config", str(config)]), *(overrides or ()), *flags]
    job = plan.Launch(stage, tuple(words), nodes, gpus, endpoint, settings.run.out, time, partition, cpus)
    shown = plan.batch_file(job) if slurm else plan.command(job)
    print(shown, file=sys.stderr if dry_run else sys.stdout)  # a dry run leaves nothing for a pipe into sh
    for text in plan.warnings(job, settings):
        print(f"warning: {text}", file=sys.stderr)
    if dry_run:
        dry_run_of(stage, settings, config, Console(highlight=False, stderr=True), nodes * gpus, resume)


@app.command()
def plan(
    stage: Annotated[str, typer.Argument(help="sft, warmup, align, rlvr; or, with --config, any that opens models.")],
    config: ConfigFile = None,
    gpu: Annotated[str, typer.Option(help="a100, h100, h200 or b200; with --config.")] = "h100",
    gpus: Annotated[int | None, typer.Option(min=1, max=100_000, help="In all; without it 1, 2, 4, 8 and 16.")] = None,
    memory: Annotated[float | None, typer.Option(min=1, help="GB of one GPU; else the GPU's own, or 80.")] = None,
    policy: Annotated[str | None, typer.Option(help="4b or 8b, where no folder of a model tells.")] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="run.tokens_per_pack.")] = None,
    prompt: Annotated[int | None, typer.Option(min=1, help="Tokens of a prompt, as a mean; with --config.")] = None,
    response: Annotated[int | None, typer.Option(min=1, help="Of a response.")] = None,
    records: Annotated[int | None, typer.Option(min=1, help="Of the data: hours where settings say epochs.")] = None,
    flops_share: Annotated[float, typer.Option(min=0.01, max=1, help="Of the datasheet's, that is reached.")] = 0.5,
    bytes_share: Annotated[float, typer.Option(min=0.01, max=1, help="Of its bandwidths.")] = 0.8,
    overrides: Overrides = None,
) -> None:
    """GB of a GPU in training by form of sharding and number of GPUs; with --config all of a recipe's, the largest
    tokens_per_pack and the seconds of a step. Counted, not measured; needs no GPU and no model."""
    from prism_fast.run.launch import check_stage

    console = Console(highlight=False)
    if config is None:
        check_stage(stage)
        if overrides:
            raise DataError(f"plan: {overrides[0]}: goes with --config alone; name a recipe or a file")
        from prism_fast.run.memory import table

        gb = memory or 80.0
        heads, rows = table(stage, policy or "4b", [gpus] if gpus else [1, 2, 4, 8, 16], gb, tokens or 24_576)
        show_table(console, heads, rows)
        console.print(f"GB of each GPU in training; * does not fit {gb:g} GB. By count: bf16, AdamW, checkpointing.")
        return
    from prism_fast.config import CONFIGS, load_config
    from prism_fast.run.plan import Efficiency, Question, unnamed
    from prism_fast.run.plans import check_planned, plan_of

    check_planned(stage)
    words = [*(overrides or ()), *([] if tokens is None else [f"run.tokens_per_pack={tokens}"])]
    settings = load_config(CONFIGS[stage], config, words, base=unnamed(CONFIGS[stage]))
    efficiency = Efficiency(flops_share, bytes_share)
    asked = Question(gpu, gpus or 1, memory, policy, prompt, response, efficiency, records)
    show_sections(console, plan_of(stage, settings, asked, config.stem).sections())
