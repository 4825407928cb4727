"""Recipes hold the published values; a bad configuration is one line that names file, key and remedy."""

import json
import os
import re
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dev import settings_page
from prism_fast.config import (
    CONFIGS,
    RECIPES,
    AlignConfig,
    BenchmarksConfig,
    EvaluateConfig,
    FilterConfig,
    ObjectiveConfig,
    PairsConfig,
    RLVRConfig,
    SFTConfig,
    UpcycleConfig,
    WarmupConfig,
    load_config,
    parse_overrides,
    read_yaml,
)
from prism_fast.records import DataError
from prism_fast.settings import allowed, leaves, show_config
from prism_kernels import PolicyObjective

FILES, RUN = "data.files=[a.parquet]", "run.out=runs/x"
POLICY, DISCRIMINATOR, MODEL = "policy.path=p", "discriminator.path=d", "model.path=m"
STAGES = {  # what a user must add to a recipe, by the first word of its name
    "sft": (SFTConfig, (MODEL, FILES, RUN)),
    "upcycle": (UpcycleConfig, (MODEL, "out=x")),
    "pairs": (PairsConfig, (MODEL, FILES, "out=x")),
    "warmup": (WarmupConfig, (DISCRIMINATOR, FILES, RUN)),
    "align": (AlignConfig, (POLICY, DISCRIMINATOR, FILES, RUN)),
    "filter": (FilterConfig, (MODEL, FILES, "out=x")),
    "rlvr": (RLVRConfig, (POLICY, FILES, RUN)),
    "eval": (EvaluateConfig, (MODEL, FILES, "out=x")),
    "benchmarks": (BenchmarksConfig, ("policies=p", "out=x")),
}
NOT_A_STAGE = {"demo", "smoke", "compare", "compare_smoke", "reference"}  # the demo reads all but the last, a base
NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml") if path.stem not in NOT_A_STAGE)


def stage_of(recipe):
    stage = recipe.removeprefix("tiny_").split("_")[0]
    return "align" if stage == "cluster" else stage


def load(name, *overrides, file=None):
    cls, paths = STAGES[stage_of(name)]
    return load_config(cls, file or name, [*paths, *overrides])


def message(cls, file, *overrides):
    with pytest.raises(DataError) as error:
        load_config(cls, file, overrides)
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_needs_its_paths_and_nothing_else(name):
    load(name)
    cls, paths = STAGES[stage_of(name)]
    for left_out in range(len(paths)):
        text = message(cls, name, *paths[:left_out], *paths[left_out + 1 :])
        assert f"{name}.yaml: {paths[left_out].split('=')[0].rsplit('.', 1)[0]}" in text


def test_sft_and_warmup_carry_the_published_values():
    sft, warmup = load("sft_4b"), load("warmup_2b")
    for config in (sft, load("sft_8b"), warmup):
        assert (config.optimizer.lr, config.optimizer.schedule, config.optimizer.warmup_ratio) == (1e-5, "cosine", 0.1)
        assert (config.max_tokens, config.epochs, config.steps) == (8192, 1, None)
    assert (warmup.optimizer.weight_decay, warmup.optimizer.clip_norm) == (0.01, 1.0)
    assert 2 * warmup.batch_size == 128  # pairs
    assert (warmup.balance_coef, warmup.head_dropout) == (0.01, 0.0)
    upcycle = load("upcycle_2b")
    assert (upcycle.num_experts, upcycle.top_k, upcycle.expert_noise, upcycle.router_std) == (4, 2, 0.01, 0.02)


