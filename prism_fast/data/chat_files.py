"""The files of a checkpoint that a `Chat` is made of, each opened and tried: tokenizer, chat template, image processor.

Whatever a library raises over a file becomes one line that names it, and what libraries print stays out of the
terminal. No file's code is run: ``trust_remote_code`` is False everywhere.
"""

from __future__ import annotations

import json
import logging
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import Tokenizer
from transformers import AutoTokenizer, Qwen2VLImageProcessorPil
from transformers.utils import logging as transformers_logging

from prism_fast.records import DataError

INSTRUCT = "Qwen/Qwen3-VL-4B-Instruct"
LARGEST_FACTOR = 1024  # pixels of a merged patch's side; Qwen3-VL has 32
LARGEST_LEAST = 2**22  # pixels to which a small image may be enlarged; Qwen3-VL has 2**16
PROBE = "Which of both is 12.5 cm?"
ROUND_TRIP = "<caption>A b\n3</caption><answer>-12.5 cm, é 漢 \\frac{1}{2}</answer>"
SYSTEM = "Answer in 7 words."
IMAGE_TOKEN = "<|image_pad|>"
END_OF_TURN = "<|im_end|>"
TOKEN_OPTIONS = {"id", "content", "single_word", "lstrip", "rstrip", "normalized", "special", "__type"}


@contextmanager
def quiet() -> Iterator[None]:
    """transformers' bars and log lines, and warnings, stay out of the terminal within: what they tell is checked."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


@contextmanager
def one_line(what: str, remedy: str) -> Iterator[None]:
    """Quietly; any exception within is raised as ``DataError("WHAT (its first words); REMEDY")``."""
    try:
        with quiet():
            yield
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{what} ({brief(error)}); {remedy}") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of Rust: no Exception, but no more than a file it cannot read
            raise
        raise DataError(f"{what} ({brief(error)}); {remedy}") from error


def brief(error: BaseException) -> str:
    """The first words of an exception, on one line."""
    return plain(" ".join(str(error).split())) or type(error).__name__


def plain(text: str) -> str:
    """What a file says, for a terminal: at most 160 characters, without line breaks and escapes."""
    text = text if len(text) <= 160 else f"{text[:157]}..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object, without NaN and infinities."""

    def refuse(name: str):
        raise ValueError(f"{name} is no number of JSON")

    with one_line(f"{path}: cannot be read", "expected a file in JSON; download it again"):
        refuse_pointer(path)
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    if not isinstance(value, dict):
        raise DataError(f"{path}: holds a {type(value).__name__}, expected a JSON object; download it again")
    return value


def refuse_pointer(path: Path) -> None:
    """DataError where git-lfs left its note in the file's place."""
    with open(path, "rb") as file:
        if file.read(64).startswith(b"version https://git-lfs"):
            raise DataError(f"{path}: a git-lfs pointer, not the file; run `git lfs pull` in its folder")


def open_tokenizer(folder: str | Path) -> Any:
    """The tokenizer with its chat template, tried on text with and without an image."""
    remedy = "take tokenizer.json and tokenizer_config.json of the Qwen3-VL checkpoint, or update transformers"
    local = Path(folder).is_dir()
    if local:
        _look_at_tokenizer_files(Path(folder))
    place = f"{folder}/tokenizer.json" if (Path(folder) / "tokenizer.json").exists() else folder
    with one_line(f"{place}: tokenizer does not load", remedy):
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=local)
        ids = sorted(tokenizer.get_vocab().values())
        if ids != list(range(len(tokenizer))):
            raise DataError(
                f"{place}: {len(tokenizer)} tokens have ids up to {ids[-1] if ids else -1}, with gaps or"
                f" repeats; {remedy}"
            )
    if local and (Path(folder) / "tokenizer.json").exists():
        _hold_against_file(tokenizer, Path(folder) / "tokenizer.json")
    if tokenizer.chat_template is None:
        path = Path(folder) / "chat_template.json"  # where older processors kept it
        if not path.is_file():
            raise DataError(f"{folder}: no chat template; add chat_template.jinja")
        tokenizer.chat_template = read_object(path).get("chat_template")
        if not isinstance(tokenizer.chat_template, str):
            raise DataError(f"{path}: no text under chat_template; add chat_template.jinja")
    _try_template(tokenizer, folder)
    return tokenizer


