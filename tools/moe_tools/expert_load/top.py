"""`top`: a running engine in the terminal, from the snapshot file that it replaces twice a second."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from moe_runtime.cli.console import Console, count
from moe_runtime.engine.snapshot_file import read_snapshot
from moe_runtime.errors import ConfigError
from moe_tools.expert_load.analysis import balance_of
from moe_tools.expert_load.words import Words

SNAPSHOT: Final = "snapshot.json"
STALE_S: Final = 5.0
"""A file that is older belongs to an engine that hangs or is gone: idle engines write too."""
_EVERY_S: Final = 0.5
HEADER: Final = ("layer", "mean/max", "max/mean", "hottest ranks", "hottest experts (× mean)")
"""mean/max: balancedness of the rows that ranks received"""


@dataclass(frozen=True, slots=True)
class View:
    """One look: pairs of name and value, then rows under HEADER."""

    title: str
    pairs: tuple[tuple[str, str], ...]
    rows: tuple[tuple[str, ...], ...]
    """A layer each"""
    over: bool
    """The engine has ended"""


def top(words: Words, console: Console) -> None:
    """Show until interrupted or the engine ends; once where the output is no terminal, and then ConfigError where there
    is no file yet."""
    file = snapshot_file(words)
    if words.flag("once") or not sys.stdout.isatty():
        show(console, make_view(read_snapshot(file), time.time()))
        return
    from moe_tools.expert_load.rich_top import watch

    if not file.exists():
        console.line(f"waiting for {file}: an engine writes it once it has loaded. Ctrl-C ends this.")
        while not file.exists():
            time.sleep(_EVERY_S)
    watch(lambda: make_view(read_snapshot(file), time.time()), every_s=_EVERY_S)


def snapshot_file(words: Words) -> Path:
    """From trace=FOLDER or snapshot_file=FILE."""
    given = [word.partition("=")[2] for word in words.launch if word.startswith("snapshot_file=")]
    if given:
        return Path(given[-1])
    if "trace" in words.own:
        return Path(words.own["trace"]) / SNAPSHOT
    raise ConfigError(
        "top: which engine? Give the folder that it writes its trace to, trace=FOLDER, or its snapshot_file=FILE. "
        "Start an engine with one: python -m moe_runtime ep=32 snapshot_file=snapshot.json"
    )


def show(console: Console, view: View) -> None:
    """As plain lines or a table."""
    console.pairs(view.title, view.pairs)
    if view.rows:
        console.table("the last window of steps", HEADER, view.rows)


def make_view(document: dict[str, Any], now: float) -> View:
    """What to show of a snapshot file's document. ConfigError where it lacks what every engine writes."""
    try:
        return _view(document, now)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"snapshot: {error!r} is not as an engine writes it. Give the file of a running one."
        ) from None


def _view(document: dict[str, Any], now: float) -> View:
    engine, window, run = document["engine"], document["window"], document["run"]
    mesh, age = engine["mesh"], max(0.0, now - document["written_at"])
    running = sum(group["num_running"] for group in engine["groups"])
    waiting = sum(group["num_waiting"] for group in engine["groups"])
    state = engine["state"]
    alive = state == "running" and age <= STALE_S
    if state == "running" and not alive:
        state = f"silent for {age:.0f} s" + ("" if _lives(document["pid"]) else ": its process has ended")
    pairs = [
        ("engine", f"{run.get('model', 'model')}, {state}, process {document['pid']}, up {_span(engine['uptime_s'])}"),
        ("mesh", f"dp {mesh['dp']} × tp {mesh['tp']} × pp {mesh['pp']}, {mesh['ranks_per_node']} ranks per node"),
        ("step", f"{engine['step']} ({engine['phase']}), the last one took {1000 * engine['last_step_s']:.1f} ms"),
        ("requests", f"{running} running, {waiting} waiting, {engine['num_finished_requests']} finished"),
        ("tokens", f"{engine['output_tokens_per_s']:.1f} per second, {engine['num_output_tokens']} written"),
        ("rebalancing", _rebalance(engine["rebalance"])),
        *_decisions(engine["rebalance"]),
    ]
    if window is None:
        pairs.append(("loads", "no window of steps has ended yet"))
        return View("expert load", tuple(pairs), (), engine["state"] != "running")
    steps = f"steps {window['first_step']} to {window['last_step']}, {count(window['num_tokens'], 'token')}"
    pairs.append(("window", steps))
    if window.get("trace_error"):
        pairs.append(("trace", f"ended early: {window['trace_error']}"))
    if dropped := window.get("trace_dropped"):
        pairs.append(("trace", f"{count(dropped, 'window')} left out: the disk is slower than what is recorded"))
    return View("expert load", tuple(pairs), _rows(window, run.get("num_routed")), engine["state"] != "running")


def _rows(window: dict[str, Any], num_routed: int | None) -> tuple[tuple[str, ...], ...]:
    """Shared experts see every token, so only the first `num_routed` experts count as hot."""
    experts = np.asarray(window["expert_load"], dtype=np.float64)[:, :num_routed]
    ranks = np.asarray(window["rank_load"], dtype=np.float64)
    rows = []
    for layer, even in enumerate(balance_of(ranks)):
        mean = ranks[layer].mean()
        if not mean:
            rows.append((str(layer), "–", "–", "", ""))
            continue
        hot = np.argsort(-ranks[layer], kind="stable")[:3]
        busy = np.argsort(-experts[layer], kind="stable")[:3]
        each = experts[layer].mean()
        rows.append(
            (
                str(layer),
                f"{even:.3f}",
                f"{1 / even:.2f}",
                ", ".join(f"{rank} ({int(ranks[layer, rank])})" for rank in hot),
                ", ".join(f"{expert} ({experts[layer, expert] / each:.1f}×)" for expert in busy),
            )
        )
    return tuple(rows)


def _rebalance(state: dict[str, Any]) -> str:
    if state["activity"] == "off":
        return "off"
    text = f"{state['activity']}, {count(state['num_layers_committed'], 'layer')} moved so far"
    if state["layer"] is not None:
        text += f"; layer {state['layer']} at {100 * state['layer_progress']:.0f} %, {state['layers_left']} left"
    if state["num_layers_abandoned"]:
        text += f"; {state['num_layers_abandoned']} abandoned"
    return text


def _decisions(state: dict[str, Any]) -> list[tuple[str, str]]:
    """The last decision and the last failure, where there were any."""
    rows = []
    if (made := state.get("decision")) is not None:
        text = f"{made['verdict']}: ranks were used to {100 * made['utilisation']:.0f} %"
        if made["num_moves"]:
            moved = f"{count(made['num_moves'], 'slot')} of {count(made['num_layers'], 'layer')}"
            text += f", {100 * made['predicted']:.0f} % promised by moving {moved}"
        rows.append(("decision", text))
    if (failed := state.get("last_failure")) is not None:
        rows.append(("failure", f"{failed['stage']} at step {failed['step']}: {'; '.join(failed['reasons'])}"))
    return rows


def _span(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _lives(pid: int) -> bool:
    """Whether this machine has a process `pid`."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True  # another user's
    return True