@pytest.mark.parametrize("name", ["align_4b", "align_8b", "cluster_8x80", "cluster_2x8x80", "cluster_1x80"])
def test_alignment_carries_the_published_values(name):
    config = load(name)
    rollout = config.rollout
    assert (rollout.prompts_per_step, rollout.samples, rollout.temperature) == (4, 16, 1.0)
    assert (config.data.max_prompt_tokens, rollout.max_response_tokens, config.steps) == (2048, 6144, 500)
    for optimizer in (config.policy_optimizer, config.discriminator_optimizer):
        assert (optimizer.lr, optimizer.weight_decay, optimizer.clip_norm) == (1e-6, 0.01, 1.0)
    advantage = config.advantage
    assert (advantage.rule, advantage.format_penalty, advantage.align_coef) == ("align", 1.5, 1.0)
    assert (advantage.perception_weight, advantage.reasoning_weight) == (0.5, 0.5)
    assert (config.score_clamp, config.score_penalty, config.length_correction) == (10.0, 0.001, 0.0)
    assert config.compat.format == "fixed" and config.compat.teacher_token_limit is None
    assert not config.compat.clamp_in_loss and not config.compat.text_positions
    # the longest tree that the limits allow fits: prompt, the teacher's two parts, one student's part
    assert config.run.tokens_per_pack >= config.data.max_prompt_tokens + 3 * config.max_part_tokens


@pytest.mark.parametrize("size", ["4b", "8b"])
def test_rlvr_carries_the_published_values(size):
    for algorithm in ("grpo", "dapo", "gspo"):
        config = load(f"rlvr_{size}_{algorithm}")
        assert (config.rollout.prompts_per_step, config.rollout.samples) == (32, 16)
        assert (config.rollout.max_response_tokens, config.steps, config.optimizer.lr) == (8192, 1500, 1e-6)
        assert (config.accuracy_weight, config.format_weight) == (0.8, 0.2)
        objective = config.objective.build(config.rollout.max_response_tokens)
        named = {"grpo": PolicyObjective.grpo(), "dapo": PolicyObjective.dapo(), "gspo": PolicyObjective.gspo()}
        assert objective == PolicyObjective(**{**vars_of(named[algorithm]), "kl_estimator": objective.kl_estimator})
        longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
        assert config.run.tokens_per_pack >= longest
    dapo = load(f"rlvr_{size}_dapo")
    assert (dapo.dynamic_sampling.generation_factor, dapo.dynamic_sampling.max_tries) == (3, 10)
    assert (dapo.overlong.buffer, dapo.overlong.factor) == (4096, 1.0)
    assert (dapo.objective.clip_low, dapo.objective.clip_high) == (0.2, 0.28)
    for other in ("grpo", "gspo"):
        config = load(f"rlvr_{size}_{other}")
        assert config.dynamic_sampling is None and config.overlong is None


def vars_of(objective):
    return {name: value for name, value in vars(objective).items() if name != "spec"}


def test_filter_and_pairs_carry_the_published_values():
    kept, pairs = load("filter"), load("pairs")
    assert (kept.limit, kept.keep, kept.low, kept.high) == (6000, 2000, 0.2, 0.8)
    assert (2 * pairs.limit * pairs.samples, pairs.temperature) == (120_000, 1.0)


def test_one_system_prompt_for_every_stage_that_renders_prompts():
    rendering = [n for n in NAMES if stage_of(n) not in ("upcycle", "warmup") and not n.startswith("tiny_")]
    prompts = {getattr(load(name), "data", load(name)).system_prompt for name in rendering}
    (prompt,) = prompts
    for tag in ("caption", "think", "answer"):
        assert prompt.count(f"<{tag}>") == prompt.count(f"</{tag}>") == 1
    assert "<image>" not in prompt and "<|" not in prompt


def test_overrides_win_over_the_file_and_are_yaml():
    config = load("align_4b", "steps=3", "rollout.samples=8", "policy.dtype=float32", "data.eval_files=[b, c]")
    assert (config.steps, config.rollout.samples, config.policy.dtype) == (3, 8, "float32")
    assert [str(path) for path in config.data.eval_files] == ["b", "c"]
    assert config.rollout.prompts_per_step == 4  # its neighbours stay
    assert load("align_4b", "steps=3", "steps=4").steps == 4
    assert load("sft_4b", "epochs=null", "steps=5").steps == 5
    assert parse_overrides(["a.b=1", "a.c=x=y"]) == {"a": {"b": 1, "c": "x=y"}}


