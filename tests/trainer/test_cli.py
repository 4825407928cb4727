"""The command line: what it has (growth is a decision), and what bad input gets: one line, exit status 2."""

import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import types

import pytest
from typer.main import get_command

import prism_kernels
from prism_fast import cli
from prism_fast.config import RECIPES


def run(capsys, monkeypatch, *arguments):
    """(exit status, stdout, stderr) of prism-fast with these arguments."""
    monkeypatch.setattr(sys, "argv", ["prism-fast", *map(str, arguments)])
    try:
        cli.main()
        status = 0
    except SystemExit as stop:
        status = stop.code or 0
    out, err = capsys.readouterr()
    return status, out, err


def test_the_command_line_is_frozen():
    command = get_command(cli.app)
    options = {}
    for name, sub in command.commands.items():
        for inner, leaf in getattr(sub, "commands", {"": sub}).items():
            flags = [o for p in leaf.params for o in p.opts if o.startswith("--")]
            options[f"{name} {inner}".strip()] = sorted(flags)
    trains = ["--accept-changes", "--config", "--dry-run", "--local-rank", "--local_rank", "--resume"]
    expected = {
        "demo": ["--compare", "--out", "--preset", "--resume", "--seed", "--seeds", "--smoke", "--teacher-errors"],
        "sft": trains,
        "upcycle": ["--config", "--dry-run"],
        "warmup": trains,
        "align": trains,
        "rlvr": trains,
        "eval": ["--config", "--dry-run", "--lmms"],
        "probe": ["--config", "--dry-run"],
        "serve-discriminator": ["--config"],
        "report": [],
        "config": ["--config"],
        "launch": [
            *("--accept-changes", "--config", "--cpus", "--dry-run", "--endpoint", "--gpus", "--nodes"),
            *("--partition", "--resume", "--slurm", "--time"),
        ],
        "plan": [
            *("--bytes-share", "--config", "--flops-share", "--gpu", "--gpus", "--memory", "--policy", "--prompt"),
            *("--records", "--response", "--tokens"),
        ],
        "bench": [],
        "doctor": [],
        "data convert": [
            *("--cache", "--column", "--dry-run", "--image-folder", "--out", "--overwrite", "--skip-bad-records"),
            "--to",
        ],
        "data check": [
            *("--batch-size", "--cache", "--column", "--dry-run", "--histogram", "--image-folder", "--json"),
            *("--max-prompt-tokens", "--model", "--ranks", "--skip-bad-records", "--tokens-per-pack", "--workers"),
        ],
        "data pairs": ["--config", "--dry-run", "--hard-negatives"],
        "data filter": ["--config", "--dry-run"],
        "data curate": ["--config", "--dry-run"],
    }
    assert options == expected


COMMANDS = [
    [],
    *([name] for name in ["demo", "sft", "upcycle", "warmup", "align", "rlvr", "eval", "report", "data", "config"]),
    ["doctor"],
]
COMMANDS += [["launch"], ["plan"]]
COMMANDS += [["data", name] for name in ("check", "pairs", "filter", "curate")]


def test_help_texts_load_neither_torch_nor_transformers():
    code = (
        "import sys; from prism_fast import cli\n"
        f"for words in {COMMANDS!r}:\n"
        "    sys.argv = ['prism-fast', *words, '--help']\n"
        "    try: cli.main()\n"
        "    except SystemExit as stop: assert not stop.code, words\n"
        "slow = {'torch', 'transformers', 'numpy', 'matplotlib', 'pyarrow', 'scipy'}\n"
        "print(sorted(slow & sys.modules.keys()), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "[]\n", done.stderr
    assert done.stdout.count("Usage: prism-fast") == len(COMMANDS)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("rlvr.steps=0", "section rlvr (with run and eval): configuration: steps: expected a whole number from 1"),
        ("run.threads=100000", "section sft (with run and eval): configuration: run.threads: expected"),
        ("rlvr.optimizer.lr=.inf", "optimizer.lr: expected a number above 0"),
        ("demo.sizes={sft: -1}", "sizes.sft: expected a whole number from 1"),
        ("demo.sizes.foo=1", "sizes.foo: unknown key"),
        ("demo=3", "demo recipe: demo: expected keys below it"),
        ("run=3", "demo recipe: run: expected keys below it"),
        ("sft=null", "demo recipe: sft: expected keys below it"),
        ("sfft.steps=1", "demo recipe: unknown section sfft"),
    ],
)
def test_a_demo_checks_all_its_settings_before_it_begins(override, says, tmp_path, capsys, monkeypatch):
    status, _, err = run(capsys, monkeypatch, "demo", "--out", tmp_path / "d", override)
    assert status == 2 and says in err and err.startswith("error: ") and err.count("\n") == 1
    assert not (tmp_path / "d").exists()


