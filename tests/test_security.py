"""What the sources may not do: unpickle, run code or a shell of others, listen. Runs: tests/cluster/test_faults.py."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

from dev import house
from prism_fast.config import ServeConfig
from prism_fast.run.launch import Launch, batch_file, command

ROOT = house.ROOT
SOURCES = sorted([*(ROOT / "prism_fast").rglob("*.py"), *(ROOT / "kernels" / "prism_kernels").rglob("*.py")])


def calls():
    """(place, name as it is written, call) of every call in what ships."""
    for path in SOURCES:
        for node in ast.walk(house.tree_of(path)):
            if isinstance(node, ast.Call):
                yield f"{path.relative_to(ROOT)}:{node.lineno}", ast.unparse(node.func), node


def keyword(call, name):
    return next((ast.unparse(found.value) for found in call.keywords if found.arg == name), None)


def written(pattern):
    """Lines of code, comments and texts left out, that hold a word."""
    found = []
    for path in SOURCES:
        for node in ast.walk(house.tree_of(path)):
            name = getattr(node, "attr", None) or getattr(node, "id", None) or getattr(node, "module", None)
            names = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
            if any(re.fullmatch(pattern, word) for word in [*names, *([name] if isinstance(name, str) else [])]):
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    return found


def test_the_search_finds_what_is_there():
    assert written(r"json") and written(r"from_pretrained") and len(list(calls())) > 1000


PICKLES = r"c?[pP]ickle|dill|cloudpickle|joblib|shelve|marshal|\w*object_list|(all_)?gather_object|scatter_object\w*"


def test_nothing_is_pickled():
    assert written(PICKLES) == []
    # What multiprocessing sends as objects is pickled; bytes are not.
    sent = [place for place, name, call in calls() if re.search(r"pipe\.(send|recv)$", name)]
    assert sent == []


def test_no_file_is_unpickled():
    loads = [(place, call) for place, name, call in calls() if name in ("torch.load", "torch.save", "load", "np.load")]
    for place, call in loads:
        allowed = {"np.load": keyword(call, "allow_pickle") == "False"}
        name = ast.unparse(call.func)
        assert allowed.get(name, not name.startswith("torch.")), f"{place}: {name}"
    assert any(ast.unparse(call.func) == "np.load" for _, call in loads)


def test_no_code_of_others_is_run():
    """A checkpoint's own Python is never asked for; an Auto class, which could, is told so."""
    asked = [(place, name, keyword(call, "trust_remote_code")) for place, name, call in calls()]
    assert {told for _, _, told in asked if told is not None} == {"False"}
    for place, name, told in asked:
        if re.search(r"\bAuto\w+\.from_pretrained$", name):
            assert told == "False", place
    evaluated = [place for place, name, _ in calls() if name in ("eval", "exec", "builtins.eval", "builtins.exec")]
    assert evaluated == []


def test_no_shell_is_started():
    """Commands are lists of words: a setting can be one of them, and never becomes two."""
    started = 0
    for place, name, call in calls():
        assert name not in ("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"), place
        if re.fullmatch(r"subprocess\.(run|Popen|call|check_call|check_output)", name):
            started += 1
            assert keyword(call, "shell") in (None, "False"), place
            first = call.args[0]
            assert not isinstance(first, (ast.Constant, ast.JoinedStr)), f"{place}: a text, not words"
    assert started > 3


SERVERS = r"\w*HTTPServer|socketserver|http\.server|TCPServer|start_server|uvicorn|fastapi|flask|aiohttp|Listener|zmq"


def test_nothing_serves():
    """Processes of one run listen, for each other (ranks.py), and `serve-discriminator`, on loopback unless told."""
    places = {place.partition(":")[0] for place in written(SERVERS)}
    assert places == {"prism_fast/stages/serving/http.py"}
    serving = set()
    for path in SOURCES:
        modules = {node.module for node in ast.walk(house.tree_of(path)) if isinstance(node, ast.ImportFrom)}
        if "prism_fast.stages.serving.http" in modules:
            serving.add(str(path.relative_to(ROOT)))
    assert serving == {"prism_fast/stages/serving/score_server.py"}
    assert ServeConfig.model_fields["host"].default == "127.0.0.1" and not ServeConfig.model_fields["expose"].default
    listening = {place.partition(":")[0] for place, name, _ in calls() if re.search(r"\.(listen|bind)$", name)}
    assert listening == {"prism_fast/ranks.py", "prism_fast/stages/serve.py", "prism_fast/stages/serving/http.py"}


@pytest.mark.parametrize("hostile", ["x; touch bad", "$(touch bad)", "`touch bad`", "a'b\"; touch bad #", "new\nline"])
def test_a_printed_command_has_a_setting_as_one_word(hostile, tmp_path):
    """`prism-fast launch` prints a shell's line, and a person runs it."""
    words = ("--config", hostile, f"run.out={hostile}")
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("prism-fast", "torchrun", "srun", "scontrol"):
        said = tools / name
        said.write_text('#!/bin/sh\nfor word in "$@"; do printf "[%s]" "$word"; done\n')
        said.chmod(0o755)
    made = [Launch("sft", words), Launch("sft", words, gpus=2), Launch("sft", words, nodes=2, endpoint="node1")]
    texts = [*map(command, made), batch_file(Launch("sft", words, nodes=2, out=Path(hostile)))]
    for text in texts:
        done = subprocess.run(
            ["bash", "-c", text],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env={"PATH": f"{tools}:/usr/bin:/bin", "SLURM_JOB_ID": "1", "SLURM_CPUS_PER_TASK": "1"},
        )
        assert f"[{hostile}][run.out={hostile}]" in done.stdout, (text, done)
        assert not (tmp_path / "bad").exists(), text