def test_configurations_are_frozen():
    config = load("align_4b")
    with pytest.raises(ValueError, match="frozen"):
        config.steps = 1
    with pytest.raises(ValueError, match="frozen"):
        config.rollout.samples = 1


def test_unknown_keys_are_errors_that_name_the_known_ones(tmp_path):
    text = message(AlignConfig, "align_4b", *STAGES["align"][1], "rollout.sample=8")
    assert "align_4b.yaml: rollout.sample: unknown key" in text and "samples" in text
    file = tmp_path / "mine.yaml"
    file.write_text("base: sft_4b\nmodel: {path: m}\ndata: {files: [a]}\nrun: {out: x}\nepoch: 2\n")
    text = message(SFTConfig, file)
    assert text.startswith(f"{file}: epoch: unknown key") and "epochs" in text


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("steps=many", "steps"),
        ("steps=0", "steps"),
        ("rollout.samples=1.5", "rollout.samples"),
        ("policy_optimizer.lr=-1", "policy_optimizer.lr"),
        ("rollout=16", "rollout"),
        ("advantage.rule=best", "advantage.rule"),
        ("compat.format=loose", "compat.format"),
        ("data.files=[]", "data.files"),
    ],
)
def test_wrong_values_name_their_key(override, named):
    assert f"align_4b.yaml: {named}: " in message(AlignConfig, "align_4b", *STAGES["align"][1], override)


def test_values_that_contradict_each_other():
    both = message(SFTConfig, "sft_4b", *STAGES["sft"][1], "steps=5", "epochs=1")
    assert "steps: steps = 5 and epochs = 1 are both set, unset one with =null" in both
    assert "steps: missing, set steps or epochs" in message(SFTConfig, "sft_4b", *STAGES["sft"][1], "epochs=null")
    assert "top_k = 5" in message(UpcycleConfig, "upcycle_2b", MODEL, "out=x", "top_k=5")
    assert "low = 0.9" in message(FilterConfig, "filter", *STAGES["filter"][1], "low=0.9")
    assert "reference.path" in message(RLVRConfig, "rlvr_4b_grpo", *STAGES["rlvr"][1], "objective.kl_coef=0.01")
    text = message(RLVRConfig, "rlvr_4b_dapo", *STAGES["rlvr"][1], "rollout.max_response_tokens=4095")
    assert "overlong.buffer = 4096 is more than max_response_tokens = 4095" in text
    for stage, recipe in (("rlvr", "rlvr_4b_grpo"), ("align", "align_4b")):
        cls, paths = STAGES[stage]
        assert "rollout.samples: expected a whole number from 2" in message(cls, recipe, *paths, "rollout.samples=1")
        text = message(cls, recipe, *paths, "run.tokens_per_pack=64", "rollout.max_response_tokens=64")
        assert "run: tokens_per_pack = 64 holds no prompt with a response of rollout.max_response_tokens = 64" in text
    assert "eval.temperature: 0 gives samples = 4 times" in message(
        EvaluateConfig, "eval", *STAGES["eval"][1], "eval.samples=4"
    )
    text = message(FilterConfig, "filter", *STAGES["filter"][1], "samples=2", "low=0.6", "high=0.9")
    assert "high: no pass rate of 2 samples lies from low = 0.6 to 0.9" in text
    text = message(RLVRConfig, "rlvr_4b_dapo", *STAGES["rlvr"][1], "rollout={prompts_per_step: 65536, samples: 32}")
    assert "rollout.prompts_per_step: expected prompts_per_step times samples at most 1048576" in text


