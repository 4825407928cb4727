"""docs/reproduce.md: its commands pass their dry run, its names exist, its hours are the planner's."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from prism_fast import metric_names
from prism_fast.config import CONFIGS, load_config
from prism_fast.run.alerts import ENDINGS, RULES
from prism_fast.run.dry_run import FITS, READS
from prism_fast.run.plan import Question, unnamed
from prism_fast.run.plans import Answers, plan_of
from prism_fast.run.seconds import parts
from prism_fast.settings import RECIPES
from tests import stand_ins
from tests.trainer.test_cli import run

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "reproduce.md").read_text()
SHELL = "".join(re.findall(r"^```sh\n((?:.*\n)*?)```$", PAGE, re.M)).replace("\\\n", " ").splitlines()
COMMANDS = [re.sub(r"\s*\| sh$", "", line) for line in SHELL if line.startswith("prism-fast")]
DOWNLOADS = [shlex.split(line) for line in SHELL if line.startswith("hf download")]
HELD_OUT = "prism/data/geo3k/test.parquet"  # written by the reference's script


def stage_of(words):
    """The command whose settings these words have; None where it has none."""
    name = words[2] if words[1] in ("launch", "data") else words[1]
    return name if name in CONFIGS else None


def given(words):
    """{key: value} of the overrides."""
    return dict(word.split("=", 1) for word in words if "=" in word)


def made_by(words):
    """The places of results that later commands read."""
    keys, stage = given(words), stage_of(words)
    if "run.out" in keys:
        return [f"{keys['run.out']}/final/{'discriminator' if stage == 'warmup' else 'policy'}"]
    if "--out" in words:
        return [words[words.index("--out") + 1]]
    return [keys["out"]] if "out" in keys else []


def files_of(words):
    """The data files of `data check` and `data convert`."""
    return [word for word in words[3:] if word.startswith("prism/data/") and word not in made_by(words)]


KINDS = {HELD_OUT: "rlvr"}  # of every data file that a command with settings reads
for _words in map(shlex.split, COMMANDS):
    if (_stage := stage_of(_words)) is not None and _stage in READS:
        KINDS.setdefault(given(_words)["data.files"], READS[_stage][0][0])


def stand_in(words):
    """Makes what a command reads."""
    for key, value in given(words).items():
        if key.endswith(".path") and key.startswith("discriminator"):
            stand_ins.model(Path(value), "2b", experts=4)
        elif key.endswith(".path"):
            size = re.search(r"(?i)[248]b", value)
            stand_ins.model(Path(value), size[0].lower())
        elif key in ("data.files", "data.eval_files"):
            stand_ins.data(Path(value), KINDS[value])
    if stage_of(words) is None:
        for file in files_of(words):
            stand_ins.data(Path(file), KINDS.get(file, "sft"))
        if "--model" in words:
            stand_ins.model(Path(words[words.index("--model") + 1]), "4b")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_passes_its_dry_run(command, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command)
    stand_in(words)
    before = sorted(tmp_path.rglob("*"))
    status, said, err = run(capsys, monkeypatch, *words[1:], "--dry-run")
    assert status == FITS, said + err
    assert "dry run: in order" in said + err and sorted(tmp_path.rglob("*")) == before


def test_what_a_command_reads_was_downloaded_or_made_before():
    there = [words[-1] for words in DOWNLOADS] + [HELD_OUT]
    for command in COMMANDS:
        words = shlex.split(command)
        read = [value for key, value in given(words).items() if key.endswith(".path") or key.startswith("data.")]
        if words[1] == "data" and stage_of(words) is None:
            read = files_of(words)
        for path in read:
            assert any(path == place or path.startswith(f"{place}/") for place in there), f"{path} in {command}"
        there += made_by(words)


def test_every_stage_is_on_the_page_and_every_recipe_of_the_paper():
    stages = {stage_of(shlex.split(command)) for command in COMMANDS}
    assert stages >= {"sft", "upcycle", "warmup", "align", "rlvr", "pairs", "filter", "eval", "probe"}
    named = set(re.findall(r"--config (\w+)", PAGE)) | set(re.findall(r"`(rlvr_\w+)`", PAGE))
    published = {path.stem for path in RECIPES.glob("*.yaml") if re.search(r"_[248]b", path.stem)} - {"align_4b"}
    assert published <= named and "cluster_8x80" in named  # which is align_4b, sharded


def looks():
    """(names, sentences) of the tables of what to look at."""
    for table in re.findall(r"^\| look at .*\n\|[-|]+\|\n((?:\|.*\n)+)", PAGE, re.M):
        for row in table.splitlines():
            first, _, last = (cell.strip() for cell in row.strip("|").split("|"))
            yield re.findall(r"`([^`]+)`", first), re.findall(r'"([^"]+)"', last)


def test_metrics_to_look_at_are_logged_and_warnings_are_given():
    templates = [what for what, _ in (*RULES.values(), *ENDINGS.values())]
    rows = list(looks())
    assert len(rows) > 15 and sum(len(sentences) for _, sentences in rows) > 10
    for names, sentences in rows:
        assert names
        for name in names:
            assert metric_names.find(name) is not None, name
        for sentence in sentences:
            assert any(sentence in template for template in templates), sentence


def test_hours_are_the_planner_s():
    rows = re.findall(r"^\| [^|]+ \| `(\w+) (--config[^`]+)` \| ([\d.]+) \| ([\d.]*) ?\| ([\d.]+) \|$", PAGE, re.M)
    assert len(rows) == 9
    for stage, words, held, step, hours in rows:
        options = dict(re.findall(r"--(\w+) (\S+)", words))
        overrides = [word for word in words.split() if "=" in word]
        settings = load_config(CONFIGS[stage], options["config"], overrides, base=unnamed(CONFIGS[stage]))
        records = int(options["records"]) if "records" in options else None
        asked = Question(gpus=int(options.get("gpus", 1)), policy=options.get("policy"), records=records)
        plan = plan_of(stage, settings, asked, options["config"])
        assert plan.fits
        if isinstance(plan, Answers):
            found, count = sum(plan.held.values()), plan.prompts * plan.batch.samples
            seconds = sum(plan.seconds.values()) * count / (plan.batch.prompts * plan.batch.samples)
            assert step == ""
        else:
            e = asked.efficiency
            each = parts(plan.trained, plan.setup, plan.batch, plan.tokens, plan.gpu, e).total
            found, seconds = plan.need(plan.tokens).training, plan.steps * each
            assert step == f"{each:.2f}"
        assert (held, hours) == (f"{found / 1e9:.1f}", f"{seconds / 3600:.1f}"), words


def test_means_of_the_paper_s_rows_are_means():
    rows = re.findall(r"^\| [\w, ]+((?: \| \d\d\.\d){8}) \|$", PAGE, re.M)
    assert len(rows) == 18
    for row in rows:
        *each, mean = (float(cell) for cell in re.findall(r"[\d.]+", row))
        assert abs(sum(each) / 7 - mean) <= 0.06, row


def test_settings_that_sources_do_not_give_are_the_recipes():
    table = PAGE.split("## Where the sources are silent")[1]
    recipes = {
        name: yaml.safe_load((RECIPES / f"{name}.yaml").read_text()) for name in ("sft_4b", "filter", "cluster_8x80")
    }
    assert recipes["sft_4b"]["batch_size"] == 64 and "`batch_size: 64`" in table
    assert recipes["filter"]["samples"] == 8 and "`samples: 8`" in table
    assert CONFIGS["warmup"].model_fields["eval_fraction"].default == 0.1 and "`eval_fraction: 0.1`" in table
    aligned = load_config(CONFIGS["align"], "cluster_8x80", base=unnamed(CONFIGS["align"]))
    assert aligned.steps == 500 and "`steps: 500`" in table
