"""What a change of placement moves: which slots, from where, and in which pieces under a budget. Pure.

P slots of a layer, `num_local` of them on each rank. A slot travels as rows of ROW_BYTES bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
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


def layer_moves(layer: int, old: Row, new: Row, *, num_local: int, ranks_per_node: int) -> tuple[Move, ...]:
    """The slots that change, in ascending order, each with its source: on the same rank, else on the same node, else
    anywhere; of equally near ones the rank that sends least so far, then the lowest slot.

    All sources hold what `old` says: a slot that changes too may be one, if all are read before any is written.
    """
    holders: dict[int, list[int]] = {}
    for slot, expert in enumerate(old):
        holders.setdefault(expert, []).append(slot)
    sent: Counter[int] = Counter()
    moves = []
    for target, (before, expert) in enumerate(zip(old, new, strict=True)):
        if before == expert:
            continue
        home = target // num_local

        def cost(slot: int, home: int = home) -> tuple[int, int, int]:
            rank = slot // num_local
            far = (rank != home) + (rank // ranks_per_node != home // ranks_per_node)
            return far, sent[rank], slot

        source = min(holders[expert], key=cost)
        sent[source // num_local] += source // num_local != home
        moves.append(Move(layer, expert, source, target))
    return tuple(moves)


def rows_of(num_bytes: int) -> int:
    """Rows of a slot of so many bytes."""
    return -(-num_bytes // ROW_BYTES)


def rounds(moves: Sequence[Move], *, slot_bytes: int, bytes_per_step: int, num_local: int) -> tuple[Round, ...]:
    """The pieces of each step: no rank sends or receives more than `bytes_per_step`, rounded down to rows, but at least
    one row. Moves within a rank do not travel. Earlier moves go first; a later one uses what they leave."""
    whole, most = rows_of(slot_bytes), max(1, bytes_per_step // ROW_BYTES)
    left = {number: whole for number, move in enumerate(moves) if move.source // num_local != move.target // num_local}
    found: list[Round] = []
    while left:
        out: Counter[int] = Counter()
        into: Counter[int] = Counter()
        pieces = []
        for number in list(left):
            source, target = moves[number].source // num_local, moves[number].target // num_local
            count = min(left[number], most - out[source], most - into[target])
            if count <= 0:
                continue
            first = whole - left[number]
            pieces.append(Piece(number, first, first + count))
            out[source] += count
            into[target] += count
            left[number] -= count
            if not left[number]:
                del left[number]
        found.append(tuple(pieces))
    return tuple(found)


def busiest_bytes(moves: Sequence[Move], *, slot_bytes: int, num_local: int) -> int:
    """The most bytes that one rank sends or receives."""
    out: Counter[int] = Counter()
    into: Counter[int] = Counter()
    for move in moves:
        source, target = move.source // num_local, move.target // num_local
        if source != target:
            out[source] += slot_bytes
            into[target] += slot_bytes
    return max([*out.values(), *into.values()], default=0)
