"""prism-fast: demo | sft | upcycle | warmup | align | rlvr | eval | data | bench | doctor."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from prism_fast.records import DataError


class Commands(TyperGroup):
    """How every command ends: bad input is one line on stderr and exit status 2, a stopped run 128 + its signal."""

    def invoke(self, ctx: typer.Context) -> object:
        from prism_fast.run.session import Stopped

        try:
            return super().invoke(ctx)
        except DataError as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            sys.exit(2)
        except Stopped as stop:
            print(str(stop), file=sys.stderr)
            sys.exit(128 + stop.signum)
        except KeyboardInterrupt:
            print("stopped; what was not saved by a checkpoint is lost", file=sys.stderr)
            sys.exit(128 + signal.SIGINT)


app = typer.Typer(
    cls=Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__
)
data_app = typer.Typer(no_args_is_help=True, help="Check data files; make warm-up pairs; keep prompts by pass rate.")
app.add_typer(data_app, name="data")

ConfigFile = Annotated[Path | None, typer.Option("--config", help="YAML file, or the name of a recipe.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key.path=value overrides, values in YAML.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in run.out.")]

CLONE = Path(__file__).resolve().parent.parent  # where the package lies in a clone; benchmarks/ is not installed


def main() -> None:
    app()


def _quiet_transformers() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _settings(cls, config: Path | None, overrides: list[str] | None):
    """The configuration of a command that opens models."""
    from prism_fast.config import load_config

    _quiet_transformers()
    return load_config(cls, config, overrides or ())


def _stage(run, cls, config: Path | None, overrides: list[str] | None, resume: bool) -> None:
    settings = _settings(cls, config, overrides)
    figures = run(settings, resume=resume)
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

    _quiet_transformers()
    run(
        out,
        seed=seed,
        smoke=smoke,
        compare=seeds if compare else 0,
        preset=preset,
        resume=resume,
        overrides=parse_overrides(overrides or ()),
    )


@app.command()
def sft(config: ConfigFile = None, resume: Resume = False, overrides: Overrides = None) -> None:
    """Stage 1: supervised fine-tuning."""
    from prism_fast.config import SFTConfig
    from prism_fast.stages.sft import sft as run

    _stage(run, SFTConfig, config, overrides, resume)


@app.command()
def upcycle(config: ConfigFile = None, overrides: Overrides = None) -> None:
    """Stage 2a: a dense model becomes a mixture-of-experts discriminator."""
    from prism_fast.config import UpcycleConfig
    from prism_fast.stages.upcycle import upcycle_directory

    path = upcycle_directory(_settings(UpcycleConfig, config, overrides))
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
    from prism_fast.config import EvaluateConfig
    from prism_fast.models.load import open_policy
    from prism_fast.reward import start
    from prism_fast.steps.evaluate import EvalSet, evaluate

    settings = _settings(EvaluateConfig, config, overrides)
    start(settings.reward)
    policy, chat = open_policy(settings.model)
    held_out = EvalSet.read(settings.data, settings.data.files, settings.eval.limit, chat)
    console = Console()
    with console.status(f"{len(held_out)} prompts, {settings.eval.samples} responses each"):
        result = evaluate(
            policy,
            chat,
            held_out,
            settings.eval,
            name=settings.model.path.name,
            seed=settings.seed,
            own=settings.reward,
        )
    table = Table("question type", "prompts", "pass@1" if settings.eval.samples == 1 else f"mean of {result.samples}")
    for kind, row in result.by_type.items():
        table.add_row(kind, str(int(row["count"]) // result.samples), f"{row['accuracy']:.1%}")
    table.add_row("all", str(len(held_out)), f"{result.accuracy:.1%}", style="bold")
    console.print(table)
    for name, value in result.figures().items():
        console.print(f"{name} {value:.4g}")
    for line in held_out.skipped:
        console.print(f"skipped: {line}", markup=False, highlight=False, soft_wrap=True)
    result.write(settings.out)
    console.print(f"written: {settings.out}", soft_wrap=True)


@data_app.command("check")
def data_check(
    files: Annotated[list[Path], typer.Argument(help="SFT json, warm-up jsonl, alignment or RLVR parquet.")],
    skip_bad_records: Annotated[int, typer.Option(min=0, help="Bad records that are allowed, in all files.")] = 0,
    model: Annotated[Path | None, typer.Option(help="A stage's model: also its tokens, pixels and limits.")] = None,
    max_prompt_tokens: Annotated[int, typer.Option(min=1, help="With --model: data.max_prompt_tokens.")] = 2048,
) -> None:
    """The stages' verdicts on every record (images opened), counts, and one rendered sample."""
    from prism_fast.data.bad_records import BadRecords
    from prism_fast.data.check import check

    chat = None
    if model is not None:
        from prism_fast.data.chat import Chat

        _quiet_transformers()
        chat = Chat.load(model)
    console, bad = Console(), BadRecords(sys.maxsize)
    for file in files:
        check(file, console, bad, chat, max_prompt_tokens)
    if len(bad) > skip_bad_records:
        allowed = f"more than --skip-bad-records={skip_bad_records}"
        raise DataError(f"{len(bad)} bad records, {allowed}; correct them, the first: {bad.messages[0]}")


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

    settings = _settings(cls, config, overrides)
    console = Console()
    if settings.out.exists():
        raise DataError(f"{settings.out}: exists already; choose another out, or remove it")
    with Progress(console=console) as progress:
        task = progress.add_task("responses", total=None)
        counts = run(
            settings,
            lambda done, total: progress.update(task, completed=done, total=total),
            lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True),
        )
    for name, value in counts.items():
        console.print(f"{name:16} {value}")
    console.print(f"written: {settings.out}", soft_wrap=True)


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
