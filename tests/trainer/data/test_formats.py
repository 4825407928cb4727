"""The four published formats: what is read, what is written, and one clear line for every kind of bad input."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from prism_fast.data import formats, row_groups, source
from prism_fast.data.bad_records import BadRecords
from prism_fast.data.cache import Cache
from prism_fast.data.formats import open_image, read_align, read_rlvr, read_sft, read_warmup
from prism_fast.data.held import Held
from prism_fast.records import DataError, ImageRef, Message, Sample

CAPTION = "<caption>a 3</caption>"
REASONING = "<think>3 + 4</think> <answer>7</answer>"
RESPONSE = f"{CAPTION} {REASONING}"
READERS = {"sft": read_sft, "warmup": read_warmup, "align": read_align, "rlvr": read_rlvr}


def png(color: int = 7, size: tuple[int, int] = (4, 3)) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", size, color).save(buffer, "PNG")
    return buffer.getvalue()


def record(kind: str, **changes):
    """A valid raw record of ``kind`` with some fields changed; a field set to ... is left out."""
    turns = [{"role": "system", "content": "Use XML."}, {"role": "user", "content": "<image>Sum?"}]
    base = {
        "sft": {"messages": [*turns, {"role": "assistant", "content": RESPONSE}], "images": ["a.png"]},
        "warmup": {
            "prompt": "Sum?",
            "image": "a.png",
            "teacher_caption": CAPTION,
            "teacher_cot": REASONING,
            "student_response": RESPONSE,
        },
        "align": {
            "prompt": turns,
            "images": ["a.png"],
            "teacher_response": RESPONSE,
            "data_source": "geo",
            "reward_model": {"style": "rule", "ground_truth": "7", "equivalent_answers": ["7.0"]},
            "extra_info": {"index": 3, "question_type": "sum"},
        },
    }
    base["rlvr"] = {name: value for name, value in base["align"].items() if name != "teacher_response"}
    return {name: value for name, value in {**base[kind], **changes}.items() if value is not ...}


def test_a_response_that_is_not_its_parts_is_said_once(tmp_path, capsys):
    parts = {"teacher_caption": CAPTION, "teacher_cot": REASONING}
    other = RESPONSE.replace("a 3", "an 8")
    same = [record("align", teacher_response=text, **parts) for text in (RESPONSE, f"{CAPTION}\n{REASONING}", ...)]
    path = write(tmp_path, "align", *same, record("align"))
    read_align(path), read_rlvr(path)
    assert not capsys.readouterr().err
    path = write(tmp_path, "align", *same, *[record("align", teacher_response=other, **parts)] * 2)
    data = read_align(path)
    told = "teacher_response is not teacher_caption and teacher_cot, which are read, here and maybe in others"
    assert capsys.readouterr().err == f"{path}:4: {told}\n"
    assert data[3].teacher_caption == CAPTION and len([*data]) == 5
    read_rlvr(path)  # which has no place for either
    pair = {
        "student_caption": CAPTION,
        "student_cot": REASONING,
        "student_response": "free",
        **parts,
        "teacher_response": RESPONSE,
    }
    read_warmup(write(tmp_path, "warmup", record("warmup", **pair)))
    assert "pairs.jsonl:1: student_response is not student_caption and student_cot," in capsys.readouterr().err


def write(folder: Path, kind: str, *records, name: str | None = None) -> Path:
    """The records in their published container; JSON lines for every kind if ``name`` says so."""
    (folder / "a.png").write_bytes(png())
    path = folder / (name or {"sft": "sft.json", "warmup": "pairs.jsonl"}.get(kind, f"{kind}.parquet"))
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(list(records)), path, row_group_size=2)
    elif path.suffix == ".json":
        path.write_text(json.dumps(list(records)))
    else:
        path.write_text("".join(json.dumps(item) + "\n" for item in records))
    return path


def refuse(read, path, *words: str, **options) -> str:
    """Reading raises DataError with one line that holds all ``words``."""
    with pytest.raises(DataError) as caught:
        data = read(path, **options)
        [open_image(ref, sample.place) for sample in data for ref in sample.images]
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
    return message


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet"])
def test_every_kind_reads_from_every_container(tmp_path, kind, suffix):
    path = write(tmp_path, kind, *[record(kind)] * 5, name=f"data.{suffix}")
    data = READERS[kind](path)
    assert len(data) == 5
    sample = data[-1]
    assert sample.place == f"{path}:5"
    assert sample.messages[-1] == Message("user", "<image>Sum?")
    assert open_image(sample.images[0], sample.place).mode == "RGB"
    if kind == "sft":
        assert sample.response == RESPONSE
    if kind in ("warmup", "align"):
        assert (sample.teacher_caption, sample.teacher_reasoning) == (CAPTION, REASONING)
    if kind == "warmup":
        assert (sample.student_caption, sample.student_reasoning) == (CAPTION, REASONING)
    if kind in ("align", "rlvr"):
        assert (sample.gold, sample.equivalents, sample.question_type, sample.data_source) == (
            "7",
            ("7.0",),
            "sum",
            "geo",
        )
    with pytest.raises(IndexError):
        data[5]


def test_several_files_are_one_dataset(tmp_path):
    (tmp_path / "b").mkdir()
    first, second = write(tmp_path, "sft", record("sft")), write(tmp_path / "b", "sft", record("sft"), record("sft"))
    data = read_sft([first, second])
    assert [sample.place for sample in data] == [f"{first}:1", f"{second}:1", f"{second}:2"]
    assert data[2].images[0].path == tmp_path / "b" / "a.png"


@pytest.mark.parametrize("image", [png(), {"bytes": png(), "path": None}, {"bytes": None, "path": "a.png"}, "a.png"])
def test_parquet_images_as_bytes_structs_or_paths(tmp_path, image):
    sample = read_align(write(tmp_path, "align", record("align", images=[image])))[0]
    assert np.array_equal(np.asarray(open_image(sample.images[0], sample.place)), np.full((3, 4, 3), 7))


def test_missing_optional_fields(tmp_path):
    bare = record("align", reward_model=..., extra_info=..., images=..., prompt=[{"role": "user", "content": "2+5?"}])
    sample = read_align(write(tmp_path, "align", bare))[0]
    assert (sample.gold, sample.equivalents, sample.question_type, sample.images) == (None, (), "geo", ())
    number = record("rlvr", reward_model={"ground_truth": 7}, data_source=..., extra_info=None)
    sample = read_rlvr(write(tmp_path, "rlvr", number))[0]
    assert (sample.gold, sample.question_type) == ("7", "all")


def test_system_prompt_only_where_there_is_none(tmp_path):
    data = read_warmup(write(tmp_path, "warmup", record("warmup")), system_prompt="Be brief.")
    assert data[0].messages == (Message("system", "Be brief."), Message("user", "<image>Sum?"))
    data = read_align(write(tmp_path, "align", record("align")), system_prompt="Be brief.")
    assert data[0].messages[0].content == "Use XML."


@pytest.mark.parametrize(
    ("caption", "cot", "expected"),
    [
        ("a 3", "3 + 4", ("<caption>a 3</caption>", "<think>3 + 4</think><answer></answer>")),
        ("a 3\n", "3 <answer>7</answer> ", ("<caption>a 3</caption>", "<think>3</think><answer>7</answer>")),
        (CAPTION, REASONING, (CAPTION, REASONING)),
    ],
)
def test_warmup_parts_get_their_tags(tmp_path, caption, cot, expected):
    pair = {f"{voice}_{part}": text for voice in ("teacher", "student") for part, text in
            (("caption", caption), ("cot", cot))}  # fmt: skip
    sample = read_warmup(write(tmp_path, "warmup", record("warmup", student_response=..., **pair)))[0]
    assert (sample.teacher_caption, sample.teacher_reasoning) == expected
    assert (sample.student_caption, sample.student_reasoning) == expected


def test_warmup_question_and_text_only(tmp_path):
    sample = read_warmup(write(tmp_path, "warmup", record("warmup", prompt=..., question="2+5?", image=None)))[0]
    assert sample.messages == (Message("user", "2+5?"),)
    assert sample.images == ()


def test_multi_turn_demonstrations_answer_the_last_turn(tmp_path):
    turns = [("user", "<image>a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    messages = [{"role": role, "content": content} for role, content in turns]
    sample = read_sft(write(tmp_path, "sft", record("sft", messages=messages)))[0]
    assert [message.content for message in sample.messages] == ["<image>a", "b", "c"]
    assert sample.response == "d"


USER, ASSISTANT = {"role": "user", "content": "<image>x"}, {"role": "assistant", "content": RESPONSE}
BAD = [
    ("sft", {"messages": ...}, ("messages", "missing")),
    ("sft", {"messages": "text"}, ("messages", "assistant")),
    ("sft", {"messages": 3}, ("messages", "list of turns")),
    ("sft", {"messages": []}, ("messages", "list of turns")),
    ("sft", {"messages": [USER]}, ("messages", "assistant")),
    ("sft", {"messages": [ASSISTANT, USER]}, ("messages", "roles")),
    ("sft", {"messages": [USER, USER, ASSISTANT]}, ("messages", "roles", "user, user, assistant")),
    ("sft", {"messages": [{"speaker": "human", "value": "x"}]}, ("messages[0]", "role and content")),
    ("sft", {"messages": [USER, {"role": "assistant", "content": " "}]}, ("messages", "empty")),
    ("sft", {"messages": [USER, {"role": "assistant", "content": None}]}, ("messages[1].content", "expected a text")),
    ("sft", {"messages": [{"role": "user", "content": "x"}, ASSISTANT]}, ("messages", "0 <image>", "1 image")),
    ("sft", {"images": ["a.png", "a.png"]}, ("1 <image>", "2 images")),
    ("sft", {"images": ...}, ("1 <image>", "0 images")),
    ("sft", {"images": 5}, ("images[0]", "int")),
    ("sft", {"images": ["missing.png"]}, ("images[0]", "missing.png", "no such image")),
    ("sft", {"images": ["https://x.org/a.png"]}, ("images[0]", "URL")),
    ("sft", {"images": ["clip.MP4"]}, ("images[0]", "video")),
    ("sft", {"images": [5]}, ("images[0]", "int")),
    ("sft", {"videos": ["clip.mp4"]}, ("videos", "not supported")),
    ("sft", {"messages": [{"role": "user", "content": "<video>x"}, ASSISTANT]}, ("messages[0]", "video")),
    ("warmup", {"prompt": ...}, ("prompt", "missing")),
    ("warmup", {"teacher_cot": ...}, ("teacher_cot", "missing")),
    ("warmup", {"student_response": ...}, ("student_caption", "missing", "student_response")),
    ("warmup", {"student_response": "no tags"}, ("student_response", "format")),
    ("warmup", {"teacher_caption": ["a"]}, ("teacher_caption", "expected a text", "list")),
    ("warmup", {"teacher_cot": "steps only"}, ("teacher_cot", "no answer")),
    ("warmup", {"image": "missing.png"}, ("image[0]", "no such image")),
    ("align", {"teacher_response": "7"}, ("teacher_response", "format")),
    ("align", {"teacher_response": RESPONSE + RESPONSE}, ("teacher_response", "each tag once")),
    ("align", {"teacher_response": ...}, ("teacher_caption", "missing")),
    ("align", {"teacher_response": "  "}, ("teacher_response", "empty")),
    ("align", {"prompt": [USER, ASSISTANT]}, ("prompt", "ends with")),
    ("align", {"reward_model": "7"}, ("reward_model", "named fields")),
    ("rlvr", {"reward_model": ...}, ("reward_model.ground_truth", "missing")),
    ("rlvr", {"reward_model": {"ground_truth": ""}}, ("reward_model.ground_truth", "empty")),
    ("rlvr", {"reward_model": {"ground_truth": ["7"]}}, ("reward_model.ground_truth", "list")),
    ("rlvr", {"reward_model": {"ground_truth": "7", "equivalent_answers": "8"}}, ("equivalent_answers", "list")),
    ("rlvr", {"prompt": 3}, ("prompt", "list of turns")),
    ("rlvr", {"extra_info": "x"}, ("extra_info", "named fields")),
    ("rlvr", {"extra_info": {"pass_rate": 1.5}}, ("extra_info.pass_rate", "a number from 0 to 1")),
    ("align", {"extra_info": {"pass_rate": "low"}}, ("extra_info.pass_rate", "a number from 0 to 1")),
]


@pytest.mark.parametrize(("kind", "changes", "words"), BAD)
def test_bad_records_name_place_field_and_remedy(tmp_path, kind, changes, words):
    path = write(tmp_path, kind, record(kind), record(kind, **changes), name="data.jsonl")
    message = refuse(READERS[kind], path, f"{path}:2: ", *words)
    assert re.search(r": .+; \w+", message)  # place: field: problem; remedy


@pytest.mark.parametrize("image", [b"", b"not an image", png()[:40]])
def test_images_that_do_not_open(tmp_path, image):
    path = write(tmp_path, "align", record("align", images=[image]))
    refuse(read_align, path, f"{path}:1: images")
    path = write(tmp_path, "sft", record("sft"))
    (tmp_path / "a.png").write_bytes(image)
    refuse(read_sft, path, f"{path}:1: images", "a.png does not open")


def test_files_that_cannot_be_read(tmp_path):
    refuse(read_sft, tmp_path / "none.json", "none.json: no such file")
    refuse(read_sft, tmp_path, "not a file")
    refuse(read_sft, [], "no data file")
    for content, word in (("", "empty"), (" \n", "empty"), ("[]", "no record")):
        (tmp_path / "e.json").write_text(content)
        refuse(read_sft, tmp_path / "e.json", "e.json", word)
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), tmp_path / "e.parquet")
    refuse(read_align, tmp_path / "e.parquet", "no record")


@pytest.mark.parametrize("keep", [5, 200, -9])
def test_truncated_parquet(tmp_path, keep):
    path = write(tmp_path, "align", *[record("align")] * 4)
    path.write_bytes(path.read_bytes()[:keep])
    refuse(read_align, path, "align.parquet", "truncated")


def test_parquet_damaged_in_the_middle(tmp_path):
    path = write(tmp_path, "align", *[record("align")] * 400)
    data = bytearray(path.read_bytes())
    data[8:600] = b"\xff" * 592
    path.write_bytes(data)
    refuse(read_align, path, "align.parquet", "cannot be read")


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ('{"messages": [}', ":2: the JSON does not parse"),
        ("[1]", ":2: expected a JSON object"),
        ('{"a": "\xff"}', ":2: not valid UTF-8"),
        ("[" * 100_000, ":2: the JSON does not parse"),
    ],
)
def test_json_lines_that_do_not_parse(tmp_path, text, place):
    path = write(tmp_path, "sft", record("sft"), name="d.jsonl")
    path.write_bytes(path.read_bytes() + text.encode("latin-1") + b"\n")
    refuse(read_sft, path, f"d.jsonl{place}")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[%s, ", ("not closed",)),
        ("[%s, {", ("not closed",)),
        ("[%s %s]", (":2:", "commas")),
        ("[%s, 3, %s]", (":2:", "commas")),
        ("[%s, [%s]]", (":2:", "JSON object")),
        ("[%s] x", ("list's end",)),
        ("[%s,]", ("list's end",)),
        ('[%s, {"a": nope}]', (":2:", "does not parse")),
    ],
)
def test_json_lists_that_do_not_parse(tmp_path, text, words):
    path = write(tmp_path, "sft", record("sft"))
    path.write_text(text.replace("%s", json.dumps(record("sft"))))
    refuse(read_sft, path, "sft.json", *words)


LEAVES = st.text(max_size=6) | st.integers() | st.none()
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3))
RECORDS = st.lists(st.dictionaries(st.text(max_size=4), VALUES, max_size=4), min_size=1, max_size=5)


@given(RECORDS, st.booleans(), st.sampled_from([None, 0, 3]))
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_json_list_index_equals_the_parser(tmp_path, records, ascii_only, indent):
    path = tmp_path / "x.json"
    path.unlink(missing_ok=True)  # a mapped file is never written over
    path.write_text(json.dumps(records, ensure_ascii=ascii_only, indent=indent), encoding="utf-8", errors="replace")
    expected = json.loads(path.read_text(encoding="utf-8"))
    opened = source.open_source(path)
    assert [opened[i] for i in range(len(opened))] == expected


def test_skipped_records_are_counted_and_listed(tmp_path):
    bad = record("sft", images=["missing.png"])
    path = write(tmp_path, "sft", record("sft"), bad, record("sft"), bad)
    data = read_sft(path, skip_bad=2)
    assert [sample.place for sample in data] == [f"{path}:1", f"{path}:3"]
    assert [line.split(": ")[0] for line in data.bad.messages] == [f"{path}:2", f"{path}:4"]
    with pytest.raises(DataError, match="skip_bad_records=2"):
        data.skip(0, DataError("a third"))
    refuse(read_sft, path, f"{path}:4", "skip_bad_records=1", f"{path}:2", skip_bad=1)
    path = write(tmp_path, "sft", bad)
    refuse(read_sft, path, "no valid record", skip_bad=9)


def test_a_data_set_of_which_nothing_is_left(tmp_path):
    path = write(tmp_path, "sft", *[record("sft")] * 3)
    data = read_sft(path, skip_bad=9)
    for index in (0, -1, 0, 2):
        data.skip(index, DataError("damaged"))
    with pytest.raises(DataError, match=r"sft.json: each of 3 records is bad \(damaged\); correct the file"):
        data.skip(1, DataError("damaged"))


def test_row_groups_leave_the_cache(tmp_path):
    path = write(tmp_path, "align", *[record("align", data_source=str(i)) for i in range(9)])
    held = Held(held_bytes=1)
    rows = source.Parquet(path, Cache(), held=held)
    order = [8, 0, 3, 8, 1, 5]
    assert [rows[i]["data_source"] for i in order] == [str(i) for i in order]
    assert len(held._groups) == 1


@pytest.mark.parametrize("stored", ["bytes", "path"])
@pytest.mark.parametrize("kind", READERS)
def test_what_is_written_reads_back(tmp_path, kind, stored):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(png(9))
    image = ImageRef(data=png(9)) if stored == "bytes" else ImageRef(path=tmp_path / "in" / "a.png")
    sample = Sample(
        place="",
        messages=(Message("system", 'quote " and ü\n'), Message("user", "<image><image>x")),
        images=(image, image),
        response=RESPONSE,
        teacher_caption=CAPTION,
        teacher_reasoning=REASONING,
        student_caption=CAPTION,
        student_reasoning="<think></think><answer>1</answer>",
        gold="7",
        equivalents=("7.0", "seven"),
        question_type="sum",
        data_source="geo",
        pass_rate=0.125,
    )
    name = {"sft": "d.json", "warmup": "d.jsonl"}.get(kind, "d.parquet")
    path = getattr(formats, f"write_{kind}")(tmp_path / "out" / name, [sample] * 3)
    assert not [p for p in path.parent.iterdir() if p.name.startswith(".")]
    back = READERS[kind](path, image_folders=[tmp_path / "in"])
    assert len(back) == 3
    gold = ("gold", "equivalents", "question_type", "data_source", "pass_rate")
    fields = {
        "sft": ("response",),
        "warmup": ("teacher_caption", "teacher_reasoning", "student_caption", "student_reasoning"),
        "align": ("teacher_caption", "teacher_reasoning", *gold),
        "rlvr": gold,
    }[kind]
    for field in ("messages", *fields):
        assert getattr(back[1], field) == getattr(sample, field), field
    assert [np.asarray(open_image(ref, ""))[0, 0, 0] for ref in back[1].images] == [9, 9]


@pytest.mark.parametrize("kind", READERS)
def test_a_failed_write_leaves_the_old_file(tmp_path, kind):
    path = tmp_path / "d.x"
    path.write_text("old")
    incomplete = Sample("p:1", (Message("user", "x"),))
    with pytest.raises(ValueError, match=r"p:1: has no \w+, .*format holds"):
        getattr(formats, f"write_{kind}")(path, [incomplete])
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_align_reads_caption_and_cot_before_the_whole_response(tmp_path):
    path = write(tmp_path, "align", record("align", teacher_caption="b", teacher_cot="<answer>8</answer>"))
    sample = read_align(path)[0]
    assert sample.teacher_caption + sample.teacher_reasoning == "<caption>b</caption><think></think><answer>8</answer>"


def test_bytes_are_stored_once(tmp_path):
    sample = Sample("p", (Message("user", "<image>x"),), (ImageRef(data=png()),), response="r")
    formats.write_sft(tmp_path / "d.json", [sample, replace(sample, response="s")])
    assert len(list((tmp_path / "d_images").iterdir())) == 1


# ---- damaged parquet


def _pages(path: Path, name: str) -> tuple[int, int]:
    """Where the pages of a column begin and end in the first row group."""
    group = pq.read_metadata(path).row_group(0)
    column = next(group.column(i) for i in range(group.num_columns) if group.column(i).path_in_schema == name)
    begin = min(filter(None, (column.dictionary_page_offset, column.data_page_offset)))
    return begin, begin + column.total_compressed_size


def test_our_files_tell_of_every_damaged_page(tmp_path):
    """What a bit more makes of a text is a text too: nothing but the page's checksum knows."""
    sample = Sample("d:1", (Message("user", "How many? 漢" * 3),), gold="7")
    path = formats.write_rlvr(tmp_path / "d.parquet", [sample] * 3)
    whole, first = path.read_bytes(), list(read_rlvr(path))
    begin, end = _pages(path, "prompt.list.element.content")
    refused = 0
    for place in range(begin, end, 3):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            assert list(read_rlvr(path)) == first  # a bit of a header that nobody reads
        except DataError as error:
            assert f"{path}: row group 1 cannot be read; copy the file again (" in str(error)
            refused += 1
    assert refused > (end - begin) // 3 // 3


