"""RouteBuffer: the logical experts of every token of a step, on the device. L layers, T rows, K top-k, n real rows."""

from __future__ import annotations

import torch
from torch import Tensor


class RouteBuffer:
    """Written by every MoE layer of a step, in place at fixed addresses, so that captured steps write it too.

    `rows` T: the most with which this rank enters a micro-batch; `top_k` K: experts of a token, dispatched shared ones
    included; ids are int16.
    """

    def __init__(
        self, num_layers: int, *, rows: int, top_k: int, micro_batches: int = 1, device: torch.device | str = "cpu"
    ) -> None:
        self._ids = torch.full((micro_batches, num_layers, rows, top_k), -1, dtype=torch.int16, device=device)

    @property
    def shape(self) -> tuple[int, int]:
        """(L, K)"""
        return self._ids.shape[1], self._ids.shape[3]

    @property
    def token_bytes(self) -> int:
        """Of one token's routes."""
        return self.shape[0] * self.shape[1] * self._ids.itemsize

    @property
    def device(self) -> torch.device:
        return self._ids.device

    @staticmethod
    def num_bytes(num_layers: int, *, rows: int, top_k: int, micro_batches: int = 1) -> int:
        """Device memory of such a buffer."""
        return micro_batches * num_layers * rows * top_k * torch.int16.itemsize

    def of(self, layer: int, micro_batch: int) -> Tensor:
        """[T, K] int16 of MoE layer `layer`, to write to."""
        return self._ids[micro_batch, layer]

    def take(self, num_real: int, micro_batch: int) -> Tensor:
        """[n, L, K] int16: the first rows, a copy."""
        return self._ids[micro_batch, :, :num_real].transpose(0, 1).clone(memory_format=torch.contiguous_format)
