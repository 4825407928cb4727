"""Recipes hold the published values; a bad configuration is one line that names file, key and remedy."""

import pytest

from prism_fast.config import (
    RECIPES,
    AlignConfig,
    EvaluateConfig,
    FilterConfig,
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
}
NOT_A_STAGE = {"demo", "smoke", "reference"}  # the demo reads the first two; the third is a base
NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml") if path.stem not in NOT_A_STAGE)


def load(name, *overrides):
    cls, paths = STAGES[name.split("_")[0]]
    return load_config(cls, name, [*paths, *overrides])


def message(cls, file, *overrides):
    with pytest.raises(DataError) as error:
        load_config(cls, file, overrides)
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_needs_its_paths_and_nothing_else(name):
    load(name)
    cls, paths = STAGES[name.split("_")[0]]
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


@pytest.mark.parametrize("name", ["align_4b", "align_8b"])
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
    prompts = {load(name).data.system_prompt for name in NAMES if name.split("_")[0] not in ("upcycle", "warmup")}
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


def test_unknown_keys_are_errors_that_list_the_known_ones(tmp_path):
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
    assert "set either epochs or steps" in message(SFTConfig, "sft_4b", *STAGES["sft"][1], "steps=5")
    assert "top_k = 5" in message(UpcycleConfig, "upcycle_2b", MODEL, "out=x", "top_k=5")
    assert "low = 0.9" in message(FilterConfig, "filter", *STAGES["filter"][1], "low=0.9")
    assert "reference.path" in message(RLVRConfig, "rlvr_4b_grpo", *STAGES["rlvr"][1], "objective.kl_coef=0.01")


def test_missing_keys_are_counted():
    text = message(AlignConfig, None)
    assert text.startswith("configuration: policy: Field required") and "more)" in text


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
