"""What `prism-fast launch` prints is read as torchrun, sbatch and the shell read it; nothing is started on a GPU."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser
from typer.main import get_command

from prism_fast import cli
from prism_fast.config import CONFIGS, load_config
from prism_fast.records import DataError
from prism_fast.run.launch import NOTICE, Launch, batch_file, check_environment, check_stage, command, warnings

WORDS = ("--config", "tiny_align", "policy.path=a b", "discriminator.path=d", "data.files=[x,$y]", "run.out=o's")
ALIGN = Launch("align", WORDS, out=Path("o's"))


def read(text):
    """(torchrun's options, the stage's parameters) of a command, as torchrun and the stage read them."""
    words = shlex.split(text.replace("\\\n", " "), comments=True)
    assert words[0] == "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=280" and words[1] == "torchrun"
    options = get_args_parser().parse_args(words[2:])
    assert options.module and options.training_script == "prism_fast"
    stage, *rest = options.training_script_args
    with get_command(cli.app).commands[stage].make_context(stage, rest) as context:
        return options, context.params


def test_one_process_needs_no_launcher():
    assert shlex.split(command(ALIGN)) == ["prism-fast", "align", *WORDS]


@pytest.mark.parametrize("gpus", [2, 8])
def test_one_node(gpus):
    options, given = read(command(ALIGN._replace(gpus=gpus)))
    assert options.standalone and options.nproc_per_node == str(gpus)
    assert given["config"] == Path("tiny_align") and given["overrides"] == list(WORDS[2:])
    assert load_config(CONFIGS["align"], given["config"], given["overrides"]).run.out == Path("o's")


@pytest.mark.parametrize(("endpoint", "meets"), [("node-1.x", "node-1.x:29500"), ("10.0.0.1:7", "10.0.0.1:7")])
def test_several_nodes_meet_at_the_first(endpoint, meets):
    text = command(ALIGN._replace(nodes=2, gpus=8, endpoint=endpoint))
    options, _ = read(text)
    assert (options.nnodes, options.nproc_per_node, options.rdzv_backend) == ("2", "8", "c10d")
    assert (options.rdzv_endpoint, options.rdzv_id) == (meets, "prism-align") and not options.standalone
    assert text.startswith("# the same command on each of the 2 nodes")


@pytest.mark.parametrize("endpoint", ["", "a b", "a;b", "a:b", "$x"])
def test_nodes_need_a_place_to_meet(endpoint):
    with pytest.raises(DataError, match=r"^launch: --endpoint: expected HOST or HOST:PORT, the first of 2 nodes"):
        command(ALIGN._replace(nodes=2, endpoint=endpoint))


def options_of(text):
    """Of an sbatch file."""
    return dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", text, re.M))


def test_a_batch_file_says_what_slurm_gives():
    text = batch_file(ALIGN._replace(nodes=2, gpus=8, time="01:00:00", partition="gpu", cpus=6))
    options = options_of(text)
    assert text.startswith("#!/bin/bash\n#SBATCH ")
    assert (options["nodes"], options["ntasks-per-node"], options["gpus-per-node"]) == ("2", "1", "8")
    assert (options["cpus-per-task"], options["partition"], options["time"]) == ("48", "gpu", "01:00:00")
    assert options["signal"] == f"TERM@{NOTICE}" and options["open-mode"] == "append" and "requeue" in options
    assert not {"time", "partition"} & options_of(batch_file(ALIGN)).keys() and "scontrol requeue" not in batch_file(
        ALIGN
    )


@pytest.mark.parametrize("time", ["1:00", "1-00:00:00", "00:10:00", "00:61:00", "x"])
def test_a_time_that_leaves_none_to_save_is_an_error(time):
    with pytest.raises(DataError, match="--time: expected HH:MM:SS of more than 10 minutes"):
        batch_file(ALIGN._replace(time=time))


@pytest.fixture
def slurm(tmp_path):
    """Runs a batch file; srun and scontrol write down what they are called with, srun ends as a stopped stage does."""
    for name, last in (("srun", "exit 143"), ("scontrol", "echo node1; echo node2")):
        script = tmp_path / name
        script.write_text(
            f'#!/bin/bash\nfor w; do printf "%s\\n" "$w"; done > {tmp_path}/$(basename $0).$1.said\n{last}\n'
        )
        script.chmod(0o755)

    def submit(text):
        environment = {
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "1007",
            "SLURM_JOB_NODELIST": "node[1-2]",
        }
        environment["SLURM_CPUS_PER_TASK"] = "48"
        (tmp_path / "file").write_text(text)
        done = subprocess.run(["bash", "file"], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 143 and not done.stderr
        (said,) = tmp_path.glob("srun.*.said")
        return said.read_text().splitlines(), (tmp_path / "scontrol.requeue.said").exists()

    return submit


def test_a_batch_file_runs_and_resumes_and_returns_to_the_queue(slurm, tmp_path):
    job = ALIGN._replace(nodes=2, gpus=8, time="01:00:00")
    words, again = slurm(batch_file(job))
    assert words[:2] == ["--cpus-per-task=48", "torchrun"] and not again  # it failed long before its limit
    options, given = read(shlex.join(["TORCH_ELASTIC_SHUTDOWN_TIMEOUT=280", *words[1:]]))
    assert (options.nnodes, options.rdzv_endpoint, options.rdzv_id) == ("2", "node1:29507", "1007")
    assert given["overrides"] == list(WORDS[2:]) and not given["resume"]
    (tmp_path / "o's").mkdir()
    (tmp_path / "o's" / "run.lock").touch()
    late = batch_file(job).replace("status=$?", "status=$?; SECONDS=3300")
    words, again = slurm(late)
    assert words[-1] == "--resume" and again
    (tmp_path / "o's" / "final").mkdir()
    (tmp_path / "scontrol.requeue.said").unlink()
    assert slurm(late) == (words, False)
    assert "$resume" not in batch_file(job._replace(words=(*WORDS, "--resume")))


def settings(stage, *overrides):
    paths = {"sft": ["model.path=m"], "align": ["policy.path=p", "discriminator.path=d"]}[stage]
    return load_config(CONFIGS[stage], f"tiny_{stage}", [*paths, "data.files=x", "run.out=o", *overrides])


def test_warnings():
    four = ALIGN._replace(gpus=4)
    assert warnings(four, settings("align")) == []
    assert warnings(ALIGN._replace(gpus=3), settings("align")) == [
        "rollout.prompts_per_step x rollout.samples = 16 is no multiple of 3 processes; "
        "some wait for others in every step"
    ]
    assert (
        "batch_size = 10 is no multiple of 4"
        in warnings(four._replace(stage="sft"), settings("sft", "batch_size=10"))[0]
    )
    zero = "cluster.sharding=zero2"
    assert warnings(ALIGN, settings("align", zero)) == ["cluster.sharding = zero2 shards nothing among 1 process"]
    assert warnings(ALIGN, settings("align", zero, "policy_optimizer.offload=true")) == []
    (found,) = warnings(four._replace(nodes=2), settings("align", "cluster.sharding=fsdp2"))
    assert found.startswith("cluster.sharding = fsdp2 gathers every weight over the network")


def test_stages_that_run_on_several_gpus():
    for stage in ("sft", "warmup", "align", "rlvr"):
        check_stage(stage)
    for stage in ("eval", "upcycle", "x"):
        with pytest.raises(DataError, match=f"'{stage}' does not run on several GPUs; expected one of sft, "):
            check_stage(stage)


STAGE = "ACCELERATE_DEEPSPEED_ZERO_STAGE"


@pytest.mark.parametrize(("sharding", "theirs"), [("none", "0"), ("zero1", "1"), ("zero2", "2"), ("zero3", "3")])
def test_accelerates_stage_agrees_or_is_not_set(sharding, theirs):
    check_environment(sharding, {STAGE: theirs})
    check_environment(sharding, {"ACCELERATE_USE_DEEPSPEED": "true"})


@pytest.mark.parametrize(
    ("sharding", "theirs", "fix"),
    [
        ("none", "2", "set cluster.sharding=zero2"),
        ("fsdp2", "3", "=zero3"),
        ("zero3", "x", "correct it"),
        ("zero1", "", "correct"),
    ],
)
def test_another_stage_is_an_error(sharding, theirs, fix):
    with pytest.raises(DataError) as error:
        check_environment(sharding, {STAGE: theirs})
    text = str(error.value)
    assert text.startswith(f"{STAGE}={theirs}: ") and f"cluster.sharding = {sharding}," in text and fix in text
    assert "\n" not in text