def clone(root):
    """A clone of which the benchmarks say what they were called with."""
    (root / "benchmarks").mkdir(parents=True)
    (root / "benchmarks" / "__init__.py").touch()
    (root / "benchmarks" / "__main__.py").write_text(
        "import json, os, signal, sys\n"
        "try:\n"
        "    print(json.dumps([sys.argv[1:], os.getcwd(), sys.path, __file__]), flush=True)\n"
        "    if sys.argv[1] == 'killed': os.kill(os.getpid(), signal.SIGKILL)\n"
        "    if sys.argv[1] == 'wait': signal.pause()\n"
        "    sys.exit(5)\n"
        "except KeyboardInterrupt:\n"
        "    sys.exit(7)\n"
    )
    return root


def test_bench_hands_everything_to_the_clones_benchmarks(tmp_path, capfd, monkeypatch):
    root = clone(tmp_path / "clone")
    other = clone(tmp_path / "elsewhere")  # what lies under that name in the current folder or on the path loses
    monkeypatch.setattr(cli.bench, "CLONE", root)
    monkeypatch.setenv("PYTHONPATH", str(other))
    monkeypatch.chdir(other)
    given = ["moe", "--help", "--shape", "T=1", "--shape=T=2", "-x", "--plot", "a b.png"]
    status, out, _ = run(capfd, monkeypatch, "bench", *given)
    arguments, folder, path, file = json.loads(out)
    assert status == 5 and arguments == given and folder == str(other)
    assert file == str(root / "benchmarks" / "__main__.py")
    assert path[:3] == [str(root), str(root / "kernels"), str(other)]
    assert run(capfd, monkeypatch, "bench", "killed")[0] == 128 + signal.SIGKILL


def test_bench_ends_with_its_benchmark_at_ctrl_c(tmp_path):
    root = clone(tmp_path / "clone")
    code = f"from pathlib import Path; from prism_fast import cli\ncli.bench.CLONE = Path({str(root)!r}); cli.main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "bench", "wait"], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert "wait" in process.stdout.readline()
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to both
    assert process.wait(timeout=60) == 7


def test_bench_without_a_clone_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli.bench, "CLONE", tmp_path)
    status, _, err = run(capsys, monkeypatch, "bench", "moe")
    assert status == 2 and err.startswith(f"error: bench: {tmp_path} holds no benchmarks/") and err.count("\n") == 1
    assert "git clone" in err


def test_the_benchmarks_of_this_clone_show_their_own_help(capfd, monkeypatch):
    status, out, _ = run(capfd, monkeypatch, "bench", "linear_logprob", "--help")
    assert status == 0 and out.startswith("usage: python -m benchmarks") and "--shape" in out


@pytest.mark.parametrize("flag", [["--local_rank=1"], ["--local-rank", "1"]])
def test_a_launchers_local_rank_is_ignored_before_and_behind_the_stage(flag, tmp_path, capsys, monkeypatch):
    words = ["sft", "model.path=/nowhere", "data.files=x", "optimizer.lr=1", "steps=1", f"run.out={tmp_path / 'o'}"]
    for arguments in ([*flag, *words], [*words, *flag]):
        status, _, err = run(capsys, monkeypatch, *arguments)
        assert status == 2 and err.startswith("error: /nowhere: no such model directory")
    assert "local" not in run(capsys, monkeypatch, "sft", "--help")[1]


