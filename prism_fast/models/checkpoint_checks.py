"""A model directory looked through before anything is allocated: its configuration, the headers of its weights, whether
both and the chat format are of one model; and its values, once they are loaded.

Whatever is wrong is a DataError of one line that names the file. No file's code is run and nothing is unpickled.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import AutoConfig

from prism_fast.data.chat import Chat
from prism_fast.data.chat_files import INSTRUCT, one_line, plain, read_object, refuse_pointer
from prism_fast.records import DataError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = {"F64", "F32", "F16", "BF16"}  # dtypes of weights, as safetensors spells them
AGAIN = "download the checkpoint again"
UNQUANTISED = f"take the checkpoint in bf16 (such as {INSTRUCT})"
# Keys by which a configuration names other files, or code from elsewhere.
ELSEWHERE = ("transformers_weights", "configuration_files", "experts_implementation", "_experts_implementation")
# What lies in a folder that has no safetensors, and what to do about it.
OTHER_WEIGHTS = {
    "*.gguf": f"holds GGUF weights, which are quantised; {UNQUANTISED}",
    "*.bin": "holds pickled weights (.bin), which may run code; convert them to safetensors",
    "*.pt*": "holds pickled weights (.pt, .pth), which may run code; convert them to safetensors",
    "*.ckpt": "holds pickled weights (.ckpt), which may run code; convert them to safetensors",
    "*.safetensors": f"holds safetensors, but no {SINGLE} and no {INDEX}; {AGAIN}",
}


# ---- the configuration


def read_config(path: Path, expected: str) -> Any:
    """The checkpoint's configuration, of architecture ``expected``, within its bounds."""
    file = path / "config.json"
    if not file.is_file():
        _refuse_other_kinds(path, ("*.gguf", "*.pt*", "*.ckpt"))
        below = [file.parent for pattern in ("final/*", "*", "*/*") for file in path.glob(f"{pattern}/config.json")]
        hint = f", such as {below[0]}" if below else ""
        raise DataError(f"{path}: no config.json; expected a Hugging Face checkpoint directory of {expected}{hint}")
    raw = read_object(file)
    if raw.get("model_type") != expected:
        found = plain(repr(raw.get("model_type")))
        raise DataError(f"{file}: model_type is {found}, expected {expected!r}; give the folder of such a checkpoint")
    texts = [raw, *(raw.get(part) for part in ("text_config", "vision_config"))]
    for part, held in zip(("text_config", "vision_config"), texts[1:]):
        if not isinstance(held, dict) or not held:
            raise DataError(f"{file}: no {part}; expected the config.json of a {expected} checkpoint")
    for held in texts:
        for key in ("quantization_config", "compression_config", "quantization"):
            if held.get(key):
                how = held[key].get("quant_method", key) if isinstance(held[key], dict) else key
                raise DataError(
                    f"{file}: a quantised checkpoint ({plain(str(how))}), which cannot be trained; {UNQUANTISED}"
                )
        for key in ELSEWHERE:
            if key in held:
                raise DataError(f"{file}: {key} names other files or code, which is not opened; remove the key")
    if (path / "generation_config.json").exists():  # nothing of it is used, but it is saved again
        read_object(path / "generation_config.json")
    if not any(_number(held.get("rope_theta")) for held in _ropes(texts[1])):
        raise DataError(
            f"{file}: text_config: no rope_theta, and libraries differ on its default; write down the value that the"
            " model was trained with (5000000 for released Qwen3-VL)"
        )
    with one_line(f"{file}: cannot be read", f"expected the configuration of a {expected} checkpoint"):
        config = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
        config._attn_implementation = "sdpa"  # another may name code from elsewhere
        for fault in _config_faults(config):
            raise ValueError(fault)
    return config


