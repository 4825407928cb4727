"""find_tag_spans: against a search over the text, on any cut of it into tokens; time against decoding prefixes."""

import re
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from prism_kernels import find_tag_spans
from tests.timing import assert_faster, assert_linear

BOTH = pytest.mark.parametrize("impl", ["reference", "native"])
TAGS = ("caption", "think", "answer")
VALID = b"<caption> a </caption>\n<think>b</think> <answer>c</answer>"
MARKERS = [f"<{slash}{tag}>".encode() for tag in TAGS for slash in ("", "/")]
SCRAPS = [b" ", b"\n\t", b"<", b">", b"</", b"<cap", b"think>", b"x", "é€😀".encode(), b"\xff", b"\xc2\xa0"]


def oracle(text, tags):
    """Byte ranges of the elements by a regular expression on the text, one character per byte."""
    letters = text.decode("latin-1")
    if any(letters.count(f"<{slash}{tag}>") != 1 for tag in tags for slash in ("", "/")):
        return None
    elements = "".join(rf"[ \t\n\r\f\v]*(<{tag}>.*</{tag}>)" for tag in tags)
    match = re.fullmatch(elements + r"[ \t\n\r\f\v]*", letters, re.DOTALL)
    return None if match is None else [match.span(i + 1) for i in range(len(tags))]


def token_spans(byte_spans, tokens):
    """By asking every token which bytes it holds."""
    if byte_spans is None:
        return None
    owner = [i for i, token in enumerate(tokens) for _ in token]
    return [(owner[first], owner[last - 1] + 1) for first, last in byte_spans]


def cut(text, cuts):
    edges = [0, *sorted(at % (len(text) + 1) for at in cuts), len(text)]  # equal edges give empty tokens
    return [text[a:b] for a, b in pairwise(edges)]


def check(tokens, tags=TAGS):
    want = token_spans(oracle(b"".join(tokens), tags), tokens)
    table = [b"?", *dict.fromkeys(tokens), b"<think>"]
    ids = [table.index(token, 1) for token in tokens]
    assert find_tag_spans(ids, table, tags, impl="reference") == want
    assert find_tag_spans(ids, table, tags, impl="native") == want
    return want


@given(st.lists(st.sampled_from([*MARKERS, VALID, *SCRAPS]), max_size=12), st.lists(st.integers(0, 400), max_size=40))
@settings(max_examples=300, deadline=None)
def test_any_text_in_any_tokens(pieces, cuts):
    check(cut(b"".join(pieces), cuts))


NO_TAGS = [b"x", b"<", b">", b"</", b" ", "😀€".encode(), b"<b>", b"Caption>", b"\xff"]
BODY = st.lists(st.sampled_from(NO_TAGS), max_size=4)
CUTS = st.lists(st.integers(0, 200), max_size=20)
SPACE = st.sampled_from([b"", b" ", b"\n", b" \t\r\n\x0b\x0c"])


@given(
    st.lists(BODY, min_size=3, max_size=3),
    st.lists(SPACE, min_size=4, max_size=4),
    st.lists(st.integers(0, 200), max_size=20),
)
@settings(max_examples=250, deadline=None)
@example([[], [], []], [b"", b"", b"", b""], [])
def test_valid_text_in_any_tokens(bodies, spaces, cuts):
    text = spaces[0]
    for i, body in enumerate(bodies):
        text += MARKERS[2 * i] + b"".join(body) + MARKERS[2 * i + 1] + spaces[i + 1]
    assert check(cut(text, cuts)) is not None


@given(st.permutations(MARKERS), st.lists(st.integers(0, 80), max_size=6))
@settings(max_examples=60, deadline=None)
def test_tags_in_any_order(markers, cuts):
    spans = check(cut(b"".join(markers), cuts))
    assert (spans is not None) == (markers == MARKERS)


def test_neighbours_share_a_token_and_empty_tokens_belong_to_none():
    tokens = [b"", b" <caption>a</cap", b"tion><th", b"", b"ink></think", b">\n<answer", b">", b"</answer>", b"", b""]
    assert check(tokens) == [(1, 3), (2, 6), (5, 8)]


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"no tags",
        VALID + b".",
        b"Well: " + VALID,
        VALID + VALID,
        VALID.replace(b"</think> <answer>", b"</think> so <answer>"),
        VALID.replace(b"</think>", b""),
        VALID.replace(b"b", b"<answer>"),
        VALID.replace(b"c</", b"c</answer></"),
        VALID.replace(b"<caption>", b"<Caption>"),
        VALID.replace(b"<caption>", b"< caption>"),
        "\u00a0".encode() + VALID,  # white space in Unicode, not in ASCII
        b"\x1c" + VALID,  # white space to str.split, not here
        b"\x00" + VALID,
        VALID[:-1],
    ],
)
def test_invalid_text(text):
    assert check([text]) is None
    assert check(cut(text, range(len(text)))) is None


