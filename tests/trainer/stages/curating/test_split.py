"""What teachers write, and what is made of it: the right parts, or none."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prism_fast.response_format import split_parts
from prism_fast.stages.curating.split import split

TAGS = ["<caption>", "</caption>", "<think>", "</think>", "<answer>", "</answer>", "<Think>", "</thinking>"]

GOOD = "<caption>\n- 3\n- 7\n</caption>\n<think>3 + 7 = 10</think>\n<answer>10</answer>"
PARTS = {"caption": "- 3\n- 7", "think": "3 + 7 = 10", "answer": "10"}
HEADED = "**Caption:**\n- 3\n- 7\n\n**Reasoning:** 3 + 7 = 10\n\n**Final answer:** 10"


@pytest.mark.parametrize(
    ("text", "how"),
    [
        (GOOD, ""),
        (f"\n\n{GOOD}\n", ""),
        (f"```xml\n{GOOD}\n```", "fence"),
        (f"```\n{GOOD}```\n", "fence"),
        (f"Sure! Here is my answer:\n\n{GOOD}", "words before"),
        (f"<think>Let me look. I see 3 and 7.</think>\n\n{GOOD}", "thoughts before"),
        (f"Let me look. I see 3 and 7.\n</think>\n\n{GOOD}", "thoughts before"),
        (f"<think>I must write <caption> first, <answer> last.</think>\n```xml\n{GOOD}\n```", "thoughts before"),
        (GOOD.replace("think>", "thinking>"), "tags"),
        (GOOD.replace("think>", "Reasoning>"), "tags"),
        (GOOD.upper(), "tags"),
        (GOOD.replace("<answer>", "< answer >"), "tags"),
        (GOOD.removesuffix("</answer>"), "end of the answer"),
        (f"```xml\nHere:\n{GOOD.replace('caption>', 'Caption>')}\n```", "fence, tags, words before"),
        (json.dumps(PARTS), "JSON"),
        ("```json\n" + json.dumps(PARTS).replace("caption", "Caption").replace("think", "reasoning") + "\n```", "JSON"),
        (HEADED, "headings"),
        (HEADED.replace("**Caption:**", "## Caption").replace("**Reasoning:** ", "## Reasoning\n"), "headings"),
        ("Caption: - 3\n- 7\nThinking: 3 + 7 = 10\nAnswer: 10", "headings"),
    ],
)
def test_wrapping_is_taken_off(text, how):
    parts, mended = split(text)
    assert mended == how
    inner = parts.caption[9:-10].strip().lower(), parts.answer
    assert inner == ("- 3\n- 7", "10")
    thought = parts.reasoning[parts.reasoning.index("<think>") + 7 : parts.reasoning.index("</think>")]
    assert thought.strip().lower() == "3 + 7 = 10"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "10",
        "I'm sorry, but I can't help with that.",
        "<caption>3; 7</caption><think>3 + 7 = 10",
        "<caption>3; 7</caption><think>3 + 7 = 10</think>",
        "<caption>3; 7</caption><answer>10</answer>",
        "<think>3 + 7 = 10</think><answer>10</answer>",
        "<think>hm <caption>3; 7</caption></think><answer>10</answer>",
        "<caption>3; 7<think>3 + 7 = 10</think><answer>10</answer>",
        "<think>3 + 7 = 10</think><caption>3; 7</caption><answer>10</answer>",
        GOOD + GOOD,
        GOOD + "\nWait, it is 11.",
        GOOD + "\n<answer>11</answer>",
        GOOD.replace("</think>", "</think> So:"),
        GOOD.replace("</think>", "</think> </think>"),
        GOOD.replace("3 + 7", "3 <answer>10</answer> + 7"),
        "<answer>10</answer> " + GOOD,
        "<think>a</think><think>b</think>" + GOOD,
        "<caption>3; 8</caption><think>3 + 8 = 11</think>" + GOOD,
        "<think>a</think> Sure: " + GOOD,
        "<think>a" + GOOD,
        GOOD.replace("- 3\n- 7", " "),
        GOOD.replace("3 + 7 = 10", ""),
        GOOD.replace(">10<", "> <"),
        GOOD.replace("10</answer>", "<|image_pad|></answer>"),
        HEADED + "\n\n**Answer:** 11",
        HEADED.replace("**Reasoning:**", "Reasoning about"),
        "Here it is.\n" + HEADED,
        HEADED.replace("3 + 7 = 10", "3 + 7 = 10</think>"),
        json.dumps({**PARTS, "note": "x"}),
        json.dumps({**PARTS, "answer": 10}),
        json.dumps({**PARTS, "caption": ["3", "7"]}),
        json.dumps({**PARTS, "think": "<answer>9</answer>"}),
        json.dumps([PARTS]),
        "{" * 100_000,
        f"```xml\n{GOOD}\n```\n```\nmore\n```",
    ],
)
def test_what_could_be_read_in_two_ways_is_none(text):
    parts, how = split(text)
    assert parts is None and how


@pytest.mark.parametrize("piece", ["<caption>", "<think>", "< ", "```\n", "**", "Answer:\n", "</answer>", "{", "# "])
def test_long_repetitions_end(piece):
    assert split(piece * 200_000).parts is None


BASE = ["<caption>", "a", "</caption>", "<think>", "b\n", "</think>", "<answer>", "c ", "</answer>"]
PIECES = st.sampled_from([*TAGS, "a", "d\n", "```", "```xml\n", "\n", " ", "**Answer:** ", "## Caption\n"])


@given(st.lists(st.tuples(st.integers(0, 12), PIECES), max_size=3), st.sampled_from([None, *range(9)]))
def test_whatever_is_taken_stands_in_the_text_in_order_and_in_the_format(insertions, left_out):
    pieces = [piece for i, piece in enumerate(BASE) if i != left_out]
    for place, piece in insertions:
        pieces.insert(place, piece)
    text = "".join(pieces)
    parts, _ = split(text)
    if parts is None:
        assert insertions or left_out not in (None, 8)  # of these nothing is refused
        return
    assert split_parts(parts.caption + parts.reasoning) == parts
    thought = parts.reasoning[len("<think>") : parts.reasoning.index("</think>")]
    at = -1
    for inner in (parts.caption[len("<caption>") : -len("</caption>")], thought, parts.answer):
        at = text.index(inner.strip(), at + 1)
    rest = text[at + len(parts.answer) :]  # and nothing is dropped behind it
    assert not rest.lower().replace("</answer>", "").replace("```", "").strip()
