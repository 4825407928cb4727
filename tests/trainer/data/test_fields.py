"""What people write: each shape is read as it is meant, or refused in one line; nothing is read as something else."""

from __future__ import annotations

import json
import math
from datetime import datetime
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prism_fast import printable
from prism_fast.data.bad_records import BadRecords
from prism_fast.data.fields import looks_like_content, missing
from prism_fast.data.formats import read_align, read_rlvr, read_sft, read_warmup
from prism_fast.records import DataError, Message, Sample
from tests.trainer.data.test_formats import READERS, RESPONSE, png, record, refuse, write

TURNS = [{"role": "user", "content": "<image>Sum?"}]
SAID = {"role": "assistant", "content": RESPONSE}
USER = Message("user", "<image>Sum?")


def read(folder, kind, *, name="d.jsonl", **changes) -> Sample:
    return READERS[kind](write(folder, kind, record(kind, **changes), name=name))[0]


SHAREGPT = [{"from": "human", "value": "<image>Sum?"}, {"from": "gpt", "value": RESPONSE}]
PARTS = [{"type": "image"}, {"type": "text", "text": "Su"}, {"type": "text", "text": "m?"}]


@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.parquet"])
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("sft", {"messages": ..., "conversations": SHAREGPT}),
        ("sft", {"messages": ..., "conversations": [*TURNS, SAID]}),
        ("sft", {"messages": SHAREGPT}),
        ("sft", {"messages": [{"role": "user", "content": PARTS}, SAID]}),
        ("sft", {"messages": [*TURNS, SAID], "images": "a.png"}),
        ("sft", {"messages": [*TURNS, SAID], "images": ..., "image": "a.png"}),
        ("sft", {"messages": [*TURNS, SAID], "images": ..., "image": ["a.png"]}),
        ("sft", {"messages": [*TURNS, SAID], "question": "Sum?", "answer": "7", "id": 5, "source": "x"}),
        ("rlvr", {"prompt": "<image>Sum?"}),
        ("rlvr", {"prompt": [{"role": "user", "content": PARTS}]}),
        ("rlvr", {"prompt": TURNS, "images": ..., "image": {"bytes": None, "path": "a.png"}}),
        ("align", {"prompt": TURNS, "images": {"bytes": None, "path": "a.png"}}),
        ("warmup", {"prompt": ..., "question": "Sum?"}),
        ("warmup", {"question": "Sum?"}),
        ("warmup", {"image": ..., "images": "a.png"}),
    ],
)
def test_read_as_meant(kind, changes, name, tmp_path):
    if name == "d.parquet" and kind == "sft" and "content" in str(changes) and "'type'" in str(changes):
        pytest.skip("a column holds texts or lists, not both")
    sample = read(tmp_path, kind, name=name, **changes)
    assert sample.messages == (USER,) and len(sample.images) == 1
    if kind == "sft":
        assert sample.response == RESPONSE


def test_system_beside_the_turns_is_the_system_turn(tmp_path):
    said = {"system": "In French.", "messages": [*TURNS, SAID]}
    assert read(tmp_path, "sft", **said).messages == (Message("system", "In French."), USER)
    path = write(tmp_path, "sft", record("sft", **said))
    assert read_sft(path, system_prompt="Be brief.")[0].messages[0].content == "In French."
    for nothing in ("", None, math.nan):
        assert read(tmp_path, "sft", system=nothing, messages=[*TURNS, SAID]).messages == (USER,)


@pytest.mark.parametrize(("gold", "text"), [(7, "7"), (2.5, "2.5"), (-0.0, "-0.0"), ("None", "None"), ("inf", "inf")])
def test_golds_are_texts(gold, text, tmp_path):
    assert read(tmp_path, "rlvr", reward_model={"ground_truth": gold}).gold == text


