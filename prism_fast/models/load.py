"""A stage's models: opened as its configuration says, saved with what opens them again."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from prism_fast import ranks
from prism_fast.config import ModelConfig
from prism_fast.data.chat import Chat
from prism_fast.models.backbone import local_directory, save_model
from prism_fast.models.checkpoint_checks import check_chat, check_tokens, read_config
from prism_fast.models.discriminator import Discriminator
from prism_fast.models.policy import Policy
from prism_kernels.moe import load_product_choices, product_choices, settle_products


def pick_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)


def open_chat(path: Path, architecture: str) -> Chat:
    """The chat format of a model directory, held against the model's configuration. Raises DataError."""
    config = read_config(path, architecture)
    chat = Chat.load(path)
    check_chat(path, config, chat)
    return chat


def check_reader(path: Path, architecture: str, chat: Chat) -> None:
    """Whether a model reads what ``chat``, maybe another model's, writes. Raises DataError."""
    check_chat(path, read_config(path, architecture), chat)
    check_tokens(path, chat)


def open_policy(config: ModelConfig, saved: Path | None = None) -> tuple[Policy, Chat]:
    """The policy at ``config.path`` and the chat format beside it; from ``saved``, a checkpoint's, where it is given.

    Raises DataError where there is no such model, or it is of another architecture; so do the others here.
    """
    path = saved or local_directory(config.path)
    chat = open_chat(path, "qwen3_vl")
    return load_policy(config, chat, path), chat


def load_policy(config: ModelConfig, chat: Chat, saved: Path | None = None) -> Policy:
    """A policy that samples what ``chat`` lets it."""
    device = pick_device()
    path, dtype = saved or local_directory(config.path), pick_dtype(config.dtype, device)
    check_reader(path, "qwen3_vl", chat)
    policy = Policy.load(path, forbidden=chat.forbidden_ids, words=chat.vocab_size, dtype=dtype, device=device)
    return _prepare(policy, config)


def open_discriminator(
    config: ModelConfig, saved: Path | None = None, head_dropout: float = 0.0
) -> tuple[Discriminator, Chat]:
    """As `open_policy`."""
    path = saved or local_directory(config.path)
    chat = open_chat(path, "qwen3_vl_moe")
    return load_discriminator(config, path, head_dropout), chat


def load_discriminator(
    config: ModelConfig, saved: Path | None = None, head_dropout: float = 0.0, *, chat: Chat | None = None
) -> Discriminator:
    """A discriminator without a chat format of its own: it reads what a policy's has made, ``chat``."""
    device = pick_device()
    path, dtype = saved or local_directory(config.path), pick_dtype(config.dtype, device)
    if chat is not None:
        check_reader(path, "qwen3_vl_moe", chat)
    discriminator = Discriminator.load(path, dtype=dtype, device=device, dropout=head_dropout)
    if ranks.world() > 1 and device.type != "cpu":  # while weights are whole
        experts: Any = discriminator.text.layers[0].mlp
        settle_products(experts.experts.gate_up_proj, experts.experts.down_proj)
    return _prepare(discriminator, config)


def _prepare(module, config: ModelConfig):
    module.freeze(vision=config.freeze_vision, embeddings=config.freeze_embeddings)
    if config.activation_checkpointing:
        module.checkpoint_activations()
    return module.train()


SaveModel = Callable[[Path], None]


def with_chat(model: Policy | Discriminator, chat: Chat) -> SaveModel:
    """Saves a model with its tokenizer and image processor, so that the directory opens by itself."""

    def save_both(path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)
        model.save(path)
        chat.save(path)

    return save_both


def collected(
    model: Policy | Discriminator, chat: Chat, stream: Callable[[], Iterable[tuple[str, Tensor]]]
) -> Callable[[int], SaveModel]:
    """(parts) -> what saves a trained model as it now is, from copies on hosts. A call of all processes.

    The weights are dealt to the first ``parts`` of them. What each gets back writes its own into a file of its own, and
    the first one's what else the directory holds: at any later time, from any thread.
    """
    rest = _Rest(model, chat)

    def collect(parts: int = 1) -> SaveModel:
        share = ranks.Share(parts)
        for name, tensor in stream():
            share.offer(name, tensor)
        beside = rest.files(share.kept) if ranks.is_first() else {}
        assert model.shapes is not None  # made here: not in a thread

        def save(path: Path) -> None:
            path.mkdir(parents=True, exist_ok=True)
            if isinstance(beside, Exception):
                raise beside
            for name, content in beside.items():
                (path / name).write_bytes(content)
            for name, tensors in model.files(share.kept).items():
                if not tensors:
                    continue
                whole = {key: value.contiguous() for key, value in tensors.items()}
                file = share.file(name) if name == "model" else f"{name}.safetensors"
                save_file(whole, path / file, metadata={"format": "pt"})

        return save

    return collect


class _Rest:
    """What a model's directory holds beside its weights: it stays the same, so transformers writes it once."""

    def __init__(self, model: Policy | Discriminator, chat: Chat):
        self.model, self.chat = model, chat
        self._files: dict[str, bytes] | None = None

    def files(self, weights: dict[str, Tensor]) -> dict[str, bytes] | Exception:
        """By name; where the system refuses to write them to a folder for a moment, what it said.

        ``weights``: the first of them, of the dtype that config.json tells.
        """
        if self._files is None:
            first = {name: weights[name] for name in [name for name in weights if name.startswith("model.")][:1]}
            try:
                with tempfile.TemporaryDirectory() as folder:
                    save_model(self.model, folder, first)
                    self.chat.save(folder)
                    found = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
            except Exception as error:  # noqa: BLE001 (libraries raise whatever they like where a disk is full)
                return error
            self._files = {name: content for name, content in found.items() if not name.endswith(".safetensors")}
        return self._files


class ProductChoices:
    """Which library multiplies the experts on a GPU, as a part of a checkpoint.

    It was measured, and measured again the choice could fall otherwise: other products give other bits. Where there are
    several processes, rank 0 measures for all (`load_discriminator`).
    """

    state = staticmethod(product_choices)
    load = staticmethod(load_product_choices)