def _ropes(text: dict[str, Any]) -> list[dict[str, Any]]:
    """Where a configuration's rotary settings may stand."""
    nested = [text.get(key) for key in ("rope_parameters", "rope_scaling")]
    return [text, *(held for held in nested if isinstance(held, dict))]


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _config_faults(config: Any) -> Iterator[str]:
    """What is out of bounds and shows in no weight's shape; the first word is the key."""
    text, vision = config.text_config, config.vision_config
    whole = {
        "text_config": "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim",
        "vision_config": "depth hidden_size num_heads patch_size spatial_merge_size temporal_patch_size in_channels",
    }
    for part, names in whole.items():
        for name in names.split():
            value = getattr(getattr(config, part), name, None)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                yield f"{part}.{name} is {value!r}, expected a positive integer"
    if text.num_attention_heads % text.num_key_value_heads:
        yield f"text_config.num_key_value_heads is {text.num_key_value_heads}, no divisor of {text.num_attention_heads}"
    if not 0 < text.rms_norm_eps < 1:
        yield f"text_config.rms_norm_eps is {text.rms_norm_eps}, expected a small positive number"
    if text.hidden_act != "silu":
        yield f"text_config.hidden_act is {text.hidden_act!r}, expected 'silu', as every Qwen3-VL has"
    rope = text.rope_parameters
    if not _number(rope.get("rope_theta")) or rope["rope_theta"] <= 1:
        yield f"text_config.rope_theta is {rope.get('rope_theta')!r}, expected a number above 1"
    section = rope.get("mrope_section", [24, 20, 20])
    if len(section) != 3 or min(section) < 0 or 2 * sum(section) != text.head_dim:
        yield f"text_config.mrope_section is {section}, expected three that sum to half of head_dim {text.head_dim}"
    if vision.hidden_size % (4 * vision.num_heads):
        yield f"vision_config.num_heads is {vision.num_heads}, expected a divisor of {vision.hidden_size} / 4"
    if vision.in_channels != 3:
        yield f"vision_config.in_channels is {vision.in_channels}, expected 3"
    if math.isqrt(vision.num_position_embeddings) ** 2 != vision.num_position_embeddings:
        yield f"vision_config.num_position_embeddings is {vision.num_position_embeddings}, expected a square"
    taken = vision.deepstack_visual_indexes
    if len({*taken}) < len(taken) or not all(i in range(vision.depth) for i in taken):
        yield f"vision_config.deepstack_visual_indexes is {taken}, expected different layers below {vision.depth}"
    if len(taken) > text.num_hidden_layers:
        yield f"vision_config.deepstack_visual_indexes has {len(taken)} for {text.num_hidden_layers} layers of text"
    experts = getattr(text, "num_experts", None)
    if experts is not None and not 0 < text.num_experts_per_tok <= experts:
        yield f"text_config.num_experts_per_tok is {text.num_experts_per_tok}, expected 1 to {experts} experts"
    for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"):
        if not 0 <= getattr(config, name) < text.vocab_size:
            yield f"{name} is {getattr(config, name)}, expected a row of the {text.vocab_size} of the embedding"


def check_chat(path: Path, config: Any, chat: Chat) -> None:
    """Whether a model reads what ``chat`` writes: tokens against rows, placeholders and patches."""
    check_words(path, config, chat.vocab_size)
    vision, made = config.vision_config, chat.image_processor
    pairs = [
        ("image_token_id", config.image_token_id, "<|image_pad|>", chat.image_id),
        ("video_token_id", config.video_token_id, "<|video_pad|>", chat.video_id),
        ("vision_start_token_id", config.vision_start_token_id, "<|vision_start|>", chat.vision_start_id),
        ("vision_end_token_id", config.vision_end_token_id, "<|vision_end|>", chat.vision_end_id),
        ("vision_config.patch_size", vision.patch_size, "patch_size", made.patch_size),
        ("vision_config.spatial_merge_size", vision.spatial_merge_size, "merge_size", made.merge_size),
        (
            "vision_config.temporal_patch_size",
            vision.temporal_patch_size,
            "temporal_patch_size",
            made.temporal_patch_size,
        ),
    ]
    for key, value, name, other in pairs:
        if value != other:
            kind = "the tokenizer" if name.startswith("<|") else "the image processor"
            raise DataError(
                f"{path}/config.json: {key} is {value}, but {name} of {kind} is {other}; take all files from one"
                " checkpoint"
            )