@pytest.mark.parametrize("stage", ["sft", "warmup"])
def test_steps_take_the_place_of_a_recipes_epochs_and_say_so(stage, tmp_path):
    cls, paths = STAGES[stage]
    recipe, notes = {"sft": "sft_4b", "warmup": "warmup_2b"}[stage], []
    config = load_config(cls, recipe, [*paths, "steps=5"], note=notes.append)
    assert (config.steps, config.epochs) == (5, None)
    assert notes == [f"steps=5 takes the place of epochs: 1 in {RECIPES / recipe}.yaml"]
    (tmp_path / "mine.yaml").write_text(f"base: {recipe}\nsteps: 7\n")
    config = load_config(cls, tmp_path / "mine.yaml", paths)
    assert (config.steps, config.epochs) == (7, None)
    config = load_config(cls, tmp_path / "mine.yaml", [*paths, "epochs=0.5"])
    assert (config.steps, config.epochs) == (None, 0.5)
    assert load_config(cls, tmp_path / "mine.yaml", [*paths, "steps=7"], note=notes.append).steps == 7
    assert len(notes) == 1


def test_every_fault_is_named_at_once():
    text = message(AlignConfig, None, "steps=0", "run.seed=-1", "run.out=x", "polcy.path=p", "rollout.sampels=3")
    assert text.startswith("configuration: ")
    assert set(text.removeprefix("configuration: ").split("; ")) == {
        "policy.path: missing",
        "discriminator.path: missing",
        "data.files: missing",
        "rollout.prompts_per_step: missing",
        "rollout.sampels: unknown key, did you mean rollout.samples?",
        "policy_optimizer.lr: missing",
        "discriminator_optimizer.lr: missing",
        "run.seed: expected a whole number from 0 to 4294967295, got -1",
        "steps: expected a whole number from 1 to 100000000, got 0",
        "polcy: unknown key, did you mean policy?",
    }


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("lr=1", "optimizer.lr"),
        ("out=x", "run.out"),
        ("optimiser.lr=1", "optimizer"),
        ("optimizer.learning_rate=1", "unknown key; known here: beta1"),
        ("run.save_evry=1", "run.save_every"),
        ("save_evry=1", "run.save_every"),
        ("batchsize=1", "batch_size"),
        ("data.file=x", "data.files"),
    ],
)
def test_an_unknown_key_is_told_which_was_meant(key, meant):
    assert meant in message(SFTConfig, "sft_4b", *STAGES["sft"][1], key)


def test_a_stage_without_epochs_says_steps():
    text = message(RLVRConfig, "rlvr_4b_grpo", *STAGES["rlvr"][1], "epochs=1")
    assert text.endswith("rlvr_4b_grpo.yaml: epochs: unknown key, did you mean steps?")


def test_dotted_keys_in_a_file_are_told_how_to_nest(tmp_path):
    (tmp_path / "a.yaml").write_text("base: sft_4b\nrun.out: x\n")
    text = message(SFTConfig, tmp_path / "a.yaml", MODEL, FILES, RUN)
    assert text.endswith("a.yaml: run.out: unknown key; in a file it is run: {out: ...}")


NO_NUMBERS = (".nan", ".inf", "-.inf", "1e999", "true", "fast", "[1]", "{}", "''", "1e30", "-1e30", str(2**70))


@pytest.mark.parametrize("stage", CONFIGS)
def test_every_number_is_finite_and_bounded(stage):
    """None takes infinity, a truth value or a text, or is without bounds."""
    for leaf in leaves(CONFIGS[stage]):
        if "number" in allowed(leaf.schema):
            for value in NO_NUMBERS:
                text = message(CONFIGS[stage], None, f"{leaf.name}={value}")
                assert f"{leaf.name}: expected a" in text, (value, text)


@given(
    st.sampled_from(["grpo", "dapo", "gspo", "dr_grpo"]),
    *[st.one_of(st.none(), st.floats(allow_nan=True)) for _ in range(3)],
    *[st.floats() for _ in range(2)],
)
@settings(max_examples=60, deadline=None)
def test_an_objective_that_the_settings_accept_is_one_that_the_kernels_accept(name, low, high, cap, kl, entropy):
    tree = {"name": name, "clip_low": low, "clip_high": high, "importance_cap": cap}
    try:
        config = ObjectiveConfig(**tree, kl_coef=kl, entropy_coef=entropy)
    except ValueError:
        return
    config.build(max_length=1)


