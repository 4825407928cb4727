"""Hard negatives: never a right text where truth is known, always the teacher's form, the rules one by one."""

import random
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_fast.config import HardNegativesConfig
from prism_fast.data.hard_negatives import INSTEAD, HardNegatives, Negative
from prism_fast.demo.digits import PRESETS, Question, Scene, ask, teacher_voice
from prism_fast.response_format import count_caption_items, count_reasoning_steps, split_parts

KINDS = ("number", "object", "word", "image")
REAL = [
    ("<caption>- A red circle above the square.\n- The label reads 1,250 kg.</caption>",
     "<think>1. The circle is above the square.\n2. Its mass is 1,250 kg, twice that is 2,500.</think>"
     "<answer>2500</answer>"),
    ("<caption>A photo of two dogs near a bench. The left dog is larger.</caption>",
     "<think>The left dog is larger, so it is the older one.</think><answer>left</answer>"),
    ("<caption>Bar chart with an axis from 0 to 3.5; the last bar is 2.5.</caption>",
     "<think>The highest bar is 2.5.</think><answer>2.5</answer>"),
]  # fmt: skip


def digits_of(text):
    return [int(n) for n in re.findall(r"-?\d+", text)]


def scenes(preset, count, seed):
    """(digits, question, (caption, reasoning)) of a teacher that is right."""
    rng, hard = np.random.default_rng(seed), PRESETS[preset]
    made = []
    for i in range(count):
        digits = tuple(
            int(d) for d in rng.integers(0, hard.largest + 1, rng.integers(hard.count[0], hard.count[1] + 1))
        )
        question: Question = ask(hard.questions[i % len(hard.questions)], digits, digits[0])
        parts = split_parts(teacher_voice(Scene(np.zeros((16, 16), np.uint8), digits), question))
        made.append((digits, question, (parts.caption, parts.reasoning)))
    return made


@given(st.sampled_from(sorted(PRESETS)), st.integers(0, 2**31), st.sets(st.sampled_from(KINDS), min_size=1))
@settings(max_examples=60, deadline=None)
def test_no_text_is_right_where_truth_is_known(preset, seed, kinds):
    truth = scenes(preset, 12, seed)
    config = HardNegativesConfig(share=0.5, kinds=tuple(sorted(kinds)))
    made = HardNegatives([texts for _, _, texts in truth], config, seed).several(36)
    if kinds & {"number", "image"}:
        assert made
    for place, negative in made:
        digits, question, _ = truth[place]
        whole = split_parts(negative.caption + negative.reasoning)
        assert whole is not None and (whole.caption, whole.reasoning) == tuple(negative)  # a valid response
        assert digits_of(whole.caption) != list(digits)
        steps = re.findall(r"-?\d+", whole.reasoning.split("</think>")[0])
        assert tuple(steps) != question.steps or whole.answer != question.answer
    assert len({(place, negative) for place, negative in made}) == len(made)


@given(st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_the_form_gives_nothing_away(seed):
    """Counts of items and steps are the teacher's, and so is every word: what a style alone can be told by."""
    truth = scenes("easy", 30, seed)
    texts = [texts for _, _, texts in truth]
    words = {word for pair in texts for word in re.split(r"\s+|(?=<)|(?<=>)", " ".join(pair))}
    for place, negative in HardNegatives(texts, HardNegativesConfig(share=0.5, kinds=("number",))).several(60):
        told, wrong = ("".join(parts) for parts in (texts[place], negative))
        assert count_caption_items(told) == count_caption_items(wrong)
        assert count_reasoning_steps(told) == count_reasoning_steps(wrong)
        assert {*re.split(r"\s+|(?=<)|(?<=>)", negative.caption)} <= words


def test_steps_slip_by_one_amount_and_the_answer_follows():
    texts = [("<caption>3\n1\n4</caption>", "<think>3\n4\n8</think><answer>8</answer>"),
             ("<caption>2\n2\n5</caption>", "<think>2\n4\n9</think><answer>9</answer>")]  # fmt: skip
    maker = HardNegatives(texts, HardNegativesConfig(share=0.5, kinds=("number",)))
    for number in range(20):
        found = maker.of(0, number)
        *steps, answer = digits_of(found.reasoning)
        offs = [a - b for a, b in zip(steps, (3, 4, 8))]
        slip = offs[-1]
        assert slip != 0 and answer == steps[-1] and offs == sorted(offs, key=bool) and set(offs) <= {0, slip}
        assert maker.of(0, number) == found


@pytest.mark.parametrize(
    ("kind", "allowed"),
    [
        ("number", lambda old, new: len(old) == len(new) and old != new),
        (
            "object",
            lambda old, new: {old, new} < {"square", "dogs", "bench", "axis", "label", "bar", "circle", "chart"},
        ),
        ("word", lambda old, new: new in INSTEAD[old]),
    ],
)
def test_rules_on_sentences(kind, allowed):
    """One word of a sentence is another, and it fits in the old one's place."""
    maker = HardNegatives(REAL, HardNegativesConfig(share=0.5, kinds=(kind, "image")), 1)
    changed = set()
    for index, number in ((i, n) for i in range(3) for n in range(30)):
        found = maker._changed(REAL[index][0], kind, 0, random.Random(number))
        if found is not None:
            before, after = (re.findall(r"[\w,.]*\w", text) for text in (REAL[index][0], found))
            ((old, new),) = [pair for pair in zip(before, after, strict=True) if pair[0] != pair[1]]
            assert allowed(old, new), found
            changed.add((old, new))
        negative = maker.of(index, number)
        assert isinstance(negative, Negative) and split_parts("".join(negative)) is not None
    assert changed


def test_labels_of_items_stay():
    """ "2." of a list is no reading: another number there would tell by form."""
    maker = HardNegatives(REAL, HardNegativesConfig(share=0.5, kinds=("number",)))
    for number in range(30):
        assert re.match(r"<think>1\. .*\n2\. ", maker.of(0, number).reasoning) if maker.of(0, number) else True
        slipped = maker._slipped(REAL[0][1], random.Random(number))
        assert re.match(r"<think>1\. .*\n2\. Its mass is 1,250 kg, twice that is 2,(?!500)", slipped)
        assert re.search(r"<answer>2(?!500)\d+</answer>", slipped)


def test_a_teacher_that_says_nothing_that_can_be_wrong():
    same = ("<caption>ok</caption>", "<think>so</think><answer>ok</answer>")
    assert HardNegatives([same, same], HardNegativesConfig(share=0.5)).several(4) == []