@pytest.mark.parametrize("gold", ["[1, 2]", "[[1, 2], [3, 4]]", "(0, 1)", "{1, 2}", "[]", "['x", "9" * 4400])
def test_vectors_sets_and_intervals_are_golds(gold, tmp_path):
    assert read(tmp_path, "rlvr", reward_model={"ground_truth": gold}).gold == gold
    assert read(tmp_path, "rlvr", reward_model={"ground_truth": int("1" * 4000)}).gold == "1" * 4000


def test_fields_that_hold_no_content_stand_beside(tmp_path):
    beside = {
        "has_image": "yes",
        "is_image": True,
        "num_images": "1",
        "image_id": "a",
        "tools": "[]",
        "file_name": "a.json",
        "videos": [None],
    }
    assert read(tmp_path, "rlvr", **beside, question_image_path="a.png", image_name="a").gold == "7"


@pytest.mark.parametrize("kind", [pa.float16(), pa.float32(), pa.float64()])
def test_narrow_floats_are_their_shortest_decimals(kind, tmp_path):
    reward = pa.struct([("ground_truth", kind), ("equivalent_answers", pa.list_(kind))])
    values = {"ground_truth": np.float16(0.1) if kind == pa.float16() else 0.1, "equivalent_answers": [None]}
    values["equivalent_answers"].append(np.float16(2.5) if kind == pa.float16() else 2.5)
    (sample,) = read_rlvr(table(tmp_path, reward_model=pa.array([values], reward)))
    assert (sample.gold, sample.equivalents) == ("0.1", ("2.5",))


def test_decimal_golds_and_missing_equivalents(tmp_path):
    reward = {"ground_truth": Decimal("2.50"), "equivalent_answers": ["5/2", None, ""]}
    sample = read(tmp_path, "rlvr", name="d.parquet", reward_model=reward)
    assert (sample.gold, sample.equivalents) == ("2.50", ("5/2",))
    assert read(tmp_path, "rlvr", reward_model={"ground_truth": "7", "equivalent_answers": [7.5, 8]}).equivalents == (
        "7.5",
        "8",
    )


@pytest.mark.parametrize("nothing", [None, math.nan, "", " ", {}])
def test_missing_is_missing(nothing, tmp_path):
    sample = read(tmp_path, "rlvr", answer="7", reward_model={"ground_truth": "7", "equivalent_answers": nothing})
    assert (sample.gold, sample.equivalents) == ("7", ())
    sample = read(tmp_path, "align", reward_model=nothing if nothing != " " else None, data_source=nothing)
    assert (sample.gold, sample.data_source, sample.question_type) == (None, "", "sum")
    sample = read(tmp_path, "align", reward_model={"ground_truth": nothing}, extra_info={"question_type": nothing})
    assert (sample.gold, sample.question_type) == (None, "geo")
    sample = read(tmp_path, "align", prompt="2+5?", images=nothing)
    assert sample.images == ()
    sample = read(tmp_path, "align", teacher_caption=nothing, teacher_cot=nothing)
    assert sample.teacher_caption == "<caption>a 3</caption>"


