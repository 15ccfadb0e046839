"""What a change of placement moves: which slots, from where, and in which pieces under a budget. Pure.

P slots of a layer, `num_local` of them on each rank. A slot travels as rows of ROW_BYTES bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from moe_runtime.parallel.placement import Move

ROW_BYTES: Final = 4096
"""Bytes that travel as one row of an all-to-all; a slot's last row is padded."""

Row = Sequence[int]
"""The logical expert of each of a layer's P slots."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows `first <= row < last` of the slot that move number `move` of a layer copies."""

    move: int
    first: int
    last: int

    @property
    def num_rows(self) -> int:
        return self.last - self.first


Round = tuple[Piece, ...]
"""What travels in one step, in the order of moves."""


def keep_slots(old: Row, new: Row, *, num_local: int) -> tuple[int, ...]:
    """`new` with each rank's experts reordered: those that stay on a rank stay in their slots, the others follow in
    their order. Every rank holds the same experts as in `new`."""
    kept: list[int] = []
    for first in range(0, len(old), num_local):
        arriving = Counter(new[first : first + num_local])
        stays = []
        for expert in old[first : first + num_local]:
            stays.append(arriving[expert] > 0)
            arriving[expert] -= stays[-1]
        left = Counter(arriving)
        queue = []
        for expert in reversed(new[first : first + num_local]):  # of equal experts the first ones stay
            if left[expert] > 0:
                left[expert] -= 1
                queue.append(expert)
        for expert, stay in zip(old[first : first + num_local], stays, strict=True):
            kept.append(expert if stay else queue.pop())
    return tuple(kept)


