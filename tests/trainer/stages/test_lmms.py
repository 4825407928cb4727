"""`eval --lmms` with a stand-in for lmms-eval's process; what it does inside that process: tests/eval."""

import json
import sys
from pathlib import Path

import pytest

from prism_fast import DataError, cli
from prism_fast.config import BenchmarksConfig
from prism_fast.stages.lmms import inside, launch
from prism_fast.stages.lmms.benchmarks import BENCHMARKS, LMMS_EVAL, SETS, TABLE_1, tasks_of
from prism_fast.stages.lmms.launch import Found, command, evaluate_on
from prism_fast.stages.lmms.table import first_figure, percent, table

ROOT = Path(__file__).parents[3]
VALID = "<caption>3; 7</caption><think>3+7=10</think><answer>{}</answer>"
# Writes the results of the job's tasks, up to one that it is told to stop at; keeps what it was started with.
STAND_IN = """
import json, os, pathlib, sys
job = json.loads(pathlib.Path(sys.argv[1]).read_text())
with open({kept!r}, "a") as kept:
    kept.write(json.dumps({{"job": job, "words": sys.argv, "environment": dict(os.environ)}}) + "\\n")
print("what a library prints", file=sys.stderr)
for task in job["tasks"]:
    if task == os.environ.get("STOP_AT"):
        print(json.dumps({{"fault": f"{{task}}: its data set A/B cannot be read (OfflineModeIsEnabled)"}}), flush=True)
        sys.exit(2)
    if task == os.environ.get("DIE_AT"):
        os._exit(3)
    if task == os.environ.get("FORGET"):
        continue
    figures = {{"asked": job["asked"], "answers": {{"responses": 4, "without": 1}},
                "results": {{task: {{"alias": task, "exact_match,none": 0.5, "exact_match_stderr,none": 0.1}}}}}}
    pathlib.Path(job["out"], f"{{task}}.json").write_text(json.dumps(figures))
    print(json.dumps({{"finished": task}}), flush=True)
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """(how to start it, () -> what its starts were given)"""
    kept, script = tmp_path / "starts.jsonl", tmp_path / "stand_in.py"
    script.write_text(STAND_IN.format(kept=str(kept)))
    monkeypatch.setattr(launch, "version", lambda package: LMMS_EVAL)
    return (str(script),), lambda: [json.loads(line) for line in kept.read_text().splitlines()]


@pytest.fixture
def config(tiny_folder, tmp_path):
    return BenchmarksConfig(policies=tiny_folder / "base", out=tmp_path / "out, with = and 'quotes' $(date)")


def run(config, start, tasks=("one", "two"), **environment):
    said = []
    found = evaluate_on(config, tasks, say=said.append, start=start, environment=environment)
    return found, said


# ---- what is judged of a response


@pytest.mark.parametrize(
    ("response", "judged"),
    [
        (VALID.format("10"), "10"),
        (VALID.format(" \n 10\t"), "10"),  # white space
        (VALID.format(""), ""),  # empty: nothing was answered
        (VALID.format(r"\boxed{\frac{1}{2}}"), r"\boxed{\frac{1}{2}}"),  # LaTeX
        (VALID.format("$x < 3$ and\n$y > 4$"), "$x < 3$ and\n$y > 4$"),
        ("<think>no caption</think>\n<answer>B</answer> trailing", "B"),  # other prompts ask for less
        ("The answer is 10.", None),  # no element
        ("", None),
        ("<answer>10", None),  # unclosed
        ("10</answer>", None),
        ("</answer>10<answer>", None),
        ("<answer>9</answer><answer>10</answer>", None),  # two
        ("<answer>9 or <answer>10</answer></answer>", None),  # nested
        ("<think>I write <answer> next</think><answer>10</answer>", None),
        ("<Answer>10</Answer>", None),  # not the tag
        ("<answer >10</answer >", None),
    ],
)
def test_what_is_judged_of_a_response(response, judged):
    assert inside.answer_of(response) == (judged or "")
    assert inside.answer_of(response, whole=True) == (response if judged is None else judged)
    assert inside.answer_of(response, tagged=True) == ("" if judged is None else f"<answer>{judged}</answer>")


def test_the_filter_keeps_the_order_of_documents_and_counts_what_has_no_answer():
    answers = inside.Answers(whole=False, tagged=False)
    responses = [[VALID.format("1"), "none"], [VALID.format("2")], VALID.format("3")]
    assert answers.apply(responses, None) == [["1", ""], ["2"], ["3"]]
    assert (answers.responses, answers.without) == (4, 1)


def test_the_policys_system_prompt_takes_the_place_of_a_tasks():
    question, theirs = {"role": "user", "content": []}, {"role": "system", "content": []}
    ours = {"role": "system", "content": [{"type": "text", "text": "Use XML."}]}
    assert inside.with_system([theirs, question], "Use XML.") == [ours, question]
    assert inside.with_system([theirs, question], None) == [theirs, question]


def test_a_fault_is_told_by_its_cause():
    class Tried(Exception):  # as tenacity's
        class last_attempt:
            exception = staticmethod(lambda: ConnectionError("no\nnetwork"))

    assert inside.one_line(Tried()) == "ConnectionError: no network"
    assert inside.one_line(ValueError()) == "ValueError"


def test_results_are_written_without_questions_and_pictures(tmp_path):
    answers = inside.Answers(whole=False, tagged=False)
    answers.apply([["none"]], None)
    sample = {"doc_id": 0, "doc": {"image": b"x"}, "arguments": ["q"], "filtered_resps": [""], "exact_match": 0.0}
    results = {"results": {"one": {"exact_match,none": 0.0}}, "samples": {"one": [sample]}, "configs": {}}
    inside.write(tmp_path, "one", {"asked": {}}, results, [answers])
    (line,) = (tmp_path / "one.samples.jsonl").read_text().splitlines()
    assert json.loads(line) == {"task": "one", "doc_id": 0, "filtered_resps": [""], "exact_match": 0.0}
    written = json.loads((tmp_path / "one.json").read_text())
    assert written["answers"] == {"responses": 1, "without": 1} and "configs" not in written


# ---- starting it, and going on


def test_settings_go_over_in_a_file_and_nothing_through_a_shell(config, stand_in):
    start, starts = stand_in
    (found,), said = run(config, start, LMMS_EVAL_PLUGINS="evil", KEPT="1")
    (given,) = starts()
    assert found.tasks.keys() == {"one", "two"} and "finished: two" in said
    assert given["words"] == [*start, str(config.out / said_folder(config) / "job.json")]
    assert given["job"]["tasks"] == ["one", "two"] and given["job"]["max_response_tokens"] == 8192
    assert given["environment"]["KEPT"] == "1" and "LMMS_EVAL_PLUGINS" not in given["environment"]
    assert given["environment"]["LMMS_CACHE_RUN_ID"] == "run"  # so that an interrupted task's cache is found again
    assert "a library prints" in (config.out / said_folder(config) / "lmms-eval.log").read_text()


def said_folder(config):
    (folder,) = {path.name for path in config.out.iterdir()}
    return folder


def test_several_processes_are_started_by_torchrun(config):
    words = command(config.model_copy(update={"processes": 7}), launch.INSIDE, config.out)
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=7"]
    assert words == [*start, "-m", "prism_fast.stages.lmms.inside", str(config.out)]
    assert command(config, launch.INSIDE, config.out) == [sys.executable, *launch.INSIDE, str(config.out)]


def test_what_is_finished_is_not_run_again(config, stand_in):
    start, starts = stand_in
    with pytest.raises(DataError, match=r"lmms-eval: two: its data set A/B cannot be read .*; see .*lmms-eval.log"):
        run(config, start, STOP_AT="two")
    with pytest.raises(DataError, match="lmms-eval ended with status 3; see"):
        run(config, start, DIE_AT="two")
    (found,), said = run(config, start)
    assert "finished already: one" in said[0] and found.tasks.keys() == {"one", "two"}
    run(config, start)  # starts nothing
    assert [given["job"]["tasks"] for given in starts()] == [["one", "two"], ["two"], ["two"]]
    assert len({given["job"]["identity"] for given in starts()}) == 1
    with pytest.raises(DataError, match="lmms-eval ended without figures for three"):
        run(config, start, ("one", "three"), FORGET="three")


def test_figures_of_other_settings_or_weights_are_not_taken(config, stand_in, tiny_folder, tmp_path):
    start, _ = stand_in
    run(config, start)
    run(config.model_copy(update={"batch_size": 8}), start)  # no figure depends on it
    with pytest.raises(DataError, match=r"one.json: was made otherwise: settings.temperature: 0.0 -> 1.0; choose"):
        run(config.model_copy(update={"temperature": 1.0}), start)
    (config.out / said_folder(config) / "one.json").write_text("{")
    with pytest.raises(DataError, match=r"one.json: not a task's figures"):
        run(config, start)


def test_policies_are_looked_through_before_any_is_run(config, stand_in, tiny_folder, tmp_path):
    start, _ = stand_in
    policy = tmp_path / "policy"
    policy.mkdir()
    for file in (tiny_folder / "base").iterdir():
        (policy / file.name).write_bytes(file.read_bytes())
    both = config.model_copy(update={"policies": (tiny_folder / "base", policy)})
    assert [found.policy for found in run(both, start)[0]] == [str(tiny_folder / "base"), str(policy)]
    with pytest.raises(DataError, match="would both be kept in"):
        run(config.model_copy(update={"policies": (policy, policy / ".")}), start)
    settings = json.loads((policy / "config.json").read_text())
    (policy / "config.json").write_text(json.dumps({**settings, "auto_map": {"AutoConfig": "evil.Config"}}))
    with pytest.raises(DataError, match=r"config.json: auto_map names code to run"):
        run(both, start)
    with pytest.raises(DataError, match="include=FOLDER"):
        run(config.model_copy(update={"include": tmp_path / "nowhere"}), start)


def test_what_is_missing_is_one_line(config, stand_in, monkeypatch):
    start, _ = stand_in
    with pytest.raises(
        DataError, match=r"mathvista_testmini, hallusion_bench_image: a language model judges .* OPENAI_API"
    ):
        run(config, start, ("mathvista_testmini", "mmmu_val", "hallusion_bench_image"))
    with pytest.raises(DataError, match="set AZURE_API_KEY"):
        run(config, start, SETS["paper"], API_TYPE="azure", OPENAI_API_KEY="k")
    run(config, start, SETS["paper-rules"])
    monkeypatch.setattr(launch, "version", lambda package: None)
    with pytest.raises(DataError, match=r"lmms-eval is not installed; pip install 'prism-fast\[eval\]'"):
        run(config, start)
    monkeypatch.setattr(launch, "version", lambda package: "0.1")
    with pytest.raises(DataError, match=f"lmms-eval 0.1 is installed, tested is {LMMS_EVAL}"):
        run(config, start)


# ---- names and the table


def test_names_of_tasks():
    assert tasks_of("paper-rules, my_task,mmmu_val") == [*SETS["paper-rules"], "my_task"]
    assert set(SETS["paper"]) == {*SETS["paper-math"], *SETS["paper-general"]} and len(SETS["paper"]) == 7
    for words in ("", "a,,b", "--model", "../x", "a b", "a;b", "*"):
        with pytest.raises(DataError, match="no name of a task"):
            tasks_of(words)


def test_the_papers_averages_are_those_of_its_figures():
    for row, figures in TABLE_1.items():
        assert len(figures) == len(BENCHMARKS) + 1
        assert abs(sum(figures[:-1]) / len(BENCHMARKS) - figures[-1]) < 0.051, row


def test_the_guide_has_the_names_and_the_papers_figures():
    text = (ROOT / "docs" / "evaluation.md").read_text()
    for b in BENCHMARKS:
        parts, judged = ", ".join(f"`{part}`" for part in b.parts), "yes" if b.judged else "no"
        assert f"| {b.name} | {b.kind} | `{b.task}` | {parts} | `{b.metric}` | {b.dataset} | {judged} |" in text
    for (size, method), figures in TABLE_1.items():
        assert f"| Qwen3-VL-{size} | {method} | {' | '.join(f'{figure:.1f}' for figure in figures)} |" in text
    assert all(f"`{name}`" in text for name in SETS) and f"lmms-eval {LMMS_EVAL}" in text


def results(**figures):
    return {"results": figures, "answers": {"responses": 10, "without": 1}}


def full(value):
    """Results of all seven benchmarks, each at ``value`` percent."""
    return {
        b.task: results(**{part: {f"{b.metric},none": value if b.percent else value / 100} for part in b.parts})
        for b in BENCHMARKS
    }


def test_the_table_stands_beside_the_papers():
    tasks = full(60.0)
    tasks["mmmu_pro"] = results(
        mmmu_pro_vision={"mmmu_acc,none": 0.4, "mmmu_acc_stderr,none": 0.9}, mmmu_pro_standard={"mmmu_acc,none": 0.5}
    )
    heads, rows = table([Found("mine", {**tasks, "own": results(own={"alias": "own", "f1,none": 0.25})})])
    names = ["MathVista", "MathVerse", "MathVision", "WeMath", "MMMU", "MMMU-Pro", "HallusionBench"]
    assert heads == ["policy", *names, "average", "own", "without an answer"]
    assert rows[0] == ["mine", *["60.0"] * 5, "45.0", "60.0", "57.9", "f1 0.25", "10.0%"]
    paper = next(row for row in rows if row[0] == "arXiv 2604.28123, Table 1: 4B PRISM + GRPO")
    assert paper[1:] == ["77.9", "68.6", "45.4", "82.9", "64.1", "49.7", "74.8", "66.2", "", ""]
    assert len(rows) == 1 + len(TABLE_1) and {len(row) for row in rows} == {len(heads)}


def test_a_table_of_some_has_no_average_and_says_what_gave_no_number():
    tasks = {
        "mmmu_val": results(mmmu_val={"alias": "mmmu_val"}),
        "wemath_testmini_reasoning": full(50.0)["wemath_testmini_reasoning"],
    }
    heads, rows = table([Found("mine", tasks)])
    assert heads == ["policy", "WeMath", "MMMU", "without an answer"] and rows[0][1:3] == ["50.0", "no number"]
    assert percent(BENCHMARKS[0], results()) is None
    assert first_figure("own", results(own={"alias": "own", "text,none": "N/A"})) == "no number"
    assert first_figure("group", results(part={"acc_stderr,none": 1.0, "acc,none": 0.5})) == "acc 0.5"
    heads, rows = table([Found("mine", {"own": results(own={"f1,none": 1})})])
    assert heads == ["policy", "own", "without an answer"] and len(rows) == 1  # nothing of the paper's


def test_the_command_shows_the_table(config, stand_in, tiny_folder, capsys, monkeypatch):
    start, _ = stand_in
    monkeypatch.setattr(launch, "INSIDE", start)
    words = [f"policies={tiny_folder / 'base'}", f"out={config.out}"]
    cli.app(["eval", "--lmms", "one", *words], standalone_mode=False)
    shown = capsys.readouterr().out
    assert "exact_match 0.5" in shown and "25.0%" in shown and "finished: one" in shown
    written = (config.out / "table.md").read_text().splitlines()
    assert written[0] == "| policy | one | without an answer |"
    assert written[2].endswith("/base | exact_match 0.5 | 25.0% |")
    with pytest.raises(SystemExit) as stop:
        cli.app(["eval", "--lmms", "one,", *words])
    assert stop.value.code == 2 and "no name of a task" in capsys.readouterr().err
