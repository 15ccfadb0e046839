"""The double of CUDA graphs keeps the limits of the real ones."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from moe_kernels import backends
from torch import Tensor

from tests.doubles.cuda_graph import CaptureError, RecordedGraph, RecordedGraphs


@triton.jit  # type: ignore[untyped-decorator]
def _add_kernel(x, y, out, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at, mask=at < n) + tl.load(y + at, mask=at < n), mask=at < n)


def captured(work: Callable[[], object]) -> RecordedGraph:
    api = RecordedGraphs()
    api.warm()
    api.begin()
    try:
        work()
        return api.end()
    except BaseException:
        api.abandon()
        raise


@pytest.mark.skipif(not backends.interpreted(), reason="needs TRITON_INTERPRET=1: kernels on CPU tensors")
def test_a_replay_computes_from_new_numbers_in_old_memory() -> None:
    x, total, out = torch.arange(6.0).view(2, 3), torch.zeros(3), torch.empty(3, 2)
    python = []

    def work() -> None:
        python.append(1)
        y = (x * 2).t()  # a view of a new tensor
        total.add_(y.sum(1))
        _add_kernel[(1,)](y.contiguous(), x.reshape(-1), out, 6, BLOCK=8)

    graph = captured(work)
    assert total.tolist() == [0, 0, 0], "a capture computes nothing"
    for number in (1.0, 10.0):
        x.copy_(torch.arange(6.0).view(2, 3) * number)
        graph.replay()
    assert total.tolist() == [66, 110, 154]
    assert out.view(-1).tolist() == [0, 70, 40, 110, 80, 150]
    assert python == [1]


def test_a_number_of_the_host_stays_as_it_was() -> None:
    x, length, out = torch.ones(2), [3], torch.zeros(2)
    graph = captured(lambda: out.copy_(x * length[0]))
    length[0] = 5
    graph.replay()
    assert out.tolist() == [3, 3]


def test_what_the_capture_made_is_not_there_before_a_replay() -> None:
    made: list[Tensor] = []
    graph = captured(lambda: made.append(torch.ones(2) + 1))
    assert made[0].isnan().all()
    graph.replay()
    assert made[0].tolist() == [2, 2]


@pytest.mark.parametrize(
    ("work", "name"),
    [
        (lambda x: x.sum().item(), "item|_local_scalar_dense"),
        (lambda x: float(x.sum()), "item|_local_scalar_dense"),
        (lambda x: bool((x > 0).any()), "is_nonzero|item|_local_scalar_dense"),
        (lambda x: x.tolist(), "tolist"),
        (lambda x: x.cpu(), "cpu"),
        (lambda x: x.numpy(), "numpy"),
        (lambda x: x.nonzero(), "nonzero"),
        (lambda x: x[x > 0], r"aten\.index.*mask"),
        (lambda x: x.masked_select(x > 0), "masked_select"),
        (lambda x: x.repeat_interleave(torch.ones_like(x, dtype=torch.int64)), "repeat_interleave"),
        (lambda x: x.unique(), "unique"),
        (lambda x: torch.tensor([1.0, 2.0]), "lift_fresh.* numbers of the host"),
        (lambda x: torch.rand(2), "rand.* random"),
        (lambda x: x.bernoulli_(), "bernoulli_.* random"),
        (lambda x: torch.cuda.synchronize(), "synchronize"),
        (lambda x: torch.cuda.stream(None), "stream"),
    ],
)
def test_what_cannot_be_captured_is_named(work: Callable[[Tensor], object], name: str) -> None:
    x = torch.arange(4.0)
    with pytest.raises(CaptureError, match=name):
        captured(lambda: work(x))
    assert x.tolist() == [0, 1, 2, 3], "put back, and nothing is patched any more"


def test_a_capture_inside_a_capture() -> None:
    api = RecordedGraphs()
    api.begin()
    with pytest.raises(CaptureError, match="inside a capture"):
        api.begin()
    api.abandon()
    api.abandon()
    api.begin()
    api.end()


@pytest.mark.parametrize("make", [lambda: torch.ones(3), lambda: torch.from_numpy(np.ones(3, dtype=np.float32))])
def test_memory_freed_after_the_capture_is_missed(make: Callable[[], Tensor]) -> None:
    held, out = [make()], torch.zeros(3)
    graph = captured(lambda: out.add_(held[0]))
    graph.replay()
    held.clear()
    with pytest.raises(CaptureError, match=r"aten\.add_.* reads memory \(3,\) torch\.float32 that was freed"):
        graph.replay()
