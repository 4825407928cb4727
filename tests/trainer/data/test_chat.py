"""Chat template, tokens and pixels: placeholders, control tokens, round trips, and equality with Qwen3VLProcessor."""

from __future__ import annotations

import importlib.util
import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import Qwen2VLImageProcessorPil

from prism_fast.data.chat import Chat
from prism_fast.demo.digits import SYSTEM_PROMPT
from prism_fast.demo.tiny import SPECIAL_TOKENS, make_tiny_model, train_tokenizer
from prism_fast.records import DataError, ImageRef, Message, Sample
from tests.oracle import assert_same

RESPONSE = "<caption>3\n-1</caption><think>so</think><answer>12</answer>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tiny"), [SYSTEM_PROMPT, "Sum?", RESPONSE] * 20)


@pytest.fixture(scope="module")
def chat(folder):
    return Chat.load(folder)


def image(width: int, height: int, seed: int = 0) -> ImageRef:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return ImageRef(data=buffer.getvalue())


def sample(*images: ImageRef, text: str = "Sum?") -> Sample:
    content = "<image>" * len(images) + text
    return Sample("d.json:4", (Message("system", SYSTEM_PROMPT), Message("user", content)), images)


def test_a_prompt_is_template_placeholders_and_pixels(chat):
    prompt = chat.encode_prompt(sample(image(64, 16), image(32, 32, 1), text="Sum?"))
    pad, start, end = "<|image_pad|>", "<|vision_start|>", "<|vision_end|>"
    vision = f"{start}{pad * 4}{end}{start}{pad * 4}{end}"
    expected = (
        f"<|im_start|>system\nUse XML.<|im_end|>\n<|im_start|>user\n{vision}Sum?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert chat.tokenizer.decode(prompt.input_ids) == expected
    assert prompt.image_grid_thw.tolist() == [[1, 2, 8], [1, 4, 4]]
    assert prompt.pixel_values.shape == (32, 3 * 2 * 8 * 8)
    assert prompt.pixel_values.dtype == torch.float32
    assert (prompt.input_ids == chat.image_id).sum() == 32 // 4
    assert len(prompt) == prompt.input_ids.numel()


def test_tokens_are_those_of_a_call_of_the_tokenizer(chat):
    """Also where tokenizer.json asks for cut or padded texts, as a call does neither."""
    backend = chat.tokenizer.backend_tokenizer
    backend.enable_truncation(2)
    backend.enable_padding(length=40)
    chat = Chat(chat.tokenizer, chat.image_processor)
    texts = ["", "Sum?", RESPONSE, "a <|im_end|> b <think>", "<|vision_start|>", "\u00e4 \U0001f600\n\n 12"]
    for text in (*texts, *reversed(texts)):
        plain = chat.tokenizer(chat._seam.split(text), add_special_tokens=False, split_special_tokens=True)
        assert chat.encode_part(text).tolist() == [index for piece in plain["input_ids"] for index in piece]
        assert chat._tokens(text) == chat.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert chat.end_of_turn_id in chat._tokens(texts[3]) and chat.end_of_turn_id not in chat.encode_part(texts[3])


def test_pixels_are_the_image_in_merged_patch_order(chat):
    """A 2 x 2 block of patches before the next block; both frames hold the image; pixels are (x - 0.25) / 0.25."""
    ref = image(32, 16)
    prompt = chat.encode_prompt(sample(ref))
    pixels = np.asarray(Image.open(io.BytesIO(ref.data)), dtype=np.float64) / 255  # (16, 32, 3)
    normal = (pixels - 0.25) / 0.25
    rows = prompt.pixel_values.reshape(8, 3, 2, 8, 8).numpy()
    order = [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (0, 3), (1, 2), (1, 3)]
    for row, (down, right) in zip(rows, order):
        patch = normal[8 * down : 8 * down + 8, 8 * right : 8 * right + 8].transpose(2, 0, 1)
        for frame in range(2):
            assert_same(torch.from_numpy(row[:, frame]), torch.from_numpy(patch), 8)


def test_text_only_prompts(chat):
    prompt = chat.encode_prompt(sample())
    assert prompt.pixel_values is None
    assert prompt.image_grid_thw is None


def test_key_tells_ids_and_pixels_apart(chat):
    base = chat.encode_prompt(sample(image(64, 16)))
    assert base.key == chat.encode_prompt(sample(image(64, 16))).key
    others = [sample(image(64, 16, 1)), sample(image(64, 16), text="Sum"), sample(), sample(image(32, 32))]
    assert len({base.key, *(chat.encode_prompt(other).key for other in others)}) == 5


def test_limits_and_images_that_do_not_open(chat):
    size = len(chat.encode_prompt(sample(image(64, 16))))
    assert len(chat.encode_prompt(sample(image(64, 16)), max_tokens=size)) == size
    with pytest.raises(DataError, match=rf"d.json:4: prompt: {size} tokens are over the limit of {size - 1}; raise"):
        chat.encode_prompt(sample(image(64, 16)), max_tokens=size - 1)
    with pytest.raises(DataError, match=r"d.json:4: images: .*does not open"):
        chat.encode_prompt(sample(ImageRef(data=b"junk")))
    with pytest.raises(DataError, match=r"d.json:4: images: .* 2010 x 10 pixels, an aspect ratio over"):
        chat.encode_prompt(sample(image(2010, 10)))


@pytest.mark.parametrize("rows", [1, 2, 3, 4])
def test_few_rows_are_not_taken_for_channels(chat, rows, caplog):
    wide, tall = chat.encode_prompt(sample(image(60, rows))), chat.encode_prompt(sample(image(rows, 60)))
    (_, height, width), (_, other_height, other_width) = wide.image_grid_thw[0], tall.image_grid_thw[0]
    assert height < width and (height, width) == (other_width, other_height) and not caplog.records


@pytest.mark.parametrize("token", ["<|im_end|>", "<|image_pad|>", "<|vision_start|>", "<|endoftext|>"])
def test_control_tokens_in_text(chat, token):
    with pytest.raises(DataError, match=r"d.json:4: messages\[1\].content: holds the control token"):
        chat.encode_prompt(sample(text=f"a{token}b"))
    # A response may spell it, but it stays text.
    for ids in (chat.encode_part(f"a{token}b"), chat.encode_response(f"a{token}b")[:-1]):
        assert not chat.holds_forbidden(ids.tolist())
        assert chat.end_of_turn_id not in ids
        assert chat.decode(ids) == f"a{token}b"


def test_forbidden_ids_hold_everything_but_the_end_of_turn(chat):
    forbidden = set(chat.forbidden_ids)
    assert {chat.image_id, chat.video_id, chat.vision_start_id, chat.vision_end_id, chat.pad_id} <= forbidden
    assert chat.tokenizer.convert_tokens_to_ids("<|im_start|>") in forbidden
    assert chat.end_of_turn_id not in forbidden
    assert chat.holds_forbidden([1, chat.image_id])
    assert not chat.holds_forbidden([1, chat.end_of_turn_id])


@given(st.text(max_size=40))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_responses_round_trip(chat, text):
    text = chat.tokenizer.backend_tokenizer.normalizer.normalize_str(text)
    ids = chat.encode_response(text)
    assert ids[-1] == chat.end_of_turn_id
    assert chat.decode(ids) == text
    assert b"".join(chat.token_bytes[i] for i in ids.tolist()).decode() == text


def test_token_bytes(chat):
    table = chat.token_bytes
    assert len(table) == chat.vocab_size
    assert table[chat.end_of_turn_id] == table[chat.pad_id] == b""
    assert table[chat.image_id] == b"<|image_pad|>"
    assert b"<caption>" in table
    assert set(range(256)) == {item[0] for item in table if len(item) == 1}  # every byte has a token


def test_spans_of_a_response(chat):
    from prism_kernels import find_tag_spans

    ids = chat.encode_response(RESPONSE)
    spans = find_tag_spans(ids, chat.token_bytes)
    assert [chat.decode(ids[start:end]) for start, end in spans] == [
        "<caption>3\n-1</caption>",
        "<think>so</think>",
        "<answer>12</answer>",
    ]
    outside = torch.cat([ids[:-1], torch.tensor([chat.image_id]), ids[-1:]])
    assert find_tag_spans(outside, chat.token_bytes) is None


def test_end_of_turn_may_be_the_padding_token(folder):
    tokenizer = train_tokenizer([RESPONSE] * 5)
    tokenizer.pad_token = "<|im_end|>"
    same = Chat(tokenizer, Qwen2VLImageProcessorPil.from_pretrained(folder))
    assert same.pad_id == same.end_of_turn_id
    assert same.end_of_turn_id not in same.forbidden_ids
    assert same.decode(same.encode_response("a")) == "a"


def test_save_and_load(chat, tmp_path):
    chat.save(tmp_path)
    again = Chat.load(tmp_path)
    first, second = (c.encode_prompt(sample(image(64, 16))) for c in (chat, again))
    assert first.key == second.key
    assert again.forbidden_ids == chat.forbidden_ids


def test_chat_template_in_its_older_file(folder, tmp_path, chat):
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(DataError, match="no chat template"):
        Chat.load(tmp_path)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": chat.tokenizer.chat_template}))
    assert Chat.load(tmp_path).encode_prompt(sample()).key == chat.encode_prompt(sample()).key


def test_directories_that_are_no_checkpoint(tmp_path, folder):
    with pytest.raises(DataError, match="does not load"):
        Chat.load(tmp_path)
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), pad_token="<pad>")
    with pytest.raises(DataError, match=r"no token <\|im_end\|>"):
        Chat(other, None)