def test_accelerates_zero_stage_must_be_ours(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    words = ["sft", "model.path=/nowhere", "data.files=x", "optimizer.lr=1", "steps=1", f"run.out={tmp_path / 'o'}"]
    status, _, err = run(capsys, monkeypatch, *words)
    assert status == 2 and err.startswith("error: ACCELERATE_DEEPSPEED_ZERO_STAGE=3: ") and err.count("\n") == 1


def test_launch_prints_and_warns_and_starts_nothing(tmp_path, capsys, monkeypatch):
    words = ["launch", "sft", "--config", "sft_4b", "model.path=m", "data.files=x", f"run.out={tmp_path / 'o'}"]
    status, out, err = run(capsys, monkeypatch, *words, "--gpus", 3, "steps=5", "--resume")
    assert status == 0 and out.endswith(f"run.out={tmp_path / 'o'} steps=5 --resume\n") and "--nproc-per-node 3 " in out
    assert err.splitlines() == [
        f"note: steps=5 takes the place of epochs: 1 in {RECIPES / 'sft_4b.yaml'}",
        "warning: batch_size = 64 is no multiple of 3 processes; some wait for others in every step",
    ]
    for more, says in (
        (["bogus=1", "steps=0"], "steps: expected a whole number from 1"),
        (["--nodes", 2], "launch: --endpoint: expected HOST or HOST:PORT"),
    ):
        status, out, err = run(capsys, monkeypatch, *words, *more)
        assert status == 2 and not out and says in err and err.splitlines()[-1].startswith("error: ")
    status, _, err = run(capsys, monkeypatch, "launch", "eval")
    assert (
        status == 2
        and err == "error: launch: 'eval' does not run on several GPUs; expected one of sft, warmup, align, rlvr\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_plan_counts(capsys, monkeypatch):
    status, out, _ = run(capsys, monkeypatch, "plan", "align", "--gpus", 8)
    assert status == 0 and "54.2" in out and "By count" in out
    status, out, _ = run(capsys, monkeypatch, "plan", "sft", "--config", "sft_4b", "--tokens", 8192)
    assert status == 0 and "packs of 8,192 tokens" in " ".join(out.split()) and "a step" in out
    status, _, err = run(capsys, monkeypatch, "plan", "sft", "optimizer.lr=1")
    assert status == 2 and err.startswith("error: plan: optimizer.lr=1: goes with --config alone")
    status, _, err = run(capsys, monkeypatch, "plan", "align", "--policy", "70b")
    assert status == 2 and err == "error: plan: --policy: expected 4b or 8b, got '70b'\n"


def stage_arguments(tiny, out, stage="sft"):
    model = {"sft": "model", "rlvr": "policy"}[stage]
    data = {"sft": "sft.json", "rlvr": "rlvr.parquet"}[stage]
    return [
        stage,
        f"{model}.path={tiny / 'base'}",
        f"data.files=[{tiny / 'data' / data}]",
        "optimizer.lr=1e-3",
        "steps=1",
        f"run.out={out}",
        *(["rollout.prompts_per_step=1"] if stage == "rlvr" else []),
    ]


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


TURNS = [{"role": "user", "content": "<image>hi"}, {"role": "assistant", "content": "x"}]


@pytest.mark.parametrize(
    ("case", "says"),
    [
        ("unknown key", "bogus: unknown key; known here: batch_size"),
        ("nested unknown key", "optimizer.rate: unknown key; known here: beta1"),
        ("many faults", "steps: expected a whole number from 1 to 100000000 or null, got 0; bogus: unknown key"),
        ("wrong type", "optimizer.lr"),
        ("bad override", "expected key.path=value"),
        ("missing file", "no such file"),
        ("no model", "no such model directory"),
        ("other architecture", "model_type is 'qwen3_vl_moe', expected 'qwen3_vl'"),
        ("truncated parquet", "not a readable parquet file"),
        ("bad json line", "bad.jsonl:2"),
        ("image does not open", "im.png does not open"),
        ("image count", "2 <image> placeholders but 1 images"),
        ("video", "video is not supported"),
        ("prompt over the limit", "tokens are over the limit of 5"),
        ("sample over the limit", "over max_tokens = 20"),
        ("teacher without the format", "align.jsonl"),
    ],
)
def test_bad_input_is_one_line_and_status_2(case, says, tiny_folder, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    (tmp_path / "im.png").write_text("not an image")
    base = stage_arguments(tiny_folder, out)

    def with_files(content, name="bad.json"):
        return [*base, f"data.files=[{write(tmp_path / name, content)}]"]

    record = {"messages": TURNS, "images": ["im.png"]}
    arguments = {
        "unknown key": lambda: [*base, "bogus=1"],
        "nested unknown key": lambda: [*base, "optimizer.rate=1"],
        "many faults": lambda: [*base, "bogus=1", "steps=0"],
        "wrong type": lambda: [*base, "optimizer.lr=fast"],
        "bad override": lambda: [*base, "steps"],
        "missing file": lambda: [*base, "data.files=[none.json]"],
        "no model": lambda: [*base, "model.path=/nowhere"],
        "other architecture": lambda: [*base, f"model.path={tiny_folder / 'discriminator'}"],
        "truncated parquet": lambda: truncated(tiny_folder, tmp_path, out),
        "bad json line": lambda: with_files(
            json.dumps({"messages": TURNS[1:], "images": []}) + "\n{oops\n", "bad.jsonl"
        ),
        "image does not open": lambda: with_files([record]),
        "image count": lambda: with_files(
            [{**record, "messages": [{"role": "user", "content": "<image><image>hi"}, TURNS[1]]}]
        ),
        "video": lambda: with_files([{**record, "videos": ["a.mp4"]}]),
        "prompt over the limit": lambda: [*base, "data.max_prompt_tokens=5"],
        "sample over the limit": lambda: [*base, "max_tokens=20"],
        "teacher without the format": lambda: teacher(tiny_folder, tmp_path, out),
    }[case]()
    if case == "bad json line":
        (tmp_path / "bad.jsonl").write_text(
            json.dumps({"messages": [{"role": "user", "content": "hi"}, TURNS[1]]}) + "\n{oops\n"
        )
    status, _, err = run(capsys, monkeypatch, *arguments)
    assert status == 2, err
    assert says in err
    assert err.count("\n") == 1 and err.startswith("error: ")
    assert not (out / "final").exists()


def test_config_prints_what_a_stage_would_run_with(tmp_path, capsys, monkeypatch):
    status, shown, err = run(capsys, monkeypatch, "config", "sft", "--config", "sft_4b", "run.seed=3", "steps=2")
    assert status == 0 and not err
    assert "  seed: 3   " in shown and "  # files: MUST BE SET " in shown and "\nepochs: null " in shown
    status, shown, err = run(capsys, monkeypatch, "config", "stf")
    assert status == 2 and err.startswith("error: config: unknown stage 'stf'; expected one of sft, ") and not shown


def truncated(tiny, tmp_path, out):
    whole = (tiny / "data" / "rlvr.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    return [*stage_arguments(tiny, out, "rlvr"), f"data.files=[{tmp_path / 'cut.parquet'}]"]


def teacher(tiny, tmp_path, out):
    record = {
        "prompt": [{"role": "user", "content": "hi"}],
        "images": [],
        "teacher_response": "no tags",
        "reward_model": {"style": "rule", "ground_truth": "1"},
    }
    return [
        "align",
        f"policy.path={tiny / 'base'}",
        f"discriminator.path={tiny / 'discriminator'}",
        "policy_optimizer.lr=1e-3",
        "discriminator_optimizer.lr=1e-3",
        "rollout.prompts_per_step=1",
        "steps=1",
        f"run.out={out}",
        f"data.files=[{write(tmp_path / 'align.jsonl', json.dumps(record))}]",
    ]


def test_bad_records_can_be_skipped_and_are_listed(tiny_folder, tmp_path, capsys, monkeypatch):
    records = json.loads((tiny_folder / "data" / "sft.json").read_text())[:6]
    for record in records:
        record["images"] = [str(tiny_folder / "data" / path) for path in record["images"]]
    records[2]["images"] = []
    file = write(tmp_path / "some.json", records)
    out = tmp_path / "out"
    arguments = [*stage_arguments(tiny_folder, out), f"data.files=[{file}]", "batch_size=4"]
    status, _, err = run(capsys, monkeypatch, *arguments)
    assert status == 2 and "some.json:1: images[0]" in err and "outside the data's folder" in err
    arguments.append(f"data.image_folders={tiny_folder}")
    status, _, err = run(capsys, monkeypatch, *arguments)
    assert status == 2 and "some.json:3" in err
    status, shown, err = run(capsys, monkeypatch, *arguments, "data.skip_bad_records=1")
    assert status == 0, err
    assert "skipped" in shown and "some.json:3" in shown


def test_data_check_counts_and_shows_a_record(tiny_folder, tmp_path, capsys, monkeypatch):
    data = tiny_folder / "data"
    files = [data / name for name in ("sft.json", "pairs.jsonl", "align.parquet", "rlvr.parquet")]
    status, shown, err = run(capsys, monkeypatch, "data", "check", *files)
    assert status == 0, err
    for text in ("sft: 48 records, 48 images", "warm-up: 12 records", "alignment: 12 records", "rlvr: 12 records"):
        assert text in shown
    assert "[teacher caption]" in shown and "[gold answer]" in shown and "question types: " in shown
    broken = tmp_path / "broken.json"
    (tmp_path / "no.png").write_text("not an image")
    broken.write_text(json.dumps([{"messages": TURNS, "images": ["no.png"]}] * 2))
    status, _, err = run(capsys, monkeypatch, "data", "check", broken)
    assert status == 2 and "no.png does not open" in err
    status, shown, err = run(capsys, monkeypatch, "data", "check", broken, "--skip-bad-records", 2)
    assert status == 0 and "2 bad records skipped" in shown, err
    status, _, err = run(capsys, monkeypatch, "data", "check", write(tmp_path / "what.json", [{"text": "hi"}]))
    assert status == 2 and "none of the formats" in err


@pytest.mark.parametrize("command", [("eval",), ("data", "pairs"), ("data", "filter"), ("upcycle",)])
def test_results_are_placed_before_the_work_and_over_nothing(command, tmp_path, capsys, monkeypatch):
    data = write(tmp_path / "data.parquet", [])
    before = data.read_bytes()
    (tmp_path / "model").mkdir()
    config = write(tmp_path / "model/config.json", {})
    (tmp_path / "new_images").write_text("mine")
    arguments = [*command, f"model.path={tmp_path / 'nowhere'}"]
    arguments += [] if command == ("upcycle",) else [f"data.files=[{data}]"]
    for out, says in ((data, "exists already"), (config, "exists already"), (config / "x", "a file is in the way")):
        status, _, err = run(capsys, monkeypatch, *arguments, f"out={out}")
        assert status == 2 and says in err and err.count("\n") == 1, err
    if command[0] == "data":
        status, _, err = run(capsys, monkeypatch, *arguments, f"out={tmp_path / 'new.jsonl'}")
        assert status == 2 and "new_images: is a file" in err, err
    assert data.read_bytes() == before and config.read_text() == "{}"


@pytest.mark.parametrize("place", ["sft.json", "sft.json/run"])
def test_a_run_needs_a_folder(place, tiny_folder, capsys, monkeypatch):
    status, _, err = run(capsys, monkeypatch, *stage_arguments(tiny_folder, tiny_folder / "data" / place))
    assert status == 2 and "cannot be written (a file is in the way); choose another run.out" in err


def test_resume_needs_a_run_and_changes_need_resume(tiny_folder, tmp_path, capsys, monkeypatch):
    arguments = stage_arguments(tiny_folder, tmp_path / "mistyped")
    status, _, err = run(capsys, monkeypatch, *arguments, "--resume")
    assert status == 2 and "mistyped: holds no run to resume" in err and not (tmp_path / "mistyped").exists()
    status, _, err = run(capsys, monkeypatch, *arguments, "--accept-changes")
    assert status == 2 and "--resume" in err
    status, _, err = run(capsys, monkeypatch, "demo", "--out", tmp_path / "mistyped", "--resume")
    assert status == 2 and "holds no demo to resume" in err and not (tmp_path / "mistyped").exists()


def test_eval_pairs_filter_upcycle_and_doctor(tiny_folder, tmp_path, capsys, monkeypatch):
    model = f"model.path={tiny_folder / 'base'}"
    status, shown, err = run(
        capsys,
        monkeypatch,
        "eval",
        model,
        f"data.files=[{tiny_folder / 'data' / 'eval.parquet'}]",
        f"out={tmp_path / 'eval.json'}",
        "eval.samples=2",
        "eval.temperature=1.0",
        "eval.max_response_tokens=6",
    )
    assert status == 0, err
    assert "mean of 2" in shown and json.loads((tmp_path / "eval.json").read_text())["pass_at_k"] is not None
    assert json.loads((tmp_path / "eval.json").read_text())["reward"] is None  # the judge's
    (tmp_path / "mine.py").write_text("import numpy\ndef f(response, record, images): return numpy.float32(3.5)\n")
    own = ["reward.replaces=reward", "eval.limit=2", "eval.max_response_tokens=4", f"out={tmp_path / 'own.json'}"]
    own += [f"reward.function={tmp_path / 'mine.py'}:f", f"data.files=[{tiny_folder / 'data' / 'eval.parquet'}]"]
    status, shown, err = run(capsys, monkeypatch, "eval", f"model.path={tiny_folder / 'base'}", *own)
    assert status == 0, err
    judged = json.loads((tmp_path / "own.json").read_text())
    assert judged["accuracy"] == 3.5 and "350" not in shown and judged["reward"]["function"].endswith("mine.py:f")
    sha = hashlib.sha256((tmp_path / "mine.py").read_bytes()).hexdigest()
    assert judged["reward"]["file"]["sha256"] == sha and judged["reward"]["replaces"] == "reward"
    status, _, err = run(
        capsys,
        monkeypatch,
        *["data", "pairs", model, f"data.files=[{tiny_folder / 'data' / 'align.parquet'}]"],
        *[f"out={tmp_path / 'pairs.jsonl'}", "max_response_tokens=4", "limit=2"],
    )
    assert status == 2 and "none of 2 responses has a valid format" in err  # random weights
    status, _, err = run(
        capsys,
        monkeypatch,
        *["data", "filter", model, f"data.files=[{tiny_folder / 'data' / 'rlvr.parquet'}]"],
        *[f"out={tmp_path / 'kept.parquet'}", "max_response_tokens=4", "samples=2", "low=0.0"],
    )
    assert status == 0 and (tmp_path / "kept.parquet").exists(), err
    status, _, err = run(capsys, monkeypatch, "upcycle", model, f"out={tmp_path / 'moe'}")
    assert status == 0 and (tmp_path / "moe" / "value_head.safetensors").exists(), err
    status, _, err = run(capsys, monkeypatch, "upcycle", model, f"out={tmp_path / 'moe'}")
    assert status == 2 and "exists already" in err
    status, shown, _ = run(capsys, monkeypatch, "doctor")
    assert status == 0 and "tree_attention" in shown and "torch" in shown and "optimizer: " not in shown
    monkeypatch.setattr(
        prism_kernels, "which_impl", lambda: {"adamw_step": ("reference", "default on cuda; cuda: it is not built")}
    )
    status, shown, _ = run(capsys, monkeypatch, "doctor")
    assert status == 0 and "optimizer: torch.optim.AdamW, as" in shown and "cuda: it is not built)" in shown


SHORT = {  # over the recipes: a step or two of everything
    "sft": ["steps=2", "batch_size=4"],
    "pairs": ["limit=6", "max_response_tokens=4"],
    "warmup": ["steps=2", "batch_size=2"],
    "align": ["steps=1", "rollout.samples=2", "rollout.max_response_tokens=6", "eval.max_response_tokens=4"],
    "rlvr": ["steps=1", "rollout.samples=2", "rollout.max_response_tokens=6", "eval.max_response_tokens=4"],
    "eval": ["eval.max_response_tokens=4"],
}


def test_tiny_recipes_go_from_own_data_to_a_policy(tiny_folder, tmp_path, capsys, monkeypatch, torch_settings):
    """Every command after the first is one that a stage before it has printed, with the names of files filled in."""
    data = tiny_folder / "data"
    files = {"ALIGNMENT.parquet": data / "align.parquet", "RLVR.parquet": data / "rlvr.parquet"}
    files["TEST.parquet"] = data / "eval.parquet"
    made = ("SFT", "DISCRIMINATOR", "PAIRS.jsonl", "WARMUP", "ALIGN", "RLVR", "EVAL.json")
    files |= {name: tmp_path / name for name in made}
    parts = types.SimpleNamespace(caption="<caption>a</caption>", reasoning="<think>b</think><answer>1</answer>")
    monkeypatch.setattr("prism_fast.stages.prepare.split_parts", lambda text: parts)  # of a policy that can write

    def follow(lines, name):
        """The lines that a printed command prints."""
        (line,) = [line for line in lines if line.startswith(f"next: prism-fast {name} ")]
        for placeholder, path in files.items():
            line = re.sub(rf"(?<==){re.escape(placeholder)}(?=[ /]|$)", str(path), line)
        words = shlex.split(line)[2:]
        status, shown, err = run(capsys, monkeypatch, *words, *SHORT.get(name.split()[-1], ()))
        assert status == 0 and not err, (words, err)
        return shown.splitlines()

    first = f"next: prism-fast sft --config tiny_sft model.path={tiny_folder / 'base'} data.files={data / 'sft.json'}"
    sft = follow([f"{first} run.out=SFT"], "sft")
    assert sft[:2] == [
        f"note: steps=2 takes the place of epochs: 3 in {RECIPES / 'tiny_sft.yaml'}",
        f"loading {tiny_folder / 'base'}, {data / 'sft.json'}",
    ]
    assert re.fullmatch(r"sft: 48 records, policy \d.\d\d M parameters, CPU, \d+ threads -> .*/SFT", sft[2])
    assert f"done: {tmp_path / 'SFT' / 'final' / 'policy'}" in sft
    follow(sft, "upcycle")
    warmup = follow(follow(sft, "data pairs"), "warmup")
    follow(follow(follow(warmup, "align"), "rlvr"), "eval")
    assert json.loads((tmp_path / "EVAL.json").read_text())
