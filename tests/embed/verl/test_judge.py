"""verl's registered trainer with prism_fast's own discriminator, which runs in an environment that verl forbids.

PRISM_JUDGE_PYTHON: the Python of that environment; make test-embed gives that of the environment of TRL.
"""

import json
import os
import subprocess
import sys

import pytest
import torch

from prism_kernels.integrations.judge import JudgeProcess
from tests.embed.verl import judge_side
from tests.embed.verl.played import LENGTHS, SCORES, expected, made, roll_out, step

PYTHON = os.path.abspath(os.environ.get("PRISM_JUDGE_PYTHON", "-"))  # not resolved: a link into another environment
PROGRAM = [PYTHON, "-m", "prism_fast.steps.judge_process"]
STEPS = 4

pytestmark = [
    pytest.mark.timeout(1800),
    pytest.mark.skipif("PRISM_JUDGE_PYTHON" not in os.environ, reason="PRISM_JUDGE_PYTHON names no environment"),
]


def beside(*arguments):
    """-> what ``judge_side`` prints, in the judge's environment."""
    command = [PYTHON, "-m", judge_side.__name__, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("judge")
    beside("prepare", out)
    return out


@pytest.fixture
def settings(folder, tmp_path):
    """Overrides of verl's configuration: its trainer starts the judge's process by this command."""
    command = [*PROGRAM, *judge_side.options(folder, STEPS)]
    quoted = ",".join(f"'{word}'" for word in command)
    return [
        "+algorithm.prism.judge=prism_kernels.integrations.judge:JudgeProcess",
        f"+algorithm.prism.judge_options={{command: [{quoted}], environment: {{OMP_NUM_THREADS: 1}}}}",
        "+algorithm.prism.columns={record: index}",
        "+algorithm.prism.rule={rule: align, format_penalty: 1.5}",
        f"trainer.default_local_dir={tmp_path}",
    ]


def steps_of(trainer, folder, numbers):
    """[(metrics, advantages by key)] of these steps, over the responses that the judge's environment encoded."""
    ids, found = json.loads((folder / "ids.json").read_text()), []
    for number in numbers:
        trainer.global_steps = number
        roll_out(ids_of=lambda key: torch.tensor(ids[key]))
        found.append(step(trainer))
    return found


def test_a_discriminator_of_another_environment_in_verls_trainer(queue, folder, settings, report, monkeypatch):
    """Three steps, a checkpoint, a trainer that goes on from it: scores, updates and advantages throughout are those of
    the reward functions in a process of their own, which verl's never sees."""
    for name in [name for name in sys.modules if name.split(".")[0] == "prism_fast"]:  # another test may have had it
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "prism_fast", None)  # importing it raises
    trainer = made(*settings)
    assert isinstance(trainer._prism_judge, JudgeProcess)
    calls, ask = [], JudgeProcess.__call__

    def kept(self, *, log_metric=None, learn=True, **columns):
        calls.append(columns)
        return ask(self, log_metric=log_metric, learn=learn, **columns)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JudgeProcess, "__call__", kept)
        found = steps_of(trainer, folder, (1, 2, 3))
        trainer._save_checkpoint()
        trainer._prism_judge.close()
        again = made(*settings)
        again._load_checkpoint()
        assert again.global_steps == 3
        found += steps_of(again, folder, (4,))
        again._prism_judge.close()
    (folder / "calls.json").write_text(json.dumps(calls))
    told = json.loads(beside("judged", folder, STEPS))
    ids = json.loads((folder / "ids.json").read_text())
    keys = {tuple(ids[key]): key for key in SCORES}
    gaps, losses = [], []
    for (metrics, rows), call, alone in zip(found, calls, told):
        assert sorted(call["record"]) == [0, 0, 1, 1]  # neither the first row of a session of two, nor padding
        scores = {
            keys[tuple(row)]: tuple(0.0 if value is None else value for value in values)
            for row, *values in zip(call["completion_ids"], *alone["scores"].values())
        }
        assert scores.keys() == SCORES.keys() and [key for key in scores if scores[key][2] == 0.0] == ["b_0_0"]
        by_session = expected(dict(sorted(scores.items())), format_penalty=1.5)
        for key in LENGTHS:
            assert len(rows[key]) == len(ids[key])
            gaps.append(float((rows[key] - by_session[key.rpartition("_")[0]]).abs().max()))
        assert {name: metrics[name] for name in alone["metrics"]} == alone["metrics"]
        losses.append(alone["metrics"]["loss/discriminator"])
    report.add(
        "trainer_mode=prism, prism_fast's discriminator by pipe, 4 steps, resumed: advantages against its own",
        f"{max(gaps):.1e}", "1e-6",
    )  # fmt: skip
    report.add("the same: discriminator's loss", f"{losses[0]:.3f} to {losses[-1]:.3f}", "falls")
    assert len(told) == len(found) == 4 and max(gaps) < 1e-6 and losses[-1] < losses[0]


def test_what_the_judge_says_ends_the_step_with_its_line(queue, folder, settings, tmp_path):
    """A record that is not there; then a judge that has ended; a discriminator that is none, before anything runs."""
    trainer = made(*settings)
    with pytest.raises(RuntimeError, match=r"the judge's process: .* 0 to 11, got 1000000"):
        trainer._prism_judge(completion_ids=[[1, 2]], record=[10**6])
    trainer._prism_judge.process.kill()
    with pytest.raises(RuntimeError, match=r"the judge's process ended with status -9: .*judge_process"):
        trainer._prism_judge(completion_ids=[[1, 2]], record=[0])
    absent = [word.replace(str(folder / "discriminator"), str(tmp_path / "absent")) for word in settings]
    with pytest.raises(RuntimeError, match=r"the judge's process: .*absent"):
        made(*absent)