def test_a_template_that_ignores_images(chat):
    broken = Chat(train_tokenizer([RESPONSE]), chat.image_processor)
    broken.tokenizer.chat_template = "{% for m in messages %}{{ m.role }}{% endfor %}"
    with pytest.raises(DataError, match="wrote 0 placeholders for 1 images"):
        broken.encode_prompt(sample(image(64, 16)))


def test_a_template_that_refuses_messages(chat):
    strict = Chat(train_tokenizer([RESPONSE]), chat.image_processor)
    strict.tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(DataError, match=r"d.json:4: messages: .* refuses them \(System role not supported\); keep to"):
        strict.encode_prompt(sample())


def test_qwen_style_control_tokens_that_are_not_flagged_special(chat):
    """Qwen's tokenizer holds <|fim_prefix|> as an ordinary added token: never sampled, never accepted from data."""
    from tokenizers import AddedToken

    tokenizer = train_tokenizer([RESPONSE])
    tokenizer.add_tokens([AddedToken("<|fim_prefix|>", special=False), AddedToken("<tool_call>", special=False)])
    wider = Chat(tokenizer, chat.image_processor)
    fim, call = tokenizer.convert_tokens_to_ids(["<|fim_prefix|>", "<tool_call>"])
    assert fim in wider.forbidden_ids
    assert call not in wider.forbidden_ids
    with pytest.raises(DataError, match="fim_prefix"):
        wider.encode_prompt(sample(text="<|fim_prefix|>"))
    assert not wider.holds_forbidden(wider.encode_part("a<|fim_prefix|>b").tolist())
    assert wider.decode(wider.encode_part("a<tool_call>b")) == "a<tool_call>b"


