"""Rows put into other ranks' blocks by the interpreted kernels, all ranks in one process, one after the other.

T tokens, K top-k, H hidden, S ranks, E slots of each, P = S·E.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from moe_kernels import put_rows
from moe_kernels.errors import KernelError
from moe_kernels.permute import unpermute
from moe_kernels.put_rows import Block, Far, Peers, Spans, find_bitcode, triton_far
from moe_kernels.put_rows import triton as launches
from moe_kernels.quant import quantize_rows
from moe_kernels.scaled import BlockScaled
from torch import Tensor

from tests.doubles.cuda_graph import RecordedGraphs
from tests.kernels.far_double import FarMemory

GROUPED, ALIGNED, PADDED = Spans(), Spans(4), Spans(room=6)


@dataclass(frozen=True)
class World:
    """S ranks of E slots, what each brings, and their memory."""

    x: list[Tensor]
    slots: list[Tensor]
    weights: list[Tensor]
    peers: list[Peers]

    @property
    def ranks(self) -> range:
        return range(len(self.x))


def make_world(
    tokens: list[int],
    *,
    slots: int,
    top_k: int,
    dtype: torch.dtype = torch.float32,
    hidden: int = 24,
    ranks_per_node: int = 100,
) -> World:
    """Blocks full of NaN but for the signals, as real memory may be. Ranks of other nodes have no address."""
    ranks, generator = len(tokens), torch.Generator().manual_seed(sum(tokens))
    ids = [torch.rand(t, ranks * slots, generator=generator).argsort(1)[:, :top_k].contiguous() for t in tokens]
    for some in ids:
        some[some % 7 == 3] = -1
    x = [torch.randn(t, hidden, generator=generator).to(dtype) for t in tokens]
    weights = [torch.rand(t, top_k, generator=generator) for t in tokens]
    room = max(sum(tokens) * min(top_k, slots) + 3 * slots, slots * PADDED.room)
    apart = ranks > ranks_per_node
    staged = max(tokens) if apart else 0
    block = Block(ranks, slots, room, hidden * dtype.itemsize, -(-hidden // 128), staged, top_k)
    memory = [torch.full((block.num_bytes,), 0xFF, dtype=torch.uint8) for _ in tokens]
    for own in memory:
        own[: block.counts_at].zero_()
    addresses = torch.tensor([own.data_ptr() for own in memory])
    node = torch.arange(ranks) // ranks_per_node
    far = Far(Path("libnvshmem_device.bc"), lambda handle: None) if apart else None
    peers = [
        Peers(block, r, own, torch.where(node == node[r], addresses, 0), torch.zeros(1, dtype=torch.int64), far)
        for r, own in enumerate(memory)
    ]
    return World(x, ids, weights, peers)


def rows_at(peers: Peers, dtype: torch.dtype, hidden: int) -> Tensor:
    start = peers.block.data_at
    data = peers.own[start : start + peers.block.rows * hidden * dtype.itemsize]
    return data.view(dtype).view(-1, hidden)


def dispatch(world: World, spans: Spans) -> list[tuple[Tensor, Tensor]]:
    """`(row_of, ends)` of every rank, all rows in place."""
    announced = [put_rows.announce(world.peers[r], world.slots[r]) for r in world.ranks]
    placed = [
        put_rows.place(world.peers[r], world.x[r], world.slots[r], announced[r], spans=spans) for r in world.ranks
    ]
    for peers in world.peers:
        put_rows.arrive(peers)
    return placed


def expected_rows(world: World, slot: int) -> Tensor:
    """In order of source rank, then token."""
    parts = [x[(ids == slot).any(dim=1)] for x, ids in zip(world.x, world.slots, strict=True)]
    return torch.cat(parts)


@pytest.mark.parametrize("spans", [GROUPED, ALIGNED, PADDED], ids=str)
def test_rows_stand_in_order_and_come_back_summed(spans: Spans) -> None:
    world = make_world([3, 0, 2], slots=2, top_k=3)
    for _ in range(2):
        check_round_trip(world, spans)


@pytest.mark.parametrize("spans", [ALIGNED, PADDED], ids=str)
def test_ranks_out_of_reach_get_and_give_the_same_rows(spans: Spans, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two nodes of two ranks; a row is wider than what one program copies."""
    world = make_world([2, 1, 0, 2], slots=2, top_k=3, hidden=520, ranks_per_node=2)
    far = FarMemory([peers.own for peers in world.peers])
    far.install(monkeypatch)
    for _ in range(2):
        check_round_trip(world, spans)
    assert far.calls


