"""What a change of placement moves, and in which pieces."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_runtime.balance.digest import checksum
from moe_runtime.balance.moves import (
    ROW_BYTES,
    Piece,
    Round,
    busiest_bytes,
    keep_slots,
    layer_moves,
    num_rounds,
    rounds,
    rows_per_step,
    steps_of_slot,
)
from moe_runtime.parallel.placement import Move

Rows = tuple[list[int], list[int], int]


@st.composite
def two_rows(draw: st.DrawFn) -> Rows:
    """Two placements of one layer, and slots per rank; experts may stand twice on a rank."""
    ranks, num_local = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    slots = ranks * num_local
    experts = draw(st.integers(1, slots))
    spare = st.lists(st.integers(0, experts - 1), min_size=slots - experts, max_size=slots - experts)
    rows = [draw(st.permutations([*range(experts), *draw(spare)])) for _ in range(2)]
    return list(rows[0]), list(rows[1]), num_local


def by_rank(row: Sequence[int], num_local: int) -> list[Counter[int]]:
    return [Counter(row[first : first + num_local]) for first in range(0, len(row), num_local)]


def test_an_expert_that_stays_keeps_its_slot() -> None:
    assert keep_slots([0, 1, 2, 3, 4, 5], [2, 1, 0, 5, 3, 3], num_local=3) == (0, 1, 2, 3, 3, 5)
    assert keep_slots([0, 0, 1, 2], [1, 0, 2, 1], num_local=2) == (0, 1, 1, 2)


@given(two_rows())
@settings(max_examples=200, deadline=None)
def test_keeping_slots_changes_no_rank_and_moves_least(rows: Rows) -> None:
    old, new, num_local = rows
    kept = keep_slots(old, new, num_local=num_local)
    assert by_rank(kept, num_local) == by_rank(new, num_local)
    pairs = zip(by_rank(old, num_local), by_rank(new, num_local), strict=True)
    assert sum(a != b for a, b in zip(old, kept, strict=True)) == sum(sum((b - a).values()) for a, b in pairs)


def test_sources_are_near_and_take_turns() -> None:
    """Ranks of 2 slots, nodes of 2 ranks: expert 0 is on ranks 0 and 2, expert 1 on rank 0."""
    old = [0, 1, 2, 3, 0, 4, 5, 6]
    new = [0, 1, 0, 3, 0, 4, 0, 1]
    moves = layer_moves(7, old, new, num_local=2, ranks_per_node=2, slot_steps=1)
    assert moves == (Move(7, 0, 0, 2), Move(7, 0, 4, 6), Move(7, 1, 1, 7))
    twice = layer_moves(0, [0, 1, 0, 2, 3, 4], [0, 1, 0, 2, 0, 0], num_local=2, ranks_per_node=1, slot_steps=1)
    assert [move.source for move in twice] == [0, 2], "equally far: the second copy comes from the other holder"
    local = layer_moves(0, [0, 1, 0, 2], [0, 0, 1, 2], num_local=2, ranks_per_node=1, slot_steps=1)
    assert local[0] == Move(0, 0, 0, 1), "on the same rank"
    nodes = layer_moves(0, [0, 1, 2, 0, 3, 4], [0, 1, 2, 0, 0, 4], num_local=1, ranks_per_node=3, slot_steps=1)
    assert nodes == (Move(0, 0, 3, 4),), "on the same node, though another rank's slot is lower"


def test_an_expert_is_passed_on() -> None:
    """From one rank to seven others: where a slot takes a step, ranks that have it double; where it takes many, each
    passes it on to the next, a step behind."""
    old, new = [0, *range(1, 8)], [0] * 8
    short = layer_moves(0, old, new, num_local=1, ranks_per_node=8, slot_steps=1)
    assert {move.source for move in short} == {0}, "that is what they are checked against"
    assert [move.sender for move in short] == [0, 0, 1, 0, 2, 3, 1]
    assert num_rounds(short, slot_bytes=ROW_BYTES, bytes_per_step=ROW_BYTES, num_local=1) == 3
    long = layer_moves(0, old, new, num_local=1, ranks_per_node=8, slot_steps=100)
    assert [move.via for move in long] == [None, 1, 2, 3, 4, 5, 6]
    assert num_rounds(long, slot_bytes=100 * ROW_BYTES, bytes_per_step=ROW_BYTES, num_local=1) == 100 + 6
    assert busiest_bytes(long, slot_bytes=10, num_local=1) == 10
    across = layer_moves(0, old, new, num_local=1, ranks_per_node=4, slot_steps=100)
    assert sum(move.sender // 4 != move.target // 4 for move in across) == 1, "between nodes once"


@given(two_rows(), st.integers(1, 5 * ROW_BYTES), st.integers(1, 4 * ROW_BYTES))
@settings(max_examples=200, deadline=None)
def test_rounds_carry_everything_once_within_the_budget(rows: Rows, slot_bytes: int, budget: int) -> None:
    old, new, num_local = rows
    each = steps_of_slot(budget, slot_bytes=slot_bytes, num_local=num_local)
    moves = layer_moves(0, old, new, num_local=num_local, ranks_per_node=2, slot_steps=each)
    assert all(old[move.source] == new[move.target] == move.logical for move in moves)
    carried: dict[int, list[int]] = {}
    found = list(rounds(moves, slot_bytes=slot_bytes, bytes_per_step=budget, num_local=num_local))
    assert num_rounds(moves, slot_bytes=slot_bytes, bytes_per_step=budget, num_local=num_local) == len(found)
    for rank in range(len(old) // num_local):
        mine = rounds(moves, slot_bytes=slot_bytes, bytes_per_step=budget, num_local=num_local, rank=rank)
        ends = [{move.sender // num_local, move.target // num_local} for move in moves]
        assert list(mine) == [tuple(one for one in pieces if rank in ends[one.move]) for pieces in found]
    check_passed_on(moves, found)
    for pieces in found:
        assert pieces, "no empty round"
        out, into = Counter[int](), Counter[int]()
        for piece in pieces:
            carried.setdefault(piece.move, []).extend(range(piece.first, piece.last))
            out[moves[piece.move].sender // num_local] += piece.last - piece.first
            into[moves[piece.move].target // num_local] += piece.last - piece.first
        most = rows_per_step(budget, slot_bytes=slot_bytes, num_local=num_local)
        assert most <= max(1, budget // ROW_BYTES)
        assert max([*out.values(), *into.values()]) <= most
    far = [n for n, move in enumerate(moves) if move.source // num_local != move.target // num_local]
    whole = -(-slot_bytes // ROW_BYTES)
    assert {move: sorted(rows) for move, rows in carried.items()} == {n: list(range(whole)) for n in far}
    assert busiest_bytes(moves, slot_bytes=slot_bytes, num_local=num_local) <= slot_bytes * len(far)


def check_passed_on(moves: Sequence[Move], found: Sequence[Round]) -> None:
    """Only what came in a step before."""
    numbers = {move.target: number for number, move in enumerate(moves)}
    arrived: Counter[int] = Counter()
    for pieces in found:
        for piece in pieces:
            via = moves[piece.move].via
            assert via is None or piece.last <= arrived[numbers[via]], piece
        for piece in pieces:
            arrived[piece.move] += piece.num_rows


def test_what_is_passed_on_runs_dry() -> None:
    """Slots of 5 steps. Rank 0 sends expert 0 to rank 1 in steps 5 and 6, then expert 3 to rank 3, which a chain has
    kept busy, as another has rank 2: rank 1 passes on what it has in steps 7 and 8, and must wait for more."""
    moves = [
        Move(0, 0, 0, 12),
        *(Move(0, 1, 14, 16), Move(0, 1, 14, 18, via=16), Move(0, 1, 14, 6, via=18)),
        *(Move(0, 2, 20, 22), Move(0, 2, 20, 24, via=22), Move(0, 2, 20, 4, via=24)),
        *(Move(0, 3, 1, 7), Move(0, 0, 0, 2), Move(0, 0, 0, 5, via=2)),
    ]
    found = list(rounds(moves, slot_bytes=20 * ROW_BYTES, bytes_per_step=4 * ROW_BYTES, num_local=2))
    check_passed_on(moves, found)
    steps = [step for step, pieces in enumerate(found) if any(piece.move == 9 for piece in pieces)]
    assert steps == [7, 8, 13, 14, 15] and len(found) == 16


def test_rounds_by_hand() -> None:
    """Slots of 3 rows, 2 rows a step. Rank 0 sends two slots, rank 2 one, to rank 1."""
    moves = [Move(0, 0, 0, 1), Move(0, 0, 0, 2), Move(0, 5, 2, 1)]
    found = rounds(moves, slot_bytes=3 * ROW_BYTES - 1, bytes_per_step=2 * ROW_BYTES + 5, num_local=1)
    assert tuple(found) == (
        (Piece(0, 0, 2),),
        (Piece(0, 2, 3), Piece(1, 0, 1), Piece(2, 0, 1)),
        (Piece(1, 1, 3), Piece(2, 1, 3)),
    )
    assert busiest_bytes(moves, slot_bytes=10, num_local=1) == 20


def test_rounds_are_made_as_they_are_taken() -> None:
    """A billion of them: the first is there at once, and so is their number."""
    sizes = {"slot_bytes": ROW_BYTES << 30, "bytes_per_step": ROW_BYTES, "num_local": 1}
    assert next(rounds([Move(0, 0, 0, 1)], **sizes)) == (Piece(0, 0, 1),)
    assert num_rounds([Move(0, 0, 0, 1), Move(0, 0, 0, 2)], **sizes) == 2 << 30


# Checksums


@pytest.mark.parametrize("count", [1, 7, 8, 2048, 2049, 5000])
def test_checksums_see_every_bit_and_swaps(count: int) -> None:
    data = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(count))
    before = checksum(data)
    assert torch.equal(before, checksum(data.clone()))
    for at in (0, count // 2, count - 1):
        for bit in (1, 128):
            data[at] ^= bit
            assert (checksum(data) != before).all(), f"bit {bit} of byte {at}"
            data[at] ^= bit
    if count > 2048:
        swapped = torch.cat((data[1024:2048], data[:1024], data[2048:]))
        assert (checksum(swapped) != before).any(), "blocks that have changed places"


def test_checksums_see_every_exchange() -> None:
    """Of two words that differ in their highest bit alone: 128 columns apart, rows apart, or anywhere."""
    draw = random.Random(3)
    pairs = [
        (0, 128),
        (5, 5 + 256 * 128),
        (256, 257),
        *[(draw.randrange(65536), draw.randrange(65536)) for _ in range(300)],
    ]
    for bit in (1 << 56, -(1 << 63), 1):
        words = torch.zeros(65536 + 7, dtype=torch.int64)
        for one, other in pairs:
            words[one], words[other] = bit, 0
            before = checksum(words)
            words[one], words[other] = 0, bit
            assert (one == other) == torch.equal(before, checksum(words)), (one, other, bit)
            words[other] = 0


def test_checksums_of_other_dtypes() -> None:
    for dtype in (torch.float8_e4m3fn, torch.bfloat16, torch.float32):
        x = torch.randn(3, 5, 7).to(dtype)
        assert torch.equal(checksum(x), checksum(x.view(-1).view(torch.uint8)))
