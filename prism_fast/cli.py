"""prism-fast: demo | sft | upcycle | warmup | align | rlvr | eval | probe | serve-discriminator | report | data
| config | launch | plan | bench | doctor."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from prism_fast import DataError
from prism_fast.command_line import Commands, alone, home, interruptible, place, quiet_libraries, spin_briefly

app = typer.Typer(
    cls=Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__
)
data_app = typer.Typer(no_args_is_help=True, help="Check data files; make warm-up pairs; keep prompts by pass rate.")
app.add_typer(data_app, name="data")


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
    list[Path] | None, typer.Option("--image-folder", callback=home, help="Where else images may lie; / anywhere.")
]

# The deepspeed launcher puts it before the command, others behind; LOCAL_RANK says the same.
LocalRank = Annotated[int | None, typer.Option("--local_rank", "--local-rank", hidden=True)]

CLONE = Path(__file__).resolve().parent.parent  # where the package lies in a clone; benchmarks/ is not installed


@app.callback()
def launched(local_rank: LocalRank = None) -> None:
    pass


def main() -> None:
    spin_briefly()
    app(prog_name="prism-fast")


def _settings(cls, config: Path | None, overrides: list[str] | None, dry_run: bool = False, resume: bool = False):
    """The configuration of a command that opens models. ``dry_run`` ends the command."""
    from prism_fast.config import CONFIGS, load_config

    rank, world = place()
    say = print if rank == 0 else lambda *_, **__: None
    settings = load_config(cls, config, overrides or (), note=lambda text: say(f"note: {text}"))
    if not hasattr(settings, "cluster"):
        alone()
    if dry_run:
        stage = next(name for name, each in CONFIGS.items() if each is cls)
        _dry_run(stage, settings, config, Console(highlight=False, quiet=rank > 0), world, resume)
    models = [getattr(settings, name).path for name in ("model", "policy", "discriminator") if hasattr(settings, name)]
    models += getattr(settings, "policies", ())
    files = settings.data.files if hasattr(settings, "data") else ()
    say(f"loading {', '.join(map(str, (*models, *files)))}", flush=True)
    quiet_libraries()
    return settings


def _dry_run(
    stage: str, settings, config: Path | None, console: Console, processes: int = 1, resume: bool = False
) -> NoReturn:
    """Tells what a command with these settings would hold and lack, and ends with the status of that."""
    from prism_fast.data.kinds import glance
    from prism_fast.run import dry_run

    hint = "" if config is None else config.stem
    _looked(dry_run.dry_run(stage, settings, glance, processes=processes, resume=resume, hint=hint), console)


def _looked(found, console: Console) -> NoReturn:
    _show_sections(console, found.sections)
    for note in found.notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    status = found.status
    end = "it would not fit the memory" if status else "in order"
    console.print(f"dry run: {end}; nothing was started or written")
    raise typer.Exit(status)


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
    settings = _settings(CONFIGS[stage], config, overrides, dry_run, resume)
    from prism_fast.run.launch import check_environment

    check_environment(settings.cluster.sharding, os.environ)
    run = getattr(importlib.import_module(f"prism_fast.stages.{stage}"), stage)
    interruptible()
    figures = run(settings, resume=resume, accept_changes=accept_changes)
    rank, world = place()
    if rank == 0:  # says what was made
        shown = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
        _done(stage, settings.run.out / "final" / ("discriminator" if stage == "warmup" else "policy"), config, shown)
    if world > 1:
        # Everything is written. The interpreter's own end may meet threads of gloo or DeepSpeed that still run, and
        # "terminate called without an active exception" (seen once in many runs) would make a finished run look failed.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _done(stage: str, made: Path, config: Path | None, figures: str = "") -> None:
    from prism_fast.run.what_next import after

    print(f"done: {made}  {figures}".rstrip())
    for line in after(stage, made, "" if config is None else config.stem):
        print(f"next: {line}")


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

    settings = _settings(UpcycleConfig, config, overrides, dry_run)
    from prism_fast.stages.upcycle import upcycle_directory

    interruptible()
    _done("upcycle", upcycle_directory(settings), config)


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

    settings = _settings(EvaluateConfig, config, overrides, dry_run)
    try_new(settings.out)
    from prism_fast.stages.evaluate import evaluate_policy

    interruptible()
    console = Console()
    with _responses(console) as progress:
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
    settings = _settings(BenchmarksConfig, config, overrides)
    if dry_run:
        from prism_fast.run.dry_run import dry_benchmarks

        _looked(dry_benchmarks(settings), Console(highlight=False))
    from prism_fast.stages.lmms.launch import evaluate_on
    from prism_fast.stages.lmms.table import table, write_table

    interruptible()
    console = Console(highlight=False)
    found = evaluate_on(settings, tasks, say=lambda text: console.print(text, markup=False, soft_wrap=True))
    heads, rows = table(found)
    _show(console, heads, rows)
    write_table(settings.out / "table.md", heads, rows)
    console.print(
        f"written: {settings.out / 'table.md'}, and what it is made of beside it", markup=False, soft_wrap=True
    )


@app.command()
def probe(config: ConfigFile = None, dry_run: DryRun = False, overrides: Overrides = None) -> None:
    """Does a discriminator know content? Its scores beside what is right, apart from form and length."""
    from prism_fast.config import ProbeConfig
    from prism_fast.files import try_new

    settings = _settings(ProbeConfig, config, overrides, dry_run)
    try_new(settings.out)
    from prism_fast.stages.probe import probe as run

    interruptible()
    console = Console()
    with _responses(console) as progress:
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

    settings = _settings(ServeConfig, config, overrides)
    from prism_fast.stages.serve import serve

    interruptible()
    serve(settings)


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


@data_app.command("check")
def data_check(
    files: Annotated[
        list[Path],
        typer.Argument(callback=home, help="SFT, warm-up, alignment or RLVR files; folders or patterns of shards."),
    ],
    skip_bad_records: Annotated[int, typer.Option(min=0, help="Bad records that are allowed, in all files.")] = 0,
    model: Annotated[
        Path | None, typer.Option(callback=home, help="A stage's model: also its tokens, pixels and limits.")
    ] = None,
    max_prompt_tokens: Annotated[int, typer.Option(min=1, help="With --model: data.max_prompt_tokens.")] = 2048,
    tokens_per_pack: Annotated[int, typer.Option(min=1, help="With --model: run.tokens_per_pack.")] = 16384,
    batch_size: Annotated[int, typer.Option(min=1, help="With --model: records of a step.")] = 16,
    histogram: Annotated[
        Path | None, typer.Option(callback=home, help="With --model: a PNG of the lengths, of one file.")
    ] = None,
    column: Columns = None,
    workers: Annotated[
        int | None,
        typer.Option(min=0, max=256, help="Processes; 0: none of its own; default: a core each, at most 16."),
    ] = None,
    machine: Annotated[bool, typer.Option("--json", help="Prints JSON: a list, an object for each of FILES.")] = False,
    dry_run: DryRun = False,
    image_folder: ImageFolders = None,
) -> None:
    """The stages' verdicts on every record (images opened), counts, lengths, and one rendered sample."""
    from prism_fast.data.check import Packing, Reading, check
    from prism_fast.data.kinds import glance

    columns = dict(_pair(text, "--column") for text in column or ())
    if dry_run:
        from prism_fast.run.dry_run import dry_files

        _looked(dry_files(files, glance, columns=columns, model=model), Console(highlight=False))
    chat = None
    if model is not None:
        from prism_fast.data.chat import Chat
        from prism_fast.models.backbone import local_directory

        quiet_libraries()
        chat = Chat.load(local_directory(model, weights=False))
    interruptible()
    if histogram is not None and (chat is None or len(files) > 1):
        raise DataError("--histogram: shows lengths of one file by a model's tokens; give one file, and --model")
    packing = Packing(max_prompt_tokens, tokens_per_pack, batch_size, histogram)
    reading = Reading(columns, image_folder or (), workers)
    told: list[dict[str, Any]] = []
    console, listen = (Console(stderr=True), told.append) if machine else (Console(), None)
    found = [check(file, console, chat, packing, reading, listen) for file in files]
    if machine:
        print(json.dumps(told, indent=1, ensure_ascii=False))
    if (bad := sum(each.bad for each in found)) > skip_bad_records:
        first = next(each.first_bad[0] for each in found if each.bad)
        allowed = f"more than --skip-bad-records={skip_bad_records}"
        raise DataError(f"{bad} bad records, {allowed}; correct them, the first: {first}")


