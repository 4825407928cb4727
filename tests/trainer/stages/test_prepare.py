"""Prompts kept by pass rate: rates on the bounds are within them. Warm-up pairs with hard negatives among them."""

import json

import pyarrow.parquet as pq
import pytest

from prism_fast.config import FilterConfig, PairsConfig, load_config
from prism_fast.data.formats import read_rlvr, write_align
from prism_fast.records import DataError, Message, Sample
from prism_fast.stages import prepare
from prism_fast.stages.answers import Answered

RESPONSE = "<caption>c</caption><think>t</think><answer>{}</answer>".format


@pytest.mark.parametrize(
    ("right", "samples", "low", "high"), [(8, 10, 0.2, 0.8), (7, 10, 0.7, 1), (17, 20, 0.15, 0.85)]
)
def test_a_pass_rate_on_the_bound_is_kept(right, samples, low, high, tmp_path, monkeypatch):
    (tmp_path / "p.jsonl").write_text('{"prompt": "x", "reward_model": {"ground_truth": "10"}}')
    text = [RESPONSE(10)] * right + [RESPONSE(11)] * (samples - right)
    monkeypatch.setattr(prepare, "answers", lambda *_, **__: [Answered(0, text, [9] * samples)])
    tree = {"model": {"path": "m"}, "data": {"files": tmp_path / "p.jsonl"}, "out": tmp_path / "kept.parquet"}
    config = load_config(FilterConfig, None, base={**tree, "samples": samples, "low": low, "high": high})
    assert prepare.filter_prompts(config)["kept"] == 1
    assert read_rlvr(tmp_path / "kept.parquet")[0].pass_rate == right / samples


@pytest.mark.parametrize(
    ("more", "told"), [({"id": 7, "extra_info": {"split": "a"}}, "extra_info.split, id"), ({}, None)]
)
def test_filter_names_once_what_it_does_not_write(more, told, tmp_path, monkeypatch):
    record = {"prompt": "x", "reward_model": {"ground_truth": "10"}, **more}
    (tmp_path / "p.jsonl").write_text(f"{json.dumps(record)}\n" * 2)
    monkeypatch.setattr(prepare, "answers", lambda *_, **__: [Answered(i, [RESPONSE(10)], [9]) for i in range(2)])
    tree = {"model": {"path": "m"}, "data": {"files": tmp_path / "p.jsonl"}, "out": tmp_path / "kept.parquet"}
    said = []
    prepare.filter_prompts(load_config(FilterConfig, None, base={**tree, "samples": 1, "high": 1}), say=said.append)
    assert said == ([f"not written, as the format has no place for them: {told}"] if told else [])
    kept = pq.read_table(tmp_path / "kept.parquet").to_pylist()[0]
    assert "id" not in kept and "split" not in kept["extra_info"]


def pairs_of(tmp_path, monkeypatch, **hard):
    """(counts, records written) of `data pairs` on three teacher's records with two answers each."""
    teachers = [
        ("<caption>3\n1</caption>", "<think>3\n4</think><answer>4</answer>"),
        ("<caption>2\n2</caption>", "<think>2\n4</think><answer>4</answer>"),
        ("<caption>4\n0</caption>", "<think>4\n5</think><answer>5</answer>"),
    ]
    samples = [
        Sample(f"t:{i}", (Message("user", "Sum?"),), teacher_caption=c, teacher_reasoning=r, gold="4")
        for i, (c, r) in enumerate(teachers)
    ]
    write_align(tmp_path / "align.parquet", samples)
    monkeypatch.setattr(prepare, "answers", lambda *_, **__: [Answered(i, [RESPONSE(7)] * 2, [9] * 2) for i in (0, 1)])
    tree = {"model": {"path": "m"}, "data": {"files": tmp_path / "align.parquet"}, "out": tmp_path / "pairs.jsonl"}
    counts = prepare.pairs(load_config(PairsConfig, None, base={**tree, "samples": 2, "hard_negatives": hard}))
    return counts, [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]


def test_without_a_share_pairs_hold_answers_alone(tmp_path, monkeypatch):
    counts, records = pairs_of(tmp_path, monkeypatch)
    assert "hard_negatives" not in counts and counts["written"] == len(records) == 4
    assert all(record["student_caption"] == "<caption>c</caption>" for record in records)


def test_hard_negatives_have_their_share_and_stand_between_the_others(tmp_path, monkeypatch):
    counts, records = pairs_of(tmp_path, monkeypatch, share=0.6, kinds=["number"])
    hard = [record["student_caption"] != "<caption>c</caption>" for record in records]
    assert counts["hard_negatives"] == sum(hard) == 6 and counts["written"] == len(records) == 10
    assert any(hard[:3]) and any(hard[-3:]) and not all(hard[-5:])
    for record, wrong in zip(records, hard):
        if wrong:
            assert record["student_caption"] != record["teacher_caption"]
            assert record["student_cot"] != record["teacher_cot"]
    assert {r["teacher_caption"] for r, wrong in zip(records, hard) if wrong} == {
        "<caption>3\n1</caption>",
        "<caption>2\n2</caption>",
        "<caption>4\n0</caption>",  # which no answer is to
    }


def test_too_many_hard_negatives_are_one_line(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"0 hard negatives can be made, hard_negatives.share = 0.5 wants 4 beside 4"):
        pairs_of(tmp_path, monkeypatch, share=0.5, kinds=["object"])
