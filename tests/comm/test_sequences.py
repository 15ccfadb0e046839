"""Random lawful programs on virtual ranks: any mesh, any calls, begun and waited for in any order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_runtime.comm.base import Communicator, Groups
from moe_runtime.comm.virtual import VirtualCluster, virtual_groups
from moe_runtime.types import Pending
from tests.comm.contract import axes, counts_of, data, equal_bits, plain_sum


@dataclass(frozen=True)
class Call:
    """`axis` 0..4 as in mesh.AXES; `n` rows per block."""

    axis: int
    op: str
    n: int
    dtype: torch.dtype


calls = st.builds(
    Call,
    axis=st.integers(0, 4),
    op=st.sampled_from(["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "exchange"]),
    n=st.integers(0, 2),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)


def begin(comm: Communicator, call: Call, turn: int) -> tuple[Pending[Tensor], Tensor]:
    """The operation under way and what it must give; every rank's input is known to all."""
    me, n = comm.rank, call.n
    parts = [data((comm.size * n, 3), call.dtype, turn, rank) for rank in comm.ranks]
    match call.op:
        case "all_reduce":
            return comm.all_reduce_begin(parts[me]), plain_sum(parts)
        case "all_gather":
            return comm.all_gather_begin(parts[me]), torch.cat(parts)
        case "reduce_scatter":
            return comm.reduce_scatter_begin(parts[me]), plain_sum(parts)[me * n : (me + 1) * n]
        case "broadcast":
            return comm.broadcast_begin(parts[me], n % comm.size), parts[n % comm.size]
        case _:
            send = counts_of(comm.size, (turn, n, *comm.ranks))
            rows = [data((sum(counts), 3), call.dtype, turn, rank) for counts, rank in zip(send, comm.ranks)]
            starts = [sum(counts[:me]) for counts in send]
            expected = torch.cat([x[start : start + send[s][me]] for s, (x, start) in enumerate(zip(rows, starts))])
            return comm.all_to_all_begin(rows[me], send[me], [counts[me] for counts in send]), expected


def program(groups: Groups, sequence: list[Call], seed: int) -> int:
    """Runs the calls in order; each rank decides by itself when it waits for what it began. Returns results checked."""
    generator = torch.Generator().manual_seed(seed * 1000 + groups.world.rank)
    open_calls: list[tuple[Pending[Tensor], Tensor]] = []
    checked = 0

    def check(i: int) -> None:
        pending, expected = open_calls.pop(i)
        got = pending.wait()
        assert equal_bits(got, expected)

    for turn, call in enumerate(sequence):
        comm = axes(groups)[call.axis][1]
        if call.op == "exchange":
            assert comm.exchange([comm.rank] * call.n) == tuple((i,) * call.n for i in range(comm.size))
            checked += 1
            continue
        open_calls.append(begin(comm, call, turn))
        while open_calls and torch.rand(1, generator=generator).item() < 0.5:
            check(int(torch.randint(0, len(open_calls), (1,), generator=generator)))
            checked += 1
    while open_calls:
        check(int(torch.randint(0, len(open_calls), (1,), generator=generator)))
        checked += 1
    return checked


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 3)),
    sequence=st.lists(calls, min_size=1, max_size=12),
    seed=st.integers(0, 99),
)
def test_random_lawful_programs(shape: tuple[int, int, int], sequence: list[Call], seed: int) -> None:
    pp, dp, tp = shape
    with VirtualCluster(pp * dp * tp, num_threads=1) as cluster:
        groups = virtual_groups(cluster, pp=pp, dp=dp, tp=tp)
        run: Callable[[int], int] = lambda rank: program(groups[rank], sequence, seed)  # noqa: E731
        for _ in range(2):
            assert cluster.run(run) == [len(sequence)] * (pp * dp * tp)