@data_app.command("convert")
def data_convert(
    files: Annotated[
        list[Path], typer.Argument(callback=home, help="Files of any of the formats; folders or patterns of shards.")
    ],
    out: Annotated[
        Path, typer.Option(callback=home, help="The .json, .jsonl or .parquet file to write; else a folder of parquet.")
    ],
    to: Annotated[
        str, typer.Option(help="sft, warm-up, alignment, rlvr or llava; default: as the first file is.")
    ] = "",
    column: Columns = None,
    skip_bad_records: Annotated[int, typer.Option(min=0, help="Bad records that are left out.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replaces what is at --out.")] = False,
    dry_run: DryRun = False,
    image_folder: ImageFolders = None,
) -> None:
    """Rewrites files as one of another format or container; images go along where they are bytes."""
    from rich.progress import Progress

    from prism_fast.data.convert import KINDS, convert, refuse_out
    from prism_fast.data.kinds import glance

    columns = dict(_pair(text, "--column") for text in column or ())
    if to and to not in KINDS:
        raise DataError(f"--to: expected one of {', '.join(KINDS)}, got {to}")
    if dry_run:
        from prism_fast.run.dry_run import dry_files

        _looked(dry_files(files, glance, out=None if overwrite else out, columns=columns), Console(highlight=False))
    refuse_out(out, overwrite)
    interruptible()
    with Progress(console=Console(), transient=True) as bar:
        task = bar.add_task("records", total=None)
        made = convert(
            files,
            out,
            to or None,
            skip_bad=skip_bad_records,
            columns=columns,
            image_folders=image_folder or (),
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    print(f"{made.records} records, {made.kind}, {made.left_out} left out -> {out}")


def _pair(text: str, key: str) -> tuple[str, str]:
    ours, equals, theirs = text.partition("=")
    if not (ours and equals and theirs):
        raise DataError(f"{key}: expected ours=theirs, got {text!r}")
    return ours, theirs


@data_app.command("pairs")
def data_pairs(
    config: ConfigFile = None,
    hard_negatives: Annotated[
        bool, typer.Option("--hard-negatives", help="Also the teacher's texts made wrong: half of the records.")
    ] = False,
    dry_run: DryRun = False,
    overrides: Overrides = None,
) -> None:
    """Rolls out a policy on the teacher's prompts and writes warm-up pairs."""
    from prism_fast.config import RECOMMENDED_HARD_NEGATIVES, PairsConfig

    given = any(each.startswith("hard_negatives.share=") for each in overrides or ())
    more = [f"hard_negatives.share={RECOMMENDED_HARD_NEGATIVES}"] if hard_negatives and not given else []
    _prepare("pairs", PairsConfig, config, [*more, *(overrides or ())], dry_run)


@data_app.command("filter")
def data_filter(config: ConfigFile = None, dry_run: DryRun = False, overrides: Overrides = None) -> None:
    """Keeps the RLVR prompts whose pass rate over k rollouts lies between low and high."""
    from prism_fast.config import FilterConfig

    _prepare("filter", FilterConfig, config, overrides, dry_run)


@data_app.command("curate")
def data_curate(config: ConfigFile = None, dry_run: DryRun = False, overrides: Overrides = None) -> None:
    """Asks a teacher over HTTP about hard prompts, and makes of its right answers what the stages train on."""
    from prism_fast.config import CurateConfig

    settings = _settings(CurateConfig, config, overrides)
    from prism_fast.stages.curate import curate
    from prism_fast.stages.curating.hard import rollouts
    from prism_fast.stages.curating.plan import plan

    interruptible()
    console = Console(highlight=False)
    say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    if dry_run:
        for line in plan(settings):
            say(line)
        if (policy := rollouts(settings)) is not None:  # which is sampled as `data filter` does
            _dry_run("filter", policy, config, console)
        say("dry run: in order; nothing was started or written")
        return
    with contextlib.ExitStack() as bars:
        rolled = bars.enter_context(_responses(console)) if settings.rates is not None else None
        report = curate(settings, rolled, bars.enter_context(_responses(console, "prompts")), say)
    for name in ("prompts", "answers", "mended", "requests", "tokens", "cost", "written"):
        say(f"{name:10} " + ", ".join(f"{key} {value}" for key, value in report[name].items()))
    if report["stopped"]:
        say(f"stopped: {report['stopped']}; more is asked by the same command with another teacher.budget")
    _done("curate", settings.out, config)


@contextlib.contextmanager
def _responses(console: Console, what: str = "responses") -> Iterator[Callable[[int, int], None]]:
    """A bar of the responses that are sampled: (done, in total) moves it."""
    from rich.progress import Progress

    with Progress(console=console) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _prepare(stage: str, cls, config: Path | None, overrides: list[str] | None, dry_run: bool) -> None:
    settings = _settings(cls, config, overrides, dry_run)
    from prism_fast.stages import prepare

    run = {"pairs": prepare.pairs, "filter": prepare.filter_prompts}[stage]
    console = Console()
    interruptible()
    with _responses(console) as progress:
        counts = run(settings, progress, partial(console.print, markup=False, highlight=False, soft_wrap=True))
    for name, value in counts.items():
        console.print(f"{name:16} {value}")
    _done(stage, settings.out, config)


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
        _dry_run(stage, settings, config, Console(highlight=False, stderr=True), nodes * gpus, resume)


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
        _show(console, heads, rows)
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
    _show_sections(console, plan_of(stage, settings, asked, config.stem).sections())


def _show_sections(console: Console, sections) -> None:
    for section in sections:
        console.print(section.title, style="bold")
        _show(console, section.heads, section.rows)
        for note in section.notes:
            console.print(note)


def _show(console: Console, heads: list[str], rows: list[list[str]]) -> None:
    table = Table(*heads)
    for row in rows:
        table.add_row(*row)
    console.print(table)


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


if __name__ == "__main__":
    main()