def test_the_tokenizer_class_of_released_checkpoints(chat, folder, tmp_path):
    """Qwen3-VL's own tokenizer class, with its own split and unflagged tool tokens, opened from a directory."""
    from tokenizers import AddedToken
    from transformers import Qwen2Tokenizer

    model = json.loads(chat.tokenizer.backend_tokenizer.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]], eos_token="<|im_end|>"
    )
    tokenizer.add_tokens([AddedToken(t, special=True) for t in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(t, special=False) for t in ("<think>", "</think>", "<tool_call>")])
    tokenizer.chat_template = chat.tokenizer.chat_template
    tokenizer.save_pretrained(tmp_path)
    chat.image_processor.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    qwen = Chat.load(tmp_path)
    assert type(qwen.tokenizer).__name__ == "Qwen2Tokenizer"
    ids = qwen.encode_response(RESPONSE)
    assert qwen.decode(ids) == RESPONSE
    assert qwen.tokenizer.convert_tokens_to_ids("</think>") in ids
    prompt = qwen.encode_prompt(sample(image(64, 16)))
    assert (prompt.input_ids == qwen.image_id).sum() == 4
    assert not qwen.holds_forbidden(qwen.encode_part("<|im_end|><|image_pad|>").tolist())


@pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is None, reason="Qwen3VLProcessor needs torchvision, not installed"
)
@pytest.mark.parametrize("sizes", [[(64, 16)], [(64, 32), (32, 16)], [(50, 23)], [(200, 130)]])
def test_equals_qwen3_vl_processor(chat, folder, sizes):
    from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    processor = Qwen3VLProcessor(
        Qwen2VLImageProcessor.from_pretrained(folder),
        chat.tokenizer,
        Qwen3VLVideoProcessor(),
        chat_template=chat.tokenizer.chat_template,
    )
    item = sample(*(image(width, height, seed) for seed, (width, height) in enumerate(sizes)))
    prompt = chat.encode_prompt(item)
    user = [{"type": "image"}] * len(sizes) + [{"type": "text", "text": "Sum?"}]
    messages = [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": user}]
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    images = [Image.open(io.BytesIO(ref.data)).convert("RGB") for ref in item.images]
    expected = processor(text=[text], images=images, return_tensors="pt")
    assert prompt.input_ids.tolist() == expected["input_ids"][0].tolist()
    assert prompt.image_grid_thw.tolist() == expected["image_grid_thw"].tolist()
    # Where the image is resized, PIL and torchvision's bicubic round to 8 bits apart: one level of 255, over 0.25.
    resized = any(size != (64, 16) and (size[0] % 16 or size[1] % 16 or size[0] * size[1] > 4096) for size in sizes)
    if resized:
        assert (prompt.pixel_values - expected["pixel_values"]).abs().max() <= 2 / 255 / 0.25
    else:
        assert_same(prompt.pixel_values, expected["pixel_values"], 8)


def test_replaced_images_change_only_pixels(chat):
    first, second = sample(image(64, 16, 3)), sample(image(64, 16, 3))
    second = replace(second, images=(image(64, 16, 4),))
    a, b = chat.encode_prompt(first), chat.encode_prompt(second)
    assert torch.equal(a.input_ids, b.input_ids)
    assert not torch.equal(a.pixel_values, b.pixel_values)
