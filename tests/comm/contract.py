"""The laws of comm/base.py as programs of one rank, for any communicator. Each asserts, and returns digests of results.

A program knows every rank's input (seeded by rank), so each rank checks against plain sums and concatenations.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor

from moe_runtime.comm.base import Communicator, Groups
from moe_runtime.parallel.mesh import AXES, Axis

Program = Callable[[Groups, int], list[str]]

SUMMABLE = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32)
COPYABLE = (*SUMMABLE, torch.float8_e4m3fn, torch.uint8, torch.int16, torch.bool)


@functools.lru_cache(maxsize=2048)
def data(shape: tuple[int, ...], dtype: torch.dtype, *key: int) -> Tensor:
    """Values that depend on `key` alone, spread over enough binades for the order of a sum to show."""
    seed = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:6], "little")
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    x = x * 10 ** torch.randint(-3, 4, shape, generator=generator).to(torch.float64)
    return x > 0 if dtype is torch.bool else x.clamp(-100, 100).to(dtype)


def plain_sum(parts: Sequence[Tensor]) -> Tensor:
    wide = torch.float32 if parts[0].dtype in (torch.bfloat16, torch.float16) else parts[0].dtype
    total = torch.zeros(parts[0].shape, dtype=wide)
    for part in parts:
        total = total + part.to(wide)
    return total.to(parts[0].dtype)


def digest(*tensors: Tensor) -> str:
    state = hashlib.sha256()
    for x in tensors:
        state.update(f"{tuple(x.shape)} {x.dtype}".encode())
        state.update(x.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return state.hexdigest()[:16]


def equal_bits(x: Tensor, y: Tensor) -> bool:
    return (
        x.shape == y.shape
        and x.dtype == y.dtype
        and digest(x + 0 if x.dtype in SUMMABLE else x) == digest(y + 0 if y.dtype in SUMMABLE else y)
    )


def axes(groups: Groups) -> list[tuple[int, Communicator]]:
    return [(i, cast(Communicator, getattr(groups, axis))) for i, axis in enumerate(AXES)]


def identity(groups: Groups, seed: int) -> list[str]:
    for i, comm in axes(groups):
        axis: Axis = AXES[i]
        assert comm.name == axis
        assert comm.size == len(comm.ranks)
        assert comm.ranks[comm.rank] == groups.world.rank
        assert comm.exchange([groups.world.rank]) == tuple((rank,) for rank in comm.ranks)
    return []


def all_reduce(groups: Groups, seed: int) -> list[str]:
    digests = []
    for axis, comm in axes(groups):
        for dtype in SUMMABLE:
            for shape in ((), (5,), (3, 4), (0, 4)):
                parts = [data(shape, dtype, seed, axis, rank) for rank in comm.ranks]
                mine = parts[comm.rank].clone()
                total = comm.all_reduce(mine)
                assert equal_bits(total, plain_sum(parts)), (comm.name, dtype, shape)
                assert torch.equal(mine, parts[comm.rank]), "the input must stay as it was"
                assert total.data_ptr() != mine.data_ptr() or total.numel() == 0
                digests.append(digest(total))
        columns = [data((4, 6), torch.float32, seed, rank).t() for rank in comm.ranks]
        assert equal_bits(comm.all_reduce(columns[comm.rank]), plain_sum(columns))
    return digests


def all_gather(groups: Groups, seed: int) -> list[str]:
    digests = []
    for axis, comm in axes(groups):
        for dtype in COPYABLE:
            for shape in ((3,), (1, 2), (2, 3, 2), (0, 4)):
                parts = [data(shape, dtype, seed, axis, rank) for rank in comm.ranks]
                whole = comm.all_gather(parts[comm.rank])
                assert whole.dtype == dtype
                expected = torch.cat([part.view(torch.uint8) if part.itemsize == 1 else part for part in parts])
                assert digest(whole) == digest(expected.view(dtype)), (comm.name, dtype, shape)
                digests.append(digest(whole))
        rows = [data((6, 4), torch.float32, seed, rank)[::2] for rank in comm.ranks]
        assert torch.equal(comm.all_gather(rows[comm.rank]), torch.cat(rows))
    return digests


def reduce_scatter(groups: Groups, seed: int) -> list[str]:
    digests = []
    for axis, comm in axes(groups):
        for dtype in SUMMABLE:
            for n, rest in ((1, ()), (2, (3,)), (0, (3,))):
                parts = [data((comm.size * n, *rest), dtype, seed, axis, rank) for rank in comm.ranks]
                block = comm.reduce_scatter(parts[comm.rank])
                assert equal_bits(block, plain_sum(parts)[comm.rank * n : (comm.rank + 1) * n]), (comm.name, dtype, n)
                digests.append(digest(block))
    return digests


def counts_of(size: int, key: tuple[int, ...], *, most: int = 3) -> list[list[int]]:
    """Rows from each source to each target, many of them zero."""
    drawn = data((size, size), torch.float32, *key) % (most + 2) - 2
    return [[max(0, int(count)) for count in row] for row in drawn.tolist()]


def all_to_all(groups: Groups, seed: int) -> list[str]:
    digests = []
    for axis, comm in axes(groups):
        me, size = comm.rank, comm.size
        uneven = counts_of(size, (seed, axis))
        for send in (uneven, [[2] * size] * size, [[0] * size] * size, [[int(s == 0)] * size for s in range(size)]):
            for dtype in (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64):
                for rest in ((), (2, 3)):
                    sent = [data((sum(send[s]), *rest), dtype, seed, axis, s) for s in range(size)]
                    got = comm.all_to_all(sent[me], send[me], [send[s][me] for s in range(size)])
                    blocks = [
                        x.view(torch.uint8) if x.itemsize == 1 else x
                        for x in (sent[s].split(send[s])[me] for s in range(size))  # type: ignore[no-untyped-call]
                    ]
                    assert got.dtype == dtype
                    assert digest(got) == digest(torch.cat(blocks).view(dtype)), (comm.name, send, dtype, rest)
                    out = torch.full_like(got.view(torch.uint8) if got.itemsize == 1 else got, 7).view(dtype)
                    again = comm.all_to_all(sent[me], send[me], [send[s][me] for s in range(size)], out)
                    assert again.data_ptr() == out.data_ptr() and digest(out) == digest(got)
                    digests.append(digest(got))
    return digests


def broadcast(groups: Groups, seed: int) -> list[str]:
    digests = []
    for axis, comm in axes(groups):
        for dtype in COPYABLE:
            for src in {0, comm.size // 2, comm.size - 1}:
                parts = [data((2, 3), dtype, seed, axis, rank) for rank in comm.ranks]
                mine = parts[comm.rank]
                before = digest(mine)
                got = comm.broadcast(mine, src)
                assert digest(got) == digest(parts[src])
                assert digest(mine) == before
                assert got.data_ptr() != mine.data_ptr()
                digests.append(digest(got))
    return digests


def messages(groups: Groups, seed: int) -> list[str]:
    """A ring that sends twice before anyone receives: sends are buffered."""
    digests = []
    for axis, comm in axes(groups):
        if comm.size == 1:
            continue
        after, before = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
        for k, dtype in enumerate((torch.float32, torch.float8_e4m3fn)):
            outgoing = data((3, 5), dtype, seed, axis, comm.ranks[comm.rank], k)
            comm.send(outgoing, after)
        for k, dtype in enumerate((torch.float32, torch.float8_e4m3fn)):
            got = comm.recv(torch.empty(3, 5, dtype=dtype), before)
            assert digest(got) == digest(data((3, 5), dtype, seed, axis, comm.ranks[before], k))
            digests.append(digest(got))
    return digests


def control(groups: Groups, seed: int) -> list[str]:
    for axis, comm in axes(groups):
        rows = [[rank, -axis, 2**63 - 1, -(2**63)] for rank in comm.ranks]
        assert comm.exchange(rows[comm.rank]) == tuple(tuple(row) for row in rows)
        assert comm.exchange([]) == ((),) * comm.size
        comm.barrier()
        for length in (0, 1, 4088, 4089, 50_000):
            for src in {0, comm.size - 1}:
                payload = bytes([src + 1]) * length
                assert comm.share(payload if comm.rank == src else None, src) == payload
        assert comm.collect(b"x" * comm.rank) == tuple(b"x" * rank for rank in range(comm.size))
        assert comm.collect(b"") == (b"",) * comm.size
    return []


def begin_and_wait(groups: Groups, seed: int) -> list[str]:
    """Several operations on several groups under way at once, waited for in an order of each rank's own."""
    digests: list[str] = []
    for turn in range(3):
        pending = {}
        expected = {}
        for axis, comm in axes(groups):
            n = comm.size
            parts = [data((2 * n, 3), torch.bfloat16, seed, turn, axis, rank) for rank in comm.ranks]
            mine, me = parts[comm.rank], comm.rank
            pending[axis, 0] = comm.all_gather_begin(mine)
            expected[axis, 0] = torch.cat(parts)
            pending[axis, 1] = comm.reduce_scatter_begin(mine)
            expected[axis, 1] = plain_sum(parts)[2 * me : 2 * me + 2]
            pending[axis, 2] = comm.all_reduce_begin(mine)
            expected[axis, 2] = plain_sum(parts)
            pending[axis, 3] = comm.all_to_all_begin(mine, [2] * n, [2] * n)
            expected[axis, 3] = torch.cat([part[2 * me : 2 * me + 2] for part in parts])
            pending[axis, 4] = comm.broadcast_begin(mine, n - 1)
            expected[axis, 4] = parts[-1]
        order = torch.randperm(len(pending), generator=torch.Generator().manual_seed(groups.world.rank + turn)).tolist()
        keys = list(pending)
        for i in order:
            key = keys[i]
            got = pending[key].wait()
            assert equal_bits(got, expected[key]), key
        digests.extend(digest(expected[key]) for key in keys)
    return digests


