"""Everything that a report shows, as plain values: the page, the pictures and the terminal read this alone.

`Document.data` is JSON: numbers are counts of tokens or rows unless their name says bytes; NaN is null.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from moe_runtime.balance.trace import Trace
from moe_runtime.parallel.placement import ExpertPlacement
from moe_runtime.parallel.replicas import ReplicaChoice
from moe_tools.expert_load.analysis import OURS, Candidate, candidates, hot_experts, share, spans
from moe_tools.expert_load.facts import Facts
from moe_tools.expert_load.pairs import Pairs, pairs
from moe_tools.expert_load.traffic import Traffic

MOST_WINDOWS: Final = 120
"""Points of a line over time; more windows are added up in neighbours."""
MOST_PAIR_EXPERTS: Final = 40
"""Experts that a co-activation map shows."""
MOST_PAIR_LAYERS: Final = 64
_NO_ROUTES: Final = "This trace has no routes of single tokens. Record with balance.record=per_token to see this."


@dataclass(frozen=True, slots=True, eq=False)
class Document:
    """A report's content."""

    data: dict[str, Any]
    candidates: list[Candidate]

    @property
    def recorded(self) -> Candidate:
        return next(found for found in self.candidates if found.key == "recorded")

    @property
    def plan(self) -> Candidate | None:
        return next((found for found in self.candidates if found.key == "plan"), None)


def make_document(
    trace: Trace,
    *,
    plan: ExpertPlacement | None,
    plan_name: str,
    facts: Facts | None,
    choice: ReplicaChoice | None = None,
) -> Document:
    """`plan_name`: where the plan comes from, in words. `facts`: None where the model is not here; rows, not bytes.
    `choice`: None: as recorded.

    Raises ConfigError where the plan is for another model.
    """
    header, found = trace.header, candidates(trace, plan, choice)
    recorded = next(candidate for candidate in found if candidate.key == "recorded")
    load = trace.total_loads
    hot = hot_experts(trace, recorded.placement, 24)
    data: dict[str, Any] = {
        "model": header.model or "a model without a name",
        "mode": header.mode,
        "source": header.source,
        "measured": header.source == OURS,
        "created": header.created,
        "layers": header.num_layers,
        "experts": header.num_logical,
        "routed": header.num_routed,
        "top_k": header.top_k,
        "ep": header.ep,
        "tp": header.tp,
        "dp": header.dp,
        "ranks_per_node": header.ranks_per_node,
        "tokens": int(trace.num_tokens.sum()),
        "steps": int(trace.window_steps.sum()),
        "windows": trace.num_windows,
        "changes": len(trace.change_step),
        "dropped_windows": header.dropped_windows,
        "complete": header.complete,
        "expert_load": load.tolist(),
        "placements": [_candidate(candidate, facts) for candidate in found],
        "time": _time(trace, found),
        "hot_experts": [
            {"layer": h.layer, "expert": h.expert, "tokens": h.tokens, "times": h.times, "ranks": list(h.ranks)}
            for h in hot
        ],
        "hot_ranks": _hot_ranks(recorded, header.ranks_per_node),
        "pairs": _all_pairs(trace),
        "traffic": {"unit": "rows" if facts is None else "bytes", "row_bytes": _row_bytes(facts)}
        | {candidate.key: _traffic(candidate.traffic, _row_bytes(facts)) for candidate in found},
        "plan": None if plan is None else _plan(recorded.placement, plan, plan_name, facts),
    }
    return Document(_plain(data), found)


def _candidate(found: Candidate, facts: Facts | None) -> dict[str, Any]:
    known = found.placement
    weights = None if known is None or facts is None else facts.slot_bytes * known.num_layers * known.num_local
    return {
        "key": found.key,
        "name": found.name,
        "kind": found.kind,
        "ep": found.ep,
        "slots": None if known is None else known.num_local,
        "rank_bytes": weights,
        "rank_load": found.total.round(1).tolist(),
        "balance": found.balance.tolist(),
        "used": found.used,
        "slowest": found.slowest,
    }


