"""What a change of placement moves, in which pieces, and when a decision says so."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_runtime.balance.decision import Decision, Terms, Verdict, decide, utilisation
from moe_runtime.balance.digest import checksum
from moe_runtime.balance.moves import ROW_BYTES, Piece, busiest_bytes, keep_slots, layer_moves, rounds
from moe_runtime.errors import ConfigError
from moe_runtime.parallel.placement import ExpertPlacement, Move

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
    moves = layer_moves(7, old, new, num_local=2, ranks_per_node=2)
    assert moves == (Move(7, 0, 0, 2), Move(7, 0, 4, 6), Move(7, 1, 1, 7))
    twice = layer_moves(0, [0, 1, 0, 2, 3, 4], [0, 1, 0, 2, 0, 0], num_local=2, ranks_per_node=1)
    assert [move.source for move in twice] == [0, 2], "equally far: the second copy comes from the other holder"
    local = layer_moves(0, [0, 1, 0, 2], [0, 0, 1, 2], num_local=2, ranks_per_node=1)
    assert local[0] == Move(0, 0, 0, 1), "on the same rank"


@given(two_rows(), st.integers(1, 5 * ROW_BYTES), st.integers(1, 4 * ROW_BYTES))
@settings(max_examples=200, deadline=None)
def test_rounds_carry_everything_once_within_the_budget(rows: Rows, slot_bytes: int, budget: int) -> None:
    old, new, num_local = rows
    moves = layer_moves(0, old, new, num_local=num_local, ranks_per_node=2)
    assert all(old[move.source] == new[move.target] == move.logical for move in moves)
    carried: dict[int, list[int]] = {}
    found = rounds(moves, slot_bytes=slot_bytes, bytes_per_step=budget, num_local=num_local)
    for pieces in found:
        assert pieces, "no empty round"
        out, into = Counter[int](), Counter[int]()
        for piece in pieces:
            carried.setdefault(piece.move, []).extend(range(piece.first, piece.last))
            out[moves[piece.move].source // num_local] += piece.last - piece.first
            into[moves[piece.move].target // num_local] += piece.last - piece.first
        most = max(1, budget // ROW_BYTES)
        assert max([*out.values(), *into.values()]) <= most
    far = [n for n, move in enumerate(moves) if move.source // num_local != move.target // num_local]
    whole = -(-slot_bytes // ROW_BYTES)
    assert {move: sorted(rows) for move, rows in carried.items()} == {n: list(range(whole)) for n in far}
    assert busiest_bytes(moves, slot_bytes=slot_bytes, num_local=num_local) <= slot_bytes * len(far)


def test_rounds_by_hand() -> None:
    """Slots of 3 rows, 2 rows a step. Rank 0 sends two slots, rank 2 one, to rank 1."""
    moves = [Move(0, 0, 0, 1), Move(0, 0, 0, 2), Move(0, 5, 2, 1)]
    found = rounds(moves, slot_bytes=3 * ROW_BYTES - 1, bytes_per_step=2 * ROW_BYTES + 5, num_local=1)
    assert found == (
        (Piece(0, 0, 2),),
        (Piece(0, 2, 3), Piece(1, 0, 1), Piece(2, 0, 1)),
        (Piece(1, 1, 3), Piece(2, 1, 3)),
    )
    assert busiest_bytes(moves, slot_bytes=10, num_local=1) == 20


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


def test_checksums_of_other_dtypes() -> None:
    for dtype in (torch.float8_e4m3fn, torch.bfloat16, torch.float32):
        x = torch.randn(3, 5, 7).to(dtype)
        assert torch.equal(checksum(x), checksum(x.view(-1).view(torch.uint8)))


# Decisions

TERMS = Terms(
    threshold=0.9, horizon_steps=10, row_bytes=100, slot_bytes=ROW_BYTES, bytes_per_step=ROW_BYTES, ranks_per_node=8
)
NOW = ExpertPlacement(torch.tensor([[0, 1, 2, 3], [0, 1, 2, 3]]), 4, 2)
BETTER = ExpertPlacement(torch.tensor([[0, 2, 1, 3], [0, 2, 1, 3]]), 4, 2)


def decision(loads: list[list[int]], *, planned: ExpertPlacement = BETTER, terms: Terms = TERMS) -> Decision:
    def plan(loads: Tensor, previous: ExpertPlacement, budget: int | None) -> ExpertPlacement:
        assert previous is NOW
        return planned

    return decide(torch.tensor(loads), 10, now=NOW, first=NOW, plan=plan, terms=terms)


def test_layers_move_where_that_pays() -> None:
    """Layer 0: 1800 rows on the busiest rank become 1000, 80 a step; 8000 bytes a step over 10 steps for 2 slots.
    Layer 1: 10 rows are saved in 10 steps, 1000 bytes."""
    found = decision([[900, 900, 100, 100], [55, 55, 45, 45]])
    assert found.verdict is Verdict.MOVE
    (change,) = found.changes
    assert (change.layer, change.row, change.num_moves) == (0, (0, 2, 1, 3), 2)
    assert (change.moved_bytes, change.saved_bytes_per_step) == (ROW_BYTES, 8000.0)
    assert found.utilisation == pytest.approx(1100 / 1910)
    assert found.predicted == pytest.approx(1100 / 1110)
    assert found.payback_steps == pytest.approx(ROW_BYTES / 8000)
    assert "utilisation 0.576" in str(found) and "predicted 0.991 with 2 slots of 1 layers" in str(found)


def test_the_layer_that_pays_most_comes_first() -> None:
    found = decision([[500, 500, 0, 0], [5000, 5000, 0, 0]])
    assert [change.layer for change in found.changes] == [1, 0]


def test_what_moves_nothing() -> None:
    assert decision([[0] * 4] * 2).verdict is Verdict.NO_LOAD
    assert decision([[10, 10, 10, 9]] * 2).verdict is Verdict.BALANCED, "above the threshold: nothing is planned"
    few = decision([[9, 9, 1, 1]] * 2)
    assert few.verdict is Verdict.NO_GAIN, "too few tokens to pay for a slot"
    assert (few.planned, few.predicted) == (1.0, few.utilisation) and "a plan reaches 1.000, but" in str(few)
    assert decision([[900, 900, 100, 100]] * 2, planned=NOW).verdict is Verdict.NO_GAIN


def test_few_moves_where_many_do_not_pay() -> None:
    """Two slots change hands, the busiest rank has half as much to do; seven bring little more at twice the cost."""
    now = ExpertPlacement(torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]]), 12, 6)
    few = ExpertPlacement(torch.tensor([[0, 2, 1, 3, 4, 5, 6, 7, 8, 9, 10, 11]]), 12, 6)
    many = ExpertPlacement(torch.tensor([[0, 3, 1, 5, 4, 7, 6, 9, 8, 11, 10, 2]]), 12, 6)
    budgets: list[int | None] = []

    def plan(loads: Tensor, previous: ExpertPlacement, budget: int | None) -> ExpertPlacement:
        budgets.append(budget)
        return few if budget is not None and budget < 8 else many

    loads = torch.tensor([[500, 500, 20, 10, *[10] * 8]])
    terms = replace(TERMS, slot_bytes=47_000, bytes_per_step=100_000)
    found = decide(loads, 10, now=now, first=now, plan=plan, terms=terms)
    assert budgets[:2] == [None, 3], "half of the 7 slots that the whole plan changes"
    assert [change.row for change in found.changes] == [(0, 2, 1, 3, 4, 5, 6, 7, 8, 9, 10, 11)]
    dear = decide(loads, 10, now=now, first=now, plan=lambda *args: many, terms=terms)
    assert dear.verdict is Verdict.NO_GAIN, "the many are judged as they are where a planner heeds no budget"


def test_a_plan_of_another_shape_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"\(\(2, 4\), 4, 1\); the run has \(\(2, 4\), 4, 2\)"):
        decision([[900, 900, 100, 100]] * 2, planned=ExpertPlacement(NOW.phy2log, 4, 1))


def test_utilisation_counts_layers_by_their_busiest_rank() -> None:
    assert utilisation(torch.tensor([[2, 2, 0, 0], [1, 1, 1, 1]]), NOW) == pytest.approx((2 + 2) / (4 + 2))
    assert utilisation(torch.zeros(2, 4, dtype=torch.int64), NOW) == 1.0
