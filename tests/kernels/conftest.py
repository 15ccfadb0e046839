"""What the kernel tests share: one thread, no gradients, seeded values and rows placed at chosen memory offsets."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

Rows = Callable[[Tensor], Tensor]
CheckRows = Callable[[Rows, Tensor], None]

COUNTS = (1, 2, 3, 15, 16, 17, 33)


@pytest.fixture(autouse=True)
def _quiet_torch() -> Iterator[None]:
    """One thread (the invariant mode pins it), inference only, the same values in every run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with torch.inference_mode():
        yield
    torch.set_num_threads(threads)


def at_offset(x: Tensor, offset: int) -> Tensor:
    """A copy of `x` that starts `offset` elements into its storage, so off the allocator's 64-byte alignment."""
    storage = torch.empty(x.numel() + offset, dtype=x.dtype)
    return storage[offset:].view(x.shape).copy_(x)


def first_difference(got: Tensor, want: Tensor) -> str:
    """How many values differ, the first place and both values there."""
    differ = (got != want).nonzero()
    where = tuple(differ[0].tolist())
    return f"{len(differ)} of {want.numel()} values differ, first at {where}: {got[where]!r} != {want[where]!r}"


@pytest.fixture
def check_rows() -> CheckRows:
    """Demand that `f` gives every row of `x` the same bits whatever the row count, position and memory offset."""

    def check(f: Rows, x: Tensor) -> None:
        alone = torch.cat([f(row) for row in torch.split(x, 1)])
        for count in COUNTS:
            for start in (0, 1, 5):
                for offset in (0, 1, 8):
                    got = f(at_offset(x[start : start + count], offset))
                    want = alone[start : start + count]
                    assert torch.equal(got, want), (
                        f"{count} rows from {start}, offset {offset}: {first_difference(got, want)}"
                    )

    return check
