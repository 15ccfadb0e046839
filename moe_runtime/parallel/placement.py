"""ExpertPlacement: which physical expert (slot) holds which logical expert, and the replica that a token goes to.

L MoE layers, E logical experts (routed, then dispatched shared ones), P physical experts = ep ranks × local slots,
R replicas of the most replicated expert, T tokens, K top-k.

The placement file is JSON:

    {"version": 1, "num_layers": L, "num_logical_experts": E, "ep": ranks, "phy2log": [[P ids] for each of L layers]}
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from moe_runtime.errors import ConfigError
from moe_runtime.parallel.replicas import ReplicaChoice, ReplicaSelector
from moe_runtime.parallel.spread import home_counts, replicate, spread
from moe_runtime.types import NOWHERE, LogicalRouting, PhysicalRouting

FILE_VERSION: Final = 1
_FILE_KEYS: Final = ("version", "num_layers", "num_logical_experts", "ep", "phy2log")


@dataclass(frozen=True, slots=True)
class Move:
    """One slot that changes: `logical` is to be copied from slot `source` (old placement) to slot `target`. `via`: the
    target of an earlier move of the same layer that passes on what it receives; None where the source sends itself."""

    layer: int
    logical: int
    source: int
    target: int
    via: int | None = None

    @property
    def sender(self) -> int:
        """The slot whose rank sends."""
        return self.source if self.via is None else self.via


def num_physical_experts(num_logical: int, *, ep: int, num_redundant: int) -> int:
    """`max(num_logical + num_redundant, ep)` rounded up to a multiple of `ep`."""
    return -(-max(num_logical + num_redundant, ep) // ep) * ep


def expected_load(num_routed: int, num_shared: int, *, top_k: int) -> tuple[float, ...]:
    """Share of the tokens that each logical expert would see under even routing; dispatched shared experts see all."""
    return (top_k / num_routed,) * num_routed + (1.0,) * num_shared


@dataclass(frozen=True, slots=True, eq=False)
class ExpertPlacement:
    """`phy2log [L, P] int64` on CPU and the maps derived from it. Immutable: do not write into the tensors.

    Raises ConfigError where P is no multiple of `ep`, an id lies outside 0..num_logical-1 or an expert has no slot.
    """

    phy2log: Tensor
    num_logical: int
    ep: int
    log2phy: Tensor = field(init=False)
    """[L, E, R] int64, slots in ascending order, padded with -1."""
    logcnt: Tensor = field(init=False)
    """[L, E] int64: number of replicas."""

    def __post_init__(self) -> None:
        _check_shape(self.phy2log, self.num_logical, self.ep)
        counts = torch.zeros(self.num_layers, self.num_logical, dtype=torch.int64)
        counts.scatter_add_(1, self.phy2log, torch.ones_like(self.phy2log))
        if (missing := (counts == 0).nonzero()).numel():
            layer, expert = missing[0].tolist()
            raise ConfigError(
                f"placement: logical expert {expert} has no slot in layer {layer} ({len(missing)} such cases). Every "
                f"expert needs one; free a slot by naming an expert with several replicas less often in phy2log."
            )
        object.__setattr__(self, "logcnt", counts)
        object.__setattr__(self, "log2phy", _invert(self.phy2log, counts))

    @classmethod
    def uniform(
        cls,
        num_layers: int,
        num_logical: int,
        *,
        ep: int,
        num_redundant: int = 0,
        expected_load: Sequence[float] | None = None,
    ) -> ExpertPlacement:
        """Equal in all layers: each rank has its even share of the experts in order, then its redundant slots.

        All experts get copies in turn or, with `expected_load [E]`, always the one with most load per replica.
        Two replicas of one expert share a rank only where that cannot be avoided.
        """
        if num_logical < 1 or num_layers < 1 or ep < 1 or num_redundant < 0:
            raise ConfigError(
                f"placement: num_layers={num_layers}, num_logical={num_logical}, ep={ep}, num_redundant_experts="
                f"{num_redundant}: the first three must be at least 1 and the last at least 0."
            )
        slots = num_physical_experts(num_logical, ep=ep, num_redundant=num_redundant) // ep
        loads = [1.0] * num_logical if expected_load is None else list(expected_load)
        homes = home_counts(num_logical, ep)
        ranks = spread(homes, replicate(loads, homes, slots * ep - num_logical), slots)
        row = torch.tensor([expert for rank in ranks for expert in rank], dtype=torch.int64)
        return cls(row.expand(num_layers, -1).contiguous(), num_logical, ep)

    @classmethod
    def from_file(cls, path: str | Path, *, num_layers: int, num_logical: int, ep: int) -> ExpertPlacement:
        """Read a placement file made for this model shape and this `ep`; ConfigError names what does not fit."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"placement.file={str(path)!r} cannot be read: {error}. Give a JSON file.") from error
        placement = cls.from_json(text, name=f"placement.file={str(path)!r}")
        seen = (placement.num_layers, placement.num_logical, placement.ep)
        for key, value, wanted in zip(_FILE_KEYS[1:4], seen, (num_layers, num_logical, ep), strict=True):
            if value != wanted:
                raise ConfigError(
                    f"placement.file={str(path)!r}: {key}={value}, but this run has {key}={wanted}. "
                    f"Run with {key}={value} or make a placement for this run."
                )
        return placement

    @classmethod
    def from_json(cls, text: str, *, name: str = "placement") -> ExpertPlacement:
        """Inverse of `to_json`; `name` leads the error texts."""
        try:
            document = json.loads(text, object_pairs_hook=_unique_keys)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{name}: not a JSON object: {error}.") from error
        if not isinstance(document, dict) or set(document) != set(_FILE_KEYS):
            keys = sorted(document) if isinstance(document, dict) else type(document).__name__
            raise ConfigError(f"{name}: has {keys}; must be an object with exactly the keys {list(_FILE_KEYS)}.")
        for key in _FILE_KEYS[:4]:
            if type(document[key]) is not int or document[key] < 1:
                raise ConfigError(f"{name}: {key}={document[key]!r}; must be an integer of at least 1.")
        if document["version"] != FILE_VERSION:
            raise ConfigError(f"{name}: version={document['version']}; this program reads version {FILE_VERSION}.")
        table = _integer_table(document["phy2log"], document["num_layers"], name)
        return cls(table, document["num_logical_experts"], document["ep"])

    def to_json(self) -> str:
        """The placement file, one line per layer."""
        rows = ",\n  ".join(json.dumps(row) for row in self.phy2log.tolist())
        values = (FILE_VERSION, self.num_layers, self.num_logical, self.ep)
        head = "".join(f' "{key}": {value},\n' for key, value in zip(_FILE_KEYS, values, strict=False))
        return f'{{\n{head} "phy2log": [\n  {rows}\n ]\n}}\n'

    @property
    def num_layers(self) -> int:
        return self.phy2log.shape[0]

    @property
    def num_physical(self) -> int:
        return self.phy2log.shape[1]

    @property
    def num_local(self) -> int:
        """Slots per rank."""
        return self.num_physical // self.ep

    def owner(self, physical: int) -> tuple[int, int]:
        """(ep rank, local slot) of a physical expert."""
        return divmod(physical, self.num_local)

    def local_logical(self, layer: int, ep_rank: int) -> tuple[int, ...]:
        """Logical id in each of a rank's slots."""
        first = ep_rank * self.num_local
        return tuple(self.phy2log[layer, first : first + self.num_local].tolist())

    def selector(
        self,
        ep_rank: int,
        *,
        choice: ReplicaChoice = ReplicaChoice.STATIC,
        ranks_per_node: int = 8,
        device: torch.device | str = "cpu",
        rewritable: bool = False,
    ) -> ReplicaSelector:
        """The device tables with which rank `ep_rank` turns logical into physical routings. `rewritable`: in place, as
        the placement changes."""
        return ReplicaSelector.build(
            self, ep_rank, choice=choice, ranks_per_node=ranks_per_node, device=device, rewritable=rewritable
        )

    def to_physical(
        self, layer: int, routing: LogicalRouting, *, ep_rank: int, choice: ReplicaChoice = ReplicaChoice.STATIC
    ) -> PhysicalRouting:
        """One-off `selector(...).to_physical(...)`; a rank keeps its selector instead."""
        return self.selector(ep_rank, choice=choice, device=routing.expert_ids.device).to_physical(layer, routing)