def test_other_tags():
    assert check([b"<a>", b"</a><b-2>", b"</b-2>"], ("a", "b-2")) == [(0, 2), (1, 3)]
    assert check([b"<a>", b"<aa></aa></a>"], ("a",)) == [(0, 2)]
    assert check([b"<a></a>", b"<aa></aa>"], ("a", "aa")) == [(0, 1), (1, 2)]


@BOTH
def test_tensors_arrays_and_tuples(impl):
    table, ids = (b"", VALID, b" "), [2, 1, 0]
    for given_ids in (ids, tuple(ids), torch.tensor(ids), np.array(ids, dtype=np.int32), [np.int64(i) for i in ids]):
        assert find_tag_spans(given_ids, table, list(TAGS), impl=impl) == [(1, 2)] * 3
    assert find_tag_spans(torch.tensor([], dtype=torch.int64), table, impl=impl) is None


@BOTH
@pytest.mark.parametrize(
    ("ids", "table", "tags", "message"),
    [
        ([0, 3], [b"a"], TAGS, r"token_ids: expected ids in \[0, 1\), of token_bytes, got id 3 at position 1"),
        ([0, -1], [b"a"], TAGS, "token_ids: .* got id -1 at position 1"),
        ([1 << 70], [b"a"], TAGS, "token_ids: .* got id 1180591620717411303424 at position 0"),
        ([0.0], [b"a"], TAGS, "token_ids: expected integers, got 0.0 at position 0"),
        ([[0]], [b"a"], TAGS, r"token_ids: expected integers, got \[0\] at position 0"),
        (torch.zeros(1, 1, dtype=torch.int64), [b"a"], TAGS, r"token_ids: expected integers, got \[0\] at position 0"),
        (0, [b"a"], TAGS, "token_ids: expected a sequence of integers .*, got int"),
        ([0, 1], [b"a", "b"], TAGS, r"token_bytes\[1\]: expected bytes, got str"),
        ([0], {0: b"a"}, TAGS, "token_bytes: expected a list of bytes .*, got dict"),
        ([0], [b"a"], (), r"tags: expected .* at least one tag name, got \(\)"),
        ([0], [b"a"], "think", "tags: expected .* at least one tag name, got 'think'"),
        ([0], [b"a"], ("a", "a"), "tags: expected every name once"),
        ([0], [b"a"], ("a>b",), "tags: expected names of ASCII letters.*, got 'a>b'"),
    ],
)
def test_bad_arguments(impl, ids, table, tags, message):
    with pytest.raises(ValueError, match=message):
        find_tag_spans(ids, table, tags, impl=impl)


def response(tokens):
    """Ids and table of a response of this many tokens of about four bytes."""
    tags = [b"<caption>", b"</caption>", b"<th", b"ink>", b"</think>", b"<answer>", b"</answer>"]
    table = [b"", *tags, *[b" abc"] * 100]
    body = [8 + i % 100 for i in range(tokens - 9)]
    return [1, *body[: tokens // 4], 2, 3, 4, *body[tokens // 4 :], 5, 6, 8, 7], table


def decoding_prefixes(ids, table):
    """Ends of the elements by decoding longer and longer prefixes; joining bytes is cheaper than any tokenizer."""
    ends = []
    for i in range(len(ids)):
        text = b"".join([table[j] for j in ids[: i + 1]]).decode("utf-8", "replace")
        if len(ends) < 3 and f"</{TAGS[len(ends)]}>" in text:
            ends.append(i + 1)
    return ends


@pytest.mark.slow
@BOTH
def test_far_faster_than_decoding_prefixes(impl):
    """A hundred and a thousand times on one machine (benchmarks); an order of magnitude on any."""
    ids, table = response(1200)
    assert [end for _, end in find_tag_spans(ids, table, impl=impl)] == decoding_prefixes(ids, table)
    assert_faster(lambda: find_tag_spans(ids, table, impl=impl), lambda: decoding_prefixes(ids, table), 20)


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize("hostile", [b"<", b"<caption>", b"</", b" ", b"<caption></caption>", b"<think></caption>"])
def test_linear_time_on_hostile_text(impl, hostile):
    """A quadratic search of 300,000 tokens would take minutes."""

    def make(size):
        ids, table = [0, *[1] * size, 2], [b"<caption>", hostile, VALID]
        return lambda: find_tag_spans(ids, table, impl=impl)

    assert_linear(make, 20_000)
