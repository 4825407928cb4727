"""`--dry-run`: what it finds, all of it at once, and that it writes and loads nothing."""

import json
from pathlib import Path

import pytest

from prism_fast.config import CONFIGS, load_config
from prism_fast.data.kinds import glance
from prism_fast.records import DataError
from prism_fast.run.dimensions import DISCRIMINATOR, POLICIES, Model
from prism_fast.run.dry_run import DOES_NOT_FIT, FITS, READS, dry_run
from prism_fast.run.plan import Question, unnamed
from prism_fast.run.plans import ANSWERS, BLOCK, PLANNED, Answers, plan_of
from prism_fast.stages import answers
from tests import stand_ins
from tests.trainer.test_cli import run

RECIPES = {"upcycle": "upcycle_2b", "pairs": "pairs", "filter": "filter", "eval": "eval"}
RECIPES |= {"sft": "sft_4b", "warmup": "warmup_2b", "align": "cluster_8x80", "rlvr": "rlvr_4b_grpo"}
COMMANDS = {"pairs": ("data", "pairs"), "filter": ("data", "filter")}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stand_ins.model(Path("m/4b"), "4b")
    stand_ins.model(Path("m/d"), "2b", experts=4)
    for kind in stand_ins.RECORDS:
        stand_ins.data(Path(f"{kind}.{'jsonl' if kind in ('sft', 'warm-up') else 'parquet'}"), kind)
    return tmp_path


def named(stage, **changed):
    fields = CONFIGS[stage].model_fields
    models = {name: "m/d" if name == "discriminator" else "m/4b" for name in ("model", "policy", "discriminator")}
    given = {f"{name}.path": path for name, path in models.items() if name in fields}
    given |= {"data.files": kind_file(READS[stage][0][0])} if "data" in fields else {}
    given |= {"run.out": "out"} if "run" in fields else {"out": "out"}
    return [f"{key}={value}" for key, value in {**given, **changed}.items()]


def kind_file(kind):
    return next(str(file) for file in Path().iterdir() if file.stem == kind)


def settings(stage, *overrides, **changed):
    return load_config(CONFIGS[stage], RECIPES.get(stage), [*named(stage, **changed), *overrides])


def everything(folder):
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize("stage", RECIPES)
def test_every_command_has_one_that_writes_nothing(stage, here, capsys, monkeypatch):
    before = everything(here)
    shard = ["cluster.sharding=zero2"] if "cluster" in CONFIGS[stage].model_fields else []
    command = ("launch", stage, "--gpus", "8") if shard else COMMANDS.get(stage, (stage,))
    given = [*command, "--config", RECIPES[stage], *named(stage), *shard, "--dry-run"]
    status, out, err = run(capsys, monkeypatch, *given)
    said = err if shard else out  # nothing for a pipe into sh
    assert status == FITS and "dry run: in order; nothing was started or written" in said
    assert not shard or out == ""
    assert ": fits." in said or stage == "upcycle"
    assert everything(here) == before


def test_all_faults_are_told_at_once_and_the_plan_still_is(here, capsys, monkeypatch):
    Path("out/final").mkdir(parents=True)
    lacks = {"policy.path": "no/such/model", "discriminator.path": "out/w/final/discriminator"}
    lacks |= {"data.files": "[a.parquet,sft.jsonl]", "data.eval_files": "b.parquet"}
    status, out, err = run(
        capsys, monkeypatch, "align", "--config", "cluster_8x80", *named("align", **lacks), "--dry-run"
    )
    assert status == 2 and err.startswith("error: ") and err.count("\n") == 1
    for said in (
        "no/such/model: no such folder; correct policy.path",
        "out/w/final/discriminator: no such folder; the stage that makes it has not ended yet?",
        "a.parquet: no such file",
        "sft.jsonl: holds sft records, expected alignment",
        "b.parquet: no such file",
        "out: holds an earlier run; add --resume to go on",
    ):
        assert said in err, said
    assert "align: policy 4.44 B" in out and "dry run" not in out


def test_what_does_not_fit_ends_with_another_status(here, capsys, monkeypatch):
    given = ["sft", "--config", "sft_4b", *named("sft"), "--dry-run"]
    status, out, err = run(capsys, monkeypatch, *given)
    assert status == DOES_NOT_FIT and err == ""
    assert "does not fit" in out and "dry run: it would not fit the memory" in out


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda folder: (folder / "config.json").unlink(), "m/4b: no config.json"),
        (lambda folder: (folder / "config.json").write_text("{}"), "m/4b/config.json: 'text_config': not there"),
        (lambda folder: (folder / "model.safetensors").unlink(), "m/4b: no model.safetensors; download the weights"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "m/4b: no tokenizer.json; download it"),
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text(
                json.dumps({"weight_map": {"a": "model.safetensors", "b": "two", "c": "three"}})
            ),
            "m/4b: 2 of 3 files of weights are missing, as three",
        ),
        (
            lambda folder: (folder / "config.json").write_text(json.dumps(stand_ins.config("2b", 4))),
            "m/4b: model.path: expected a policy, without experts; its config.json has 4",
        ),
    ],
)
def test_a_model_s_folder_is_looked_at_without_its_weights(spoil, says, here):
    spoil(Path("m/4b"))
    with pytest.raises(DataError, match=r"^m/4b") as raised:
        _ = dry_run("sft", settings("sft"), glance, processes=8).status
    assert str(raised.value).startswith(says) and str(raised.value).count("m/4b") == 1


