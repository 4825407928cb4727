"""Checkpoints written beside the run: what waits for them, what is in them, and what becomes of faults."""

import errno
import json
import os
import signal
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file

from prism_fast import ranks
from prism_fast.records import DataError
from prism_fast.run import checkpoint
from prism_fast.run.signals import Stopped
from tests.damage import DAMAGE, edit_state, flip
from tests.trainer.run.test_session import FullDisk, Stage, lines

pytestmark = pytest.mark.usefixtures("torch_settings")
SECONDS = 30  # until a test that hangs fails


@pytest.fixture
def held(monkeypatch):
    """Writing waits in the thread until the event is set."""
    write, go_on = checkpoint.Part.write, threading.Event()

    def wait_and_write(part, folder):
        assert threading.current_thread() is not threading.main_thread()
        assert go_on.wait(SECONDS), "nobody let it go on"
        return write(part, folder)

    monkeypatch.setattr(checkpoint.Part, "write", wait_and_write)
    yield go_on
    go_on.set()


def saved(out, step):
    path = out / f"checkpoints/step-{step:06d}"
    assert checkpoint.fault(path) is None
    return load_file(path / "trainer.safetensors"), json.loads((path / "trainer.json").read_text())


def warned(out):
    return [
        line["warning"] for line in lines(out) if "warning" in line and not line["warning"].endswith((": odd", "bad"))
    ]


def test_steps_go_on_while_a_checkpoint_is_written_and_it_is_of_its_own_step(tmp_path, held):
    """The optimizer's tensors, parts and weights have changed three times when the file is begun."""
    stage = Stage(tmp_path, save_every=2, keep_last=9)
    seen = []

    def look(step):
        seen.append(checkpoint.steps(tmp_path / "checkpoints"))
        if step == 4:  # at its end the next one is due, which waits
            held.set()

    stage.run(5, fault=lambda step: look(step))
    assert seen[:4] == [[], [], [], []]
    assert checkpoint.steps(tmp_path / "checkpoints") == [2, 4, 5]
    for step in (2, 4, 5):
        tensors, state = saved(tmp_path, step)
        assert tensors["a/exp_avg.weight"].tolist() == [step * (step + 1) / 2] * 2
        assert state["counter"] == {"count": 2 * step} and state["position"] == 3 * step
        assert (tmp_path / f"checkpoints/step-{step:06d}/policy/weight").read_text() == str(step)


def test_one_is_written_at_a_time(tmp_path, monkeypatch):
    write, busy = checkpoint.Part.write, []

    def watched(part, folder):
        busy.append(part.step)
        assert len(busy) == 1
        made = write(part, folder)
        busy.remove(part.step)
        return made

    monkeypatch.setattr(checkpoint.Part, "write", watched)
    Stage(tmp_path, save_every=1, keep_last=9).run(6)
    assert checkpoint.steps(tmp_path / "checkpoints") == [1, 2, 3, 4, 5, 6]


def test_without_the_background_a_step_ends_with_its_checkpoint(tmp_path):
    seen = []
    stage = Stage(tmp_path, save_every=1, keep_last=9, save_in_background=False)
    stage.run(3, fault=lambda step: seen.append(checkpoint.steps(tmp_path / "checkpoints")))
    assert seen == [[], [1], [1, 2]]


def test_a_run_that_ends_with_an_error_waits_for_its_checkpoint(tmp_path, held):
    def fail(step):
        if step == 3:
            threading.Timer(0.2, held.set).start()
            raise DataError("a.json:3: torn")

    with pytest.raises(DataError, match="torn"):
        Stage(tmp_path, save_every=2).run(5, fault=fail)
    assert checkpoint.steps(tmp_path / "checkpoints") == [2]


def test_a_checkpoint_that_is_lost_with_a_process_is_told_in_plain_words(tmp_path, monkeypatch):
    """The thread that writes hears of it as the first does, from a library that knows no process's number."""

    def lost(part, folder):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:42")

    def fail(step):
        if step == 3:
            raise DataError("a.json:3: torn")

    monkeypatch.setattr(checkpoint.Part, "write", lost)
    with pytest.raises(DataError, match="torn"):
        Stage(tmp_path, save_every=2, save_in_background=True).run(5, fault=fail)
    assert warned(tmp_path) == ["a checkpoint was not written: a process is gone, or does not answer"]