def test_a_damaged_row_group_is_tried_once_and_its_records_are_counted(tmp_path, monkeypatch):
    path = tmp_path / "d.parquet"
    rows = [record("rlvr", images=[], prompt=f"How many? {i}") for i in range(30)]
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=10, write_page_checksum=True)
    _, end = _pages(path, "prompt")
    content = bytearray(path.read_bytes())
    content[end - 3] ^= 1
    path.write_bytes(content)
    read: list[int] = []
    group = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile, "read_row_group", lambda self, i, **options: read.append(i) or group(self, i, **options)
    )
    data = read_rlvr(path, skip_bad=10)
    assert (len(data), len(data.bad)) == (20, 10)
    assert read.count(0) == 1


def test_a_footer_that_counts_other_rows_than_there_are(tmp_path):
    path = tmp_path / "d.parquet"
    pq.write_table(pa.Table.from_pylist([record("rlvr", images=[], prompt="x")] * 300), path)
    whole = path.read_bytes()
    number = b"\xd8\x04"  # 300, as thrift writes it
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    at = [m.start() for m in re.finditer(re.escape(number), whole) if m.start() > footer]
    assert len(at) > 2
    told = []
    for place in at:
        path.write_bytes(whole[:place] + b"\xda\x04" + whole[place + 2 :])  # 301
        bad = BadRecords(10**9)
        try:
            count = len(read_rlvr(path, skip_bad=bad)) + len(bad)
        except DataError as error:
            told.append(str(error))
            assert str(path) in told[-1]
        else:
            assert count == 300
    assert any("rows" in line for line in told)


