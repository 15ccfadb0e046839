from __future__ import annotations

import torch

from moe_runtime.balance.load import LoadRecorder
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
    recorder.reset()
    assert not recorder.counts().any()
    assert counts.sum() == 6, "what was read stays as it was"
