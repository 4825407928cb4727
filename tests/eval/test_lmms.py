"""`eval --lmms` with the real lmms-eval: a task of its own on scenes of digits, and what it has of the paper's."""

import json
import re
import subprocess
import sys

import pytest

from prism_fast import DataError
from prism_fast.config import BenchmarksConfig, EvaluateConfig
from prism_fast.stages.evaluate import evaluate_policy
from prism_fast.stages.lmms import inside
from prism_fast.stages.lmms.benchmarks import BENCHMARKS, LMMS_EVAL
from prism_fast.stages.lmms.launch import evaluate_on
from tests.eval.conftest import SCENES

PROMPT = "Use XML."
TOKENS = 48
# The process's own code, in blocks of eight responses; it ends, as if killed, when it is asked for a third block.
KILLED = """
import os, sys
from prism_fast.stages.lmms import inside
inside.BLOCK, opened, asked = 8, inside.open_model, []
def open_model(job):
    model = opened(job)
    theirs = model.generate_until
    def generate_until(requests):
        asked.append(len(requests))
        print("asked for", len(requests), file=sys.stderr)
        if len(asked) > {blocks}:
            os._exit(9)
        return theirs(requests)
    model.generate_until = generate_until
    return model
inside.open_model = open_model
sys.exit(inside.main(sys.argv[1]))
"""


@pytest.fixture
def config(policy, tasks, tmp_path):
    return BenchmarksConfig(
        policies=policy, out=tmp_path / "out", include=tasks, system_prompt=PROMPT, max_response_tokens=TOKENS
    )


