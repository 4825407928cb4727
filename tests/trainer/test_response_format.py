"""The response format: one linear scan against the definitions of docs/method.md 2."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_fast.reward import answer_element, count_caption_items, count_reasoning_steps, is_valid, split_parts
from prism_kernels import find_tag_spans
from tests.timing import assert_linear

GOOD = "<caption>3; 7</caption> <think>3+7=10</think>\n<answer> 10 </answer>"
MARKS = ["<caption>", "</caption>", "<think>", "</think>", "<answer>", "</answer>"]

# The definitions, as expressions that may take cubic time.
_INNER = "((?:(?!</?(?:caption|think|answer)>).)*)"
FIXED = re.compile(
    rf"[ \t\n\r\f\v]*(<caption>{_INNER}</caption>)[ \t\n\r\f\v]*"
    rf"(<think>{_INNER}</think>[ \t\n\r\f\v]*<answer>{_INNER}</answer>)[ \t\n\r\f\v]*",
    re.DOTALL,
)
COMPAT = re.compile(
    r"^\s*(<caption>.*?</caption>)\s*(<think>.*?</think>\s*<answer>(.*?)</answer>)\s*$",
    re.DOTALL,
)

pieces = st.sampled_from([*MARKS, " ", "\n", "\u00a0", "\x1c", "x", "<", "</think", "caption>", "é"])
# Valid skeletons with up to two pieces inserted anywhere are nearly valid; plain lists of pieces rarely are.
nearly_valid = st.builds(
    lambda body, extras: "".join(_insert(body, extras)),
    st.just(MARKS),
    st.lists(st.tuples(st.integers(0, 12), pieces), max_size=5),
)
texts = nearly_valid | st.lists(pieces, max_size=14).map("".join)


def _insert(body, extras):
    body = list(body)
    for at, piece in extras:
        body.insert(min(at, len(body)), piece)
    return body


@settings(max_examples=400, deadline=None)
@given(texts)
def test_fixed_is_the_definition(text):
    match = FIXED.fullmatch(text)
    parts = split_parts(text)
    assert (parts is None) == (match is None)
    if match:
        assert (parts.caption, parts.reasoning, parts.answer) == (match[1], match[3], match[5].strip())


@settings(max_examples=400, deadline=None)
@given(texts)
def test_the_one_answer_element_is_that_of_a_valid_response_and_found_in_others_too(text):
    found = re.findall(r"</?answer>", text)
    one = re.search(r"<answer>(.*?)</answer>", text, re.DOTALL) if found == ["<answer>", "</answer>"] else None
    assert answer_element(text) == (one and one[1].strip())
    parts = split_parts(text)
    assert parts is None or answer_element(text) == parts.answer


@settings(max_examples=400, deadline=None)
@given(texts)
def test_compat_is_the_expression(text):
    match = COMPAT.match(text)
    parts = split_parts(text, "compat")
    assert (parts is None) == (match is None)
    if match:
        assert (parts.caption, parts.reasoning, parts.answer) == (match[1], match[2], match[3].strip())


@settings(max_examples=200, deadline=None)
@given(texts)
def test_fixed_agrees_with_find_tag_spans(text):
    table = [bytes([byte]) for byte in range(256)]
    data = text.encode()
    spans = find_tag_spans(list(data), table, impl="reference")
    parts = split_parts(text)
    assert (spans is None) == (parts is None)
    if parts:
        caption, think, answer = spans
        assert data[slice(*caption)].decode() == parts.caption
        assert data[think[0] : answer[1]].decode() == parts.reasoning


def test_every_white_space_character():
    """Compat's white space is that of ``\\s``, fixed's is ASCII's; nothing else may stand between the elements."""
    for code in [*range(0x3001), 0xFEFF]:
        text = GOOD.replace("</caption> <think>", f"</caption>{chr(code)}<think>")
        assert is_valid(text, "compat") == (re.fullmatch(r"\s", chr(code)) is not None), hex(code)
        assert is_valid(text) == (code < 128 and bytes([code]).isspace()), hex(code)


