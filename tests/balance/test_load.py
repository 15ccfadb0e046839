from __future__ import annotations

import pytest
import torch

from moe_runtime.balance.load import LoadRecorder
from moe_runtime.dispatch.base import GroupedRows, PaddedRows, Rows
from moe_runtime.types import LogicalRouting


def routing(ids: list[list[int]]) -> LogicalRouting:
    tensor = torch.tensor(ids)
    return LogicalRouting(tensor, torch.ones(tensor.shape))


def test_counts_real_tokens_by_layer_and_expert() -> None:
    recorder = LoadRecorder(2, 4)
    recorder.record(0, routing([[0, 3], [3, 1], [-1, -1]]))
    recorder.record(1, routing([[-1, -1]]))
    recorder.record(0, routing([[3, 2]]))
    recorder.record(1, LogicalRouting(torch.empty(0, 2, dtype=torch.int64), torch.empty(0, 2)))
    counts = recorder.counts()
    assert counts.dtype == torch.int64
    assert counts.tolist() == [[1, 1, 1, 3], [0, 0, 0, 0]]
    recorder.record(0, routing([[0, 1]]))
    assert counts.sum() == 6, "what was read stays as it was"


@pytest.mark.parametrize("num_logical", [4, 5])
def test_rows_of_all_layers_are_aligned_alike(num_logical: int) -> None:
    """A kernel that adds to them is compiled once, for addresses that are multiples of 16."""
    recorder = LoadRecorder(3, num_logical)
    for layer in range(3):
        row = recorder.counts_of(layer)
        assert (row.shape, row.is_contiguous(), row.data_ptr() % 16) == ((num_logical + 1,), True, 0)
        row[-1] += 7
    recorder.record(1, routing([[0, -1]]))
    assert recorder.counts().sum(1).tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (GroupedRows(torch.full((9, 2), torch.nan), torch.tensor([2, 5], dtype=torch.int32)), 5),
        (GroupedRows(torch.zeros(12, 2), torch.tensor([3, 5], dtype=torch.int32), alignment=4), 4),
        (PaddedRows(torch.zeros(2, 4, 2), torch.tensor([1, 4], dtype=torch.int32)), 5),
    ],
    ids=["more room than rows", "gaps", "padded"],
)
def test_only_real_rows_count_as_received(rows: Rows, expected: int) -> None:
    recorder = LoadRecorder(2, 4)
    recorder.record_received(1, rows)
    recorder.record_received(1, rows)
    assert recorder.received().tolist() == [0, 2 * expected]
