"""DecodeLayout: where the keys and values lie that each row of a decoding step sees.

B rows (one new token each), G prompts, PAGE tokens a page. All tensors keep their places and sizes, so that a captured
graph reads them anew: a sampler writes into them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prism_kernels.checks import check_device, check_tensor, integer, items, shown, wrong

PAGE = 64  # tokens
MAX_TOKENS = 1 << 24  # of a prompt or a response: more than any model reads


@dataclass(frozen=True, eq=False)
class DecodeLayout:
    """Tokens lie in pages that prompts and rows share, `PAGE` tokens each: token i of a row is token i % PAGE of page
    ``own_page[row, i // PAGE]``. Page 0 is nobody's: it stands wherever a table names none.

    Who samples writes tables and lengths, by `copy_` or under a captured graph; only `place` must be called by hand,
    where rows go to other prompts, as it computes which rows share a read of their prompt.

    >>> layout = DecodeLayout.build(rows=3, prompts=2, prompt_tokens=100, own_tokens=64)
    >>> layout.prompt_page.copy_(torch.tensor([[1, 2], [3, 0]]))     # 100 tokens in pages 1 and 2, 7 in page 3
    >>> layout.prompt_length.copy_(torch.tensor([100, 7]))
    >>> layout.own_page.copy_(torch.tensor([[4], [5], [6]]))
    >>> layout.place([1, 0, 1])
    >>> layout.own_length += 1                                       # each row has its first token
    """

    prompt_page: Tensor  # (G, pages) int32
    prompt_length: Tensor  # (G,) int32
    own_page: Tensor  # (B, pages) int32
    own_length: Tensor  # (B,) int32, the new token included; 0: the row is idle
    group: Tensor  # (B,) int32: which prompt a row continues
    tile_row: Tensor  # (tiles, width) int32: rows that read one prompt together; -1: none
    slot: Tensor  # (B,) int32: where a row stands in tile_row, flat
    arrived: Tensor  # (B * heads,) int32, for Hq <= heads: a GPU's programs count here, 0 between calls

    def __post_init__(self) -> None:
        rows, prompts = len(self.own_length), len(self.prompt_length)
        check_tensor("prompt_page", self.prompt_page, {"G": prompts, "pages": None}, [torch.int32])
        check_tensor("own_page", self.own_page, {"B": rows, "pages": None}, [torch.int32])
        check_tensor("tile_row", self.tile_row, {"tiles": None, "width": None}, [torch.int32])
        check_tensor("prompt_length", self.prompt_length, {"G": prompts}, [torch.int32])
        check_tensor("arrived", self.arrived, {"B * heads": None}, [torch.int32])
        for name in ("own_length", "group", "slot"):
            check_tensor(name, getattr(self, name), {"B": rows}, [torch.int32])
        for name, tensor in vars(self).items():
            check_device(name, tensor, "group", self.group)
            if not tensor.is_contiguous():
                raise wrong(name, "a contiguous table", f"strides {tensor.stride()}")

    @classmethod
    def build(
        cls,
        *,
        rows: int,
        prompts: int,
        prompt_tokens: int,
        own_tokens: int,
        rows_per_tile: int = 16,
        heads: int = 64,
        device: torch.device | str = "cpu",
    ) -> DecodeLayout:
        """All rows idle, at prompt 0, whose length is 0 as the others' are.

        Args:
            rows, prompts: B and G, >= 1.
            prompt_tokens, own_tokens: what the longest prompt and the longest response may have, >= 1.
            rows_per_tile: rows of a group that read their prompt together; times the query heads of a key-value head,
                64 fill a GPU's tile.
            heads: the most query heads of a call.

        Raises ValueError naming the argument.
        """
        rows = integer("rows", rows, 1, MAX_TOKENS)
        prompts = integer("prompts", prompts, 1, MAX_TOKENS)
        pages = [
            -(-integer(name, n, 1, MAX_TOKENS) // PAGE)
            for name, n in (("prompt_tokens", prompt_tokens), ("own_tokens", own_tokens))
        ]
        width = integer("rows_per_tile", rows_per_tile, 1, 128)
        tiles = min(rows, min(rows, prompts) + rows // width)
        most = integer("heads", heads, 1, MAX_TOKENS)
        try:
            place = torch.device(device)
        except (TypeError, RuntimeError):
            raise wrong("device", "a device of this machine", shown(device)) from None

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=place)

        layout = cls(
            zeros(prompts, pages[0]), zeros(prompts), zeros(rows, pages[1]), zeros(rows), zeros(rows),
            zeros(tiles, width), zeros(rows), zeros(rows * most),
        )  # fmt: skip
        if layout.group.device.type != "meta":
            layout.place([0] * rows)
        return layout

    @property
    def shape(self) -> tuple[int, int]:
        """(B, G)."""
        return len(self.group), len(self.prompt_length)

    def place(self, group: Sequence[int]) -> None:
        """Row i continues prompt ``group[i]`` from now on. Raises ValueError naming ``group``."""
        rows, prompts = self.shape
        numbers = [integer("group", g, 0, prompts - 1) for g in items("group", group, "a list of prompts' numbers")]
        if len(numbers) != rows:
            raise wrong("group", f"B = {rows} numbers of prompts", str(len(numbers)))
        width = self.tile_row.shape[1]
        tiles: list[list[int]] = []
        slot = [0] * rows
        open_tile: dict[int, int] = {}  # of each prompt, the one with room
        for row, g in enumerate(numbers):
            if g not in open_tile or len(tiles[open_tile[g]]) == width:
                open_tile[g] = len(tiles)
                tiles.append([])
            tile = open_tile[g]
            slot[row] = tile * width + len(tiles[tile])
            tiles[tile].append(row)
        filled = [tile + [-1] * (width - len(tile)) for tile in tiles]
        filled += [[-1] * width] * (len(self.tile_row) - len(tiles))
        for tensor, values in ((self.group, numbers), (self.tile_row, filled), (self.slot, slot)):
            tensor.copy_(_staged(values, tensor))


def _staged(values: list, like: Tensor) -> Tensor:
    host = torch.tensor(values, dtype=torch.int32)
    return host.pin_memory() if like.is_cuda else host