def _time(trace: Trace, found: list[Candidate]) -> dict[str, Any]:
    """Per run of windows: its steps, and for each placement the balancedness of each layer."""
    parts = spans(trace.num_windows, MOST_WINDOWS)
    lines = {}
    for candidate in found:
        mean = np.stack([candidate.rank_loads[a:b].mean(axis=2).sum(axis=0) for a, b in parts])
        most = np.stack([candidate.rank_loads[a:b].max(axis=2).sum(axis=0) for a, b in parts])
        each, together = share(mean, most), share(mean.sum(axis=1), most.sum(axis=1))
        lines[candidate.key] = {"all": together.tolist(), "layers": each.T.tolist()}
    return {
        "first": [int(trace.first_step[a:b].min()) for a, b in parts],
        "last": [int(trace.last_step[a:b].max()) for a, b in parts],
        "tokens": [int(trace.num_tokens[a:b].sum()) for a, b in parts],
        "phases": [" and ".join(sorted(set(trace.phases[a:b]))) for a, b in parts],
        "lines": lines,
    }


def _hot_ranks(recorded: Candidate, ranks_per_node: int) -> list[dict[str, Any]]:
    """The ranks by all their rows, and the layers in which each is the slowest."""
    total = recorded.total
    rows, mean = total.sum(axis=0), total.sum(axis=0).mean()
    slowest = total.argmax(axis=1)
    order = np.argsort(-rows, kind="stable")[:24].tolist()
    return [
        {
            "rank": rank,
            "node": rank // ranks_per_node,
            "rows": int(rows[rank]),
            "times": float(rows[rank] / mean) if mean else 0.0,
            "slowest_in": [layer for layer in range(len(total)) if slowest[layer] == rank and total[layer].max() > 0],
        }
        for rank in order
        if rows[rank]
    ]


def _all_pairs(trace: Trace) -> dict[str, Any]:
    if not len(trace.routes):
        return {"missing": _NO_ROUTES, "layers": []}
    header, routes = trace.header, trace.routes.numpy()
    layers = [
        pairs(routes, layer, header.num_routed, shown=MOST_PAIR_EXPERTS, top=12)
        for layer in range(min(header.num_layers, MOST_PAIR_LAYERS))
    ]
    return {"missing": None, "layers": [_pairs(found) for found in layers]}


def _pairs(found: Pairs) -> dict[str, Any]:
    return {
        "experts": list(found.experts),
        "together": found.together.tolist(),
        "top": [list(pair) for pair in found.top],
        "tokens": found.num_tokens,
    }


def _row_bytes(facts: Facts | None) -> int:
    return 1 if facts is None else facts.row_bytes


def _traffic(sent: Traffic, size: int) -> dict[str, Any]:
    once = (sent.to_ranks, sent.to_nodes)
    per_rank, per_node = (None if rows is None else rows * size for rows in once)
    return {
        "exact": sent.exact,
        "ranks": (sent.ranks * size).tolist(),
        "nodes": (sent.nodes * size).tolist(),
        "total": sent.total * size,
        "off_rank": sent.off_rank * size,
        "off_node": sent.off_node * size,
        "busiest": sent.busiest * size,
        "once_per_rank": per_rank,
        "once_per_node": per_node,
    }


def _plan(before: ExpertPlacement | None, plan: ExpertPlacement, name: str, facts: Facts | None) -> dict[str, Any]:
    size = None if facts is None else facts.slot_bytes * plan.num_layers
    moves = slot_moves(before, plan)
    return {
        "name": name,
        "ep": plan.ep,
        "slots": plan.num_local,
        "spare": plan.num_physical - plan.num_logical,
        "rank_bytes": None if size is None else size * plan.num_local,
        "rank_bytes_before": None if size is None or before is None else size * before.num_local,
        "moves": moves,
        "move_bytes": None if moves is None or facts is None else moves * facts.slot_bytes,
    }


def slot_moves(before: ExpertPlacement | None, plan: ExpertPlacement) -> int | None:
    """Slots whose expert changes; None where the slots themselves differ, so that the run starts anew."""
    if before is None or (before.phy2log.shape, before.ep) != (plan.phy2log.shape, plan.ep):
        return None
    return int((before.phy2log != plan.phy2log).sum())


def _plain(value: Any) -> Any:
    """JSON's values: NaN is null, numpy's numbers are Python's, floats have 5 digits."""
    match value:
        case dict():
            return {key: _plain(part) for key, part in value.items()}
        case list() | tuple():
            return [_plain(part) for part in value]
        case np.integer():
            return int(value)
        case float() | np.floating():
            return round(float(value), 5) if np.isfinite(value) else None
        case _:
            return value