def test_who_will_not_wait_does_not(tmp_path, held):
    """A second signal: what was begun is no checkpoint."""

    def stop(step):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        Stage(tmp_path, save_every=2).run(5, fault=stop)
    assert checkpoint.steps(tmp_path / "checkpoints") == []


def test_a_stop_waits_for_the_checkpoint_before_and_writes_its_own(tmp_path, held):
    def stop(step):
        if step == 3:
            threading.Timer(0.2, held.set).start()
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped, match=r"saved .*step-000003"):
        Stage(tmp_path, save_every=2).run(5, fault=stop)
    assert checkpoint.steps(tmp_path / "checkpoints") == [2, 3]


def test_what_the_system_refuses_is_told_when_it_is_known(tmp_path, monkeypatch):
    """Not only at the next save."""
    FullDisk(monkeypatch, {2}, OSError(errno.ENOSPC, "No space left on device"))

    def wait(step):
        for thread in threading.enumerate() if step == 3 else ():
            if thread.name == "checkpoint":
                thread.join(SECONDS)

    Stage(tmp_path, save_every=2, keep_last=9).run(5, until=5, fault=wait)
    told = [line.get("loss", line.get("warning")) for line in lines(tmp_path)]
    said = next(text for text in told if "could not be written (No space left" in str(text))
    assert told.index(said) < told.index(3.0) and said.startswith("step 2: ")
    assert checkpoint.steps(tmp_path / "checkpoints") == [4, 5]


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("name", ["policy/weight", "trainer.safetensors", "trainer.json", "manifest.json"])
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_taken(how, name, tmp_path):
    whole = Stage(tmp_path / "whole", save_every=1)
    whole.run(5)
    Stage(tmp_path / "cut", save_every=1).run(5, until=4)
    newest = tmp_path / "cut/checkpoints/step-000004"
    if (name, how) == ("manifest.json", "flipped"):
        flip_a_digit(newest / name)
    else:
        DAMAGE[how](newest / name)
    again = Stage(tmp_path / "cut", save_every=1)
    again.run(5, resume=True)
    (said,) = warned(tmp_path / "cut")
    assert said.startswith(f"{newest} is damaged: ") and "\n" not in said
    assert "damaged-step-000004" in said and said.endswith("from " + str(newest.with_name("step-000003")))
    assert name in said or (name, how) == ("manifest.json", "flipped")  # then a file is not as the manifest says
    assert again.weight == whole.weight and torch.equal(again.optimizers["a/"].value, whole.optimizers["a/"].value)
    assert checkpoint.steps(tmp_path / "cut/checkpoints") == [4, 5]
    assert (tmp_path / "cut/checkpoints/damaged-step-000004").is_dir()


def flip_a_digit(file):
    told = json.loads(file.read_text())
    first = next(iter(told["files"].values()))
    first["sha256"] = first["sha256"][:-1] + ("0" if first["sha256"][-1] != "0" else "1")
    file.write_text(json.dumps(told))


def test_no_whole_checkpoint_is_one_line_and_begins_nothing(tmp_path):
    Stage(tmp_path, save_every=1, keep_last=2).run(5, until=2)
    for step in (1, 2):
        flip(tmp_path / f"checkpoints/step-{step:06d}/policy/weight")
    with pytest.raises(DataError, match=r"step-000002: not as it was written \(policy/weight .*; remove .*checkpoints"):
        Stage(tmp_path, save_every=1).run(5, resume=True)
    assert checkpoint.steps(tmp_path / "checkpoints") == [1, 2]  # to be looked at


def test_a_refused_resume_leaves_damage_to_be_told_again(tmp_path):
    Stage(tmp_path, save_every=1).run(5, until=2)
    flip(tmp_path / "checkpoints/step-000002/policy/weight")
    with pytest.raises(DataError, match="other settings"):
        Stage(tmp_path, save_every=1, lr=1.0).run(5, resume=True)
    Stage(tmp_path, save_every=1).run(5, resume=True)
    assert ["damaged" in text for text in warned(tmp_path)] == [True]


def test_a_later_version_is_refused_not_passed_over(tmp_path):
    Stage(tmp_path, save_every=1).run(5, until=2)
    edit_state(tmp_path / "checkpoints/step-000002", version=checkpoint.VERSION + 1)
    with pytest.raises(DataError, match=r"trainer\.json: version 3, expected at most 2"):
        Stage(tmp_path, save_every=1).run(5, resume=True)


