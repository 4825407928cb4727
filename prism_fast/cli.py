"""prism-fast: demo | sft | upcycle | warmup | align | rlvr | eval | data | bench | doctor."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from prism_fast.records import DataError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
data_app = typer.Typer(no_args_is_help=True, help="Check data files; make warm-up pairs; keep prompts by pass rate.")
app.add_typer(data_app, name="data")

ConfigFile = Annotated[Path | None, typer.Option("--config", help="YAML file, or the name of a recipe.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key.path=value overrides, values in YAML.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in run.out.")]


def main() -> None:
    """Entry point. Bad input is one line on stderr and exit status 2; a stopped run exits with 128 + its signal."""
    try:
        app(standalone_mode=True)
    except DataError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; what was not saved by a checkpoint is lost", file=sys.stderr)
        sys.exit(130)


def _quiet_transformers() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _stage(run, cls, config: Path | None, overrides: list[str] | None, resume: bool) -> None:
    from prism_fast.config import load_config
    from prism_fast.run.session import Stopped

    _quiet_transformers()
    settings = load_config(cls, config, overrides or ())
    try:
        figures = run(settings, resume=resume)
    except Stopped as stop:
        print(str(stop), file=sys.stderr)
        sys.exit(128 + stop.signum)
    shown = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
    Console().print(f"done: {settings.run.out / 'final'}  {shown}", soft_wrap=True)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything the demo writes; must be new.")],
    smoke: Annotated[bool, typer.Option("--smoke", help="A few steps of everything, at most 90 s.")] = False,
    seed: int = 0,
    compare: Annotated[bool, typer.Option("--compare", help="Also SFT -> RLVR with as many policy updates.")] = False,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of --compare.")] = 3,
    preset: Annotated[str | None, typer.Option(help="Scenes: easy (default) or full.")] = None,
    resume: Resume = False,
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value over recipes/demo.yaml.")] = None,
) -> None:
    """PRISM in miniature on real images: all stages, summary.json and report.html."""
    from prism_fast.config import parse_overrides
    from prism_fast.demo.demo import demo as run
    from prism_fast.run.session import Stopped

    _quiet_transformers()
    try:
        run(
            out,
            seed=seed,
            smoke=smoke,
            compare=seeds if compare else 0,
            preset=preset,
            resume=resume,
            overrides=parse_overrides(overrides or ()),
        )
    except Stopped as stop:
        print(str(stop), file=sys.stderr)
        sys.exit(128 + stop.signum)


@app.command()
def sft(config: ConfigFile = None, resume: Resume = False, overrides: Overrides = None) -> None:
    """Stage 1: supervised fine-tuning."""
    from prism_fast.config import SFTConfig
    from prism_fast.stages.sft import sft as run

    _stage(run, SFTConfig, config, overrides, resume)


@app.command()
def upcycle(config: ConfigFile = None, overrides: Overrides = None) -> None:
    """Stage 2a: a dense model becomes a mixture-of-experts discriminator."""
    from prism_fast.config import UpcycleConfig, load_config
    from prism_fast.stages.upcycle import upcycle_directory

    _quiet_transformers()
    path = upcycle_directory(load_config(UpcycleConfig, config, overrides or ()))
    Console().print(f"done: {path}", soft_wrap=True)


@app.command()
def warmup(config: ConfigFile = None, resume: Resume = False, overrides: Overrides = None) -> None:
    """Stage 2b: the discriminator learns from (teacher, student) pairs."""
    from prism_fast.config import WarmupConfig
    from prism_fast.stages.warmup import warmup as run

    _stage(run, WarmupConfig, config, overrides, resume)


@app.command()
def align(config: ConfigFile = None, resume: Resume = False, overrides: Overrides = None) -> None:
    """Stage 2c: adversarial alignment."""
    from prism_fast.config import AlignConfig
    from prism_fast.stages.align import align as run

    _stage(run, AlignConfig, config, overrides, resume)


@app.command()
def rlvr(config: ConfigFile = None, resume: Resume = False, overrides: Overrides = None) -> None:
    """Stage 3: reinforcement learning with verifiable rewards."""
    from prism_fast.config import RLVRConfig
    from prism_fast.stages.rlvr import rlvr as run

    _stage(run, RLVRConfig, config, overrides, resume)


@app.command("eval")
def evaluate(config: ConfigFile = None, overrides: Overrides = None) -> None:
    """Accuracy of a policy on held-out prompts: pass@1, mean of k, by question type."""
    from prism_fast.config import EvaluateConfig, load_config
    from prism_fast.models.load import open_policy
    from prism_fast.steps.evaluate import EvalSet, evaluate

    _quiet_transformers()
    settings = load_config(EvaluateConfig, config, overrides or ())
    policy, chat = open_policy(settings.model)
    held_out = EvalSet.read(settings.data, settings.data.files, settings.eval.limit, chat)
    console = Console()
    with console.status(f"{len(held_out)} prompts, {settings.eval.samples} responses each"):
        result = evaluate(policy, chat, held_out, settings.eval, name=settings.model.path.name, seed=settings.seed)
    table = Table("question type", "prompts", "pass@1" if settings.eval.samples == 1 else f"mean of {result.samples}")
    for kind, row in result.by_type.items():
        table.add_row(kind, str(int(row["count"]) // result.samples), f"{row['accuracy']:.1%}")
    table.add_row("all", str(len(held_out)), f"{result.accuracy:.1%}", style="bold")
    console.print(table)
    for name, value in result.figures().items():
        console.print(f"{name} {value:.4g}")
    result.write(settings.out)
    console.print(f"written: {settings.out}", soft_wrap=True)


@data_app.command("check")
def data_check(
    files: Annotated[list[Path], typer.Argument(help="SFT json, warm-up jsonl, alignment or RLVR parquet.")],
    skip_bad_records: Annotated[int, typer.Option(min=0, help="Bad records to count instead of stopping at.")] = 0,
) -> None:
    """Validates and counts records (images opened), and shows one rendered sample."""
    from prism_fast.data.check import check

    console = Console()
    for file in files:
        check(file, skip_bad_records, console)


@data_app.command("pairs")
def data_pairs(config: ConfigFile = None, overrides: Overrides = None) -> None:
    """Rolls out a policy on the teacher's prompts and writes warm-up pairs."""
    from prism_fast.config import PairsConfig
    from prism_fast.stages.prepare import pairs

    _prepare(pairs, PairsConfig, config, overrides)


