"""The numbers of a captured decode step, at fixed addresses.

N rows of the step, n of them real tokens, M the largest size, P pages of the longest sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from moe_runtime.engine.plan import PENDING, ChunkKind, SequenceChunk

_ALIGN = 16
"""Numbers of 8 bytes: every field begins at a multiple of 128 bytes, as its own allocation would."""
_PAIR = 2
"""The numbers of micro-batches stand 16 bytes apart: kernels are compiled for the alignment of their pointers."""
_NUMBER_BYTES = 8


class StepFields(NamedTuple):
    """Views of a rank's buffers for a step of N rows; int64."""

    token_ids: Tensor
    """[N], 0 on padding"""
    positions: Tensor
    """[N], 0 on padding"""
    cache_rows: Tensor
    """[N], -1 on padding"""
    kv_lens: Tensor
    """[N], 0 on padding"""
    num_real: Tensor
    """[1]; of all micro-batches before `part` has chosen one"""
    page_table: Tensor
    """[N, P], columns of pages: what lies past a token's pages is left over from other steps"""
    logit_rows: Tensor
    """[N]: 0, 1, …"""

    def part(self, first: int, count: int, micro_batch: int) -> StepFields:
        """Those of a micro-batch, rows `first .. first + count - 1`."""
        own = slice(first, first + count)
        return StepFields(
            self.token_ids[own],
            self.positions[own],
            self.cache_rows[own],
            self.kv_lens[own],
            self.num_real[_PAIR * micro_batch :][:1],
            self.page_table[own],
            self.logit_rows[:count],
        )


class StepBuffers:
    """The numbers of a decode step at fixed addresses, written on the host and sent in one copy.

    The page table is stored by columns, so that the columns in use lie together: a step sends those alone.
    """

    def __init__(self, most: int, *, max_pages: int, page_size: int, device: torch.device) -> None:
        """For steps of up to `most` rows (M) and sequences of up to `max_pages` pages (P)."""
        self._most = most
        self._stride, self._table = _places(most)
        self._max_pages = max_pages
        self._page_size = page_size
        count = self._table + max_pages * most
        pinned = device.type == "cuda"
        self._host = torch.zeros(count, dtype=torch.int64, pin_memory=pinned)
        self._device = torch.zeros(count, dtype=torch.int64, device=device)
        self._rows = torch.arange(most, device=device)
        self._sent = torch.cuda.Event() if pinned else None  # type: ignore[no-untyped-call]

    @staticmethod
    def num_bytes(most: int, max_pages: int) -> int:
        """Device memory of such buffers."""
        return (_places(most)[1] + (max_pages + 1) * most) * _NUMBER_BYTES

    def fields(self, size: int) -> StepFields:
        """What a step of `size` rows reads."""
        data, stride, table = self._device, self._stride, self._table
        tokens, positions, cache_rows, kv_lens = (data[i * stride : i * stride + size] for i in range(4))
        pages = data[table : table + self._max_pages * size].view(self._max_pages, size).t()
        return StepFields(
            tokens, positions, cache_rows, kv_lens, data[4 * stride : 4 * stride + _ALIGN], pages, self._rows[:size]
        )

    def fill(self, chunks: Sequence[SequenceChunk], size: int, *, num_real: Sequence[int]) -> None:
        """The step of `chunks`, one token each, padded to `size` rows; `num_real` of this rank's own rows are tokens,
        per micro-batch.

        Asynchronous on a GPU: what runs on its current stream afterwards sees the new numbers.
        """
        n = len(chunks)
        width = max([len(chunk.pages) for chunk in chunks], default=1)
        assert n <= size <= self._most and width <= self._max_pages, f"{n} tokens, {width} pages in {size} rows"
        for chunk in chunks:
            assert len(chunk.token_ids) == 1 and chunk.kind is ChunkKind.DECODE, "a captured step decodes"
            assert chunk.token_ids[0] != PENDING, "a plan made before the last step was committed"
        if self._sent is not None:
            self._sent.synchronize()  # the last step's copy has long left; the device may not have come to it
        host, stride = self._host.numpy(), self._stride
        starts = np.array([chunk.start for chunk in chunks], dtype=np.int64)
        table = host[self._table : self._table + width * size].reshape(width, size)
        table[:] = 0
        for row, chunk in enumerate(chunks):
            table[: len(chunk.pages), row] = chunk.pages
        pages = table[starts // self._page_size, np.arange(n)]
        for i, (values, padding) in enumerate(
            (
                ([chunk.token_ids[0] for chunk in chunks], 0),
                (starts, 0),
                (pages * self._page_size + starts % self._page_size, -1),
                (starts + 1, 0),
            )
        ):
            host[i * stride : i * stride + n] = values
            host[i * stride + n : i * stride + size] = padding
        host[4 * stride : 4 * stride + _PAIR * len(num_real) : _PAIR] = num_real
        used = self._table + width * size
        self._device[:used].copy_(self._host[:used], non_blocking=True)
        if self._sent is not None:
            self._sent.record()


def _places(most: int) -> tuple[int, int]:
    """Of steps of up to `most` rows: numbers from one field to the next, and where the page table begins."""
    stride = -(-most // _ALIGN) * _ALIGN
    return stride, 4 * stride + _ALIGN