def _invert(phy2log: Tensor, counts: Tensor) -> Tensor:
    """[L, E, R] int64 with the slots of each expert in ascending order."""
    layers, experts = counts.shape
    order = phy2log.argsort(dim=1, stable=True)
    sorted_ids = phy2log.gather(1, order)
    first = counts.cumsum(1) - counts
    replica = torch.arange(phy2log.shape[1]) - first.gather(1, sorted_ids)
    table = torch.full((layers, experts, int(counts.max())), NOWHERE, dtype=torch.int64)
    table[torch.arange(layers).unsqueeze(1), sorted_ids, replica] = order
    return table


def _check_shape(phy2log: Tensor, num_logical: int, ep: int) -> None:
    if phy2log.ndim != 2 or phy2log.dtype != torch.int64 or phy2log.device.type != "cpu" or not phy2log.numel():
        raise ConfigError(
            f"placement: phy2log is {phy2log.dtype} {tuple(phy2log.shape)}; must be int64 [layers, slots] on CPU."
        )
    slots = phy2log.shape[1]
    if slots < num_logical:
        raise ConfigError(
            f"placement: {slots} slots for {num_logical} logical experts; every expert needs one. "
            f"Use {num_physical_experts(num_logical, ep=ep, num_redundant=0)} slots or more."
        )
    if slots % ep:
        raise ConfigError(
            f"placement: {slots} slots do not divide among ep={ep} ranks. "
            f"Use {max(1, slots // ep) * ep} or {-(-slots // ep) * ep} slots."
        )
    if bad := ((phy2log < 0) | (phy2log >= num_logical)).nonzero().tolist():
        layer, slot = bad[0]
        raise ConfigError(
            f"placement: slot {slot} of layer {layer} names expert {int(phy2log[layer, slot])}; "
            f"must lie in 0..{num_logical - 1}."
        )


def _integer_table(rows: object, num_layers: int, name: str) -> Tensor:
    if not isinstance(rows, list) or len(rows) != num_layers:
        found = len(rows) if isinstance(rows, list) else type(rows).__name__
        raise ConfigError(f"{name}: phy2log has {found} layers; num_layers={num_layers} says otherwise.")
    for layer, row in enumerate(rows):
        if not isinstance(row, list) or not row or any(type(expert) is not int for expert in row):
            raise ConfigError(f"{name}: phy2log of layer {layer} must be a list of integers.")
        if len(row) != len(rows[0]):
            raise ConfigError(f"{name}: layer {layer} has {len(row)} slots and layer 0 has {len(rows[0])}; not equal.")
        if max(map(abs, row)) >= 2**31:
            raise ConfigError(f"{name}: phy2log of layer {layer} names {max(row, key=abs)}; that is no expert id.")
    return torch.tensor(rows, dtype=torch.int64)


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    document = dict(pairs)
    if len(document) != len(pairs):
        names = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in names if names.count(key) > 1)!r} appears twice")
    return document
