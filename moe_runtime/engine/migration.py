"""One layer on its way to other slots: round after round, then its checks and its commit. One rank's part.

Every rank makes the same calls between the same steps. A rank that fails at its part still comes to every collective
and votes against: a layer commits on all ranks, or on none.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, TypeVar

import torch

from moe_runtime.balance.decision import Terms
from moe_runtime.balance.moves import (
    ROW_BYTES,
    Row,
    busiest_bytes,
    layer_moves,
    num_rounds,
    rounds,
    rows_of,
    steps_of_slot,
)
from moe_runtime.comm.base import Communicator
from moe_runtime.engine.mover import LayerMove, MismatchError, Mover
from moe_runtime.engine.rebalance_state import Stage
from moe_runtime.errors import CommunicationError, EngineClosedError
from moe_runtime.parallel.placement import ExpertPlacement, Move
from moe_runtime.parallel.replicas import ReplicaSelector
from moe_runtime.parallel.table_check import wrong_tables

T = TypeVar("T")

_TRIES: Final = 3
"""Budgets that a layer's rounds are counted with, at most, where one that would do is sought"""

OnStage = Callable[[Stage, int, int | None], None]
"""(stage, ep rank, MoE layer) as a rank enters a stage; what it raises is that rank's failure."""


@dataclass(frozen=True, slots=True)
class Ended:
    """A layer is through: committed, or abandoned at `stage` for `reasons`, which all ranks know."""

    change: LayerMove
    stage: Stage | None = None
    reasons: tuple[str, ...] = ()


