"""What a trace says of itself: `trace.json`. L MoE layers, E routed experts, E' logical ones, P slots, K top-k."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final

import torch

from moe_runtime.errors import ConfigError, TraceError
from moe_runtime.parallel.placement import ExpertPlacement
from moe_runtime.parallel.replicas import ReplicaChoice

FORMAT: Final = "moe_runtime.trace"
VERSION: Final = 1
HEADER_FILE: Final = "trace.json"
MODES: Final = ("stat", "per_pass", "per_token")
MAX_ROUTED: Final = 2**15
"""Routes are int16."""
_LATER: Final = ("replica_choice",)
"""Keys that the first traces of this version do not have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceHeader:
    """The run that a trace is of, and how much of it is there. TraceError where the numbers contradict each other."""

    model: str
    """Its name, or its folder's"""
    num_layers: int
    """L: layers with experts"""
    num_logical: int
    """E': routed experts, then the shared ones where they are dispatched"""
    num_routed: int
    """E"""
    top_k: int
    """K: experts of a token, dispatched shared ones included"""
    ep: int = 1
    tp: int = 1
    dp: int = 1
    ranks_per_node: int = 8
    mode: str = "stat"
    """One of MODES"""
    window_steps: int = 100
    """As asked for; each window says how many it has"""
    phy2log: tuple[tuple[int, ...], ...] | None = None
    """[L][P]: the placement when the first part that is there begins; None where it is not known"""
    replica_choice: str | None = None
    """A ReplicaChoice: how ranks picked among an expert's replicas; None where it is not known"""
    created: str = ""
    """ISO 8601, UTC"""
    source: str = "moe_runtime"
    """What recorded it"""
    first_part: int = 0
    next_part: int = 0
    """Parts first_part .. next_part - 1 are there; more may have been written since"""
    dropped_windows: int = 0
    dropped_tokens: int = 0
    """What is not there: parts that the byte cap has cost, windows that a slow disk has; their tokens with routes"""
    complete: bool = False
    """The run has ended and all of it was written; the byte cap may have dropped parts since"""

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_logical", "num_routed", "top_k", "ep", "tp", "dp", "ranks_per_node"):
            _at_least(name, getattr(self, name), 1)
        for name in ("window_steps", "first_part", "next_part", "dropped_windows", "dropped_tokens"):
            _at_least(name, getattr(self, name), 0)
        if self.mode not in MODES:
            raise TraceError(f"mode={self.mode!r}: must be one of {', '.join(MODES)}.")
        if self.replica_choice is not None and self.replica_choice not in tuple(ReplicaChoice):
            raise TraceError(
                f"replica_choice={self.replica_choice!r}: must be null or one of {', '.join(ReplicaChoice)}."
            )
        if not self.num_routed <= self.num_logical < MAX_ROUTED:
            raise TraceError(
                f"num_logical={self.num_logical}: must be at least num_routed={self.num_routed} and below {MAX_ROUTED}."
            )
        if self.top_k > self.num_logical:
            raise TraceError(f"top_k={self.top_k}: a token has at most num_logical={self.num_logical} experts.")
        if self.ep != self.dp * self.tp:
            raise TraceError(f"ep={self.ep}: must be dp·tp = {self.dp * self.tp}.")

    @property
    def num_physical(self) -> int:
        """P; 0 where the placement is not known."""
        return len(self.phy2log[0]) if self.phy2log else 0

    def placement(self) -> ExpertPlacement | None:
        """That of `phy2log`. TraceError where it is none."""
        if self.phy2log is None:
            return None
        try:
            placement = ExpertPlacement(torch.tensor(self.phy2log, dtype=torch.int64), self.num_logical, self.ep)
        except (ConfigError, ValueError, TypeError, RuntimeError) as error:
            raise TraceError(f"phy2log: {error} Record again, or set phy2log to null.") from error
        if placement.num_layers != self.num_layers:
            raise TraceError(f"phy2log has {placement.num_layers} layers, num_layers={self.num_layers}.")
        return placement

    def check_model(self, *, num_layers: int, num_logical: int, top_k: int | None = None) -> None:
        """TraceError where the trace is of a model of another shape: other layers or experts, or, where given, another
        top_k."""
        asked = {"num_layers": num_layers, "num_logical": num_logical, "top_k": top_k}
        for name, wanted in asked.items():
            seen = getattr(self, name)
            if wanted is not None and seen != wanted:
                remedy = " or set shared_experts as it was recorded" if name == "num_logical" else ""
                raise TraceError(
                    f"a trace of {self.model!r} with {name}={seen}, and this model has {name}={wanted}: they must be "
                    f"equal. Record a trace of this model{remedy}."
                )

    def to_json(self) -> str:
        """What `trace.json` holds; one line per key."""
        rows = {"format": FORMAT, "version": VERSION, **asdict(self)}
        return "{\n" + ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in rows.items()) + "\n}\n"

    @classmethod
    def from_json(cls, text: str) -> TraceHeader:
        """The inverse of `to_json`. TraceError where the text is no header of this version."""
        try:
            document = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise TraceError(f"not JSON: {error}. It was cut short or edited; record again.") from error
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise TraceError(f'no trace: must be a JSON object with "format": "{FORMAT}".')
        if document.get("version") != VERSION:
            raise TraceError(
                f"version={document.get('version')!r}: this program reads version {VERSION}. "
                "Record again, or read it with the program that wrote it."
            )
        return cls(**_values(document))


def read_header(folder: str | Path) -> TraceHeader:
    """The header of the trace in `folder`. TraceError where there is none."""
    file = Path(folder) / HEADER_FILE
    try:
        return TraceHeader.from_json(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(
            f"{str(file)!r} cannot be read: {error}. Give the folder of a trace, as balance.trace=FOLDER writes it."
        ) from error
    except TraceError as error:
        raise TraceError(f"{str(file)!r}: {error}") from error


def has_trace(folder: str | Path) -> bool:
    """Whether a trace lies in `folder`."""
    return (Path(folder) / HEADER_FILE).exists()


def _values(document: Mapping[str, Any]) -> dict[str, Any]:
    """The header's fields of a document; keys that later programs add are passed over."""
    found: dict[str, Any] = {}
    for item in fields(TraceHeader):
        if item.name not in document:
            if item.name in _LATER:
                continue
            raise TraceError(f"{item.name} is missing. It was edited; record again.")
        value = document[item.name]
        wanted = {"int": int, "str": str, "bool": bool}.get(str(item.type))
        if wanted is not None and type(value) is not wanted:
            raise TraceError(f"{item.name}={value!r}: must be of type {wanted.__name__}.")
        if item.name == "phy2log" and value is not None:
            if not isinstance(value, list) or not all(isinstance(row, list) for row in value):
                raise TraceError("phy2log: must be null or a list of a list of expert ids for each layer.")
            value = tuple(map(tuple, value))
        found[item.name] = value
    return found


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise TraceError(f"{name}={value}: must be at least {least}.")