@data_app.command("filter")
def data_filter(config: ConfigFile = None, overrides: Overrides = None) -> None:
    """Keeps the RLVR prompts whose pass rate over k rollouts lies between low and high."""
    from prism_fast.config import FilterConfig
    from prism_fast.stages.prepare import filter_prompts

    _prepare(filter_prompts, FilterConfig, config, overrides)


def _prepare(run, cls, config: Path | None, overrides: list[str] | None) -> None:
    from rich.progress import Progress

    from prism_fast.config import load_config

    _quiet_transformers()
    settings = load_config(cls, config, overrides or ())
    console = Console()
    if settings.out.exists():
        raise DataError(f"{settings.out}: exists already; choose another out, or remove it")
    with Progress(console=console) as progress:
        task = progress.add_task("responses", total=None)
        counts = run(settings, lambda done, total: progress.update(task, completed=done, total=total))
    for name, value in counts.items():
        console.print(f"{name:16} {value}")
    console.print(f"written: {settings.out}", soft_wrap=True)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(
    context: typer.Context,
    op: Annotated[str, typer.Argument(help="linear_logprob, advantage, moe, ...: a bench_<op>.py of the clone.")],
    peers: Annotated[str | None, typer.Option(help="Parts of peers' names, comma-separated; default: all.")] = None,
    shape: Annotated[list[str] | None, typer.Option(help="published, cpu, tiny, or T=8192,V=32768.")] = None,
    json: Annotated[Path | None, typer.Option(help="Also write the result here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="PNG: time and memory over T, roofline.")] = None,
    base: Annotated[str | None, typer.Option(help="A commit to compare with, side by side.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda where there is one.")] = None,
    seconds: Annotated[float | None, typer.Option(help="Timing of one problem.")] = None,
    no_tests: Annotated[bool, typer.Option("--no-tests", help="Do not run the op's tests first.")] = False,
) -> None:
    """Time, memory and error of an op beside its peers, or of a whole step (needs a clone).

    Further options are the benchmark's own: python -m benchmarks OP --help lists them.
    """
    from prism_fast.bench import run

    given = {"peers": peers, "json": json, "plot": plot, "base": base, "device": device, "seconds": seconds}
    options = [f"--{name}={value}" for name, value in given.items() if value is not None]
    options += [f"--shape={value}" for value in shape or ()] + (["--no-tests"] if no_tests else [])
    sys.exit(run([op, *options, *context.args]))


@app.command()
def doctor() -> None:
    """Hardware, versions, and which implementation each op uses and why."""
    from prism_fast.run.environment import environment
    from prism_kernels import which_impl

    console = Console()
    facts = environment()
    for name, value in facts.items():
        if name != "packages":
            console.print(f"{name:10} {value}", highlight=False)
    for name, value in facts["packages"].items():
        console.print(f"{name:14} {value or 'not installed'}", highlight=False)
    table = Table("op", "implementation", "why")
    for op, (impl, reason) in which_impl().items():
        table.add_row(op, impl, reason)
    console.print(table)


if __name__ == "__main__":
    main()