def test_parts():
    parts = split_parts(GOOD)
    assert parts.caption == "<caption>3; 7</caption>"
    assert parts.reasoning == "<think>3+7=10</think>\n<answer> 10 </answer>"
    assert parts.answer == "10"


def test_repeated_answers():
    two = "<caption>c</caption><think>t</think><answer>1</answer> <answer>2</answer>"
    assert split_parts(two) is None
    assert split_parts(two, "compat").answer == "1</answer> <answer>2"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "10",
        GOOD[:-1],
        GOOD + "x",
        "x" + GOOD,
        GOOD + GOOD,
        GOOD.replace("<think>", ""),
        GOOD.replace("<think>", "<think><think>"),
        GOOD.replace("</caption> <think>", "</caption> then <think>"),
        GOOD.replace("caption", "Caption"),
        GOOD.replace("3; 7", "3; <|image_pad|> 7"),
        GOOD.replace("3+7", "<|video_pad|>"),
        "<think>t</think><caption>c</caption><answer>1</answer>",
    ],
)
def test_invalid(text):
    assert not is_valid(text)


def test_unknown_mode():
    with pytest.raises(ValueError, match=r'mode: expected "fixed" or "compat"'):
        split_parts(GOOD, "strict")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["fixed", "compat"])
@pytest.mark.parametrize(
    "unit", ["<caption>", "</caption>", "</caption><think>", "</think><answer>", "</caption> ", " ", "<", *MARKS[3:]]
)
def test_linear_time(mode, unit):
    def make(size):
        hostile = "<caption>" + unit * (size // len(unit)) + "x</answer>"
        nearly = "<caption></caption>" + unit * (size // len(unit)) + "<think></think><answer></answer>"
        return lambda: (split_parts(hostile, mode), split_parts(nearly, mode))

    assert_linear(make, 6_500)


def _response(caption="c", think="t"):
    return f"<caption>{caption}</caption><think>{think}</think><answer>1</answer>"


@pytest.mark.parametrize(
    ("caption", "count"),
    [
        ("3; 7; 2; 9", 4),
        ("3;7;2;9;", 4),
        ("", 0),
        ("  \n ", 0),
        ("a cat", 1),
        ("- a photo\n- two cats, a dog\n- the text 'STOP'", 3),
        ("\n* a photo. Bright.\n* two cats\n", 2),
        ("Objects:\n1. a cat\n2. a dog\n   with a hat\n3. \n", 2),
        ("a) a cat\nb) a dog", 2),
        ("a cat\na dog\n\na bird", 3),
        ("A cat sits. A dog, 3.5 years old, lies down.", 2),
    ],
)
def test_caption_items(caption, count):
    assert count_caption_items(_response(caption=caption)) == count


@pytest.mark.parametrize(
    ("think", "count"),
    [
        ("3+7=10; 10+2=12; 12+9=21", 3),
        ("3+7=10; 10+2=12.", 2),
        ("", 0),
        ("Step 1: add 3 and 7. That is 10.\nStep 2: add 2.", 2),
        ("**Step 1**: add\n\n**Step 2**: add again\n", 2),
        ("1. Add 3 and 7.\n2. Add 2.", 2),
        ("1. Add 3 and 7. 2. Add 2.", 2),
        ("First I add 3.5 and 7. Then 2! Done?", 3),
        ("3+7=10\n10+2=12\n", 2),
    ],
)
def test_reasoning_steps(think, count):
    assert count_reasoning_steps(_response(think=think)) == count


def test_an_invalid_response_counts_nothing():
    assert count_caption_items("3; 7") == count_reasoning_steps("3+7=10") == 0


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["- ", "1. ", ". ", ";", "Step 1: ", "   ", "\n", "1.\n", "**", "a.b "])
def test_counts_take_linear_time(unit):
    def make(size):
        text = _response(unit * (size // len(unit)), unit * (size // len(unit)))
        return lambda: (count_caption_items(text), count_reasoning_steps(text))

    assert_linear(make, 4_000)