@pytest.mark.parametrize("value", ["''", "' '", "3", "1.5", "null", "true", "[]", "{}", '"a\\0b"', '"a\\nb"', ""])
def test_places_are_texts_that_say_something(value):
    assert "run.out: expected a path, got " in message(SFTConfig, "sft_4b", MODEL, FILES, f"run.out={value}")
    assert "model.path: expected a path, got " in message(SFTConfig, "sft_4b", FILES, RUN, f"model.path={value}")


def test_one_path_is_a_list_of_one_and_home_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = load("sft", "data.files=a b.json", "data.eval_files=~/c.json", "run.out=~/runs", file="sft_4b")
    assert [str(p) for p in (*config.data.files, *config.data.eval_files)] == ["a b.json", "/home/me/c.json"]
    assert str(config.run.out) == "/home/me/runs"
    for value in ("3", "null", "{a: b}", "[]", "['']", "[3]", "[[a]]"):
        assert "data.files: expected a path" in message(SFTConfig, "sft_4b", MODEL, RUN, f"data.files={value}")


@pytest.mark.parametrize("value", ["2026-11-26", "010", "1:30", "1e5x", "v1.0", "on-line"])
def test_texts_that_yaml_would_take_for_dates_or_clocks_stay_texts(value):
    assert str(load("sft", f"run.out={value}", file="sft_4b").run.out) == value


def test_a_key_that_stands_twice_is_an_error(tmp_path):
    file = tmp_path / "twice.yaml"
    file.write_text("base: sft_4b\nrun: {out: a}\nsteps: 3\nrun: {out: b}\n")
    assert message(SFTConfig, file) == f"{file}:4: the key 'run' stands twice; remove one"
    file.write_text("run:\n  out: a\n  seed: 1\n  out: b\n")
    assert message(SFTConfig, file) == f"{file}:4: the key 'out' stands twice; remove one"
    assert "the key 'out' stands twice" in message(SFTConfig, None, "run={out: a, out: b}")


@pytest.mark.parametrize(
    "text", ["[" * 1200, "run: &a {out: *a}", "a: 1\n---\nb: 2", "? [a]\n: 1", "\t", "%x", "!!python/x"]
)
def test_hostile_yaml_is_one_line(text, tmp_path):
    (tmp_path / "a.yaml").write_text(text)
    message(SFTConfig, tmp_path / "a.yaml")
    assert len(message(SFTConfig, None, f"run={text}")) < 400


@pytest.mark.parametrize(
    ("name", "data", "steps"),
    [
        ("a.yaml", b"\xef\xbb\xbfbase: sft_4b\nsteps: 5\n", 5),  # a byte order mark
        ("a.yaml", b"base: sft_4b\r\nsteps: 5\r\n", 5),
        ("a.yaml", b"base: sft_4b\nsteps: &n 5\nbatch_size: *n\neval: &e {limit: 3}\n", 5),
        ("a.json", b'{\n\t"base": "sft_4b",\n\t"steps": 5\n}', 5),
        ("a.json", b'{"base": "sft_4b", "steps": 1e3}', 1000),
    ],
)
def test_files_as_editors_and_programs_write_them(name, data, steps, tmp_path):
    (tmp_path / name).write_bytes(data)
    assert load("sft", file=tmp_path / name).steps == steps


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("a.yaml", "steps: 5".encode("utf-16"), r"not valid YAML \(no text in UTF-8\); save it as such"),
        ("a.yaml", b"run:\n\tout: x\n", r"a\.yaml:2: not valid YAML \(found character '\\t'"),
        ("a.yaml", b"base: [sft_4b]", r"base: expected the name of a recipe or a file, got a list of 1"),
        ("a.yaml", b"base: '" + b"x" * 999 + b"'", r"no such configuration file"),
        ("a.json", b'{"steps": 1,\n"steps": 2}', r"a\.json: the key 'steps' stands twice; remove one"),
        ("a.json", b'{"steps": 1,\n"run": {', r"a\.json:2: not valid JSON \(Expecting"),
        ("a.json", b'{"optimizer": {"lr": NaN}}', r"optimizer\.lr: expected a number above 0, at most 1, got nan"),
    ],
)
def test_files_that_do_not_parse_are_one_line(name, data, says, tmp_path):
    (tmp_path / name).write_bytes(data)
    assert re.search(says, message(SFTConfig, tmp_path / name))


