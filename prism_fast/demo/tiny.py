"""A tiny Qwen3-VL (about 2M parameters, random weights) saved as an ordinary Hugging Face checkpoint.

Everything that opens Qwen/Qwen3-VL-4B-Instruct opens this directory with the same code: config, safetensors, tokenizer
with chat template, image processor. Nothing is downloaded: the byte-level BPE is trained on the texts it will see.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

# Qwen's split (single digits, words with their leading space, punctuation) with two additions that keep the demo's
# sequences near 45 tokens: an XML tag is one piece, and a digit takes the white space and the sign before it.
SPLIT = r"</?[a-z]+>|\s?-?\p{N}|[^\r\n\p{L}\p{N}<]?\p{L}+| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.content is string -%}
{{- message.content -}}
{%- else -%}
{%- for part in message.content -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' if part.type == 'image' else part.text -}}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""

PATCH = 8
MERGE = 2


def train_tokenizer(texts: Iterable[str], vocab_size: int = 512) -> PreTrainedTokenizerFast:
    """Byte-level BPE over ``texts`` with Qwen-VL's special tokens and chat template; any text can be encoded."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    template_words = ["system\nuser\nassistant\n"] * 100  # the chat template's own words, which no record holds
    tokenizer.train_from_iterator([*texts, *template_words], trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def tiny_config(tokenizer: PreTrainedTokenizerFast) -> Qwen3VLConfig:
    """The shape of the demo's model; every part of Qwen3-VL is there once: GQA, mRoPE, DeepStack, patch merger."""
    token = tokenizer.convert_tokens_to_ids
    text = dict(
        vocab_size=-(-len(tokenizer) // 8) * 8,
        hidden_size=160,
        intermediate_size=480,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        initializer_range=0.05,
        rms_norm_eps=1e-6,
        # A small base: neighbouring digits are one position apart, and mRoPE gives width only every third frequency.
        rope_parameters=dict(rope_type="default", rope_theta=100.0, mrope_section=[6, 5, 5], mrope_interleaved=True),
        bos_token_id=token("<|endoftext|>"),
        eos_token_id=token("<|im_end|>"),
        pad_token_id=token("<|endoftext|>"),
        tie_word_embeddings=True,
    )
    vision = dict(
        depth=2,
        hidden_size=96,
        intermediate_size=256,
        num_heads=4,
        patch_size=PATCH,
        spatial_merge_size=MERGE,
        temporal_patch_size=2,
        out_hidden_size=160,
        num_position_embeddings=64,
        deepstack_visual_indexes=[0],
        initializer_range=0.05,
    )
    return Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
    )


def make_tiny_model(out_dir: str | Path, corpus_texts: Iterable[str], seed: int = 0) -> Path:
    """Write a randomly initialised tiny Qwen3-VL checkpoint to ``out_dir`` and return the directory.

    ``corpus_texts``: the texts the tokenizer is trained on. The same seed and texts give the same files.
    """
    out_dir = Path(out_dir)
    tokenizer = train_tokenizer(corpus_texts)
    config = tiny_config(tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3VLForConditionalGeneration(config)
        with torch.no_grad():  # so few patches need positions that stand out from the start
            model.model.visual.pos_embed.weight.mul_(10)
    token = tokenizer.convert_tokens_to_ids
    model.generation_config.eos_token_id = [token("<|im_end|>"), token("<|endoftext|>")]
    model.generation_config.pad_token_id = token("<|endoftext|>")
    model.save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)
    image_processor(min_pixels=(PATCH * MERGE) ** 2, max_pixels=64 * 64).save_pretrained(out_dir)
    return out_dir


def image_processor(min_pixels: int, max_pixels: int) -> Qwen2VLImageProcessorPil:
    """Qwen3-VL's image processor at the tiny model's patch size; mean and deviation are those of the dark scenes."""
    return Qwen2VLImageProcessorPil(
        patch_size=PATCH,
        merge_size=MERGE,
        temporal_patch_size=2,
        size={"shortest_edge": min_pixels, "longest_edge": max_pixels},
        image_mean=[0.25, 0.25, 0.25],
        image_std=[0.25, 0.25, 0.25],
    )