@pytest.mark.parametrize("skipped", ["quiet", "put_block", "get_block", "signal_op"])
def test_what_carries_rows_to_far_ranks_is_needed(skipped: str, monkeypatch: pytest.MonkeyPatch) -> None:
    world = make_world([1, 2], slots=2, top_k=3, ranks_per_node=1)
    FarMemory([peers.own for peers in world.peers]).install(monkeypatch)
    monkeypatch.setattr(triton_far, skipped, lambda *arguments: None)
    with pytest.raises((AssertionError, KernelError)):
        check_round_trip(world, GROUPED)


def check_round_trip(world: World, spans: Spans) -> None:
    """Rows stand where they belong, and what the experts make of them comes back summed."""
    placed, outputs = dispatch(world, spans), []
    hidden = world.x[0].shape[1]
    for rank, (_, ends) in enumerate(placed):
        data, start = rows_at(world.peers[rank], torch.float32, hidden), 0
        for slot, end in enumerate(ends.tolist()):
            first, last = (slot * spans.room, slot * spans.room + end) if spans.room else (start, end)
            assert torch.equal(data[first:last], expected_rows(world, 2 * rank + slot)), (rank, slot)
            start = -(-end // spans.alignment) * spans.alignment
        outputs.append(data * (rank + 2))
    for rank, (_, ends) in enumerate(placed):
        put_rows.publish(world.peers[rank], outputs[rank], ends, spans=spans)
    for rank in world.ranks:
        row_of, slots, weights = placed[rank][0], world.slots[rank], world.weights[rank]
        y = put_rows.pull(world.peers[rank], slots, row_of, weights, hidden=hidden, dtype=torch.float32)
        assert torch.equal(y, expected_sums(world, rank))
        assert not y.isnan().any()


def test_a_graph_replays_dispatches(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of a dispatch is counted on the device, so what was captured once serves any number of steps."""
    monkeypatch.setattr(launches, "_check_came", lambda peers, channel: None)  # a wait of the host, for tests alone
    world, other = (make_world(tokens, slots=2, top_k=3) for tokens in ([3, 2], [2, 3]))
    sums: list[Tensor] = []

    def step() -> None:
        placed = dispatch(world, ALIGNED)
        for rank, (_, ends) in enumerate(placed):
            outputs = rows_at(world.peers[rank], torch.float32, 24) * (rank + 2)
            put_rows.publish(world.peers[rank], outputs, ends, spans=ALIGNED)
        for rank, (row_of, _) in enumerate(placed):
            slots, weights = world.slots[rank], world.weights[rank]
            sums.append(put_rows.pull(world.peers[rank], slots, row_of, weights, hidden=24, dtype=torch.float32))

    graphs = RecordedGraphs()
    graphs.begin()
    step()
    graph = graphs.end()
    sums = sums[:2]
    for replay in range(3):
        for rank in world.ranks:
            # Of the other world as many tokens as there are, in another order each time.
            order = torch.arange(len(world.x[rank])).roll(replay) % len(other.x[rank])
            for mine, theirs in ((world.x, other.x), (world.slots, other.slots), (world.weights, other.weights)):
                mine[rank].copy_(theirs[rank][order])
        graph.replay()
        assert [int(peers.step) for peers in world.peers] == [replay + 1] * 2
        for rank in world.ranks:
            assert torch.equal(sums[rank], expected_sums(world, rank)), (replay, rank)


def expected_sums(world: World, rank: int) -> Tensor:
    """Experts of rank r multiply by r + 2."""
    slots, hidden = world.slots[rank], world.x[rank].shape[1]
    rows = (world.x[rank][:, None, :] * (slots // 2 + 2)[:, :, None]).reshape(-1, hidden)
    own = torch.where(slots < 0, -1, torch.arange(slots.numel()).view(slots.shape))
    return unpermute(rows, own, world.weights[rank], backend="triton")


def test_many_assignments_count_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than one program counts for itself: blocks of tokens, with the same rows."""
    world = make_world([66, 1], slots=1, top_k=1, hidden=4)
    few = dispatch(world, GROUPED)
    monkeypatch.setattr(launches, "ONE_LAUNCH", 8)
    many = dispatch(world, GROUPED)
    assert all(torch.equal(a, b) for one, other in zip(few, many, strict=True) for a, b in zip(one, other, strict=True))
    assert len(expected_rows(world, 0)) > 8


def test_fp8_rows_keep_their_bytes_and_scales() -> None:
    world = make_world([3, 2], slots=2, top_k=2, hidden=130)
    plain = [quantize_rows(x, backend="torch") for x in world.x]
    announced = [put_rows.announce(p, slots) for p, slots in zip(world.peers, world.slots, strict=True)]
    block = world.peers[0].block
    strides = (1, (block.rows + 3) // 4 * 4)
    for rank in world.ranks:
        put_rows.place(
            world.peers[rank], plain[rank], world.slots[rank], announced[rank], spans=GROUPED, scale_strides=strides
        )
    for rank, peers in enumerate(world.peers):
        scales = peers.own[block.scales_at :].view(torch.float32)[: 2 * strides[1]].view(2, -1).t()
        row = 0
        for slot in (2 * rank, 2 * rank + 1):
            for scaled, ids in zip(plain, world.slots, strict=True):
                for token in (ids == slot).any(dim=1).nonzero().flatten().tolist():
                    assert torch.equal(rows_at(peers, torch.uint8, 130)[row], scaled.data.view(torch.uint8)[token])
                    assert torch.equal(scales[row], scaled.scale[token])
                    row += 1
        assert row


def test_a_rank_that_did_not_come_is_named() -> None:
    world = make_world([1, 1], slots=1, top_k=1)
    announced = put_rows.announce(world.peers[0], world.slots[0])
    with pytest.raises(KernelError, match=r"ranks \[1\] have not come to dispatch 1, channel 0"):
        put_rows.place(world.peers[0], world.x[0], world.slots[0], announced, spans=GROUPED)


def test_what_does_not_fit_is_refused() -> None:
    world = make_world([2], slots=2, top_k=2)
    peers, slots, x = world.peers[0], world.slots[0], world.x[0]
    announced = put_rows.announce(peers, slots)
    with pytest.raises(KernelError, match="must be \\[T, K\\], int64 and contiguous"):
        put_rows.announce(peers, slots.to(torch.int32))
    with pytest.raises(KernelError, match="at most 4096 in all"):
        put_rows.announce(replace(peers, block=Block(64, 65, 1, 4)), slots)
    with pytest.raises(KernelError, match="exceed the block's 96 bytes per row"):
        put_rows.place(peers, x.double(), slots, announced, spans=GROUPED)
    with pytest.raises(KernelError, match="a row of unit stride for each"):
        put_rows.place(peers, x[:1], slots, announced, spans=GROUPED)
    wide = BlockScaled(x.to(torch.float8_e4m3fn), torch.ones(2, 3))
    with pytest.raises(KernelError, match="3 scales per row, the block has room for 1"):
        put_rows.place(peers, wide, slots, announced, spans=GROUPED)
    with pytest.raises(KernelError, match="it must be contiguous and within the block's"):
        put_rows.publish(peers, torch.zeros(peers.block.rows + 1, 24), torch.zeros(2, dtype=torch.int32), spans=GROUPED)
    with pytest.raises(KernelError, match="make them agree"):
        put_rows.pull(peers, slots, slots[:1], world.weights[0], hidden=24, dtype=torch.float32)


@pytest.mark.skipif(find_bitcode() is None, reason="needs libnvshmem_device.bc: pip install nvidia-nvshmem-cu13==3.4.5")
def test_kernels_link_with_nvshmem(tmp_path: Path) -> None:
    """Compiled for sm_90, every kernel that calls NVSHMEM's device functions."""
    report = tmp_path / "report.jsonl"
    command = [sys.executable, "-m", "moe_kernels.aot", "--only", "put_rows", "--report", str(report)]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    subprocess.run(command, check=True, timeout=300, env=environment, cwd=Path(__file__).parents[2] / "kernels")
    names = {json.loads(line)["name"] for line in report.read_text(encoding="utf-8").splitlines()}
    assert {"announce far", "offsets far", "place far", "signal far", "arrive far", "pull far"} <= names
