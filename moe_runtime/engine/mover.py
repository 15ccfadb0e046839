"""One rank's hands in moving a layer's experts: out of its slots, into the staging set, and from there into its slots.

Nothing here decides or waits for a clock. Every rank makes the same calls in the same order; those that communicate
say so. H hidden, D numbers of a digest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from moe_kernels.experts import ExpertWeights, plain_like
from torch import Tensor

from moe_runtime.balance.digest import checksum
from moe_runtime.balance.moves import ROW_BYTES, Piece, Round, rows_per_step
from moe_runtime.comm.base import Communicator
from moe_runtime.engine.slot_rows import copy_rows
from moe_runtime.errors import ConfigError
from moe_runtime.layers.experts import Experts
from moe_runtime.parallel.placement import Move

CANARY_ROWS: Final = 8
_CANARY_SEED: Final = 20180701
_CHECKSUM_NUMBERS: Final = 2


class MismatchError(Exception):
    """Weights that did not arrive as they left, or that do not multiply as they did."""


@dataclass(frozen=True, slots=True)
class LayerMove:
    """What all ranks agreed on for one layer: `row [P]`, the expert of each slot afterwards, and how it gets there."""

    layer: int
    row: tuple[int, ...]
    moves: tuple[Move, ...]
    num_rounds: int
    rounds: Iterator[Round]
    """`num_rounds` of them: of each, the pieces that this rank sends or receives."""


class Mover:
    """`experts`: this rank's slots of every MoE layer; `bytes_per_step`: the most that it sends, and receives, between
    two steps.

    Takes the memory of all migrations at once: one layer's slots more (the staging set), a slot to exchange by way of,
    and what travels in a step, both ways. What a rank does outside of its own part (`exchange`, `exchange_digests`,
    what `swap` leaves to undo it) takes no tensor's memory, so it does not fail for want of it. Raises ConfigError
    where layers hold their experts in different forms.
    """

    def __init__(self, ep: Communicator, experts: Sequence[Experts], *, bytes_per_step: int) -> None:
        self._ep = ep
        self._experts = experts
        first = experts[0].weights
        self._num_local = first.num_slots
        self._staging = plain_like(first, first.num_slots)
        self._scratch = plain_like(first, 1)
        self._form = _form(self._staging)
        different = [layer for layer, own in enumerate(experts) if _form(own.weights) != self._form]
        if different:
            raise ConfigError(
                f"balance.rebalance=on: MoE layers {different} hold their experts in another form than layer 0 "
                f"({self._form}). Set fp8_weights=dequantize, or balance.rebalance=off."
            )
        draw = torch.Generator().manual_seed(_CANARY_SEED)
        canary = torch.randn(CANARY_ROWS, first.hidden, generator=draw)
        self._canary_rows = canary.to(device=self._device, dtype=first.dtype)
        rows = rows_per_step(bytes_per_step, slot_bytes=self.slot_bytes, num_local=self._num_local)
        self._out, self._in = (torch.zeros(rows, ROW_BYTES, dtype=torch.uint8, device=self._device) for _ in range(2))
        leaving, arriving, numbers = ep.size * self._num_local, self._num_local, numbers_of_digest(len(self._form))
        self._told, self._wanted = (
            torch.zeros(most, numbers, dtype=torch.int64, device=self._device) for most in (leaving, arriving)
        )
        self._addresses = self._slot_addresses()
        self._leaves: tuple[LayerMove | None, dict[int, tuple[Tensor, ...]]] = (None, {})
        self._canary(0, 0)  # what compiles at first use does so now

    @property
    def num_local(self) -> int:
        """Slots of a layer on this rank."""
        return self._num_local

    @property
    def num_bytes(self) -> int:
        """Memory held for migrations."""
        buffers = (self._out, self._in, self._told, self._wanted)
        return self._staging.num_bytes + self._scratch.num_bytes + sum(buffer.nbytes for buffer in buffers)

    @property
    def slot_bytes(self) -> int:
        """Bytes of one expert, scales included."""
        return sum(part.nbytes for part in self._staging.slot_tensors(0))

    @property
    def form(self) -> str:
        """Shapes and dtypes of a slot; equal on all ranks, or nothing can move."""
        return str(self._form)

    # Into the staging set

    def copy_local(self, change: LayerMove) -> None:
        """Moves within this rank."""
        for move in self._arriving(change):
            if self._rank_of(move.source) == self._ep.rank:
                source = self._weights(change).slot_tensors(move.source % self._num_local)
                for staged, part in zip(self._staged(move), source, strict=True):
                    staged.copy_(part)

    def put_out(self, change: LayerMove, pieces: Round) -> None:
        """What this rank sends of a round into the buffer for it, by target rank; what it passes on is taken from the
        staging set. A slot's tensors are held while pieces of it leave: those of packed slots are copies."""
        before, held = self._leaves
        known = held if before is change else {}
        leaves: dict[int, tuple[Tensor, ...]] = {}
        at = 0
        for piece in self._pieces(change, pieces, sends=True):
            move = change.moves[piece.move]
            slot = move.sender % self._num_local
            if move.via is not None:
                parts = self._staging.slot_tensors(slot)
            else:
                parts = leaves.get(slot) or known.get(slot) or self._weights(change).slot_tensors(slot)
                leaves[slot] = parts
            copy_rows(parts, piece, self._out[at : at + piece.num_rows], inward=False)
            at += piece.num_rows
        self._leaves = (change, leaves)

    def exchange(self, change: LayerMove, pieces: Round) -> None:
        """Collective: a round's rows from buffer to buffer, by source rank. A rank that could not put its own out sends
        what is there."""
        send, receive = self._counts(change, pieces)
        self._ep.all_to_all(self._out[: sum(send)], send, receive, self._in[: sum(receive)])

    def take_in(self, change: LayerMove, pieces: Round) -> None:
        """Put what came in a round into the staging set."""
        at = 0
        for piece in self._pieces(change, pieces, sends=False):
            rows = self._in[at : at + piece.num_rows]
            copy_rows(self._staged(change.moves[piece.move]), piece, rows, inward=True)
            at += piece.num_rows

    # Checks

    def put_digests(self, change: LayerMove) -> None:
        """D numbers of each slot that leaves into the buffer for them, by target rank: its checksums, then those of its
        canary."""
        self._leaves = (None, {})
        slots = [move.source % self._num_local for move in self._leaving(change)]
        known = {slot: self._digest(change.layer, slot) for slot in set(slots)}
        for number, slot in enumerate(slots):
            self._told[number].copy_(known[slot])

    def exchange_digests(self, change: LayerMove) -> None:
        """Collective: remember what each arriving slot must be, by its source."""
        send, receive = [0] * self._ep.size, [0] * self._ep.size
        for move in change.moves:
            source, target = self._rank_of(move.source), self._rank_of(move.target)
            send[target] += source == self._ep.rank
            receive[source] += target == self._ep.rank
        self._ep.all_to_all(self._told[: sum(send)], send, receive, self._wanted[: sum(receive)])

    def check_staged(self, change: LayerMove) -> None:
        """MismatchError where a staged slot's checksums are not those of its source."""
        self._compare(change, [_checksums(self._staged(move)) for move in self._arriving(change)], "arrived with")

    def check_written(self, change: LayerMove) -> None:
        """The same for the slots themselves after `swap`."""
        found = [_checksums(self._weights(change).slot_tensors(self._slot(move))) for move in self._arriving(change)]
        self._compare(change, found, "was written with")

    def check_canary(self, change: LayerMove) -> None:
        """MismatchError where a slot's outputs for the canary rows have other bits than its source's had."""
        found = [self._canary(change.layer, self._slot(move)) for move in self._arriving(change)]
        self._compare(change, found, "gives canary outputs with", first=_CHECKSUM_NUMBERS * len(self._form))

    def check_addresses(self) -> None:
        """MismatchError where fixed storage has moved: captured graphs would read what is no longer there."""
        if self._slot_addresses() != self._addresses:
            raise MismatchError("expert slots have moved in memory")

    # Into the slots

    def swap(self, change: LayerMove, undo: list[Callable[[], None]]) -> None:
        """Put the arriving slots where they belong; what puts each old one back is added to `undo`."""
        for move in self._arriving(change):
            undo.append(self._weights(change).take_slot_(self._slot(move), self._staging, self._scratch))

    # Who and where

    @property
    def _device(self) -> torch.device:
        return self._staging.slot_tensors(0)[0].device

    def _rank_of(self, slot: int) -> int:
        return slot // self._num_local

    def _slot(self, move: Move) -> int:
        return move.target % self._num_local

    def _weights(self, change: LayerMove) -> ExpertWeights:
        return self._experts[change.layer].weights

    def _staged(self, move: Move) -> tuple[Tensor, ...]:
        return self._staging.slot_tensors(self._slot(move))

    def _arriving(self, change: LayerMove) -> list[Move]:
        """Moves to this rank by source rank, as their digests come."""
        mine = [move for move in change.moves if self._rank_of(move.target) == self._ep.rank]
        return sorted(mine, key=lambda move: self._rank_of(move.source))

    def _leaving(self, change: LayerMove) -> list[Move]:
        mine = [move for move in change.moves if self._rank_of(move.source) == self._ep.rank]
        return sorted(mine, key=lambda move: self._rank_of(move.target))

    def _pieces(self, change: LayerMove, pieces: Round, *, sends: bool) -> list[Piece]:
        """Those from this rank or to it, by the other rank."""

        def here(piece: Piece) -> int:
            move = change.moves[piece.move]
            return self._rank_of(move.sender if sends else move.target)

        def there(piece: Piece) -> int:
            move = change.moves[piece.move]
            return self._rank_of(move.target if sends else move.sender)

        return sorted((piece for piece in pieces if here(piece) == self._ep.rank), key=there)

    def _counts(self, change: LayerMove, pieces: Round) -> tuple[list[int], list[int]]:
        """Rows to and from each rank."""
        send, receive = [0] * self._ep.size, [0] * self._ep.size
        for piece in pieces:
            move = change.moves[piece.move]
            source, target = self._rank_of(move.sender), self._rank_of(move.target)
            if source == self._ep.rank:
                send[target] += piece.num_rows
            if target == self._ep.rank:
                receive[source] += piece.num_rows
        return send, receive

    # Numbers

    def _digest(self, layer: int, slot: int) -> Tensor:
        return torch.cat((_checksums(self._experts[layer].weights.slot_tensors(slot)), self._canary(layer, slot)))

    def _canary(self, layer: int, slot: int) -> Tensor:
        return checksum(self._experts[layer].alone(slot, self._canary_rows).contiguous())

    def _compare(self, change: LayerMove, found: list[Tensor], how: str, *, first: int = 0) -> None:
        if not found:
            return
        got = torch.stack(found)
        want = self._wanted[: len(found), first : first + got.shape[1]]
        wrong = (got != want).any(dim=1).tolist()
        for move, is_wrong in zip(self._arriving(change), wrong, strict=True):
            if is_wrong:
                raise MismatchError(
                    f"expert {move.logical} of slot {move.target} {how} other bits than slot {move.source} of rank "
                    f"{self._rank_of(move.source)} holds"
                )

    def _slot_addresses(self) -> list[int]:
        """Of fixed storage: packed slots are made anew when they are written."""
        weights = [own.weights for own in self._experts]
        return [part.data_ptr() for own in weights if own.is_fixed for part in own.slot_tensors(0)]


def numbers_of_digest(num_parts: int) -> int:
    """D, where a slot consists of so many tensors: checksums of each, and of the canary's outputs."""
    return _CHECKSUM_NUMBERS * (num_parts + 1)


def _form(weights: ExpertWeights) -> tuple[tuple[tuple[int, ...], str], ...]:
    return tuple([(tuple(part.shape), str(part.dtype)) for part in weights.slot_tensors(0)])


def _checksums(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([checksum(part) for part in parts])