def layer_moves(
    layer: int, old: Row, new: Row, *, num_local: int, ranks_per_node: int, slot_steps: int
) -> tuple[Move, ...]:
    """The slots that change, in ascending order, each with its source: on the same rank, else on the same node, else
    anywhere; of equally near ones the one that is through first, then the rank that sends least so far, then the lowest
    slot. A rank that receives an expert may pass it on, a step behind: so many copies of one expert go through many
    ranks, not all out of one. `slot_steps`: those that a slot takes (`steps_of_slot`).

    All sources hold what `old` says: a slot that changes too may be one, if all are read before any is written.
    """
    copies: dict[int, list[_Copy]] = {}
    for slot, expert in enumerate(old):
        copies.setdefault(expert, []).append(_Copy(slot, slot // num_local))
    busy_out: Counter[int] = Counter()
    busy_in: Counter[int] = Counter()
    moves = []
    for target, (before, expert) in enumerate(zip(old, new, strict=True)):
        if before == expert:
            continue
        home = target // num_local
        if local := [one for one in copies[expert] if one.rank == home and one.source is None]:
            moves.append(Move(layer, expert, local[0].slot, target))
            continue

        free, node = busy_in[home], home // ranks_per_node
        best, least = copies[expert][0], None
        for copy in copies[expert]:
            if copy.rank == home:
                continue
            sent = busy_out[copy.rank]
            start = max(sent, free, copy.first)
            cost = (copy.rank // ranks_per_node != node, start, copy.source is not None, sent, copy.slot)
            if least is None or cost < least:
                best, least = copy, cost
        assert least is not None, "an expert that does not stay has a slot on another rank"
        source = best.slot if best.source is None else best.source
        moves.append(Move(layer, expert, source, target, None if best.source is None else best.slot))
        copies[expert].append(_Copy(target, home, source, least[1] + 1))
        busy_out[best.rank] = busy_in[home] = least[1] + slot_steps
    return tuple(moves)


@dataclass(frozen=True, slots=True)
class _Copy:
    """Of an expert, on a rank; one that arrives comes from `source` and has its first rows after `first` steps."""

    slot: int
    rank: int
    source: int | None = None
    first: int = 0


def rows_of(num_bytes: int) -> int:
    """Rows of a slot of so many bytes."""
    return -(-num_bytes // ROW_BYTES)


def rows_per_step(bytes_per_step: int, *, slot_bytes: int, num_local: int) -> int:
    """Rows that a rank sends at most, and receives at most, in one step: what `bytes_per_step` holds, but at least one,
    and no more than one layer's slots."""
    return min(max(1, bytes_per_step // ROW_BYTES), num_local * rows_of(slot_bytes))


def steps_of_slot(bytes_per_step: int, *, slot_bytes: int, num_local: int) -> int:
    """Steps that one slot takes from rank to rank."""
    return -(-rows_of(slot_bytes) // rows_per_step(bytes_per_step, slot_bytes=slot_bytes, num_local=num_local))


def rounds(
    moves: Sequence[Move], *, slot_bytes: int, bytes_per_step: int, num_local: int, rank: int | None = None
) -> Iterator[Round]:
    """The pieces of each step: no rank sends or receives more rows than `rows_per_step`, and none passes on what it has
    not received in a step before. Moves within a rank do not travel. Earlier moves go first; a later one uses what they
    leave.

    `rank`: only what this rank sends or receives, an empty round where that is nothing. Made as they are taken: a step
    costs time in proportion to its moves, however small its pieces are.
    """
    done: Counter[int] = Counter()
    same = _stretches(moves, slot_bytes=slot_bytes, bytes_per_step=bytes_per_step, num_local=num_local)
    for counts, num_steps in same:
        mine = [
            (number, count)
            for number, count in counts.items()
            if rank is None or rank in (moves[number].sender // num_local, moves[number].target // num_local)
        ]
        for _ in range(num_steps):
            yield tuple([Piece(number, done[number], done[number] + count) for number, count in mine])
            for number, count in mine:
                done[number] += count


def num_rounds(moves: Sequence[Move], *, slot_bytes: int, bytes_per_step: int, num_local: int) -> int:
    """How many steps `rounds` takes, without making them."""
    same = _stretches(moves, slot_bytes=slot_bytes, bytes_per_step=bytes_per_step, num_local=num_local)
    return sum(num_steps for _, num_steps in same)


def _stretches(
    moves: Sequence[Move], *, slot_bytes: int, bytes_per_step: int, num_local: int
) -> Iterator[tuple[dict[int, int], int]]:
    """Rows of each move that travels, and for how many steps on end: what is sent stays the same until a move has less
    left than its share, or what is passed on runs dry or swells."""
    whole, most = rows_of(slot_bytes), rows_per_step(bytes_per_step, slot_bytes=slot_bytes, num_local=num_local)
    ends = [(move.sender // num_local, move.target // num_local) for move in moves]
    left = {number: whole for number, (source, target) in enumerate(ends) if source != target}
    numbers = {moves[number].target: number for number in left}
    parents = {number: numbers[via] for number in left if (via := moves[number].via) is not None}
    ranks = {rank: most for pair in ends for rank in pair}
    while left:
        out, into = ranks.copy(), ranks.copy()
        counts: dict[int, int] = {}
        num_steps = whole
        for number, rows in left.items():
            source, target = ends[number]
            count = may = min(rows, out[source], into[target])
            if number in parents:
                parent = parents[number]
                there = rows - left.get(parent, 0)
                count, more = min(may, there), counts.get(parent, 0)
                if count > more:
                    num_steps = min(num_steps, (there - count) // (count - more) + 1)
                elif count < min(may, more):
                    num_steps = 1
            if count > 0:
                counts[number] = count
                out[source] -= count
                into[target] -= count
        num_steps = min(num_steps, *(left[number] // count for number, count in counts.items()))
        yield counts, num_steps
        for number, count in counts.items():
            left[number] -= num_steps * count
            if not left[number]:
                del left[number]


def busiest_bytes(moves: Sequence[Move], *, slot_bytes: int, num_local: int) -> int:
    """The most bytes that one rank sends or receives."""
    out: Counter[int] = Counter()
    into: Counter[int] = Counter()
    for move in moves:
        source, target = move.sender // num_local, move.target // num_local
        if source != target:
            out[source] += slot_bytes
            into[target] += slot_bytes
    return max([*out.values(), *into.values()], default=0)
