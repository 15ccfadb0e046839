"""`top`: what an engine's snapshot file looks like in a terminal."""

from __future__ import annotations

import time
from typing import Any

import pytest
from moe_tools.expert_load.rich_top import bar, render
from moe_tools.expert_load.top import View, make_view
from rich.console import Console

from moe_runtime.errors import ConfigError


def snapshot(**changes: Any) -> dict[str, Any]:
    """As an engine writes it."""
    rebalance = {"activity": "moving", "num_layers_committed": 1, "layer": 2, "layer_progress": 0.5, "layers_left": 3}
    engine = {
        "mesh": {"dp": 2, "tp": 1, "pp": 1, "ranks_per_node": 8},
        "state": "running",
        "step": 7,
        "phase": "decode",
        "groups": [{"num_running": 2, "num_waiting": 1}] * 2,
        "num_finished_requests": 5,
        "num_output_tokens": 99,
        "uptime_s": 3700.0,
        "last_step_s": 0.0125,
        "output_tokens_per_s": 12.5,
        "rebalance": rebalance | {"num_layers_abandoned": 1},
    }
    window = {
        "first_step": 4,
        "last_step": 7,
        "num_tokens": 8,
        "expert_load": [[6, 2, 0, 0], [0, 0, 0, 0]],
        "rank_load": [[8, 0], [0, 0]],
        "trace_error": None,
    }
    return {"written_at": time.time(), "pid": 1, "run": {"model": "m"}, "engine": engine, "window": window} | changes


def test_top_shows_the_window() -> None:
    view = make_view(snapshot(), time.time())
    text = dict(view.pairs)
    assert text["requests"] == "4 running, 2 waiting, 5 finished"
    assert text["rebalancing"] == "moving, 1 layer moved so far; layer 2 at 50 %, 3 left; 1 abandoned"
    assert view.rows[0] == ("0", "0.500", "2.00", "0 (8), 1 (0)", "0 (3.0×), 1 (1.0×), 2 (0.0×)")
    assert view.rows[1][1] == "–"
    assert not view.over


def test_top_tells_a_silent_engine() -> None:
    late = snapshot(written_at=time.time() - 60, pid=2**22 + 1, window=None)
    view = make_view(late, time.time())
    assert "silent for 60 s: its process has ended" in dict(view.pairs)["engine"]
    assert "no window" in dict(view.pairs)["loads"]
    with pytest.raises(ConfigError, match="not as an engine writes it"):
        make_view({"engine": {}}, 0.0)


def test_the_last_decision_and_failure_are_shown() -> None:
    document = snapshot()
    document["engine"]["rebalance"] |= {
        "decision": {"verdict": "move", "utilisation": 0.57, "predicted": 0.97, "num_moves": 101, "num_layers": 1},
        "last_failure": {"stage": "checksum", "step": 41, "layer": 1, "reasons": ["rank 3: sums differ"]},
    }
    text = dict(make_view(document, time.time()).pairs)
    assert text["decision"] == "move: ranks were used to 57 %, 97 % promised by moving 101 slots of 1 layer"
    assert text["failure"] == "checksum at step 41: rank 3: sums differ"


def test_shared_experts_are_not_the_hottest() -> None:
    view = make_view(snapshot(run={"model": "m", "num_routed": 2}), time.time())
    assert view.rows[0][4] == "0 (1.5×), 1 (0.5×)"


def drawn(view: View, *, width: int, most_rows: int | None = None) -> list[str]:
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(render(view, width=width, most_rows=most_rows))
    return capture.get().splitlines()


def test_top_on_a_terminal() -> None:
    lines = drawn(make_view(snapshot(), time.time()), width=110)
    text = "\n".join(lines)
    assert "0 (3.0×)" in text
    assert f" {'█' * 12} " in text
    assert "[" not in text


def test_a_small_terminal_shows_the_least_even_layers_in_a_line_each() -> None:
    document = snapshot()
    loads = {"rank_load": [[8 + layer, 8, 0] for layer in range(58)], "expert_load": [[9] * 256] * 58}
    view = make_view(document | {"window": document["window"] | loads}, time.time())
    lines = drawn(view, width=80, most_rows=6)
    assert len(lines) <= len(view.pairs) + 6 + 8
    assert [line.split()[0] for line in lines if line[:2].strip().isdecimal()] == ["52", "53", "54", "55", "56", "57"]
    assert all("0.3" in line for line in lines if line.startswith("5"))
    assert "The 6 least even layers of 58" in lines[-1]


@pytest.mark.parametrize(("part", "text"), [(0, ""), (1, "█" * 24), (0.5, "█" * 12), (1 / 48, "▌")])
def test_bars(part: float, text: str) -> None:
    assert bar(part, 24) == text