def _hold_against_file(tokenizer: Any, file: Path) -> None:
    """Whether tokens are those of tokenizer.json: another class, or ids out of order, silently make others."""
    ids, remedy = tokenizer.get_vocab(), "take tokenizer.json and tokenizer_config.json of the checkpoint"
    with one_line(f"{file}: cannot be used", remedy):
        for token in read_object(file).get("added_tokens") or ():
            name, asked = token["content"], token["id"]
            if ids.get(name) != asked:
                raise ValueError(f"added token {name!r} has id {asked!r}, but is loaded as {ids.get(name)}")
        own = Tokenizer.from_file(str(file))
        own.no_truncation()
        own.no_padding()
        expected = own.encode(ROUND_TRIP, add_special_tokens=False).ids
        if tokenizer(ROUND_TRIP, add_special_tokens=False)["input_ids"] != expected:
            raise ValueError(f"it makes other tokens than {type(tokenizer).__name__} of tokenizer_config.json")


def _look_at_tokenizer_files(folder: Path) -> None:
    """What a library would pass over, or word worse."""
    if not (folder / "tokenizer_config.json").is_file():
        raise DataError(
            f"{folder}: tokenizer does not load (no tokenizer_config.json, without which it makes other tokens);"
            " copy it from the checkpoint that the model comes from"
        )
    names = ("tokenizer_config.json", "added_tokens.json", "special_tokens_map.json", "tokenizer.json", "vocab.json")
    held = {name: read_object(folder / name) for name in names if (folder / name).exists()}
    for name in ("chat_template.jinja", "merges.txt"):
        with one_line(f"{folder / name}: cannot be read", "expected text in UTF-8; download it again"):
            if (folder / name).is_file():
                refuse_pointer(folder / name)
                (folder / name).read_text(encoding="utf-8")
    _refuse_odd_tokens(folder / "tokenizer.json", held.get("tokenizer.json", {}).get("added_tokens"))
    decoder = held["tokenizer_config.json"].get("added_tokens_decoder")
    _refuse_odd_tokens(folder / "tokenizer_config.json", decoder.values() if isinstance(decoder, dict) else None)
    model = held.get("tokenizer.json", {}).get("model")
    if isinstance(model, dict) and isinstance(model.get("vocab"), dict) and isinstance(model.get("merges"), list):
        _count_merges(folder / "tokenizer.json", model["vocab"], len(model["merges"]))
    elif "tokenizer.json" not in held and "vocab.json" in held and (folder / "merges.txt").is_file():
        lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
        _count_merges(folder / "merges.txt", held["vocab.json"], sum(line.count(" ") == 1 for line in lines))


def _refuse_odd_tokens(file: Path, tokens: Any) -> None:
    """An option of another name is passed over by the library, which says so on the terminal."""
    for token in tokens or ():
        odd = sorted(set(token) - TOKEN_OPTIONS) if isinstance(token, dict) else []
        if odd:
            raise DataError(f"{file}: an added token has {plain(odd[0])!r}, which is no option; download it again")


def _count_merges(file: Path, vocab: dict[str, Any], merges: int) -> None:
    """In byte-level BPE every token but the 256 bytes is a merge of two; with fewer merges, text gets other tokens."""
    merged = sum(len(token) > 1 and not token.startswith("<|") for token in vocab)
    if merges < 0.99 * merged:
        raise DataError(f"{file}: {merges} merges for {merged} tokens, so some are never made; download it again")


def render(tokenizer: Any, messages: Sequence[dict[str, Any]], *, answer: bool = True) -> str:
    """The messages in the chat template; with ``answer``, up to where the assistant's turn begins."""
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=answer)
    if not isinstance(text, str):
        raise TypeError(f"it gives a {type(text).__name__}")
    return text


