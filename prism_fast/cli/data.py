"""prism-fast data check | convert | pairs | filter | curate."""

from __future__ import annotations

import contextlib
import json
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from prism_fast import DataError
from prism_fast.cli.command_line import home, interruptible, quiet_libraries
from prism_fast.cli.common import dry_run_of, end_dry_run, responses_bar, say_done, settings_of
from prism_fast.cli.options import CacheFolder, Columns, ConfigFile, DryRun, ImageFolders, Overrides

app = typer.Typer(
    no_args_is_help=True, help="Check and convert data files; make pairs; keep prompts by pass rate; ask a teacher."
)


@app.command("check")
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
    ranks: Annotated[int, typer.Option(min=1, max=4096, help="With --model: processes that share a step.")] = 1,
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
    cache: CacheFolder = None,
) -> None:
    """The stages' verdicts on every record (images opened), counts, lengths, and one rendered sample."""
    from prism_fast.data.check import Reading, check
    from prism_fast.data.kinds import glance
    from prism_fast.data.packing import Packing

    columns = dict(_pair(text, "--column") for text in column or ())
    if dry_run:
        from prism_fast.run.dry_run import dry_files

        end_dry_run(dry_files(files, glance, columns=columns, model=model), Console(highlight=False))
    chat = plan = None
    if model is not None:
        from prism_fast.data.chat import Chat
        from prism_fast.models.backbone import local_directory
        from prism_fast.stages.packing import plan as plan_of

        quiet_libraries()
        folder = local_directory(model, weights=False)
        chat = Chat.load(folder)
        plan = plan_of(chat, folder, ranks)
    interruptible(terminable=True)
    if histogram is not None and (chat is None or len(files) > 1):
        raise DataError("--histogram: shows lengths of one file by a model's tokens; give one file, and --model")
    packing = Packing(max_prompt_tokens, tokens_per_pack, batch_size, histogram, plan, ranks)
    reading = Reading(columns, image_folder or (), workers, cache)
    told: list[dict[str, Any]] = []
    console, listen = (Console(stderr=True), told.append) if machine else (Console(), None)
    found = [check(file, console, chat, packing, reading, listen) for file in files]
    if machine:
        print(json.dumps(told, indent=1, ensure_ascii=False))
    if (bad := sum(each.bad for each in found)) > skip_bad_records:
        first = next(each.first_bad[0] for each in found if each.bad)
        allowed = f"more than --skip-bad-records={skip_bad_records}"
        raise DataError(f"{bad} bad records, {allowed}; correct them, the first: {first}")


@app.command("convert")
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
    cache: CacheFolder = None,
) -> None:
    """Rewrites files as one of another format or container; images go along where they are bytes."""
    from rich.progress import Progress

    from prism_fast.data.convert import KINDS, convert, refuse_out
    from prism_fast.data.kinds import glance
    from prism_fast.data.unread import not_written

    columns = dict(_pair(text, "--column") for text in column or ())
    if to and to not in KINDS:
        raise DataError(f"--to: expected one of {', '.join(KINDS)}, got {to}")
    if dry_run:
        from prism_fast.run.dry_run import dry_files

        end_dry_run(dry_files(files, glance, out=None if overwrite else out, columns=columns), Console(highlight=False))
    refuse_out(out, overwrite)
    interruptible(terminable=True)
    with Progress(console=Console(), transient=True) as bar:
        task = bar.add_task("records", total=None)
        made = convert(
            files,
            out,
            to or None,
            skip_bad=skip_bad_records,
            columns=columns,
            image_folders=image_folder or (),
            cache=cache,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    print(f"{made.records} records, {made.kind}, {made.left_out} left out -> {out}")
    if made.not_written:
        print(not_written(made.not_written))
    if made.images_elsewhere is not None:
        print(f"its images stay in {made.images_elsewhere}: read it with data.image_folders or --image-folder")


def _pair(text: str, key: str) -> tuple[str, str]:
    ours, equals, theirs = text.partition("=")
    if not (ours and equals and theirs):
        raise DataError(f"{key}: expected ours=theirs, got {text!r}")
    return ours, theirs


@app.command("pairs")
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


@app.command("filter")
def data_filter(config: ConfigFile = None, dry_run: DryRun = False, overrides: Overrides = None) -> None:
    """Keeps the RLVR prompts whose pass rate over k rollouts lies between low and high."""
    from prism_fast.config import FilterConfig

    _prepare("filter", FilterConfig, config, overrides, dry_run)


@app.command("curate")
def data_curate(config: ConfigFile = None, dry_run: DryRun = False, overrides: Overrides = None) -> None:
    """Asks a teacher over HTTP about hard prompts, and makes of its right answers what the stages train on."""
    from prism_fast.config import CurateConfig

    settings = settings_of(CurateConfig, config, overrides)
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
            dry_run_of("filter", policy, config, console)
        say("dry run: in order; nothing was started or written")
        return
    with contextlib.ExitStack() as bars:
        rolled = bars.enter_context(responses_bar(console)) if settings.rates is not None else None
        report = curate(settings, rolled, bars.enter_context(responses_bar(console, "prompts")), say)
    for name in ("prompts", "answers", "mended", "requests", "tokens", "cost", "written"):
        say(f"{name:10} " + ", ".join(f"{key} {value}" for key, value in report[name].items()))
    if report["stopped"]:
        say(f"stopped: {report['stopped']}; more is asked by the same command with another teacher.budget")
    say_done("curate", settings.out, config)


def _prepare(stage: str, cls, config: Path | None, overrides: list[str] | None, dry_run: bool) -> None:
    settings = settings_of(cls, config, overrides, dry_run)
    from prism_fast.stages import prepare

    run = {"pairs": prepare.pairs, "filter": prepare.filter_prompts}[stage]
    console = Console()
    interruptible()
    with responses_bar(console) as progress:
        counts = run(settings, progress, partial(console.print, markup=False, highlight=False, soft_wrap=True))
    for name, value in counts.items():
        console.print(f"{name:16} {value}")
    say_done(stage, settings.out, config)