def test_a_name_of_the_hub_and_a_missing_package_are_notes(here, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found = dry_run("sft", settings("sft", "cluster.sharding=zero2", **{"model.path": "Qwen/NAME"}), glance)
    assert found.faults == [] and len(found.notes) == 2
    assert "Qwen/NAME: no folder here, so a name of the hub" in found.notes[0]
    assert "deepspeed is not installed here; where it runs: pip install 'prism-fast[cluster]'" in found.notes[1]
    Path("Qwen").mkdir()  # now it is a path of which a part is there
    assert dry_run("sft", settings("sft", **{"model.path": "Qwen/NAME"}), glance).faults


def test_a_run_that_goes_on_needs_a_run_and_no_model(here):
    other = settings("sft", **{"model.path": "gone/for/ever"})
    assert dry_run("sft", other, glance, resume=True).faults == [
        "out: holds no run to resume; correct run.out, or leave out --resume to begin one"
    ]
    Path("out").mkdir()
    Path("out/run.lock").touch()
    assert dry_run("sft", other, glance, resume=True).faults == []


def test_data_commands_have_one_too(here, capsys, monkeypatch):
    sft = kind_file("sft")
    assert run(capsys, monkeypatch, "data", "check", sft, "--model", "m/4b", "--dry-run")[0] == FITS
    assert run(capsys, monkeypatch, "data", "convert", sft, "--out", "new.jsonl", "--dry-run")[0] == FITS
    status, _, err = run(capsys, monkeypatch, "data", "convert", "a", "b", "--out", sft, "--dry-run")
    assert status == 2 and "a: no such file; b: no such file; sft.jsonl: exists already" in err
    assert not Path("new.jsonl").exists()


def test_a_glance_tells_the_format_of_a_file_of_any_length(here):
    for kind in stand_ins.RECORDS:
        assert glance(Path(kind_file(kind))) == kind
        assert glance(stand_ins.data(Path(f"{kind}-list.json"), kind)) == kind
    Path("deep.jsonl").write_text("[" * 5000)
    assert glance(Path("deep.jsonl")) is None
    Path("long.jsonl").write_text(json.dumps({"messages": "x" * (2 << 20)}))  # the first record ends beyond a glance
    assert glance(Path("long.jsonl")) is None
    Path("own.json").write_text('[{"turns": [1]}]')
    assert glance(Path("own.json")) is None and glance(Path("own.json"), {"messages": "turns"}) == "sft"
    Path("half.parquet").write_bytes(Path(kind_file("rlvr")).read_bytes()[:99])
    with pytest.raises(DataError, match=r"half.parquet: cannot be read"):
        glance(Path("half.parquet"))


def test_stand_ins_have_the_published_dimensions():
    assert {size: Model.of(stand_ins.config(size)) for size in ("4b", "8b")} == POLICIES
    assert Model.of(stand_ins.config("2b", 4)) == DISCRIMINATOR


@pytest.mark.parametrize("stage", ANSWERS)
def test_commands_that_answer_have_a_plan(stage):
    given = load_config(CONFIGS[stage], RECIPES.get(stage), base=unnamed(CONFIGS[stage]))
    plan = plan_of(stage, given, Question(), "4b")
    assert isinstance(plan, Answers) and plan.fits and plan.rows > 1
    halves = plan_of(stage, given, Question(memory=40), "4b")
    assert halves.fits and halves.rows < plan.rows and sum(halves.seconds.values()) > sum(plan.seconds.values())
    assert not plan_of(stage, given, Question(memory=8), "4b").fits
    assert ("score" in plan.seconds and plan.seconds["score"] > 0) == (stage == "probe")
    with pytest.raises(DataError, match="runs in one process"):
        plan_of(stage, given, Question(gpus=8))


def test_blocks_are_those_that_are_answered_and_hours_follow_from_the_limit():
    assert BLOCK == answers.BLOCK
    given = load_config(CONFIGS["filter"], "filter", base=unnamed(CONFIGS["filter"]))  # 6,000 prompts, 8 answers each
    plan = plan_of("filter", given, Question(), "4b")
    assert plan.prompts == 6000
    said = "\n".join(note for section in plan.sections() for note in section.notes)
    assert f"48,000 responses: {sum(plan.seconds.values()) * 48_000 / BLOCK / 3600:,.1f} hours." in said


def test_hours_of_epochs_need_the_number_of_records(capsys, monkeypatch):
    given = ["plan", "warmup", "--config", "warmup_2b", "--gpus", "8", "cluster.sharding=zero2"]
    assert "hours" not in run(capsys, monkeypatch, *given)[1]
    out = run(capsys, monkeypatch, *given, "--records", "64000")[1]
    assert "900 steps: " in out  # a tenth is held out


def test_a_plan_of_another_command_is_refused(capsys, monkeypatch):
    status, _, err = run(capsys, monkeypatch, "plan", "doctor", "--config", "eval")
    assert status == 2 and f"expected one of {', '.join(PLANNED)}" in err
