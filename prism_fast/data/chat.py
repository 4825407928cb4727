"""Chat template, tokens and pixels of a Qwen3-VL checkpoint: what Qwen3VLProcessor does, without torchvision.

Text from data never becomes a control token. A prompt that spells one ("<|im_end|>", "<|image_pad|>") is refused with
a DataError, since its template is tokenised as one string; responses and their parts are tokenised with control tokens
switched off, so a response that spells one yields ordinary tokens.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Sequence
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prism_fast.data.chat_files import (
    END_OF_TURN,
    ROUND_TRIP,
    brief,
    one_line,
    open_image_processor,
    open_tokenizer,
    quiet,
    render,
)
from prism_fast.data.patches import PatchMaker
from prism_fast.data.processed import Patches, ProcessedImages
from prism_fast.records import DataError, Message, Prompt, Sample

IMAGE = "<image>"
VISION_TOKENS = {
    "image": "<|image_pad|>",
    "video": "<|video_pad|>",
    "vision_start": "<|vision_start|>",
    "vision_end": "<|vision_end|>",
}


class Chat:
    """Tokenizer and image processor of one checkpoint.

    >>> chat = Chat.load("Qwen/Qwen3-VL-4B-Instruct")
    >>> prompt = chat.encode_prompt(sample)               # ends with "<|im_start|>assistant\\n"
    >>> chat.decode(chat.encode_response("<caption>..."))  # end-of-turn is appended by the one, removed by the other
    """

    def __init__(self, tokenizer: Any, image_processor: Any):
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        # A tokenizer has one state, such as whether control tokens are on, and a step may be drawn beside another.
        self._one_at_a_time = threading.Lock()
        self._tokenize = getattr(tokenizer, "backend_tokenizer", None)
        if self._tokenize is None:
            raise DataError(f"tokenizer: {type(tokenizer).__name__} has no tokenizer.json behind it; add that file")
        self._tokenize.no_truncation()
        self._tokenize.no_padding()
        added = {token.content: index for index, token in tokenizer.added_tokens_decoder.items()}
        missing = [token for token in (END_OF_TURN, *VISION_TOKENS.values()) if token not in added]
        if missing:
            raise DataError(f"tokenizer: no token {', '.join(missing)}; use the tokenizer of a Qwen3-VL checkpoint")
        if tokenizer.pad_token_id is None:
            raise DataError("tokenizer: no padding token; set pad_token in tokenizer_config.json")
        self.end_of_turn_id: int = added[END_OF_TURN]
        self.pad_id: int = tokenizer.pad_token_id
        self.image_id, self.video_id, self.vision_start_id, self.vision_end_id = (
            added[token] for token in VISION_TOKENS.values()
        )
        # Control tokens: all that are flagged special, and those of the form <|...|> that Qwen does not flag.
        self._control = {
            token.content: index
            for index, token in tokenizer.added_tokens_decoder.items()
            if token.special or (token.content.startswith("<|") and token.content.endswith("|>"))
        }
        unflagged = [token for token in self._control if not tokenizer.added_tokens_decoder[added[token]].special]
        # Between "<|" and the rest of a control token that switching off special tokens leaves on.
        self._seam = re.compile("|".join(rf"(?<=<\|)(?={re.escape(token[2:])})" for token in unflagged) or r"(?!)")
        # The padding token is never sampled either, unless it is the end of turn too.
        self.forbidden_ids: tuple[int, ...] = tuple(
            sorted({*self._control.values(), self.pad_id} - {self.end_of_turn_id})
        )
        self.images = ProcessedImages(PatchMaker(image_processor))

    @classmethod
    def load(cls, model_dir: str | Path) -> Chat:
        """Open the tokenizer, chat template and image processor of a checkpoint directory (or hub name).

        Raises DataError on what does not open, and on what opens but is not Qwen3-VL's: see `chat_files`.
        """
        tokenizer, image_processor = open_tokenizer(model_dir), open_image_processor(model_dir)
        try:
            chat = cls(tokenizer, image_processor)
        except DataError as error:
            raise DataError(f"{model_dir}: {error}") from None
        with one_line(f"{model_dir}: tokenizer: not Qwen3-VL's", "take tokenizer.json of the checkpoint"):
            if len({piece for piece in chat.token_bytes if len(piece) == 1}) < 256:
                raise ValueError("some bytes have no token")
            if chat.decode(chat.encode_part(ROUND_TRIP)) != ROUND_TRIP:
                raise ValueError("text does not come back from its tokens")
        return chat

    def save(self, out_dir: str | Path) -> None:
        """Write tokenizer, chat template and image settings, so that a saved model directory opens by itself."""
        with quiet():
            self.tokenizer.save_pretrained(out_dir)
            self.image_processor.save_pretrained(out_dir)

    @property
    def vocab_size(self) -> int:
        """Number of token ids the tokenizer knows; a model's embedding may have more rows."""
        return len(self.tokenizer)

    def encode_prompt(self, sample: Sample, max_tokens: int | None = None) -> Prompt:
        """Render, tokenise and preprocess the prompt of ``sample``; ends with the start of the assistant's turn.

        Every ``<image>`` becomes one placeholder token per merged patch between the vision marks. Raises DataError for
        an image that does not open, a control token in the text, or more than ``max_tokens`` tokens.
        """
        self._refuse_control_tokens(sample)
        try:
            text = render(self.tokenizer, [self._template_message(message) for message in sample.messages])
        except Exception as error:  # a template is a program: raise_exception(...), or its own faults
            raise DataError(
                f"{sample.place}: messages: the chat template refuses them ({brief(error)});"
                " keep to its roles and their order"
            ) from error
        pixels = grid = decode = None
        keys: tuple[bytes, ...] = ()
        if sample.images and sample.seen is not None:
            grid, decode = torch.tensor(sample.seen.grid), lambda: self._pixels(sample).pixels
            keys = sample.seen.image_keys
        elif sample.images:
            pixels, grid, keys = self._pixels(sample)
        if grid is not None:
            text = self._expand(text, grid, sample.place)
        ids = torch.tensor(self._tokens(text), dtype=torch.int64)
        if max_tokens is not None and len(ids) > max_tokens:
            raise DataError(
                f"{sample.place}: prompt: {len(ids)} tokens are over the limit of {max_tokens};"
                " raise the limit, shorten the text or make the images smaller"
            )
        return Prompt(ids, pixels, grid, _key(ids, keys), sample.place, decode, keys)

    def encode_part(self, text: str) -> Tensor:
        """(L,) int64: the tokens of a part of a response (a caption, a reasoning), tokenised on its own."""
        ids = self._tokens(*self._seam.split(text), control=False)
        return torch.tensor(ids, dtype=torch.int64)

    def _tokens(self, *texts: str, control: bool = True) -> list[int]:
        """Of texts one after the other. ``control``: whether control tokens that they spell are such."""
        with self._one_at_a_time:
            # Not by calling the tokenizer, which does the same at several times the cost of a short text.
            self._tokenize.encode_special_tokens = not control
            return [index for text in texts for index in self._tokenize.encode(text, add_special_tokens=False).ids]

    def encode_response(self, text: str) -> Tensor:
        """(L + 1,) int64: the tokens of a response, then end-of-turn."""
        return torch.cat([self.encode_part(text), torch.tensor([self.end_of_turn_id])])

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """The text of sampled tokens: their bytes as UTF-8, without end-of-turn and padding."""
        ids = ids.tolist() if isinstance(ids, Tensor) else ids
        return b"".join(self.token_bytes[index] for index in ids).decode("utf-8", errors="replace")

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """The bytes of every token id, for ``prism_kernels.find_tag_spans``: b"" for end-of-turn and padding, and the
        token's name for other added tokens, so that one that arrives in a response from outside is seen as text."""
        unbyte = {character: byte for byte, character in _byte_characters().items()}
        added = self.tokenizer.added_tokens_decoder
        table = []
        for index, token in enumerate(self.tokenizer.convert_ids_to_tokens(list(range(self.vocab_size)))):
            if index in (self.end_of_turn_id, self.pad_id) or token is None:
                table.append(b"")
            elif index in added:
                table.append(token.encode())
            else:
                table.append(bytes(unbyte[character] for character in token))
        return table

    def holds_forbidden(self, ids: Iterable[int]) -> bool:
        """Whether a response from outside holds a token that is never sampled (invalid format, not an image)."""
        return not set(self.forbidden_ids).isdisjoint(ids)

    def _refuse_control_tokens(self, sample: Sample) -> None:
        for number, message in enumerate(sample.messages):
            if "<|" not in message.content and all(token.startswith("<|") for token in self._control):
                continue
            found = [token for token in self._control if token in message.content]
            if found:
                raise DataError(
                    f"{sample.place}: messages[{number}].content: holds the control token {found[0]};"
                    " remove it or write it differently"
                )

    def _template_message(self, message: Message) -> dict[str, Any]:
        if IMAGE not in message.content:
            return {"role": message.role, "content": message.content}
        parts: list[dict[str, str]] = []
        for number, text in enumerate(message.content.split(IMAGE)):
            if number:
                parts.append({"type": "image"})
            if text:
                parts.append({"type": "text", "text": text})
        return {"role": message.role, "content": parts}

    def _pixels(self, sample: Sample) -> Patches:
        try:
            return self.images(sample.images, sample.place)
        except DataError:
            raise
        except ValueError as error:  # a size that the processor refuses and open_image takes
            detail = " ".join(str(error).split())[:160]
            raise DataError(f"{sample.place}: images: cannot be preprocessed ({detail}); resize the image") from error

    def _expand(self, text: str, grid: Tensor, place: str) -> str:
        placeholder = VISION_TOKENS["image"]
        pieces = text.split(placeholder)
        if len(pieces) != len(grid) + 1:
            raise DataError(
                f"{place}: images: the chat template wrote {len(pieces) - 1} placeholders for {len(grid)} images;"
                " use a template that writes one for each image part"
            )
        counts = (grid.prod(dim=1) // self.image_processor.merge_size**2).tolist()
        return pieces[0] + "".join(placeholder * count + piece for count, piece in zip(counts, pieces[1:]))


def _key(ids: Tensor, image_keys: Sequence[bytes]) -> bytes:
    """Hash of token ids and images: equal only where a root may be shared."""
    digest = blake2b(str(len(ids)).encode(), digest_size=16)
    digest.update(ids.numpy())
    for key in image_keys:
        digest.update(key)
    return digest.digest()


def _byte_characters() -> dict[int, str]:
    """The printable character that byte-level BPE writes for each byte: itself where it is printable Latin-1 and no
    white space, else the code points from 256 on, in order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {byte: chr(byte) for byte in printable}
    table.update({byte: chr(256 + position) for position, byte in enumerate(others)})
    return table
