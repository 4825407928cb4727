"""The examples of README.md and docs/*.md are run: python blocks, commands, records, links between documents."""

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest
from PIL import Image
from typer.main import get_command

from benchmarks.catalog import CATALOG
from prism_fast import cli, config
from prism_fast.data import formats
from prism_fast.run.memory import table
from prism_fast.run.record import FREE
from prism_fast.stages.lmms.benchmarks import tasks_of

ROOT = Path(__file__).parent.parent
README, METHOD = (ROOT / "README.md").read_text(), (ROOT / "docs" / "method.md").read_text()
GUIDES = {path.name: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}


def blocks(text, language):
    """[(what follows the language's name, content)] of the fenced blocks in a language."""
    return re.findall(rf"^```{language} ?(.*)\n((?:.*\n)*?)```$", text, re.M)


EXAMPLES = [
    pytest.param(code, name, id=f"{name}-{i}")
    for name, text in GUIDES.items()
    for i, (_, code) in enumerate(blocks(text, "python"))
]


@pytest.mark.parametrize(("code", "name"), EXAMPLES)
def test_python_examples_print_what_they_say(code, name):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, name, "exec"), {})
    assert printed.getvalue().splitlines() == re.findall(r"^print.*# -> (.*)$", code, re.M)


def commands():
    shell = "".join(block for text in GUIDES.values() for _, block in blocks(text, "sh"))
    lines = dict.fromkeys(shell.replace("\\\n", " ").splitlines())  # some stand in two guides
    return [line.removesuffix(" | sh") for line in lines if line.startswith("prism-fast")]


CONFIGS = {
    "sft": config.SFTConfig,
    "upcycle": config.UpcycleConfig,
    "warmup": config.WarmupConfig,
    "align": config.AlignConfig,
    "rlvr": config.RLVRConfig,
    "eval": config.EvaluateConfig,
    "eval --lmms": config.BenchmarksConfig,
    "probe": config.ProbeConfig,
    "serve-discriminator": config.ServeConfig,
    "data pairs": config.PairsConfig,
    "data filter": config.FilterConfig,
    "data curate": config.CurateConfig,
}


@pytest.mark.parametrize("line", commands())
def test_commands_parse_and_their_settings_are_valid(line):
    command, words, name = get_command(cli.app), shlex.split(line, comments=True)[1:], ""
    while hasattr(command, "commands"):
        name, command, words = f"{name} {words[0]}".strip(), command.commands[words[0]], words[1:]
    with command.make_context(name, words) as context:
        given, rest = context.params, context.args
    if given.get("lmms"):
        name = "eval --lmms"
        tasks_of(given["lmms"])
    if name in CONFIGS:
        config.load_config(CONFIGS[name], given["config"], given["overrides"])
    elif name == "bench":
        assert rest[0] in CATALOG
    else:
        if name == "launch":
            config.load_config(CONFIGS[given["stage"]], given["config"], given["overrides"])
        assert name in ("demo", "doctor", "data check", "data convert", "launch", "plan")


LAUNCHES = re.findall(
    r"^```sh\n(prism-fast launch (?:.*\n)+?)```\n```text\n((?:.*\n)+?)```$", GUIDES["cluster.md"], re.M
)


@pytest.mark.parametrize(("line", "shown"), LAUNCHES)
def test_the_page_on_clusters_shows_what_launch_prints(line, shown, capsys):
    words = shlex.split(line.replace("\\\n", " "))[1:]
    cli.app(words, standalone_mode=False)
    assert capsys.readouterr() == (shown, "")


def test_the_page_on_clusters_has_the_counted_memory():
    _, rows = table("align", "4b", [1, 2, 4, 8, 16], memory=80, tokens=24_576)
    for row in rows:
        assert f"| {' | '.join(row)} |" in GUIDES["cluster.md"]
    assert len(LAUNCHES) == 4
    for recipe in config.RECIPES.glob("cluster_*"):
        assert any(f"--config {recipe.stem} " in line for line in commands()), recipe


