"""WeightSource: what a model's assembly reads its weights from; the ranks of one process share equal slices."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Protocol, TypeVar, cast

import torch
from moe_kernels.scaled import BlockScaled
from torch import Tensor

from moe_runtime.loading.checkpoint import Checkpoint, Region
from moe_runtime.loading.shard import TensorSpec, load_blocks, load_region

T = TypeVar("T")


class WeightSource(Protocol):
    """Reads slices by checkpoint name."""

    @property
    def dtype(self) -> torch.dtype:
        """Compute dtype of weights that are not asked for otherwise."""

    @property
    def device(self) -> torch.device: ...

    def read(self, name: str, region: Region | None = None, *, dtype: torch.dtype | None = None) -> Tensor: ...

    def is_fp8(self, name: str) -> bool:
        """Whether the checkpoint stores this matrix in FP8 blocks. Which ones it does is seen from the files only."""

    def read_blocks(self, name: str, region: Region | None = None) -> BlockScaled:
        """The region as it is stored, where `is_fp8`; it must start on borders of blocks."""

    def shared(self, key: Hashable, build: Callable[[], T]) -> T:
        """The value built for `key`: built once per process, so it must be immutable."""


class CheckpointSource:
    """Reads from a checkpoint folder to `device`, nothing but the region asked for; tells `on_read` its bytes as stored
    (without the scales of FP8 blocks)."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        specs: Mapping[str, TensorSpec],
        *,
        dtype: torch.dtype,
        device: torch.device,
        on_read: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._checkpoint = checkpoint
        self._specs = specs
        self._dtype = dtype
        self._device = device
        self._on_read = on_read
        self._shared: dict[Hashable, object] = {}

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @property
    def device(self) -> torch.device:
        return self._device

    def read(self, name: str, region: Region | None = None, *, dtype: torch.dtype | None = None) -> Tensor:
        tensor = load_region(self._checkpoint, self._specs[name], region, dtype=dtype or self._dtype)
        self._on_read(tensor.numel() * self._checkpoint.info(name).dtype.itemsize)
        return tensor.to(self._device)

    def is_fp8(self, name: str) -> bool:
        return self._specs[name].block is not None and self._checkpoint.info(name).dtype == torch.float8_e4m3fn

    def read_blocks(self, name: str, region: Region | None = None) -> BlockScaled:
        scaled = load_blocks(self._checkpoint, self._specs[name], region)
        self._on_read(scaled.data.nbytes)
        return BlockScaled(scaled.data.to(self._device), scaled.scale.to(self._device))

    def shared(self, key: Hashable, build: Callable[[], T]) -> T:
        if key not in self._shared:
            self._shared[key] = build()
        return cast(T, self._shared[key])

    def end_sharing(self) -> None:
        """Every rank of the process is built: hold none of their values any longer than they do."""
        self._shared.clear()