def test_what_is_given_for_a_configuration_file(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "low.yaml").write_text("base: sft_4b\nsteps: 5\n")
    (tmp_path / "high.yaml").write_text("base: ~/low.yaml\n")
    assert load("sft", file="~/high.yaml").steps == 5
    os.mkfifo(tmp_path / "pipe")  # as <(...) gives
    threading.Thread(target=(tmp_path / "pipe").write_text, args=["base: sft_4b\nsteps: 6\n"], daemon=True).start()
    assert load("sft", file=tmp_path / "pipe").steps == 6
    for name, says in (
        (tmp_path, "is a folder, expected a file"),
        ("x" * 999, "no such configuration file"),
        ("a\0b", "'a.x00b': no such configuration file"),
        ("SFT_4B", "did you mean sft_4b?"),
        ("sft_4b.yaml", "did you mean sft_4b?"),
    ):
        assert re.search(re.escape(says).replace(r"a\.x00b", r"a\\x00b"), message(SFTConfig, name))


@pytest.mark.parametrize(
    ("written", "text"),
    [("Use # for heads", "Use # for heads"), ("a\nb", "a\nb"), ("'a # b'", "a # b"), (" a  b ", "a  b"), ("", None)],
)
def test_a_text_on_the_command_line_is_taken_as_it_stands(written, text):
    assert load("sft", f"data.system_prompt={written}", file="sft_4b").data.system_prompt == text


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("Run.out=x", "Run: unknown key, did you mean run?"),
        ("BATCH-SIZE=4", "BATCH-SIZE: unknown key, did you mean batch_size?"),
        ("run/out=x", "run/out: unknown key, did you mean run.out?"),
        ("run_save_every=4", "run_save_every: unknown key, did you mean run.save_every?"),
        ("--steps=4", "--steps: unknown key, did you mean steps?"),
        ("config=sft_4b", "config: unknown key; it is an option: --config NAME"),
        ("resume=true", "resume: unknown key; it is an option: --resume"),
        ("data.system_prompt=Answer: yes", "expected a text or null, got a mapping of 1 (in quotes it is one)"),
        ("data.system_prompt=no", "expected a text or null, got false (in quotes it is one)"),
        ("run..out=x", "override 'run..out=x': expected key.path=value"),
        ("sft_4b", "expected key.path=value, for example run.seed=1; a file or recipe goes after --config"),
        ("mine.yaml", "goes after --config: --config mine.yaml"),
        ("k" * 5000 + "=1", "kkk...: unknown key"),
    ],
)
def test_overrides_as_people_write_them_are_told_how(override, says):
    text = message(SFTConfig, "sft_4b", *STAGES["sft"][1], override)
    assert says in text and len(text) < 600


@pytest.mark.parametrize("stage", CONFIGS)
def test_every_key_is_described(stage):
    for leaf in leaves(CONFIGS[stage]):
        assert leaf.field.description, f"{stage}: {leaf.name}"


@pytest.mark.parametrize("name", NAMES)
def test_the_shown_configuration_is_read_again_as_it_was(name, tmp_path):
    cls, paths = STAGES[stage_of(name)]
    text = show_config(cls, name, paths)
    (tmp_path / "shown.yaml").write_text(text)
    assert load_config(cls, tmp_path / "shown.yaml") == load(name)
    assert text.count("  # ") >= len(list(leaves(cls))) - 8 and "MUST BE SET" not in text  # of sections that are off


