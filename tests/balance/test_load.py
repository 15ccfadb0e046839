from __future__ import annotations

import pytest
import torch

from moe_runtime.balance.load import LoadRecorder
from moe_runtime.balance.routes import RouteBuffer
from moe_runtime.dispatch.base import GroupedRows, PaddedRows, Phase, Rows
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
    recorder.record(1, routing([[2, -1]]), Phase.DECODE)
    recorder.copy_counts_(out := torch.full((2, 4), 7))
    assert torch.equal(out, recorder.counts()) and out.sum() == 9


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
        (GroupedRows(torch.zeros(5, 2), torch.tensor([2, 5], dtype=torch.int32), exact=True), 5),
        (PaddedRows(torch.zeros(2, 4, 2), torch.tensor([1, 4], dtype=torch.int32)), 5),
    ],
    ids=["more room than rows", "gaps", "exact", "padded"],
)
def test_only_real_rows_count_as_received(rows: Rows, expected: int) -> None:
    recorder = LoadRecorder(2, 4)
    recorder.record_received(1, rows)
    recorder.record_received(1, rows)
    assert recorder.received().tolist() == [0, 2 * expected]


def test_phases_are_counted_apart() -> None:
    recorder = LoadRecorder(2, 4)
    recorder.record(1, routing([[0, 3]]), Phase.DECODE)
    recorder.record(1, routing([[0, 1], [-1, -1]]), Phase.MIXED)
    recorder.counts_of(0, Phase.DECODE)[2] += 5
    rows = PaddedRows(torch.zeros(2, 4, 2), torch.tensor([1, 4], dtype=torch.int32))
    recorder.record_received(0, rows, Phase.DECODE)
    recorder.record_received(0, rows, Phase.DECODE, captured=True)
    recorder.record_received(1, rows, Phase.MIXED)
    assert recorder.counts_by_phase().tolist() == [[[0, 0, 5, 0], [1, 0, 0, 1]], [[0, 0, 0, 0], [1, 1, 0, 0]]]
    assert recorder.received_by_phase().tolist() == [[10, 0], [0, 5]]
    assert recorder.counts().tolist() == [[0, 0, 5, 0], [2, 1, 0, 1]]
    assert recorder.received().tolist() == [10, 5]


def test_few_assignments_wait_to_be_counted() -> None:
    """Neither many calls nor large ones are kept; all are counted in the end."""
    recorder = LoadRecorder(1, 4)
    waiting = []
    for number in range(200):
        recorder.record(0, routing([[number % 4, (number + 1) % 4]]), Phase.DECODE)
        waiting.append(sum(map(len, recorder._late)))
    assert 32 < max(waiting) < 150
    recorder.record(0, routing([[0, 1]] * 10000), Phase.DECODE)
    assert not any(recorder._late)
    assert recorder.counts().tolist() == [[10100, 10100, 100, 100]]


def test_routes_are_kept_where_a_buffer_is() -> None:
    routes = RouteBuffer(2, rows=3, top_k=2, micro_batches=2)
    recorder = LoadRecorder(2, 4, routes=routes)
    recorder.record(0, routing([[0, 3], [2, 1], [-1, -1]]))
    recorder.record(1, routing([[1, 0], [3, 2], [-1, -1]]))
    recorder.record(1, routing([[3, 3]]), micro_batch=1)
    assert routes.take(2, 0).tolist() == [[[0, 3], [1, 0]], [[2, 1], [3, 2]]]
    assert routes.take(1, 1)[:, 1].tolist() == [[3, 3]]
    taken = routes.take(1, 0)
    recorder.record(0, routing([[2, 2]]))
    assert taken[0, 0].tolist() == [0, 3], "a copy"
    assert (routes.shape, routes.token_bytes) == ((2, 2), 8)
    assert RouteBuffer.num_bytes(2, rows=3, top_k=2, micro_batches=2) == 48
    assert LoadRecorder(2, 4).routes_of(0) is None
