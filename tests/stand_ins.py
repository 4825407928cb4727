"""Folders that look like Qwen3-VL's models, in their published dimensions and without weights; files of one record in
each of the formats. What a dry run looks at."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

# hidden, layers, intermediate, heads, tied: of Qwen/Qwen3-VL-2B-Instruct, 4B, 8B (config.json of each)
TEXT = {
    "2b": (2048, 28, 6144, 16, True),
    "4b": (2560, 36, 9728, 32, True),
    "8b": (4096, 36, 12288, 32, False),
}
VISION = {size: (1024, 24, 4096, [5, 11, 17]) for size in ("2b", "4b")} | {"8b": (1152, 27, 4304, [8, 16, 24])}
NAMES = ("tokenizer.json", "preprocessor_config.json", "model.safetensors")


def config(size: str, experts: int = 1) -> dict:
    """config.json of a policy, or of a discriminator of several experts."""
    hidden, layers, intermediate, heads, tied = TEXT[size]
    wide, depth, mlp, taps = VISION[size]
    text = {
        "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": 8,
        "head_dim": 128, "vocab_size": 151_936, "rope_theta": 5_000_000,
    }  # fmt: skip
    if experts > 1:
        text |= {"moe_intermediate_size": intermediate, "num_experts": experts, "num_experts_per_tok": 2}
    else:
        text["intermediate_size"] = intermediate
    vision = {
        "hidden_size": wide, "depth": depth, "intermediate_size": mlp, "out_hidden_size": hidden, "num_heads": 16,
        "deepstack_visual_indexes": taps, "num_position_embeddings": 2304, "in_channels": 3, "patch_size": 16,
        "temporal_patch_size": 2, "spatial_merge_size": 2,
    }  # fmt: skip
    kind = "qwen3_vl_moe" if experts > 1 else "qwen3_vl"
    return {"model_type": kind, "tie_word_embeddings": tied, "text_config": text, "vision_config": vision}


def model(folder: Path, size: str, experts: int = 1) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config(size, experts)))
    for name in NAMES:
        (folder / name).touch()
    return folder


PROMPT = {"prompt": [{"role": "user", "content": "<image>Sum?"}], "images": ["0.png"]}
PROMPT |= {"reward_model": {"style": "rule", "ground_truth": "10"}, "data_source": "d", "extra_info": {"index": 0}}
PARTS = {"teacher_caption": "<caption>3 7</caption>", "teacher_cot": "<think>10</think><answer>10</answer>"}
RECORDS = {
    "sft": {
        "messages": [{"role": "user", "content": "<image>Sum?"}, {"role": "assistant", "content": "10"}],
        "images": ["0.png"],
    },
    "warm-up": {"prompt": "Sum?", "image": "0.png", **PARTS, "student_caption": "<caption>3</caption>"},
    "alignment": {**PROMPT, **PARTS},
    "rlvr": PROMPT,
}


def data(file: Path, kind: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist([RECORDS[kind]]), file)
    else:
        text = json.dumps(RECORDS[kind])
        file.write_text(f"{text}\n" if file.suffix == ".jsonl" else f"[{text}]")
    return file