def _try_template(tokenizer: Any, folder: str | Path) -> None:
    system = {"role": "system", "content": SYSTEM}
    text = [system, {"role": "user", "content": PROBE}]
    parts = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": PROBE}]}]
    remedy = f"take chat_template.jinja of {_instruct(folder)}"
    with one_line(f"{folder}: the chat template cannot be used", remedy):
        for messages, images in ((text[1:], 0), (parts, 1), (text, 0)):
            closed, opened = render(tokenizer, messages, answer=False), render(tokenizer, messages)
            before, found, after = closed.rpartition(PROBE)
            if not found:
                raise ValueError("it leaves out the user's text")
            if messages[0] is system and SYSTEM not in before:
                raise ValueError("it leaves out the system's text")
            if opened.count(IMAGE_TOKEN) != images:
                raise ValueError(f"it writes {opened.count(IMAGE_TOKEN)} placeholders for {images} images")
            if not after.startswith(END_OF_TURN):
                raise ValueError(f"it does not end the user's turn with {END_OF_TURN}")
            if not opened.startswith(closed) or len(opened) == len(closed):
                raise ValueError("it does not begin the assistant's turn")
            begun = opened[len(closed) :]
            if begun.count("<think>") > begun.count("</think>"):
                raise DataError(
                    f"{folder}: the chat template opens <think> before the response, as Thinking checkpoints do, but"
                    f" responses begin with <caption>; use {_instruct(folder)}"
                )
            if not re.fullmatch(r"<\|im_start\|>assistant\s*(<think>\s*</think>\s*)?", begun):
                raise ValueError(f"it begins the assistant's turn with {plain(repr(begun))}")


def _instruct(folder: str | Path) -> str:
    """The Instruct checkpoint beside a released one."""
    size = re.search(r"Qwen3-VL-\w+(?=-(Thinking|Instruct))", str(folder))
    return f"Qwen/{size[0]}-Instruct" if size else f"an Instruct checkpoint such as {INSTRUCT}"


def open_image_processor(folder: str | Path) -> Any:
    """Qwen-VL's image processor, tried on a small image."""
    what, remedy = f"{folder}/preprocessor_config.json", "take the file of the Qwen3-VL checkpoint"
    local = Path(folder).is_dir()
    held = None
    if local and Path(what).exists():
        held = read_object(Path(what))
    newer = Path(folder) / "processor_config.json"  # where it holds the settings, they come first
    if local and newer.exists() and isinstance(settings := read_object(newer).get("image_processor"), dict):
        what, held = str(newer), settings
    lacks = [name for name in ("image_mean", "image_std") if held is not None and name not in held]
    if lacks:
        raise DataError(f"{what}: no {lacks[0]}, whose default is another model's; {remedy}")
    with one_line(f"{folder}: image processor does not load", remedy):
        processor: Any = Qwen2VLImageProcessorPil.from_pretrained(folder, local_files_only=local)
    with one_line(f"{what}: cannot be used", remedy):
        patch, merge, frames = processor.patch_size, processor.merge_size, processor.temporal_patch_size
        for name, value in (("patch_size", patch), ("merge_size", merge), ("temporal_patch_size", frames)):
            if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= LARGEST_FACTOR:
                raise ValueError(f"{name} is {value!r}, expected a positive integer")
        if patch * merge > LARGEST_FACTOR:
            raise ValueError(f"patch_size x merge_size is {patch * merge}, at most {LARGEST_FACTOR}")
        least, most = processor.size["shortest_edge"], processor.size["longest_edge"]
        if not 0 < least <= min(most, LARGEST_LEAST) or not math.isfinite(most):
            raise ValueError(f"size is {least} to {most} pixels, expected 0 < shortest_edge <= longest_edge")
        if most < (patch * merge) ** 2:
            raise ValueError(
                f"size is at most {most} pixels, less than one merged patch of {patch * merge} x {patch * merge}"
            )
        if processor.resample not in (None, *range(6)):
            raise ValueError(f"resample is {processor.resample!r}, expected one of Pillow's, 0 to 5")
        for name in ("do_resize", "do_rescale", "do_normalize"):
            if getattr(processor, name) is not True:
                raise ValueError(f"{name} is {getattr(processor, name)!r}, expected true")
        mean, deviation = np.array(processor.image_mean, float), np.array(processor.image_std, float)
        if not abs(255 * processor.rescale_factor - 1) < 0.01:
            raise ValueError(f"rescale_factor is {processor.rescale_factor}, expected 1 / 255")
        if not ((mean >= 0) & (mean <= 1) & (deviation > 0.01) & (deviation <= 2)).all():
            raise ValueError(f"image_mean is {mean.tolist()}, image_std {deviation.tolist()}, expected parts of 1")
        made = processor(images=[Image.new("RGB", (70, 50), (200, 100, 50))], return_tensors="pt")
        pixels, grid = made["pixel_values"], made["image_grid_thw"]
        if tuple(pixels.shape) != (int(grid.prod()), 3 * frames * patch**2) or not pixels.isfinite().all():
            raise ValueError(f"it makes pixels of shape {tuple(pixels.shape)} for a grid of {grid.tolist()}")
    return processor