@pytest.mark.parametrize(
    "value",
    [
        "a: b # c",
        "1e-5",
        "no",
        "ü",
        "'quoted'",
        "two\nlines",
        "[x",
        "\x85x",
        "\ufeffa\rb",
        "null",
        "- a",
        "2026-01-01",
        "",
    ],
)
def test_any_text_is_shown_so_that_it_is_read_again(value, tmp_path):
    tree = {"system_prompt": value}
    (tmp_path / "base.yaml").write_text(json.dumps({"data": tree}))
    text = show_config(SFTConfig, tmp_path / "base.yaml", [*STAGES["sft"][1], "optimizer.lr=1e-5", "steps=1"])
    (tmp_path / "shown.yaml").write_text(text)
    assert load_config(SFTConfig, tmp_path / "shown.yaml").data.system_prompt == value


@pytest.mark.parametrize("stage", CONFIGS)
def test_what_must_be_set_is_shown_as_a_comment(stage, tmp_path):
    text = show_config(CONFIGS[stage], None)
    (tmp_path / "shown.yaml").write_text(text)
    shown = [line.split("#")[1].split(":")[0].strip() for line in text.splitlines() if ": MUST BE SET " in line]
    asked = message(CONFIGS[stage], tmp_path / "shown.yaml").split(".yaml: ")[1].split("; ")
    assert sorted(shown) == sorted(fault.split(":")[0].split(".")[-1] for fault in asked)
    with pytest.raises(DataError, match="steps"):
        show_config(SFTConfig, None, ["steps=0"])


def test_the_page_of_settings_is_the_configurations():
    page = (Path(__file__).parents[2] / "docs" / "settings.md").read_text()
    assert page == settings_page.page(), "write it again: python dev/settings_page.py > docs/settings.md"
    assert {f"## {title}" for title in map(settings_page.title, CONFIGS)} <= set(page.splitlines())


def test_files_that_are_missing_or_not_yaml(tmp_path):
    assert "no such configuration file" in message(SFTConfig, tmp_path / "none.yaml")
    assert "align_4b" in message(SFTConfig, "aling_4b")  # lists the recipes
    file = tmp_path / "bad.yaml"
    file.write_text("steps: 3\nrun: [out: x\n")
    assert message(SFTConfig, file).startswith(f"{file}:")
    file.write_text("- steps\n")
    assert "mapping" in message(SFTConfig, file)
    file.write_bytes(b"\xff\xfe\x00")
    assert "not valid YAML" in message(SFTConfig, file)


@pytest.mark.parametrize("override", ["steps", "=3", "run.out=[x", "steps: 3"])
def test_bad_overrides_quote_themselves(override):
    with pytest.raises(DataError) as error:
        parse_overrides([override])
    assert repr(override) in str(error.value) and "\n" not in str(error.value)


def test_a_file_lies_over_its_base(tmp_path):
    (tmp_path / "low.yaml").write_text("base: rlvr_4b_grpo\nrollout: {samples: 8}\n")
    (tmp_path / "high.yaml").write_text("base: low.yaml\nsteps: 7\n")
    config = load_config(RLVRConfig, tmp_path / "high.yaml", STAGES["rlvr"][1])
    assert (config.steps, config.rollout.samples, config.rollout.prompts_per_step) == (7, 8, 32)
    (tmp_path / "low.yaml").write_text("base: high.yaml\n")
    assert "in a circle" in message(RLVRConfig, tmp_path / "high.yaml")
    (tmp_path / "low.yaml").write_text("base: nothing\n")
    assert "no such configuration file" in message(RLVRConfig, tmp_path / "low.yaml")


def test_the_demo_recipe_is_read_as_it_stands():
    assert read_yaml(RECIPES / "demo.yaml")["align"]["steps"] > 0


def test_recipes_of_clusters_shard():
    for name, offload in (("cluster_8x80", False), ("cluster_2x8x80", False), ("cluster_1x80", True)):
        config = load(name)
        assert config.cluster.sharding == "zero2"
        assert config.policy_optimizer.offload == config.discriminator_optimizer.offload == offload
        assert config.policy.activation_checkpointing and config.discriminator.activation_checkpointing