def random_calls(groups: Groups, seed: int) -> list[str]:
    """200 calls on groups drawn at random, alike on all ranks; what is compared is the digests across backends."""
    generator = torch.Generator().manual_seed(seed)
    digests = []
    for turn in range(200):
        axis, op, n = (int(i) for i in torch.randint(0, 5, (3,), generator=generator))
        comm = axes(groups)[axis][1]
        x = data((comm.size * n, 3), torch.bfloat16, seed, turn, groups.world.rank)
        match op:
            case 0:
                digests.append(digest(comm.all_reduce(x)))
            case 1:
                digests.append(digest(comm.all_gather(x)))
            case 2:
                digests.append(digest(comm.reduce_scatter(x)))
            case 3:
                send = counts_of(comm.size, (seed, turn, *comm.ranks))
                rows = data((sum(send[comm.rank]), 3), torch.bfloat16, seed, turn, groups.world.rank)
                digests.append(digest(comm.all_to_all(rows, send[comm.rank], [row[comm.rank] for row in send])))
            case _:
                digests.append(repr(comm.exchange([turn, comm.rank, n])))
    return digests


PROGRAMS: dict[str, Program] = {
    program.__name__: program
    for program in (
        identity,
        all_reduce,
        all_gather,
        reduce_scatter,
        all_to_all,
        broadcast,
        messages,
        control,
        begin_and_wait,
        random_calls,
    )
}
