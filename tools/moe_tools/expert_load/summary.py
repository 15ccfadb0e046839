"""A report's content in the terminal."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from moe_runtime.cli.console import Console, count
from moe_runtime.launch.sizing import format_bytes
from moe_tools.expert_load.analysis import Candidate, Floats, balance_of
from moe_tools.expert_load.document import Document
from moe_tools.expert_load.planning import Comparison

_SHOWN_LAYERS = 12


def show_summary(console: Console, document: Document) -> None:
    """What the trace says, and what each placement would have made of it."""
    data = document.data
    nodes = -(-data["ep"] // data["ranks_per_node"])
    rows = [
        ("model", f"{data['model']}: {count(data['layers'], 'MoE layer')} of {count(data['experts'], 'expert')}"),
        ("ranks", f"{data['ep']} on {count(nodes, 'node')}{_other_ranks(document)}"),
        ("tokens", f"{data['tokens']} in {count(data['steps'], 'step')}, {count(data['windows'], 'window')}"),
        *_traffic(data["traffic"], [own for own in document.candidates if own.key != "none"]),
    ]
    if moved := data["changes"]:
        rows.append(("moved", f"{count(moved, 'time')} a layer's experts, while it ran"))
    if not data["complete"]:
        rows.append(("trace", "not complete: the run goes on, it ended early, or its disk was too slow"))
    if dropped := data["dropped_windows"]:
        rows.append(
            (
                "trace",
                f"{count(dropped, 'window')} are missing: balance.trace_bytes was reached, or the disk was too slow",
            )
        )
    if hot := data["hot_experts"][:4]:
        each = ", ".join(f"{h['expert']} in layer {h['layer']} ({h['times']:.1f}×)" for h in hot)
        rows.append(("hot experts", each))
    if busy := data["hot_ranks"][:4]:
        rows.append(("hot ranks", ", ".join(f"{h['rank']} ({h['times']:.2f}×)" for h in busy)))
    console.pairs("expert load", rows)
    header = ("placement", "", "experts' time used", "busiest rank / mean", "worst layer", "ranks × slots")
    lines = [
        (
            own.name,
            own.kind,
            percent(own.used),
            _number(own.slowest, 2),
            _number(_least(own.balance)),
            "–" if own.placement is None else f"{own.placement.ep} × {own.placement.num_local}",
        )
        for own in document.candidates
    ]
    console.table("placements (in each window and layer all ranks wait for the busiest)", header, lines)


def _other_ranks(document: Document) -> str:
    """What to keep in mind where the plan is for other ranks."""
    plan, recorded = document.plan, document.recorded
    if plan is None or plan.ep == recorded.ep:
        return ""
    return f"; the plan is for {plan.ep}: compare it with no balancing on {plan.ep}, not with the recording's figures"


def _traffic(data: dict[str, Any], shown: list[Candidate]) -> list[tuple[str, str]]:
    """What is routed, and what of it travels under each placement."""
    routed = _amount(data["recorded"]["total"], data["unit"])
    rows = [("routed", f"{routed}{' of rows' if data['unit'] == 'bytes' else ''} to experts, and as much back")]
    for own in shown:
        sent = data[own.key]
        off_rank, off_node = (_amount(sent[part], data["unit"]) for part in ("off_rank", "off_node"))
        about = "" if sent["exact"] else "; an estimate, not from routes of tokens"
        line = f"{own.name.lower()}, {off_rank} leave their rank and {off_node} their node{about}"
        rows.append(("traffic" if len(rows) == 1 else "", line))
    return rows


def show_plan(console: Console, document: Document) -> None:
    """What the plan costs."""
    plan = document.data["plan"]
    rows = [
        ("slots", f"{plan['slots']} per rank and layer, {plan['spare']} of {plan['slots'] * plan['ep']} spare"),
    ]
    if plan["rank_bytes"] is not None:
        before = "" if plan["rank_bytes_before"] is None else f" (recorded: {format_bytes(plan['rank_bytes_before'])})"
        rows.append(("memory", f"{format_bytes(plan['rank_bytes'])} of expert weights per rank{before}"))
    else:
        rows.append(("memory", "unknown: the model is not on this machine"))
    if plan["moves"] is None:
        rows.append(("moves", "a new start: the recording had other slots or ranks"))
    else:
        size = "" if plan["move_bytes"] is None else f", {format_bytes(plan['move_bytes'])}"
        rows.append(("moves", f"{count(plan['moves'], 'slot')}{size}"))
    console.pairs("plan", rows)


def show_comparison(console: Console, found: Comparison) -> None:
    """Predicted and measured, layer by layer."""
    totals = found.totals
    predicted, measured = map(balance_of, totals)
    rows = [
        (
            str(layer),
            _number(predicted[layer]),
            _number(measured[layer]),
            f"{totals[0][layer].max():.0f}",
            f"{totals[1][layer].max():.0f}",
        )
        for layer in range(min(len(predicted), _SHOWN_LAYERS))
    ]
    header = ("layer", "balancedness predicted", "measured", "busiest rank's rows predicted", "measured")
    console.table("plan: predicted and measured", header, rows)
    if (more := len(predicted) - _SHOWN_LAYERS) > 0:
        console.line(f"… and {count(more, 'layer')} more, in the same way")
    used = [percent(part) for part in found.used()]
    how = "each token's route sent through the plan" if found.exact else "loads spread over replicas"
    lines = [
        ("predicted", how),
        ("experts' time", f"{used[0]} used as predicted, {used[1]} as measured"),
        (
            "rows of a rank",
            "exactly as predicted"
            if (totals[0] == totals[1]).all()
            else f"off by {percent(found.off_by())} of the mean",
        ),
        (
            "experts",
            "chosen equally often in both runs" if found.same_routing else "chosen differently: the runs differ",
        ),
        ("balancedness", f"{_number(_mean(predicted))} predicted, {_number(_mean(measured))} measured, of all layers"),
    ]
    console.pairs("in all", lines)


def percent(part: float) -> str:
    """`0.5` → 50 %."""
    return f"{100 * part:.0f} %" if math.isfinite(part) else "–"


def _amount(value: int, unit: str) -> str:
    return format_bytes(value) if unit == "bytes" else count(value, "row")


def _number(value: float, digits: int = 3) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else "–"


def _least(values: Floats) -> float:
    known = values[np.isfinite(values)]
    return float(known.min()) if known.size else math.nan


def _mean(values: Floats) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else math.nan