def check_tokens(path: Path, chat: Chat) -> None:
    """Whether the tokenizer of a model that reads what ``chat`` writes, where it has one, gives tokens the same ids."""
    file = path / "tokenizer.json"
    if not file.is_file():
        return
    with one_line(f"{file}: cannot be read", AGAIN):
        ids = Tokenizer.from_file(str(file)).get_vocab()
    own = chat.tokenizer.get_vocab()
    other = next((token for token, index in own.items() if ids.get(token, index) != index), None)
    if other is not None:
        raise DataError(
            f"{file}: token {plain(repr(other))} is {ids[other]}, of the policy {own[other]}; take models that share"
            " one tokenizer"
        )


def check_words(path: Path, config: Any, words: int) -> None:
    """Whether every token has a row in the embedding."""
    rows = config.text_config.vocab_size
    if words > rows:
        raise DataError(
            f"{path}: the tokenizer has {words} tokens, the embedding {rows} rows; take the model's own tokenizer, or"
            " resize the embedding"
        )


# ---- the weights, by their headers


@dataclass(frozen=True)
class Stored:
    """One tensor of a safetensors file, by the file's header."""

    file: Path
    shape: tuple[int, ...]
    dtype: str  # as safetensors spells it: "BF16"


def read_header(file: Path) -> dict[str, Stored]:
    """The tensors of one safetensors file."""
    if not file.exists():
        raise DataError(f"{file}: no such file; {AGAIN}")
    with one_line(f"{file}: not a readable safetensors file", AGAIN):
        refuse_pointer(file)
        with safe_open(file, framework="pt") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
            return {name: Stored(file, tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}


def _refuse_other_kinds(path: Path, patterns: Collection[str]) -> None:
    """DataError where a folder holds an adapter, or one of these files of OTHER_WEIGHTS."""
    if any((path / f"adapter_{name}").exists() for name in ("config.json", "model.safetensors", "model.bin")):
        raise DataError(f"{path}: a LoRA adapter (adapter_config.json); merge it into its base model first")
    for pattern in patterns:
        if next(path.glob(pattern), None) is not None:
            raise DataError(f"{path}: {OTHER_WEIGHTS[pattern]}")


def stored_tensors(path: Path, beside: Collection[str] = ()) -> dict[str, Stored]:
    """The tensors of a model directory: those of model.safetensors, or of the files that the index names.

    ``beside``: names that the index may lack.
    """
    _refuse_other_kinds(path, ())
    single, index = path / SINGLE, path / INDEX
    if not index.exists():
        if single.exists() or single.is_symlink():
            return read_header(single)
        _refuse_other_kinds(path, OTHER_WEIGHTS)
        raise DataError(f"{path}: no {SINGLE}; {AGAIN}")
    tree = read_object(index)
    names = tree.get("weight_map")
    if not isinstance(names, dict) or not names:
        raise DataError(f"{index}: no weight_map; {AGAIN}")
    shards = {str(name): None for name in names.values()}
    for name in shards:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise DataError(
                f"{index}: names {plain(repr(name))}, expected safetensors files of its own folder; {AGAIN}"
            )
    if single.exists() and SINGLE not in shards:
        raise DataError(
            f"{path}: holds {SINGLE} and {INDEX}, which is of other files; remove the one that is not meant"
        )
    if not isinstance(tree.get("metadata"), dict):
        raise DataError(f'{index}: no object under metadata, which transformers reads; add "metadata": {{}}')
    found: dict[str, Stored] = {}
    for shard in shards:
        for name, stored in read_header(path / shard).items():
            if name in found:
                raise DataError(f"{stored.file}: {plain(name)} stands in {found[name].file.name} too; {AGAIN}")
            found[name] = stored
    wrong = next((n for n, shard in names.items() if n not in found or found[n].file.name != shard), None)
    wrong = wrong or next((n for n in found if n not in names and n not in beside), None)
    if wrong is not None:
        raise DataError(f"{index}: {plain(wrong)} is not where it says; {AGAIN}")
    return found


def check_weights(model_class: Any, config: Any, path: Path, beside: Collection[str] = ()) -> dict[str, Stored]:
    """The directory's tensors, held against what the configuration asks for: names, shapes, dtypes.

    ``beside``: names that may be there and are not the model's.
    """
    stored = stored_tensors(path, beside)
    _check_layers(config, path, stored)
    file = path / "config.json"
    with one_line(f"{file}: no model can be made of it", "take the config.json of the checkpoint"):
        with torch.device("meta"):
            model = model_class(config)
        shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        tied = model.lm_head.weight is model.get_input_embeddings().weight
    full = {
        f"model.{name}" if name not in shapes and f"model.{name}" in shapes else name: held
        for name, held in stored.items()
        if name not in beside
    }
    extra = sorted(full.keys() - shapes.keys())
    lacks = sorted(shapes.keys() - full.keys())
    if tied and len([name for name in lacks if name in _ends(shapes)]) == 1:  # one of both is enough
        lacks = [name for name in lacks if name not in _ends(shapes)]
    if lacks:
        raise DataError(
            f"{path}: no weights for {lacks[0]} ({len(lacks)} missing); expected a whole {config.model_type}"
        )
    if extra:
        raise DataError(
            f"{path}: weights that the model has not: {plain(extra[0])} ({len(extra)} unexpected); config.json and"
            " weights are of different models"
        )
    for name, held in full.items():
        if held.dtype not in FLOATS:
            raise DataError(f"{held.file}: {name} is {held.dtype}, expected floating point; {UNQUANTISED}")
        turned = re.search(r"experts\.(gate_up|down)_proj$", name) and held.shape[1:] == shapes[name][:0:-1]
        if held.shape != shapes[name] and not (turned and held.shape[0] == shapes[name][0]):
            raise DataError(
                f"{held.file}: {name} has shape {held.shape}, by config.json {shapes[name]}; config.json and weights"
                " are of different models"
            )
    return stored


def _ends(shapes: Collection[str]) -> list[str]:
    """Token embedding and head, which may be tied."""
    return [name for name in shapes if name.endswith(("embed_tokens.weight", "lm_head.weight"))]


def _check_layers(config: Any, path: Path, stored: Collection[str]) -> None:
    """The numbers of layers, before a model of so many is made."""
    for key, asked, pattern in (
        ("text_config.num_hidden_layers", config.text_config.num_hidden_layers, r"language_model\.layers\.(\d{1,6})\."),
        ("vision_config.depth", config.vision_config.depth, r"visual\.blocks\.(\d{1,6})\."),
    ):
        found = [int(match[1]) for name in stored if (match := re.search(pattern, name))]
        held = max(found, default=-1) + 1
        if held != asked:
            raise DataError(
                f"{path}/config.json: {key} is {asked}, the weights have {held}; config.json and weights are of"
                " different models"
            )


# ---- their values


def check_values(model: Any, config: Any, path: Path, stored: dict[str, Stored]) -> None:
    """Whether every weight is finite, by one reading of each; and tied ones one."""
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if value.is_floating_point():
            check_finite(value, name, stored[name].file if name in stored else path)
    head, embedding = model.lm_head.weight, model.get_input_embeddings().weight
    if config.tie_word_embeddings and head is not embedding:
        raise DataError(
            f"{path}: config.json ties lm_head to the embedding, the weights hold two that differ; set"
            " tie_word_embeddings to false, or remove lm_head.weight"
        )


def check_finite(value: torch.Tensor, name: str, file: Path) -> None:
    low, high = torch.aminmax(value.detach())
    if not (math.isfinite(low) and math.isfinite(high)):
        kind = str(value.dtype).removeprefix("torch.")
        raise DataError(
            f"{file}: {name} holds NaN or infinity (as {kind}); take another checkpoint, or download it again"
        )