def test_the_guide_names_every_setting_that_a_resumed_run_may_change():
    (row,) = re.findall(r"^\| (`run\.out`.*) \| every other key", GUIDES["training.md"], re.M)
    shown, room = set(), ""
    for name in re.findall(r"`([^`]+)`", row):  # `run.out`, `eval_every`: of the same room
        room = name.rpartition(".")[0] if "." in name else room
        shown.add(f"{room}.{name.rpartition('.')[2]}")
    assert shown == {key.replace("*rows", "*.rows") for key in FREE}


def test_every_stage_has_a_command_in_the_guides():
    shown = {" ".join(line.split()[1:3]) for line in commands()}
    for name in CONFIGS:
        assert any(words == name or words.split()[0] == name for words in shown), name


@pytest.mark.parametrize(("kind", "record"), blocks(METHOD, "json"))
def test_records_of_every_format_load(kind, record, tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "0001.png")
    (tmp_path / "data.json").write_text(f"[{record}]")
    read = {"sft": formats.read_sft, "warmup": formats.read_warmup}
    read |= {"align": formats.read_align, "rlvr": formats.read_rlvr}
    (sample,) = read[kind](tmp_path / "data.json")
    assert len(sample.images) == 1
    assert sample.gold == {"align": "10", "rlvr": "10"}.get(kind)
    assert (sample.response or sample.teacher_caption or "") == {
        "sft": "<caption>3\n7</caption><think>3 + 7 = 10</think><answer>10</answer>",
        "warmup": "<caption>3\n7</caption>",
        "align": "<caption>3\n7</caption>",
        "rlvr": "",
    }[kind]


def test_all_four_formats_are_shown():
    assert [kind for kind, _ in blocks(METHOD, "json")] == ["sft", "warmup", "align", "rlvr"]


def test_counts_of_tokens_are_right():
    prompt, caption, reasoning, responses = 1000, 250, 700, 16
    one_by_one = responses * (2 * prompt + caption + reasoning)  # both parts of a response, each after the prompt
    assert f"{3 * one_by_one:,}" in README  # students scored; students and teacher in the update
    assert f"{prompt + (responses + 1) * (caption + reasoning):,}" in README


def test_the_first_screen_says_what_and_where():
    """What it is, its picture, where to start and how to install come within 45 lines."""
    screen = "\n".join(README.splitlines()[:45])
    for found in ("discriminator.png", "| you want to | start here |", "git clone", "pip install", "not yet measured"):
        assert found in screen, found


DOCUMENTS = ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md"]


@pytest.mark.parametrize("name", [*DOCUMENTS, *(f"docs/{name}" for name in GUIDES if name != "README.md")])
def test_links_and_named_files_exist(name):
    path = ROOT / name
    text = path.read_text()
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]+)#?([^)]*)\)", text):
        linked = path.parent / target
        assert linked.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", linked.read_text(), re.M)
            slugs = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in slugs, anchor
    for named in re.findall(r"`((?:prism_fast|kernels|tests|docs|dev|benchmarks)/[\w/.-]+\.\w+)`", text):
        assert name == "CHANGELOG.md" or (ROOT / named).exists(), named
    for line in text.splitlines():
        file = ""
        for named, test in re.findall(r"`(tests/[\w/]+\.py)?::(\w+)`", line):
            file = named or file  # `::name` is of the file that was named before it
            assert re.search(rf"^def {test}\(", (ROOT / file).read_text(), re.M), f"{file}::{test}"


def test_settings_named_in_the_table_of_hazards_exist():
    table = METHOD.split("## 8.")[1].split("## 9.")[0]
    keys = re.findall(r"`([\w.]+): [\w.]+` \(`(\w+)`\)", table)
    assert len(keys) == 6
    for key, stage in keys:
        cls = CONFIGS[stage]
        *branch, leaf = key.split(".")
        for name in branch:
            cls = cls.model_fields[name].annotation
        assert leaf in cls.model_fields, key
