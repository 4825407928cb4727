"""Processed images: used again while they fit, by content, and never instead of another."""

from __future__ import annotations

import pytest
import torch

from prism_fast.data import processed
from prism_fast.data.chat import Chat
from prism_fast.data.images import content, open_image
from prism_fast.records import DataError, ImageRef, Message, Sample
from tests.trainer.data.test_formats import png


@pytest.fixture
def chat(tiny_folder):
    return Chat.load(tiny_folder / "base")


def sample(*refs: ImageRef) -> Sample:
    return Sample("x.jsonl:1", (Message("user", "<image>" * len(refs) + "Sum?"),), tuple(refs))


def test_equal_images_are_decoded_once(chat, tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(png(9))
    refs = [ImageRef(path=tmp_path / "a.png"), ImageRef(path=tmp_path / "b.png"), ImageRef(data=png(9))]
    both = [chat.encode_prompt(sample(ref)) for ref in (*refs, refs[0])]
    assert chat.images.decoded == 1
    assert len({prompt.key for prompt in both}) == 1
    several = chat.encode_prompt(sample(refs[0], ImageRef(data=png(8)), refs[2]))
    assert chat.images.decoded == 2
    images = [open_image(ref, "x") for ref in (refs[0], ImageRef(data=png(8)), refs[2])]
    at_once = chat.image_processor(images=images, return_tensors="pt")
    assert torch.equal(several.pixel_values, at_once["pixel_values"])
    assert torch.equal(several.image_grid_thw, at_once["image_grid_thw"])


def test_a_replaced_file_is_another_image(chat, tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(png(9))
    first = chat.encode_prompt(sample(ImageRef(path=path)))
    path.write_bytes(png(200))
    second = chat.encode_prompt(sample(ImageRef(path=path)))
    assert first.key != second.key and not torch.equal(first.pixel_values, second.pixel_values)


def test_a_file_that_is_replaced_meanwhile_is_what_its_key_says(chat, tmp_path, monkeypatch):
    path, as_before = tmp_path / "a.png", chat.encode_prompt(sample(ImageRef(data=png(9))))
    path.write_bytes(png(9))
    chat.images.held_bytes = 0
    chat.encode_prompt(sample(ImageRef(data=png(8))))  # so that nothing is held

    def replaced(ref):
        read = content(ref)
        path.write_bytes(png(200))
        return read

    monkeypatch.setattr(processed, "content", replaced)
    made = chat.encode_prompt(sample(ImageRef(path=path)))
    assert made.image_keys == as_before.image_keys and torch.equal(made.pixel_values, as_before.pixel_values)


@pytest.mark.parametrize("room", [0, 1, 2])
def test_the_latest_used_stay(chat, room):
    refs = [ImageRef(data=png(color)) for color in range(3)]
    one = chat.encode_prompt(sample(refs[0])).pixel_values.nbytes
    chat.images.held_bytes, chat.images.decoded = room * one, 0
    chat.encode_prompt(sample(ImageRef(data=png(99))))  # what is over goes
    for ref in (refs[0], refs[0], refs[1], refs[0], refs[2], refs[0]):
        chat.encode_prompt(sample(ref))
    assert chat.images.decoded == 1 + {0: 6, 1: 5, 2: 2}[room]  # of two, the first is still there
    chat.images.keep(1)
    assert chat.images.held_bytes == 2**20


def test_bad_images_are_refused_each_time(chat, tmp_path):
    (tmp_path / "cut.png").write_bytes(png()[:40])
    for bad in (ImageRef(path=tmp_path / "cut.png"), ImageRef(path=tmp_path / "no.png"), ImageRef(path=tmp_path)):
        for _ in range(2):
            with pytest.raises(DataError, match=r"x.jsonl:1: images: .*(does not open)"):
                chat.encode_prompt(sample(bad))
