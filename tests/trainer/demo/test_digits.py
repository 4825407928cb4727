"""The demo's data and model: disjoint digits, correct teachers, the published formats, an ordinary checkpoint."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoTokenizer, Qwen3VLForConditionalGeneration

from prism_fast.data.formats import open_image, read_align, read_rlvr, read_sft
from prism_fast.demo.digits import (
    PRESETS,
    DemoSizes,
    Voices,
    ask,
    digit_indices,
    draw_question,
    make_scene,
    public_voice,
    teacher_voice,
    write_demo_data,
    write_demonstrations,
    write_teacher_texts,
)
from prism_fast.demo.tiny import make_tiny_model
from prism_fast.response_format import count_caption_items, count_reasoning_steps, split_parts

SIZES = DemoSizes(sft=40, align=12, rlvr=12, eval=12)
KINDS = PRESETS["full"].questions


def test_no_digit_image_is_in_train_and_test():
    train, test = set(digit_indices("train")), set(digit_indices("test"))
    assert not train & test
    assert len(train) + len(test) == 1797
    assert len(test) == 359


def test_a_scene_draws_from_its_own_side(monkeypatch):
    from prism_fast.demo import digits

    asked = []
    real = digits.digit_indices
    monkeypatch.setattr(digits, "digit_indices", lambda split: asked.append(split) or real(split))
    make_scene(np.random.default_rng(0), "test", PRESETS["full"])
    assert set(asked) == {"test"}


@pytest.mark.parametrize("name", PRESETS)
def test_scenes_have_the_preset_shape(name):
    preset, rng = PRESETS[name], np.random.default_rng(1)
    counts = set()
    for _ in range(60):
        scene = make_scene(rng, "train", preset)
        assert scene.pixels.shape == (16 * preset.rows, 16 * preset.columns)
        assert scene.pixels.dtype == np.uint8
        counts.add(len(scene.digits))
    assert counts == set(range(preset.count[0], preset.count[1] + 1))


@given(st.sampled_from(KINDS), st.lists(st.integers(0, 9), min_size=2, max_size=5), st.integers(0, 9))
@settings(max_examples=200, deadline=None)
def test_questions_have_the_answer_a_person_computes(kind, digits, target):
    question = ask(kind, tuple(digits), target)
    expected = {
        "sum": sum(digits),
        "difference": 2 * digits[0] - sum(digits),
        "maximum": max(digits),
        "order": "".join(sorted(map(str, digits))),
        "count": sum(digit == target for digit in digits),
        "two_step": sum(sorted(digits)[:-1]),
    }[kind]
    assert question.answer == str(expected) == question.steps[-1]
    assert len(question.steps) == len(digits) + (kind == "two_step")


@pytest.mark.parametrize("kind", KINDS)
def test_voices_differ_in_items_and_steps(kind):
    rng = np.random.default_rng(2)
    scene = make_scene(rng, "train", PRESETS["full"])
    question = draw_question(rng, kind, scene.digits)
    teacher = teacher_voice(scene, question)
    assert split_parts(teacher).answer == question.answer
    assert count_caption_items(teacher) == len(scene.digits)
    assert count_reasoning_steps(teacher) == len(question.steps)
    public = public_voice(scene, question, rng, replace(PRESETS["full"], misread=0.0))
    assert split_parts(public).answer == question.answer
    assert count_caption_items(public) <= 2
    assert count_reasoning_steps(public) == 1


def test_the_public_voice_misreads():
    rng = np.random.default_rng(3)
    wrong = 0
    for _ in range(300):
        scene = make_scene(rng, "train", PRESETS["easy"])
        caption = split_parts(public_voice(scene, ask("sum", scene.digits), rng, PRESETS["easy"])).caption
        wrong += caption != f"<caption>{scene.digits[0]}\n{scene.digits[1]}</caption>"
    assert 0.2 < wrong / 300 < 0.5  # two digits, each misread with probability 0.16


@pytest.mark.parametrize("preset", PRESETS)
def test_written_data_reads_back(tmp_path, preset):
    files = write_demo_data(tmp_path, seed=5, sizes=SIZES, preset=preset)
    sft, align, rlvr, held_out = (
        read_sft(files.sft),
        read_align(files.align),
        read_rlvr(files.rlvr),
        read_align(files.eval),
    )
    assert [len(data) for data in (sft, align, rlvr, held_out)] == [40, 12, 12, 12]
    assert {sample.question_type for sample in rlvr} == set(PRESETS[preset].questions)
    assert all(split_parts(sample.response) for sample in sft)
    public = sum("<think>so</think>" in sample.response for sample in sft)
    assert 8 < public < 32
    for data in (align, held_out):
        for sample in data:
            assert split_parts(sample.teacher_caption + sample.teacher_reasoning).answer == sample.gold
    for sample in (sft[0], align[0], rlvr[0], held_out[0]):
        image = open_image(sample.images[0], sample.place)
        assert image.mode == "RGB"
        assert image.size == (64, 16 * PRESETS[preset].rows)


def test_same_arguments_same_files(tmp_path):
    first = write_demo_data(tmp_path / "a", seed=7, sizes=SIZES)
    second = write_demo_data(tmp_path / "b", seed=7, sizes=SIZES)
    other = write_demo_data(tmp_path / "c", seed=8, sizes=SIZES)
    for name in ("sft", "align", "rlvr", "eval"):
        assert getattr(first, name).read_bytes() == getattr(second, name).read_bytes()
        assert getattr(first, name).read_bytes() != getattr(other, name).read_bytes()


def test_unknown_preset():
    with pytest.raises(ValueError, match="preset must be one of easy, full"):
        write_demo_data("/nonexistent", preset="hard")


def test_tiny_model_is_an_ordinary_checkpoint(tmp_path):
    texts = ["Use XML.", "Sum?", "<caption>3\n-1</caption><think>so</think><answer>12</answer>"] * 20
    first, second = make_tiny_model(tmp_path / "a", texts, seed=1), make_tiny_model(tmp_path / "b", texts, seed=1)
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
    assert (first / "tokenizer.json").read_bytes() == (second / "tokenizer.json").read_bytes()
    config, tokenizer = AutoConfig.from_pretrained(first), AutoTokenizer.from_pretrained(first)
    model = Qwen3VLForConditionalGeneration.from_pretrained(first)
    assert config.model_type == "qwen3_vl"
    assert 1.5e6 < sum(parameter.numel() for parameter in model.parameters()) < 2.5e6
    assert config.image_token_id == tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert tokenizer.decode(tokenizer("Ünïcödé <b> 1,234 \n漢字")["input_ids"]) == "Ünïcödé <b> 1,234 \n漢字"
    assert len(tokenizer("<caption>3\n-1</caption>")["input_ids"]) == 4
    with torch.no_grad():
        logits = model(torch.tensor([tokenizer("Sum?")["input_ids"]])).logits
    assert logits.isfinite().all()


def test_an_erring_teacher_keeps_its_form_and_is_wrong_as_often_as_it_is_told(tmp_path):
    """Gold answers stay right, and without errors not a byte is another."""
    sizes = DemoSizes(sft=4, align=400, rlvr=4, eval=4)
    right, wrong = (
        read_align([write_demo_data(tmp_path / str(errors), 0, sizes, errors=errors).align]) for errors in (0.0, 0.2)
    )
    counts = {"caption": 0, "steps": 0}
    for told, (caption, reasoning, gold) in (
        (split_parts(s.teacher_caption + s.teacher_reasoning), (s.teacher_caption, s.teacher_reasoning, s.gold))
        for s in (wrong[i] for i in range(400))
    ):
        assert told is not None and caption.count("\n") == reasoning.count("\n") == 3
        assert count_caption_items(caption + reasoning) == count_reasoning_steps(caption + reasoning) == 4
        counts["steps"] += told.answer != gold
    misread = sum(told_right_caption(wrong[i]) is False for i in range(400))
    assert 400 * 0.02 < misread < 400 * 0.2 and 400 * 0.05 < counts["steps"] < 400 * 0.3
    assert all(told_right_caption(right[i]) for i in range(400))
    control = tmp_path / "control.json"
    assert write_teacher_texts(control, tmp_path / "0.2" / "align.parquet") == 400
    texts = read_sft(control)
    assert [texts[i].response for i in (0, 399)] == [
        wrong[i].teacher_caption + wrong[i].teacher_reasoning for i in (0, 399)
    ]


def told_right_caption(sample):
    """Whether an answer by the caption's digits is the gold one, where it decides; True where it cannot tell."""
    digits = tuple(int(d) for d in sample.teacher_caption.removeprefix("<caption>").removesuffix("</caption>").split())
    return ask(sample.question_type, digits).answer == sample.gold


def test_demonstrations_of_a_drift_are_mostly_public(tmp_path):
    write_demonstrations(tmp_path / "drift.json", 0, 400, "easy", Voices(public=0.95))
    samples = read_sft(tmp_path / "drift.json")
    teacher = sum(count_reasoning_steps(samples[i].response) == 4 for i in range(400))
    assert 400 * 0.02 < teacher < 400 * 0.09 and (tmp_path / "drift_images").is_dir()
