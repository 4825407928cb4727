"""Which rows are computed, and in which chunks. Decided from what the host knows: nothing here waits for a GPU, except
where a caller needs the unmasked rows of targets that lie on one.

T rows of the input, R of them computed, V vocab size, H hidden, S sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from prism_kernels.linear_logprob.records import IGNORE, Head

CPU_CHUNK_BYTES = 48 << 20  # 384 rows at V 32,768: the GEMM for z takes 8 % longer at 256 rows; 512 gain nothing
GPU_CHUNK_DIVISOR = 30  # of the GPU's memory: 5.0 GB on an H200, whose 8192 rows x 151,936 columns are 4.98 GB
ROW_ALIGNMENT = 16  # columns between the starts of a GPU's rows: what Triton's loads of 16 bytes ask of a stride
TILE_ROWS, TILE_COLUMNS = 128, 256  # output tile of the library's fastest bf16 GEMM on Hopper
CHUNK_COST = 0.5  # of one wave: reading and writing the fp32 dW once more per chunk


@dataclass(frozen=True)
class Plan:
    """``rows`` (R,) int64 beside hidden, or None for all T; ``targets`` (R,) beside hidden; ``chunks`` [(start, stop)]
    of the R rows. ``whole_sequences``: no sequence is cut by a chunk. ``maybe_skipped``: the host could not see
    whether skipped rows are among the R."""

    num_rows: int
    rows: Tensor | None
    targets: Tensor
    chunks: list[tuple[int, int]]
    whole_sequences: bool
    maybe_skipped: bool

    @property
    def longest(self) -> int:
        return max((stop - start for start, stop in self.chunks), default=0)

    def take(self, values: Tensor, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of the plan out of values (T, ...): a view where all rows are computed."""
        return values[start:stop] if self.rows is None else values[self.rows[start:stop]]

    def index(self, start: int, stop: int) -> Tensor:
        """(stop - start,) int64: their indices into the input."""
        if self.rows is not None:
            return self.rows[start:stop]
        return torch.arange(start, stop, device=self.targets.device)

    def spread(self, values: Tensor) -> Tensor:
        """(R,) -> (T,), 0 where a row was not computed."""
        if self.rows is None:
            return values
        return values.new_zeros(self.num_rows).index_copy_(0, self.rows, values)


def make_plan(
    head: Head,
    targets: Tensor,
    *,
    chunk_bytes: int = 0,
    unread: Tensor | None = None,
    sequence_start: Tensor | None = None,
    compact: bool = False,
) -> Plan:
    """Rows that nothing reads are dropped where the host can see them.

    ``unread`` (T,) bool on the host: further rows to drop. ``sequence_start``: end chunks where a sequence ends, if the
    host knows where, and if every sequence fits. ``compact``: drop skipped rows even if that waits for the GPU.
    ``chunk_bytes``: 0 for the device's default.
    """
    num_rows, width = head.hidden.shape
    device = head.hidden.device
    rows = None
    seen = compact or targets.device.type == "cpu"
    if seen:
        kept = targets != IGNORE
        if unread is not None:
            kept &= ~unread.to(kept.device)
        found = kept.nonzero().squeeze(1)
        if found.shape[0] < num_rows:
            rows = found
    num_kept = num_rows if rows is None else rows.shape[0]
    limit = chunk_row_limit(head.vocab_size, head.hidden.dtype, device, chunk_bytes)

    chunks = None
    if (
        sequence_start is not None
        and num_kept > limit
        and _on_host(sequence_start)
        and (rows is None or _on_host(rows))
    ):
        ends = sequence_start[1:].long()
        chunks = chunks_of_sequences((ends if rows is None else torch.searchsorted(rows, ends)).tolist(), limit)
    whole = chunks is not None or num_kept <= limit
    if chunks is None:
        chunks = list(chunks_of_rows(num_kept, limit, width, _processors(device)))

    targets = (targets.contiguous() if rows is None else targets[rows]).to(device, non_blocking=True)
    rows = None if rows is None else rows.to(device, non_blocking=True)
    return Plan(num_rows, rows, targets, chunks, whole, not seen)


def chunk_row_limit(vocab_size: int, dtype: torch.dtype, device: torch.device, chunk_bytes: int = 0) -> int:
    """Rows of logits (fp32, or fp64) that fit a chunk; at least 1."""
    if chunk_bytes == 0:
        chunk_bytes = CPU_CHUNK_BYTES
        if device.type == "cuda":
            chunk_bytes = torch.cuda.get_device_properties(device).total_memory // GPU_CHUNK_DIVISOR
    return max(1, chunk_bytes // (padded(vocab_size, device) * torch.promote_types(dtype, torch.float32).itemsize))


def padded(vocab_size: int, device: torch.device) -> int:
    """Columns of the chunk's buffer. A kernel must mask those past V itself."""
    return vocab_size if device.type == "cpu" else -(-vocab_size // ROW_ALIGNMENT) * ROW_ALIGNMENT


@lru_cache(maxsize=256)
def chunks_of_rows(num_rows: int, limit: int, num_hidden: int, processors: int) -> tuple[tuple[int, int], ...]:
    """Even chunks; on a GPU (``processors`` > 0) sized so that the tiles of the dX GEMM fill whole waves.

    Its R x H tiles are few: at H 2560 a chunk of 4096 rows makes 320 tiles, 2.4 waves of 132 processors that cost 3.
    """
    if num_rows == 0:
        return ()
    if processors == 0 or limit < TILE_ROWS:
        count = -(-num_rows // limit)
        size = -(-num_rows // count)
    else:
        size = min(
            range(TILE_ROWS, min(limit, num_rows + TILE_ROWS - 1) + 1, TILE_ROWS),
            key=lambda rows: (_waves(num_rows, rows, num_hidden, processors), -rows),
        )
    return tuple((start, min(start + size, num_rows)) for start in range(0, num_rows, size))


def chunks_of_sequences(ends: list[int], limit: int) -> list[tuple[int, int]] | None:
    """Chunks of whole sequences, at most ``limit`` rows each, or None where a sequence is longer than that."""
    chunks, start, previous = [], 0, 0
    for end in ends:
        if end - previous > limit:
            return None
        if end - start > limit:
            chunks.append((start, previous))
            start = previous
        previous = end
    if previous > start:
        chunks.append((start, previous))
    return chunks


def _waves(num_rows: int, size: int, num_hidden: int, processors: int) -> float:
    def waves(rows: int) -> int:
        tiles = -(-rows // TILE_ROWS) * -(-num_hidden // TILE_COLUMNS)
        return -(-tiles // processors)

    full, rest = divmod(num_rows, size)
    return full * (waves(size) + CHUNK_COST) + (waves(rest) + CHUNK_COST if rest else 0)


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 0


def _on_host(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"