class Migration:
    """`begin` with a layer, then `advance` after each step until it has ended. `num_logical`: experts of a layer;
    `deadline_s`: seconds for each layer, by the clock of rank 0."""

    def __init__(
        self,
        ep: Communicator,
        mover: Mover,
        selector: ReplicaSelector,
        *,
        num_logical: int,
        terms: Terms,
        deadline_s: float,
        clock: Callable[[], float],
        on_stage: OnStage,
    ) -> None:
        self._ep = ep
        self._mover = mover
        self._selector = selector
        self._num_logical = num_logical
        self._terms = terms
        self._deadline_s = deadline_s
        self._clock = clock
        self._on_stage = on_stage
        self._addresses = list(selector.addresses)
        self._kept = tuple([table.clone() for table in selector.of_layer(0)])
        """Room for the maps of the layer that moves, to put them back without taking memory"""
        self._change: LayerMove | None = None
        self._round = 0
        self._began = 0.0
        self._fault: tuple[Stage, str] | None = None

    def begin(self, layer: int, old: Row, row: tuple[int, ...]) -> None:
        """`old`, `row` [P]: the expert of each slot now and afterwards. A rank that cannot begin says so at the first
        vote, before anything is sent."""
        self._round, self._fault, self._began = 0, None, self._clock()
        self._change = LayerMove(layer, row, (), 0, iter(()))
        self._change = self._try(Stage.SEND, partial(self._moves, layer, old, row)) or self._change

    def _moves(self, layer: int, old: Row, row: tuple[int, ...]) -> LayerMove:
        terms, num_local = self._terms, self._mover.num_local
        steps = steps_of_slot(terms.bytes_per_step, slot_bytes=terms.slot_bytes, num_local=num_local)
        moves = layer_moves(layer, old, row, num_local=num_local, ranks_per_node=terms.ranks_per_node, slot_steps=steps)
        mine = rounds(
            moves,
            slot_bytes=terms.slot_bytes,
            bytes_per_step=terms.bytes_per_step,
            num_local=num_local,
            rank=self._ep.rank,
        )
        return LayerMove(layer, row, moves, self._num_rounds(moves, terms.bytes_per_step), mine)

    @property
    def progress(self) -> float:
        """Share of the layer's rounds that are done."""
        return self._round / max(self._change.num_rounds, 1) if self._change is not None else 0.0

    def advance(self) -> Ended | None:
        """Collective: the layer's next round, after the last one its checks and its commit. None: there is more."""
        change, mover = self._change, self._mover
        assert change is not None, "begun"
        if self._round == 0:
            if ended := self._against(change):
                return ended
            self._try(Stage.SEND, partial(mover.copy_local, change))
        if change.num_rounds:
            pieces = next(change.rounds)
            self._try(Stage.SEND, partial(mover.put_out, change, pieces))
            mover.exchange(change, pieces)
            self._try(Stage.SEND, partial(mover.take_in, change, pieces))
        self._round += 1
        if self._round < change.num_rounds:
            return self._against(change)
        self._try(Stage.CHECKSUM, partial(mover.put_digests, change))
        mover.exchange_digests(change)
        self._try(Stage.CHECKSUM, partial(mover.check_staged, change))
        return self._against(change) or self._commit(change)

    def _commit(self, change: LayerMove) -> Ended:
        """Collective, between two steps: write slots and maps and check both where they are; or put the old ones back
        on all ranks."""
        mover, undo = self._mover, list[Callable[[], None]]()
        self._try(Stage.COMMIT, partial(mover.swap, change, undo))
        self._try(Stage.COMMIT, partial(mover.check_written, change))
        self._try(Stage.CANARY, partial(mover.check_canary, change))
        self._try(Stage.COMMIT, partial(self._write_maps, change, undo))
        self._try(Stage.COMMIT, partial(self._check_maps, change))
        self._try(Stage.COMMIT, self._check_addresses)
        if ended := self._against(change):
            for put_back in undo:
                put_back()
            return ended
        return Ended(change)

    def _write_maps(self, change: LayerMove, undo: list[Callable[[], None]]) -> None:
        """What puts the old ones back is added to `undo` before anything is written."""
        layer, selector = change.layer, self._selector
        tables = selector.tables(ExpertPlacement(torch.tensor([change.row]), self._num_logical, self._ep.size))
        for kept, table in zip(self._kept, selector.of_layer(layer), strict=True):
            kept.copy_(table)
        undo.append(partial(selector.write_, layer, self._kept))
        selector.write_(layer, tables)

    def _check_maps(self, change: LayerMove) -> None:
        """MismatchError where the maps are not those of the row that all ranks agreed on."""
        if (wrong := wrong_tables(self._selector, change.layer, change.row)) is not None:
            raise MismatchError(f"replica maps: {wrong}")

    def _check_addresses(self) -> None:
        """MismatchError where what captured graphs read has moved."""
        self._mover.check_addresses()
        if list(self._selector.addresses) != self._addresses:
            raise MismatchError("replica maps have moved in memory")

    def _try(self, stage: Stage, act: Callable[[], T]) -> T | None:
        """`act()`, or None where this rank fails or has failed: what it raises is told to all at the next vote."""
        if self._fault is not None:
            return None
        try:
            self._on_stage(stage, self._ep.rank, None if self._change is None else self._change.layer)
            return act()
        except (CommunicationError, EngineClosedError):
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, serving goes on without this move
            self._fault = (stage, f"{type(error).__name__}: {error}")
            return None

    def _against(self, change: LayerMove) -> Ended | None:
        """Collective: None where no rank has failed and the layer's time is not over; else why, known to all."""
        took_s = self._clock() - self._began
        if self._ep.rank == 0 and self._fault is None and self._round and took_s > self._deadline_s:
            self._fault = (Stage.DEADLINE, self._late(change, took_s))
        fault = self._fault
        if not any(failed for (failed,) in self._ep.exchange((int(fault is not None),))):
            return None
        told = self._ep.collect(b"" if fault is None else json.dumps(fault).encode())
        causes = [(rank, *json.loads(payload)) for rank, payload in enumerate(told) if payload]
        causes.sort(key=lambda one: list(Stage).index(Stage(one[1])))  # the cause before what follows from it
        reasons = tuple([f"rank {rank}: {text}" for rank, _, text in causes])
        return Ended(change, Stage(causes[0][1]), reasons)

    def _late(self, change: LayerMove, took_s: float) -> str:
        """With the nearest settings that would do if steps go on as they went."""
        done, count, budget = self._round, max(change.num_rounds, 1), self._terms.bytes_per_step
        text = (
            f"round {done} of {count} after balance.deadline_s={self._deadline_s:g}, "
            f"with balance.bytes_per_step={budget}. "
            f"Nearest: balance.deadline_s={math.ceil(took_s * count / done) + 1}"
        )
        in_time = max(1, math.floor(done * self._deadline_s / took_s))
        num_local, whole = self._mover.num_local, rows_of(self._terms.slot_bytes) * ROW_BYTES
        least = busiest_bytes(change.moves, slot_bytes=whole, num_local=num_local) / in_time
        while budget < least:
            budget *= 2  # less would be late at the busiest rank
        for _ in range(_TRIES if done < count else 0):
            if self._num_rounds(change.moves, budget) <= in_time:
                return f"{text}, or balance.bytes_per_step={budget}."
            budget *= 2
        return f"{text}."

    def _num_rounds(self, moves: Sequence[Move], bytes_per_step: int) -> int:
        slot_bytes, num_local = self._terms.slot_bytes, self._mover.num_local
        return num_rounds(moves, slot_bytes=slot_bytes, bytes_per_step=bytes_per_step, num_local=num_local)