REFUSED = [
    ("rlvr", {"prompt": json.dumps(TURNS)}, ("prompt", "spells a list of turns", "write the list itself")),
    ("rlvr", {"prompt": str(TURNS)}, ("prompt", "spells a list")),
    ("rlvr", {"prompt": json.dumps(json.dumps(TURNS))}, ("prompt", "spells a list")),
    ("rlvr", {"prompt": f"array({TURNS}, dtype=object)"}, ("prompt", "spells a list")),
    ("rlvr", {"prompt": json.dumps(TURNS, indent=2)}, ("prompt", "spells a list")),
    ("align", {"prompt": str(TURNS[0])}, ("prompt", "spells a list")),
    ("rlvr", {"prompt": json.dumps({"messages": TURNS})}, ("prompt", "spells a list")),
    ("sft", {"messages": json.dumps([*TURNS, SAID])}, ("messages", "spells a list")),
    ("rlvr", {"prompt": [{"role": "user", "content": json.dumps(PARTS)}]}, ("content", "spells a list of parts")),
    ("rlvr", {"prompt": "\ufeff" + json.dumps(TURNS)}, ("prompt", "spells a list")),
    ("rlvr", {"prompt": json.dumps([{"id": 1, **TURNS[0]}])}, ("prompt", "spells a list")),
    ("rlvr", {"prompt": json.dumps([{"type": "message", **TURNS[0]}])}, ("prompt", "spells a list of turns")),
    ("rlvr", {"prompt": json.dumps(TURNS)[:-2]}, ("prompt", "spells a list")),
    ("rlvr", {"prompt": f"```json\n{json.dumps(TURNS)}\n```"}, ("prompt", "spells a list")),
    ("rlvr", {"prompt": "[OrderedDict([('role', 'user'), ('content', 'x')])]"}, ("prompt", "spells a list")),
    ("rlvr", {"prompt": "[Message(role='user', content='x')]"}, ("prompt", "spells a list")),
    ("rlvr", {"prompt": '["<image>Sum?"]'}, ("prompt", "spells a list")),
    ("rlvr", {"prompt": "b'<image>Sum?'"}, ("prompt", "spells a list")),
    ("rlvr", {"prompt": [{"role": "user", "content": json.dumps(PARTS[1])}]}, ("content", "spells a list of parts")),
    ("rlvr", {"prompt": TURNS[0]}, ("prompt", "list of turns")),
    ("rlvr", {"prompt": [["user", "x"]]}, ("prompt[0]", "role and content")),
    ("rlvr", {"prompt": ["x"]}, ("prompt[0]", "role and content")),
    ("rlvr", {"prompt": math.nan}, ("prompt", "missing")),
    ("rlvr", {"prompt": ..., "question": "x"}, ("prompt", "missing", "question")),
    ("rlvr", {"prompt": [{"role": "user", "content": ""}]}, ("prompt[0].content", "empty")),
    ("rlvr", {"prompt": [{"role": "user", "content": "<image>x", "images": ["a.png"]}]}, ("prompt[0].images", "read")),
    ("sft", {"messages": [*TURNS, {**SAID, "reasoning_content": "so"}]}, ("messages[1].reasoning_content", "read")),
    ("sft", {"messages": [*TURNS, {**SAID, "tool_calls": [{"name": "f"}]}]}, ("messages[1].tool_calls", "read")),
    ("sft", {"messages": [*TURNS, {**SAID, "weight": 0}]}, ("messages[1].weight", "not read")),
    (
        "rlvr",
        {"prompt": [{"role": "user", "content": [{"type": "image", "image": "a.png"}]}]},
        ("content[0]", "image inside a turn", "images"),
    ),
    (
        "rlvr",
        {"prompt": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;"}}]}]},
        ("content[0]", "image inside a turn"),
    ),
    ("rlvr", {"prompt": [{"role": "user", "content": [{"type": "video", "video": "a"}]}]}, ("content[0]", "expected")),
    ("rlvr", {"prompt": [{"role": "user", "content": [{"type": "text", "text": 3}]}]}, ("content[0]", "int")),
    ("rlvr", {"prompt": [{"role": "user", "content": ["x"]}]}, ("content[0]", "expected")),
    ("rlvr", {"prompt": [{"role": "user", "content": "<audio>x"}]}, ("audio is not supported",)),
    ("rlvr", {"prompt": "<image_1>x", "images": ...}, ("<image_1>", "write <image>")),
    ("rlvr", {"prompt": "<IMAGE>x"}, ("<IMAGE>", "write <image>")),
    ("rlvr", {"prompt": "<image/>x"}, ("<image/>", "write <image>")),
    ("rlvr", {"prompt": "<image></image>x"}, ("</image>", "write <image>")),
    ("rlvr", {"prompt": "<image_placeholder>x", "images": ...}, ("<image_placeholder>", "write <image>")),
    ("rlvr", {"prompt": "<IMG_CONTEXT>x", "images": ...}, ("<IMG_CONTEXT>", "write <image>")),
    ("rlvr", {"prompt": "![figure](a.png) x", "images": ...}, ("![figure](a.png)", "names an image")),
    ("rlvr", {"prompt": "x <img width=5 src='a.png'/>", "images": ...}, ("names an image", "images")),
    ("rlvr", {"prompt": "<img>a.png</img>x", "images": ...}, ("names an image", "images")),
    ("rlvr", {"prompt": "<Video>x", "images": ...}, ("video is not supported",)),
    ("rlvr", {"prompt": "<|audio_1|>x", "images": ...}, ("audio is not supported",)),
    ("rlvr", {"prompt": "<image><image>x"}, ("2 <image>", "1 images")),
    ("rlvr", {"images": ..., "image": "missing.png"}, ("image[0]", "no such image")),
    ("sft", {"image": "a.png"}, ("image", "images too")),
    ("align", {"images": [None]}, ("images[0]",)),
    ("align", {"images": [{"bytes": None, "path": None}]}, ("images[0]",)),
    ("align", {"images": ["iVBORw0KGgo" + "A" * 6000]}, ("images[0]",)),
    ("align", {"images": ["Qk0" + "A" * 300]}, ("images[0]", "is base64")),
    ("align", {"images": [{"bytes": "a.png", "path": None}]}, ("images[0]", "bytes is a text")),
    ("align", {"images": ["file:/a.png"]}, ("images[0]", "URL")),
    ("align", {"images": ["sub\\a.png"]}, ("images[0]", "a path of Windows")),
    ("align", {"images": [0]}, ("images[0]", "got int")),
    ("align", {"images": ["a\0b"]}, ("images[0]",)),
    ("align", {"images": '["a.png"]'}, ("images[0]", "no such image")),
    ("align", {"images": ..., "image_path": "a.png"}, ("1 <image>", "0 images")),
    ("rlvr", {"prompt": "x?", "images": ..., "image_path": "a.png"}, ("image_path", "not read")),
    ("rlvr", {"prompt": "x?", "images": ..., "Images": ["a.png"]}, ("Images", "rename it to images")),
    ("rlvr", {"prompt": "x?", "images": ..., "imagess": ["a.png"]}, ("imagess", "rename it to images")),
    ("rlvr", {"prompt": "x?", "images": ..., "pictures": [{"bytes": "x"}]}, ("pictures", "not read")),
    *(
        ("rlvr", {"prompt": "x?", "images": ..., name: "a.png"}, (name, "not read"))
        for name in (
            "input_image",
            "screenshot",
            "question_image_path",
            "media",
            "jpg",
            "file_name",
            "image0",
            "image_b64",
        )
    ),
    ("rlvr", {"prompt": "x?", "images": ..., "view": {"bytes": None, "path": "a.png"}}, ("view", "not read")),
    ("rlvr", {"prompt": "x?", "images": ..., "multi_modal_data": {"image": ["a"]}}, ("multi_modal_data", "not read")),
    ("rlvr", {"decoded": [{"bytes": None, "path": "b.png"}]}, ("decoded", "not read")),
    ("rlvr", {"sys": "Be brief."}, ("sys", "not read")),
    ("rlvr", {"options": ["A. 3", "B. 4"]}, ("options", "not read")),
    ("rlvr", {"system_prompt": "Be brief."}, ("system_prompt", "not read")),
    ("rlvr", {"system": "Be brief."}, ("system", "a system turn of its own")),
    ("sft", {"system": ["x"]}, ("system", "expected a text")),
    ("sft", {"tools": [{"name": "f"}]}, ("tools", "not read")),
    ("sft", {"conversations": [{"from": "human", "value": "else"}]}, ("conversations", "not read")),
    ("sft", {"messages": ..., "instruction": "a", "output": "b"}, ("messages", "missing", "instruction")),
    ("warmup", {"question": "else"}, ("question", "not read")),
    ("rlvr", {"reward_model": {"ground_truth": math.nan}}, ("ground_truth", "missing")),
    ("rlvr", {"reward_model": {"ground_truth": math.inf}}, ("ground_truth", "inf is no answer")),
    ("align", {"reward_model": {"ground_truth": -math.inf}}, ("ground_truth", "no answer")),
    ("rlvr", {"reward_model": {"ground_truth": "nan"}}, ("ground_truth", "missing value")),
    ("rlvr", {"reward_model": {"ground_truth": None}}, ("ground_truth", "missing")),
    ("rlvr", {"reward_model": {"ground_truth": True}}, ("ground_truth", "bool")),
    ("rlvr", {"reward_model": {"ground_truth": {"value": 7}}}, ("ground_truth", "dict")),
    ("rlvr", {"reward_model": {"ground_truth": "\u200b"}}, ("ground_truth", "the answer is empty")),
    ("rlvr", {"reward_model": {"ground_truth": "['7']"}}, ("ground_truth", "spells a list", "equivalent_answers")),
    ("rlvr", {"reward_model": {"ground_truth": '{"answer": 7}'}}, ("ground_truth", "spells a list or an object")),
    (
        "rlvr",
        {"reward_model": {"ground_truth": "7", "equivalent_answers": ['["8"]']}},
        ("equivalent_answers", "spells"),
    ),
    ("rlvr", {"reward_model": json.dumps({"ground_truth": "7"})}, ("reward_model", "named fields")),
    ("rlvr", {"reward_model": ..., "answer": "7"}, ("ground_truth", "missing")),
    *(("rlvr", {name: "8"}, (name, "not read from here")) for name in ("gt", "target", "reference_answer", "solution")),
    ("sft", {"reasoning_content": "so"}, ("reasoning_content", "not read")),
    ("sft", {"video_path": "a.mp4"}, ("video_path", "video is not supported")),
    ("rlvr", {"answer": "3 + 4 #### 7"}, ("answer", "not read from here", "reward_model.ground_truth")),
    ("align", {"reward_model": ..., "answer": "7"}, ("answer", "not read from here")),
    ("align", {"reward_model": {"gt": "7"}}, ("reward_model.gt", "not read from here")),
    ("align", {"data_source": ["geo"]}, ("data_source", "list")),
    ("rlvr", {"extra_info": {"question_type": {"a": 1}}}, ("extra_info.question_type", "dict")),
    ("rlvr", {"reward_model": {"ground_truth": "7", "equivalents": ["seven"]}}, ("reward_model.equivalents", "read")),
    ("rlvr", {"reward_model": {"ground_truth": "7", "equivalent_answers": [["8"]]}}, ("equivalent_answers", "list")),
    ("align", {"teacher_caption": 3, "teacher_cot": "x"}, ("teacher_caption", "int")),
]


@pytest.mark.parametrize(("kind", "changes", "words"), REFUSED)
def test_refused_with_a_hint(kind, changes, words, tmp_path):
    path = write(tmp_path, kind, record(kind, **changes), name="d.jsonl")
    message = refuse(READERS[kind], path, "d.jsonl:1: ", *words)
    assert "; " in message and len(message) < 400


def test_questions_that_only_look_like_lists_are_read(tmp_path):
    for text in (
        "[1, 2, 3]",
        '{"a": 1}',
        "[role] Who is it?",
        '"content" is what?',
        "What does <img> do?",
        "array([1])",
        '{"role": "admin", "content": "x"}: what is it?',
        '["a", "b"]',
        "What does <im> or </img> do?",
        "f(x) = ![x](y",
        "What does <img src='a.png'> do in HTML?",
        "Is ![x](a.png) Markdown?",
        "(a) 3 and (b)",
        "print([1, 2])",
    ):
        assert read(tmp_path, "rlvr", prompt=text, images=...).messages == (Message("user", text),)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (json.dumps(record("sft"), indent=2), ("over several lines", "jq")),
        (json.dumps({"data": [record("sft")]}, indent=1), ("over several lines", '{"data"')),
        (json.dumps({"data": [record("sft")]}), ("messages", "data holds the records")),
        ("prompt,images\nx,a.png\n", ("begins 'prompt,images'", "JSON lines")),
        ("prompt\timages\n", ("JSON lines",)),
        ('"text"', ("JSON lines",)),
        ("<!DOCTYPE html>", ("a web page",)),
        (b"BZh91AY", ("bzip2",)),
        (b"\xfd7zXZ\0", ("xz",)),
        (b"\xd0\xcf\x11\xe0", ("a spreadsheet",)),
        (b"\x80\x04\x95pickle", ("a binary file",)),
        (json.dumps(record("sft")).encode("utf-16-le"), ("another encoding",)),
        (json.dumps(record("sft")) * 2, (":1: ", "Extra data", "write one record a line")),
        ("{}\r{}\r", (":1: ", "write one record a line")),
        (b"\x1f\x8b\x08\0", ("gzip",)),
        (b"PK\x03\x04", ("zip",)),
        (b"ARROW1\0\0", ("parquet",)),
        ("﻿{}".encode("utf-16-le"), ("UTF-16",)),
        ("version https://git-lfs.github.com/spec/v1\n", ("git lfs pull",)),
        ('{"messages": [], "messages": []}', (":1: messages: the field stands twice",)),
        ('{"messages": [{"role": "user", "role": "user"}]}', (":1: role: the field stands twice",)),
        ('{"messages": "\\ud83d"}', (":1: ", "half of a character")),
        ('{"messages": %s}' % ("9" * 5000), (":1: the JSON does not parse",)),
    ],
)  # fmt: skip
def test_files_of_another_layout(content, words, tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    refuse(read_sft, path, "d.jsonl", *words)


def test_the_layout_is_told_by_the_first_bytes_that_say_something(tmp_path):
    path = write(tmp_path, "sft", record("sft"), name="d.jsonl")
    path.write_text("\n" * 5000 + path.read_text())
    assert len(read_sft(path)) == len(read_sft(path.rename(tmp_path / "d.parquet"))) == 1


def test_places_that_are_no_data_files(tmp_path):
    (tmp_path / "saved" / "train").mkdir(parents=True)
    (tmp_path / "saved" / "train" / "data-00000-of-00001.arrow").touch()
    refuse(read_sft, tmp_path / "saved", "not a file")
    (tmp_path / "hub" / "sft").mkdir(parents=True)
    (tmp_path / "hub" / "sft" / "train.json").touch()
    refuse(read_sft, tmp_path / "hub", f"name the data file itself, as {tmp_path}/hub/sft/train.json")
    refuse(read_sft, "https://x.org/d.jsonl", "a URL; download it first")


def test_a_damaged_first_line_is_one_bad_record(tmp_path):
    path = write(tmp_path, "sft", record("sft"), record("sft"), name="d.jsonl")
    path.write_text("{oops\n" + path.read_text())
    assert len(read_sft(path, skip_bad=1)) == 2


def test_a_byte_order_mark_and_crlf_are_no_content(tmp_path):
    path = write(tmp_path, "sft", record("sft"), record("sft"), name="d.jsonl")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert len(read_sft(path)) == 2


NAMES = [
    "messages",
    "prompt",
    "images",
    "image",
    "system",
    "question",
    "answer",
    "reward_model",
    "extra_info",
    "data_source",
    "teacher_response",
]
LEAVES = st.sampled_from([None, "", "x", "<image>", "a.png", 0, 2.5, math.nan, math.inf, True, [], {}, "\x1b\0"])
KEYS = st.sampled_from(
    ["role", "content", "from", "value", "type", "text", "bytes", "path", "ground_truth", "question_type"]
)
VALUES = st.recursive(LEAVES, lambda v: st.lists(v, max_size=2) | st.dictionaries(KEYS, v, max_size=3), max_leaves=6)


@given(st.sampled_from(list(READERS)), st.dictionaries(st.sampled_from(NAMES), VALUES, min_size=1, max_size=3))
@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_value_is_read_or_refused_in_one_line(tmp_path, kind, changes):
    (tmp_path / "d.jsonl").unlink(missing_ok=True)  # a mapped file is never written over
    path = write(tmp_path, kind, record(kind, **changes), name="d.jsonl")
    try:
        (sample,) = READERS[kind](path)
    except DataError as error:
        assert str(error).startswith(f"{path}:1: ") or "no valid record" in str(error)
        assert str(error).isprintable() and len(str(error)) < 500
    else:
        asked = sum(m.content.count("<image>") for m in sample.messages)
        assert asked == len(sample.images) and all(m.content.strip() for m in sample.messages)


def table(folder, **columns):
    rows = record("rlvr")
    made = {name: pa.array([value]) for name, value in rows.items()} | columns
    (folder / "a.png").write_bytes(png())
    path = folder / "d.parquet"
    pq.write_table(pa.table(made), path)
    return path


def test_parquet_types_are_read_alike(tmp_path):
    plain = read_rlvr(table(tmp_path))[0]
    prompt = record("rlvr")["prompt"]
    turn = pa.struct([("role", pa.dictionary(pa.int8(), pa.string())), ("content", pa.large_string())])
    image = pa.struct([("bytes", pa.large_binary()), ("path", pa.string())])
    for columns in (
        {"prompt": pa.array([prompt], pa.large_list(turn))},
        {"data_source": pa.array(["geo"]).dictionary_encode()},
        {"images": pa.array([[{"bytes": png(), "path": None}]], pa.list_(image))},
        {"prompt": pa.chunked_array([pa.array([prompt]), pa.array([], pa.array([prompt]).type)])},
    ):  # fmt: skip
        sample = read_rlvr(table(tmp_path, **columns))[0]
        assert (sample.messages, sample.gold, sample.data_source) == (plain.messages, plain.gold, plain.data_source)


def test_only_needed_columns_are_read(tmp_path):
    odd = {
        "created": pa.array([253402300800], pa.timestamp("s")),
        "zone": pa.array([0], pa.timestamp("s", "Mars/Olympus")),
        "extra_info": pa.array(
            [{"question_type": "sum", "when": 253402300800}],
            pa.struct([("question_type", pa.string()), ("when", pa.timestamp("s"))]),
        ),
    }
    assert read_rlvr(table(tmp_path, **odd))[0].question_type == "sum"
    nothing = {"extra_info": pa.array([{"when": 253402300800}], pa.struct([("when", pa.timestamp("s"))]))}
    assert read_rlvr(table(tmp_path, **nothing))[0].question_type == "geo"


@pytest.mark.parametrize("zone", [None, "Mars/Olympus"])
def test_a_date_that_python_cannot_hold_is_one_line(zone, tmp_path):
    path = table(tmp_path, question=pa.array([253402300800], pa.timestamp("s", zone)))
    refuse(read_rlvr, path, "d.parquet:1: a value cannot be read")
    path = table(tmp_path, reward_model=pa.array([{"ground_truth": datetime(2026, 1, 1)}]))
    refuse(read_rlvr, path, "ground_truth", "datetime")


def test_columns_of_images_are_read_whatever_their_name(tmp_path):
    path = table(tmp_path, view=pa.array([{"bytes": png(), "path": None}]))
    refuse(read_rlvr, path, "d.parquet:1: view: the field is not read")
    path = table(tmp_path, images=pa.nulls(1), prompt=pa.array(["x?"]), decoded_image=pa.array([png()]))
    refuse(read_rlvr, path, "decoded_image: the field is not read")


def test_two_columns_of_one_name(tmp_path):
    path = tmp_path / "d.parquet"
    pq.write_table(pa.Table.from_arrays([pa.array(["x"]), pa.array(["y"])], names=["prompt", "prompt"]), path)
    refuse(read_rlvr, path, "prompt: two columns")


def test_nan_of_pandas_is_missing(tmp_path):
    nan = {"images": pa.array([math.nan]), "reward_model": pa.array([{"ground_truth": math.nan}]), "image": pa.nulls(1)}
    path = table(tmp_path, **nan, prompt=pa.array(["x?"]), teacher_response=pa.array([RESPONSE]))
    assert (read_align(path)[0].images, read_align(path)[0].gold) == ((), None)
    refuse(read_rlvr, path, "ground_truth", "missing")


def test_what_looks_like_content():
    for name in (
        "Image",
        "image_url",
        "ground_truth",
        "final_answer",
        "image_1",
        "answer",
        "message",
        "reward_modle",
        "Question ",
        "system_prompt",
    ):
        assert looks_like_content(name), name
    for name in ("id", "index", "ability", "image_id", "prompt_id", "question_type", "source", "split", "difficulty"):
        assert not looks_like_content(name), name
    assert missing(Decimal("nan")) and not missing(0) and not missing(False)


def test_errors_neither_break_lines_nor_steer_a_terminal(tmp_path):
    assert str(DataError("a\n\x1b[31mb\x07\u202ec")) == "a \\x1b[31mb\\x07\\u202ec"
    assert printable("ü 中\u3000文\n") == "ü 中\u3000文\n"
    path = write(tmp_path, "sft", record("sft", messages=[{"role": "\x1b]0;x\x07", "content": "x"}]), name="d.jsonl")
    assert "\x1b" not in refuse(read_sft, path, "messages")


def test_warmup_pairs_with_turns_and_images(tmp_path):
    sample = read(tmp_path, "warmup", prompt=[{"role": "user", "content": "Sum?"}], image=["a.png", "a.png"])
    assert sample.messages == (Message("user", "<image><image>Sum?"),) and len(sample.images) == 2
    refuse(read_warmup, write(tmp_path, "warmup", record("warmup", prompt=[*TURNS, SAID])), "prompt", "ends with")


# ---- damage


def test_long_names_of_fields_do_not_make_long_lines(tmp_path):
    names = [letter * 9999 for letter in "abcdefghijklmnop"]
    said = refuse(read_sft, write(tmp_path, "sft", dict.fromkeys(names, "x"), name="d.jsonl"), "messages", "aaaa")
    assert len(said) < 900 + len(str(tmp_path))
    path = tmp_path / "twice.jsonl"
    path.write_text(json.dumps(record("sft"))[:-1] + f', "{names[0]}": 1, "{names[0]}": 2}}')
    assert len(refuse(read_sft, path, "the field stands twice")) < 300 + len(str(tmp_path))
    path = write(tmp_path, "rlvr", record("rlvr", images=[dict.fromkeys(names, "x")]), name="e.jsonl")
    assert len(refuse(read_rlvr, path, "expected the fields bytes and path")) < 500 + len(str(tmp_path))


@pytest.mark.parametrize("field", ["solution", "images", "prompt", "reward_model"])
def test_lists_in_lists_as_deep_as_a_parser_takes_them(tmp_path, field):
    """JSON's parser takes some hundred more than what looks into a record does, or fewer, by how deep its caller is."""
    path = tmp_path / "d.jsonl"
    for depth in (*range(880, 1000, 3), 5000):
        nested = (
            '{"ground_truth": ' * depth + "[7]" + "}" * depth if field == "reward_model" else "[" * depth + "]" * depth
        )
        whole = record("rlvr", images=[], prompt="x")
        rest = json.dumps({key: value for key, value in whole.items() if key != field})
        path.write_text(json.dumps(whole) + "\n" + rest[:-1] + f', "{field}": {nested}' + "}")
        bad = BadRecords(1)
        assert len(read_rlvr(path, skip_bad=bad)) in (1, 2)
        assert all(line.startswith(f"{path}:2: ") for line in bad.messages)