def samples(config, task):
    (file,) = config.out.glob(f"*/{task}.samples.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


def logged(config):
    (file,) = config.out.glob("*/lmms-eval.log")
    return file.read_text()


def metric(found, task, name="exact_match"):
    return found.tasks[task]["results"][task][f"{name},none"]


@pytest.fixture(scope="module")
def evaluated(policy, tasks, tmp_path_factory):
    """The settings of a finished evaluation, and what its command printed."""
    config = BenchmarksConfig(
        policies=policy,
        out=tmp_path_factory.mktemp("evaluated") / "out",
        include=tasks,
        system_prompt=PROMPT,
        max_response_tokens=TOKENS,
    )
    words = [f"policies={policy}", f"out={config.out}", f"include={config.include}", f"max_response_tokens={TOKENS}"]
    command = [sys.executable, "-m", "prism_fast", "eval", "--lmms", "digits", *words, f"system_prompt={PROMPT}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + logged(config)[-3000:]
    return config, done.stdout


def test_lmms_eval_hears_from_a_policy_what_the_trainer_hears(evaluated, policy, scenes, tmp_path, report):
    config, shown = evaluated
    settings = {
        "model": {"path": policy},
        "data": {"files": [scenes.eval]},
        "eval": {"max_response_tokens": TOKENS},
        "out": tmp_path / "eval.json",
    }
    ours, _ = evaluate_policy(EvaluateConfig.model_validate(settings), lambda done, total: None)
    assert "exact_match" in shown and "finished: digits" in shown
    (found,) = evaluate_on(config, ["digits"])  # from what is kept
    heard = samples(config, "digits")
    assert [sample["doc_id"] for sample in heard] == list(range(SCENES))
    same = sum(sample["resps"][0][0] == shown["response"] for sample, shown in zip(heard, ours.responses))
    report.add("responses of 12 that are the trainer's own to the letter", same, "11 or more")
    report.add(
        "accuracy by lmms-eval, by `prism-fast eval`", f"{metric(found, 'digits'):.4f}, {ours.accuracy:.4f}", "equal"
    )
    report.add(f"responses of {SCENES} without an answer", found.tasks["digits"]["answers"]["without"], "few")
    assert same >= len(ours.responses) - 1
    assert abs(metric(found, "digits") - ours.accuracy) <= 1.5 / SCENES  # greedy: a near tie may fall otherwise
    assert ours.accuracy > 0.1  # else nothing was compared
    answered = [sample for sample in heard if sample["filtered_resps"][0]]
    assert len(answered) == SCENES - found.tasks["digits"]["answers"]["without"]
    for sample in answered:
        assert (
            re.search(r"<answer>\s*(.*?)\s*</answer>", sample["resps"][0][0], re.DOTALL)[1]
            == sample["filtered_resps"][0]
        )


def test_an_interrupted_task_goes_on_behind_its_last_block(config, evaluated, report):
    limited = config.model_copy(update={"limit": 40})
    with pytest.raises(DataError, match="ended with status 9"):
        evaluate_on(limited, ["digits"], start=("-c", KILLED.format(blocks=2)))
    assert logged(limited).count("asked for 8") == 3
    evaluate_on(limited, ["digits"], start=("-c", KILLED.format(blocks=99)))
    asked = logged(limited).count("asked for 8") - 3
    report.add("killed in the third block of five, started again: blocks that are asked for", asked, "3")
    assert asked == 3
    whole = samples(evaluated[0], "digits")[:40]
    assert [sample["resps"] for sample in samples(limited, "digits")] == [sample["resps"] for sample in whole]


def test_groups_and_tasks_that_look_for_the_element_themselves(config):
    (found,) = evaluate_on(config.model_copy(update={"limit": 12, "batch_size": 4}), ["digits_both"])
    results = found.tasks["digits_both"]["results"]
    assert results["digits"]["exact_match,none"] == results["digits_tagged"]["exact_match,none"]
    heard = {
        task: [s for s in samples(config, "digits_both") if s["task"] == task] for task in ("digits", "digits_tagged")
    }
    for bare, tagged in zip(heard["digits"], heard["digits_tagged"]):
        assert tagged["filtered_resps"][0] == (
            bare["filtered_resps"][0] and f"<answer>{bare['filtered_resps'][0]}</answer>"
        )


def test_a_policy_that_never_learned_the_format(config, tiny_folder):
    changed = config.model_copy(update={"policies": (tiny_folder / "base",), "limit": 3, "no_answer": "whole"})
    (found,) = evaluate_on(changed, ["digits"])
    assert found.tasks["digits"]["answers"] == {"responses": 3, "without": 3}
    assert all(sample["filtered_resps"][0] == sample["resps"][0][0] for sample in samples(changed, "digits"))


def test_what_is_missing_offline_is_one_line(config, report):
    with pytest.raises(DataError) as error:
        evaluate_on(config, ["digits", "mmmu_val"])
    text = str(error.value)
    assert text.startswith("lmms-eval: mmmu_val: its data set lmms-lab-encoder/MMMU cannot be read (")
    assert "set HF_HOME" in text and "\n" not in text
    report.add("a data set that is not there, without a network", text.partition("; see")[0], "one line")


def test_lmms_eval_has_the_papers_benchmarks(tasks, monkeypatch, report):
    manager = inside.manager_class()("ERROR", model_name=inside.PROMPTS)
    for benchmark in BENCHMARKS:
        assert benchmark.task in manager.all_tasks
        config = manager._get_config(benchmark.task)
        parts = config["task"] if isinstance(config["task"], list) else [config["task"]]
        assert tuple(parts) == benchmark.parts
        assert manager.datasets(benchmark.task) == {benchmark.dataset}
        for part in parts:
            assert benchmark.metric in [metric["metric"] for metric in manager._get_config(part)["metric_list"]]
    job = {"tasks": ["digits", "nothing"], "include": str(tasks), "lmms_eval": LMMS_EVAL, "no_answer": "wrong"}
    theirs = inside.manager_class()
    monkeypatch.setattr(
        inside, "manager_class", lambda: lambda *a, **k: theirs(*a, **k) if "include_path" in k else manager
    )
    with pytest.raises(inside.Fault, match=r"nothing: no such task in lmms-eval .*, nor in "):
        inside.managers(job)
    report.add("the paper's benchmarks, with parts, metrics, data sets", len(BENCHMARKS), "7, as in docs/evaluation.md")


def test_the_papers_tasks_judge_what_the_filter_gives_them():
    from lmms_eval.tasks.mathvision.utils import mathvision_process_results
    from lmms_eval.tasks.mmmu.utils import mmmu_process_results
    from lmms_eval.tasks.mmmu_pro.utils import mmmu_pro_process_results
    from lmms_eval.tasks.wemath.reasoning.utils import wemath_reasoning_process_results

    response = "<caption>A or C?</caption><think>not C</think><answer>{}</answer>".format
    judged = inside.answer_of(response("B"))
    options = {"options": "['one', 'two', 'three']", "question": "Which?", "answer": "B"}
    mmmu = mmmu_process_results({**options, "id": "validation_Art_1", "question_type": "multiple-choice"}, [judged])
    assert mmmu["mmmu_acc"]["parsed_pred"] == ["B"] or mmmu["mmmu_acc"]["parsed_pred"] == "B"
    pro = mmmu_pro_process_results({**options, "id": "1", "subject": "Art"}, [judged])
    assert pro["mmmu_acc"]["parsed_pred"] == "B"
    vision = mathvision_process_results({"answer": "0.5", "options": []}, [inside.answer_of(response(r"\frac{1}{2}"))])
    assert vision["mathvision_standard_eval"]["scores"] == [True]
    names = ("ID", "split", "knowledge concept", "key", "question number", "knowledge concept description")
    doc = {**dict.fromkeys(names, ""), "question": "Which?", "option": "A. 1; B. 2", "answer": "B"}
    tagged = inside.answer_of(response("B"), tagged=True)
    assert wemath_reasoning_process_results(doc, [tagged])["acc_score"] == 1.0
    assert wemath_reasoning_process_results(doc, ["B"])["acc_score"] == 0.0  # why the element stays


def test_vllm_is_opened_without_a_models_code_and_asked_with_our_prompt(config, monkeypatch, tmp_path):
    from lmms_eval.models.simple import vllm

    opened = {}
    monkeypatch.setattr(vllm, "LLM", lambda **settings: opened.update(settings) or object())
    job = {**config.model_dump(mode="json"), "policy": str(tmp_path), "identity": "x"}
    model = inside._vllm(job)
    assert opened["trust_remote_code"] is False and opened["model"] == str(tmp_path)
    assert repr(model) == "prism_fast x" and opened["gpu_memory_utilization"] == 0.8

    class Request:
        turns = tuple({"role": role, "content": [{"type": "text", "text": "t"}]} for role in ("system", "user"))
        arguments = ("", lambda doc: list(Request.turns), {"max_new_tokens": 5, "temperature": 0}, 0, "digits", "test")

    model.task_dict = {"digits": {"test": [{}]}}
    messages, _ = model.make_one_request(Request)
    assert [turn["role"] for turn in messages] == ["system", "user"] and messages[0]["content"][0]["text"] == PROMPT