def test_a_checkpoint_of_before_there_were_manifests_is_read(tmp_path):
    Stage(tmp_path, save_every=1).run(5, until=2)
    path = tmp_path / "checkpoints/step-000002"
    edit_state(path, version=1)
    (path / "manifest.json").unlink()
    again = Stage(tmp_path, save_every=1)
    again.run(3, resume=True)
    assert again.weight == 3 and warned(tmp_path) == []


def test_parts_of_several_processes_are_one_checkpoint(tmp_path, monkeypatch):
    """Tensors are dealt by bytes; each process has files of its own, and a model's index says where its weights are."""
    tensors = {f"w{i}": torch.full((size,), i + 1.0) for i, size in enumerate((100, 10, 10, 80, 0, 5))}
    parts = []
    for rank in range(2):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        share = ranks.Share(2)
        for name, tensor in tensors.items():
            share.offer(name, tensor)
        tensors["w0"].add_(1.0)  # what was dealt is a copy

        def save_model(path, share=share):
            path.mkdir()
            save_file(share.kept, path / share.file("model"))

        state = checkpoint.state_text(7, None, {}) if rank == 0 else None
        kept = share.kept | (checkpoint.random_states() if rank == 0 else {})
        part = checkpoint.Part(7, {"policy": save_model}, kept, share.file("trainer"), state, None)
        parts.append((share, part.write(checkpoint.own_folder(tmp_path, 7, rank))))
    first, second = (share.kept for share, _ in parts)
    assert first.keys() | second.keys() == tensors.keys() and not first.keys() & second.keys()
    assert sum(t.numel() for t in first.values()) == 105 and sum(t.numel() for t in second.values()) == 100
    checkpoint.commit(tmp_path, 7, [files for _, files in parts])
    path = tmp_path / "step-000007"
    assert checkpoint.fault(path) is None and os.listdir(tmp_path) == ["step-000007"]
    found, state = checkpoint.load(path)
    assert state["step"] == 7
    tensors["w0"].fill_(1.0)
    assert all(torch.equal(found[name], value) for name, value in tensors.items()) and "w9" not in found
    assert sorted(found.under("w")) == ["0", "1", "2", "3", "4", "5"] and len(found) == 7
    where = json.loads((path / "policy/model.safetensors.index.json").read_text())["weight_map"]
    assert {name: where[name] for name in ("w0", "w1")} == {
        "w0": "model-00001-of-00002.safetensors",
        "w1": "model-00002-of-00002.safetensors",
    }


def test_a_folder_that_not_all_processes_see_is_named(tmp_path):
    part = {"trainer-00002-of-00002.safetensors": {"bytes": 1, "sha256": ""}}
    checkpoint.aside(tmp_path, 3).mkdir()
    with pytest.raises(DataError, match=r"process 1 wrote it and process 0 does not find it; let run\.out lie"):
        checkpoint.commit(tmp_path, 3, [{}, part])
    assert checkpoint.steps(tmp_path) == []


def test_a_kill_while_an_old_checkpoint_is_removed_leaves_none(tmp_path, monkeypatch):
    Stage(tmp_path, save_every=1, keep_last=2).run(3)
    monkeypatch.setattr(checkpoint.shutil, "rmtree", lambda path, **options: None)  # does not come to it
    checkpoint.prune(tmp_path / "checkpoints", 1, None)
    assert checkpoint.steps(tmp_path / "checkpoints") == [3]
    monkeypatch.undo()
    checkpoint.clear_partial(tmp_path / "checkpoints")
    assert os.listdir(tmp_path / "checkpoints") == ["step-000003"]


@pytest.mark.parametrize(
    ("file", "content"),
    [
        (checkpoint.STATE, "[" * 5000),
        (checkpoint.MANIFEST, "[" * 5000),
        (checkpoint.MANIFEST, '{"files": {"a\\nb": {"bytes": 1, "sha256": ""}}}'),
        (checkpoint.MANIFEST, '{"files": {"trainer.json": {"bytes": Infinity, "sha256": ""}}}'),
    ],
)
def test_json_that_a_parser_takes_ill_is_a_fault_in_words(tmp_path, file, content):
    Stage(tmp_path, save_every=2).run(2)
    path = checkpoint.latest(tmp_path / "checkpoints")
    (path / file).write_text(content)
    said = checkpoint.fault(path)
    assert said and file in said and "\n" not in said