@pytest.mark.parametrize("kind", [b"\x02", b"\x04", b"\x00"], ids=["index", "dictionary", "data"])
def test_a_page_that_gives_a_length_of_gigabytes_takes_no_memory(tmp_path, kind):
    """It would be taken and filled with zeros by a buffered reader, column by column."""
    path = tmp_path / "d.parquet"
    rows = [record("rlvr", images=[], prompt="How many? " * 20)] * 3
    pq.write_table(pa.Table.from_pylist(rows), path, compression="none", use_dictionary=False)
    begin, _ = _pages(path, "prompt")
    most = b"\xfe\xff\xff\xff\x0f"  # 2^31 - 1, as thrift writes it
    header = b"\x15" + kind + b"\x15" + most + b"\x15" + most + b"\x00"  # kind, bytes unpacked, bytes
    content = path.read_bytes()
    path.write_bytes(content[:begin] + header + content[begin + len(header) :])
    most_before = pa.default_memory_pool().max_memory()
    with pytest.raises(DataError, match="row group 1 cannot be read"):
        read_rlvr(path)
    with pytest.raises(DataError, match="row group 1 cannot be read"):
        row_groups.cut(path, tmp_path / "cut.parquet", ["prompt"])
    assert pa.default_memory_pool().max_memory() < most_before + (1 << 30)
