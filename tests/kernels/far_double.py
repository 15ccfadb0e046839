"""NVSHMEM's device functions as Python, for kernels that the interpreter runs: blocks that only these functions reach.

A put without a signal is on its way until `quiet`; its target is garbage until then.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from moe_kernels.put_rows import triton_far
from torch import Tensor

SET, AT_LEAST = 9, 5


def number(value: Any) -> int:
    """Of a scalar that the interpreter or Python holds."""
    value = getattr(value, "value", value)
    return int(value.handle.data.item()) if hasattr(value, "handle") else int(value)


@dataclass
class FarMemory:
    """All ranks' blocks; `running` is whose kernel runs."""

    blocks: Sequence[Tensor]
    under_way: list[tuple[int, bytes]] = field(default_factory=list)
    calls: int = 0

    def of(self, address: int, rank: int) -> int:
        """The same place in the block of `rank`."""
        self.calls += 1
        for block in self.blocks:
            if 0 <= (offset := address - block.data_ptr()) < block.numel():
                return self.blocks[rank].data_ptr() + offset
        raise AssertionError(f"{address} lies in no block: NVSHMEM reaches symmetric memory only")

    def own(self, address: int) -> int:
        assert any(0 <= address - block.data_ptr() < block.numel() for block in self.blocks), "source is not in a block"
        return address

    def put_block(self, to: Any, source: Any, num_bytes: Any, rank: Any, _semantic: Any = None) -> None:
        target, size = self.of(number(to), number(rank)), number(num_bytes)
        ctypes.memset(target, 0x7F, size)
        self.under_way.append((target, ctypes.string_at(self.own(number(source)), size)))

    def quiet(self, _semantic: Any = None) -> None:
        for target, data in self.under_way:
            ctypes.memmove(target, data, len(data))
        self.under_way.clear()

    def put_signal_block(
        self, to: Any, source: Any, num_bytes: Any, signal: Any, value: Any, operation: Any, rank: Any
    ) -> None:
        target = self.of(number(to), number(rank))
        ctypes.memmove(target, self.own(number(source)), number(num_bytes))
        self.signal_op(signal, value, operation, rank)

    def get_block(self, to: Any, source: Any, num_bytes: Any, rank: Any) -> None:
        ctypes.memmove(self.own(number(to)), self.of(number(source), number(rank)), number(num_bytes))

    def signal_op(self, signal: Any, value: Any, operation: Any, rank: Any) -> None:
        assert number(operation) == SET
        ctypes.c_int64.from_address(self.of(number(signal), number(rank))).value = number(value)

    def signal_wait_until(self, signals: Any, comparison: Any, values: Any) -> None:
        assert number(comparison) == AT_LEAST
        for signal, value in zip(signals.handle.data.tolist(), values.handle.data.tolist(), strict=True):
            if value:
                seen = ctypes.c_int64.from_address(self.own(signal)).value
                assert seen >= value, f"a signal stands at {seen} and {value} will never come"

    def install(self, patch: pytest.MonkeyPatch) -> None:
        for name in ("put_block", "quiet", "put_signal_block", "get_block", "signal_op", "signal_wait_until"):
            patch.setattr(triton_far, name, getattr(self, name))
