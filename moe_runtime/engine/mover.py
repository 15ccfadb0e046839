"""One rank's hands in moving a layer's experts: out of its slots, into the staging set, and from there into its slots.

Nothing here decides or waits for a clock. Every rank makes the same calls in the same order; those that communicate
say so. H hidden, D numbers of a digest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from moe_kernels.experts import ExpertWeights, plain_like
from torch import Tensor

from moe_runtime.balance.digest import checksum
from moe_runtime.balance.moves import ROW_BYTES, Piece, Round
from moe_runtime.comm.base import Communicator
from moe_runtime.errors import ConfigError
from moe_runtime.layers.experts import Experts
from moe_runtime.parallel.placement import Move

CANARY_ROWS: Final = 8
_CANARY_SEED: Final = 20180701
_CANARY_NUMBERS: Final = 2


class MismatchError(Exception):
    """Weights that did not arrive as they left, or that do not multiply as they did."""


@dataclass(frozen=True, slots=True)
class LayerMove:
    """What all ranks agreed on for one layer: `row`, the expert of each slot afterwards, and how it gets there."""

    layer: int
    row: tuple[int, ...]
    moves: tuple[Move, ...]
    rounds: tuple[Round, ...]


class Mover:
    """`experts`: this rank's slots of every MoE layer. Holds one layer's slots more: the staging set.

    Raises ConfigError where layers hold their experts in different forms.
    """

    def __init__(self, ep: Communicator, experts: Sequence[Experts]) -> None:
        self._ep = ep
        self._experts = experts
        first = experts[0].weights
        self._num_local = first.num_slots
        self._staging = plain_like(first)
        self._form = _form(self._staging)
        different = [layer for layer, own in enumerate(experts) if _form(own.weights) != self._form]
        if different:
            raise ConfigError(
                f"balance.rebalance=on: MoE layers {different} hold their experts in another form than layer 0 "
                f"({self._form}). Set fp8_weights=dequantize, or balance.rebalance=off."
            )
        draw = torch.Generator().manual_seed(_CANARY_SEED)
        rows = torch.randn(CANARY_ROWS, first.hidden, generator=draw)
        self._canary_rows = rows.to(device=self._device, dtype=first.dtype)
        self._wanted = torch.empty(0, dtype=torch.int64, device=self._device)
        self._addresses = self._slot_addresses()
        self._canary(0, 0)  # what compiles at first use does so now

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

    def outgoing(self, change: LayerMove, number: int) -> Tensor:
        """`[rows, ROW_BYTES] uint8`: what this rank sends in round `number`, by target rank."""
        out = self.blank(change, number)
        at = 0
        for piece in self._pieces(change, number, sends=True):
            parts = self._weights(change).slot_tensors(change.moves[piece.move].source % self._num_local)
            _copy_rows(parts, piece, out[at : at + piece.last - piece.first], inward=False)
            at += piece.last - piece.first
        return out

    def blank(self, change: LayerMove, number: int) -> Tensor:
        """Zeros of that shape: a rank that cannot send still comes."""
        return torch.zeros(sum(self._counts(change, number)[0]), ROW_BYTES, dtype=torch.uint8, device=self._device)

    def exchange(self, change: LayerMove, number: int, out: Tensor) -> Tensor:
        """Collective: `[rows, ROW_BYTES] uint8`, what this rank receives in round `number`, by source rank."""
        return self._ep.all_to_all(out, *self._counts(change, number))

    def take_in(self, change: LayerMove, number: int, received: Tensor) -> None:
        """Put what came in round `number` into the staging set."""
        at = 0
        for piece in self._pieces(change, number, sends=False):
            rows = received[at : at + piece.last - piece.first]
            _copy_rows(self._staged(change.moves[piece.move]), piece, rows, inward=True)
            at += piece.last - piece.first

    # Checks

    def digests(self, change: LayerMove) -> Tensor:
        """`[moves from this rank, D] int64`, by target rank: checksums of each source slot, then of its canary."""
        leaving = self._leaving(change)
        if not leaving:
            return self.no_digests(change)
        slots = [move.source % self._num_local for move in leaving]
        known = {slot: self._digest(change.layer, slot) for slot in set(slots)}
        return torch.stack([known[slot] for slot in slots])

    def no_digests(self, change: LayerMove) -> Tensor:
        """Zeros of that shape."""
        count = len(self._leaving(change)), 2 * len(self._form) + _CANARY_NUMBERS
        return torch.zeros(count, dtype=torch.int64, device=self._device)

    def exchange_digests(self, change: LayerMove, out: Tensor) -> None:
        """Collective: remember what each arriving slot must be, by its source."""
        size, me = self._ep.size, self._ep.rank
        pairs = [(self._rank_of(move.source), self._rank_of(move.target)) for move in change.moves]
        send = [pairs.count((me, rank)) for rank in range(size)]
        receive = [pairs.count((rank, me)) for rank in range(size)]
        self._wanted = self._ep.all_to_all(out, send, receive)

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
        self._compare(change, found, "gives canary outputs with", first=2 * len(self._form))

    def check_addresses(self) -> None:
        """MismatchError where fixed storage has moved: captured graphs would read what is no longer there."""
        if self._slot_addresses() != self._addresses:
            raise MismatchError("expert slots have moved in memory")

    # Into the slots

    def swap(self, change: LayerMove, swapped: list[int]) -> None:
        """Exchange the arriving slots with the staging set, which holds the old ones then; the slots done are added to
        `swapped`. `swap_back` undoes it."""
        for move in self._arriving(change):
            self._weights(change).swap_slot_(self._slot(move), self._staging)
            swapped.append(self._slot(move))

    def swap_back(self, change: LayerMove, swapped: list[int]) -> None:
        for slot in swapped:
            self._weights(change).swap_slot_(slot, self._staging)
        swapped.clear()

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

    def _pieces(self, change: LayerMove, number: int, *, sends: bool) -> list[Piece]:
        """Of round `number`, from this rank or to it, by the other rank."""

        def here(piece: Piece) -> int:
            move = change.moves[piece.move]
            return self._rank_of(move.source if sends else move.target)

        def there(piece: Piece) -> int:
            move = change.moves[piece.move]
            return self._rank_of(move.target if sends else move.source)

        return sorted((piece for piece in change.rounds[number] if here(piece) == self._ep.rank), key=there)

    def _counts(self, change: LayerMove, number: int) -> tuple[list[int], list[int]]:
        """Rows to and from each rank."""
        send, receive = [0] * self._ep.size, [0] * self._ep.size
        for piece in change.rounds[number]:
            move, rows = change.moves[piece.move], piece.last - piece.first
            source, target = self._rank_of(move.source), self._rank_of(move.target)
            if source == self._ep.rank:
                send[target] += rows
            if target == self._ep.rank:
                receive[source] += rows
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
        want = self._wanted[:, first : first + got.shape[1]]
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


def _form(weights: ExpertWeights) -> tuple[tuple[tuple[int, ...], str], ...]:
    return tuple([(tuple(part.shape), str(part.dtype)) for part in weights.slot_tensors(0)])


def _checksums(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([checksum(part) for part in parts])


def _copy_rows(parts: Sequence[Tensor], piece: Piece, rows: Tensor, *, inward: bool) -> None:
    """Between the bytes of a slot, its `parts` one after the other, and the rows of a piece of it."""
    flat = rows.view(-1)
    for part, begin, end, at in _overlaps(parts, piece.first * ROW_BYTES, piece.last * ROW_BYTES):
        own, wire = part[begin:end], flat[at : at + end - begin]
        if inward:
            own.copy_(wire)
        else:
            wire.copy_(own)


def _overlaps(parts: Sequence[Tensor], first: int, last: int) -> Iterator[tuple[Tensor, int, int, int]]:
    """(part as bytes, begin and end in it, offset from `first`) of each part that bytes `first … last` touch."""
    start = 0
    for part in parts:
        data = part.view(-1).view(torch.uint8)
        begin, end = max(first - start, 0), min(last - start, data.numel())
        if begin < end:
            yield data, begin, end, start + begin - first
        start += data.numel()
