"""Rebalancing as a configuration asks for it: when it moves by itself, what it takes, what is refused."""

from __future__ import annotations

from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_runtime import LLM
from moe_runtime.balance.decision import Decision, Terms, decide
from moe_runtime.balance.routes import RouteBuffer
from moe_runtime.cli.console import PlainConsole
from moe_runtime.cli.doctor import doctor
from moe_runtime.engine.mover import Mover
from moe_runtime.engine.rebalance import Rebalancer
from moe_runtime.errors import ConfigError
from moe_runtime.launch import planning, rebalancing
from moe_runtime.launch import recording as launch_recording
from moe_runtime.launch.compose import compose
from moe_runtime.launch.placing import num_local_slots
from moe_runtime.launch.planning import PlanRule
from moe_runtime.launch.process_size import process_bytes, staging_bytes
from moe_runtime.launch.recording import route_bytes
from moe_runtime.parallel.placement import ExpertPlacement
from tests.api.tiny import NUM_EXPERTS, NUM_MOE_LAYERS, greedy, write_tiny
from tests.engine.moving_runs import (
    COMMON,
    COPIES,
    INVARIANT,
    PROMPTS,
)
from tests.engine.moving_world import inline


def decide_here(
    loads: Tensor, steps: int, *, now: ExpertPlacement, first: ExpertPlacement, rule: PlanRule, terms: Terms, **_: Any
) -> Decision:
    return decide(loads, steps, now=now, first=first, plan=rule, terms=terms)


@pytest.mark.parametrize("interval", [10, 40], ids=["in this process", "in a process of its own"])
def test_loads_decide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interval: int) -> None:
    """Nothing forced: all tokens go to two experts of one rank, the planner parts them, and serving ends up so."""
    monkeypatch.setattr(rebalancing, "Rebalancer", partial(Rebalancer, start=inline))
    if interval == 10:
        monkeypatch.setattr(rebalancing, "decide_apart", decide_here)
    else:
        monkeypatch.delattr(planning, "decide")  # what would be called here
    folder, file = write_tiny(tmp_path / "skewed", text=False, max_position_embeddings=64), tmp_path / "live.json"
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("e_score_correction_bias"):
            tensor[:2] += 5.0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    words = ["ep=4", "tp=1", "balance.rebalance=on", f"balance.interval_steps={interval}", "balance.threshold=1.0"]
    words += [f"balance.window_steps={interval // 2}"]
    with LLM(str(folder), overrides=[*COMMON, *words, f"balance.save_placement={file}"]) as llm:
        for _ in range(6):
            llm.generate(PROMPTS, [greedy(14)] * 4)
        state = llm.snapshot().rebalance
        assert state.num_decisions >= 2 and state.decision is not None
        assert (state.decision.without, state.decision.utilisation) == (0.25, 0.5), "one rank of four, then two"
        assert state.num_layers_committed >= 2 and state.promised == 0.5 and state.decision.num_windows >= 2
    assert state.last_failure is None
    live = ExpertPlacement.from_file(file, num_layers=NUM_MOE_LAYERS, num_logical=NUM_EXPERTS, ep=4)
    for layer in range(2):
        ranks = {live.owner(int(live.log2phy[layer, expert, 0]))[0] for expert in (0, 1)}
        assert len(ranks) == 2, f"layer {layer}: both on one rank"


def test_a_budget_in_which_no_expert_can_move(folder: Path) -> None:
    """An expert of 6 KiB is two rows of 4 KiB; it must be there before the next decision."""
    words = [f"model={folder}", "ep=4", "balance.rebalance=on"]
    with pytest.raises(ConfigError) as caught:
        compose([*words, "balance.bytes_per_step=4KiB", "balance.interval_steps=2"])
    assert str(caught.value) == (
        "balance.bytes_per_step=4096, balance.interval_steps=2: an expert of 6 KiB takes 2 steps, and must be there "
        "before the next decision. Nearest: balance.bytes_per_step=8192, or balance.interval_steps=3."
    )
    compose([*words, "balance.bytes_per_step=4KiB", "balance.interval_steps=3"])
    compose([*words, "balance.bytes_per_step=8KiB", "balance.interval_steps=2"])
    out = StringIO()
    assert doctor([*words, "balance.interval_steps=1", "job=doctor"], console=PlainConsole(out)) == 1
    assert "balance.bytes_per_step=8192 with balance.interval_steps=2, or balance.interval_steps=2" in out.getvalue()


def test_what_it_takes_is_told(folder: Path) -> None:
    """The staging set is a layer's share of the slots."""
    out = StringIO()
    words = [f"model={folder}", "job=doctor", "ep=4", "balance.rebalance=on"]
    assert doctor(words, console=PlainConsole(out)) == 0
    line = next(line for line in out.getvalue().splitlines() if "moving experts" in line)
    slot = 3 * 16 * 32 * 4 / 1024
    assert f"{NUM_EXPERTS // 4 * slot:g} KiB for one layer's slots, {slot:g} KiB for one more, " in line
    assert f"{NUM_EXPERTS // 4 * 8} KiB each way between two steps" in line, "rows of 4 KiB, as many as a layer has"


@pytest.mark.parametrize("words", [["balance.bytes_per_step=8KiB"], ["balance.bytes_per_step=64MiB", *COPIES]])
def test_what_is_told_is_what_is_taken(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    movers, routes = list[Mover](), list[RouteBuffer]()

    def mover(*args: Any, **others: Any) -> Mover:
        movers.append(Mover(*args, **others))
        return movers[-1]

    def buffer(*args: Any, **others: Any) -> RouteBuffer:
        routes.append(RouteBuffer(*args, **others))
        return routes[-1]

    buffer.num_bytes = RouteBuffer.num_bytes  # type: ignore[attr-defined]
    monkeypatch.setattr(rebalancing, "Mover", mover)
    monkeypatch.setattr(launch_recording, "RouteBuffer", buffer)
    moving = [*COMMON, f"model={folder}", "ep=4", "balance.rebalance=on", "balance.record=per_token", *words]
    composed = compose([*moving, f"balance.trace={tmp_path / 'trace'}"])
    config, model = composed.config, composed.model
    slots = num_local_slots(config, model)
    with LLM.from_composed(composed):
        told = staging_bytes(config, model, num_local_slots=slots)
        assert told is not None and {held.num_bytes for held in movers} == {told.total} and len(movers) == 4
        assert {held._ids.nbytes for held in routes} == {route_bytes(config, model)}
    still = compose([*COMMON, f"model={folder}", "ep=4", *words[1:]])
    both = [process_bytes(run.config, run.model, num_local_slots=slots) for run in (composed, still)]
    assert both[0] - both[1] == 4 * (told.total + route_bytes(config, model))


# Bad input


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["balance.rebalance=on"], "balance.rebalance=on: ep=1 has no other rank"),
        (["ep=2", "balance.rebalance=on", "balance.record=off"], "moves follow from recorded loads. Set balance.rec"),
        (["balance.save_placement=x.json"], "no placement changes with balance.rebalance=off"),
        (["ep=2", "balance.rebalance=on", "balance.save_placement=no/x.json"], "there is no folder"),
        (["balance.rebalance=maybe"], "one of off, on"),
        (["balance.policy=greedy"], "one of best, eplb"),
        (["balance.threshold=1.5"], "Nearest: balance.threshold=1"),
        (["ep=4", "balance.rebalance=on", "balance.threshold=0"], "nothing would ever move. Nearest: balance."),
        (["ep=4", "balance.rebalance=on", "balance.threshold=0.25"], "Nearest: balance.threshold=0.26"),
        (["balance.interval_steps=0"], "Nearest: balance.interval_steps=1"),
        (["balance.bytes_per_step=1KiB"], "Nearest: balance.bytes_per_step=4096"),
        (["balance.deadline_s=0.5"], "Nearest: balance.deadline_s=10"),
        (["ep=2", "balance.rebalance=on", INVARIANT, "dispatch=all_gather"], "sums by rank"),
        (["balance.threshold=0.8"], "balance.threshold=0.8: has no effect with balance.rebalance=off. Set balance.reb"),
        (["balance.interval_steps=7"], "balance.interval_steps=7: has no effect with balance.rebalance=off"),
        (["balance.bytes_per_step=1MiB"], "balance.bytes_per_step=1048576: has no effect with balance.rebalance=off"),
        (["balance.deadline_s=70"], "balance.deadline_s=70.0: has no effect with balance.rebalance=off"),
        (["balance.trace_bytes=1MiB"], "balance.trace_bytes=1048576: has no effect without balance.trace"),
        (["balance.window_steps=7"], "balance.window_steps=7: has no effect where loads are neither traced, shown nor"),
        (["balance.window_steps=7", "balance.record=off", "snapshot_file=x.json"], "balance.window_steps=7: has no"),
    ],
)
def test_settings_that_do_not_fit(words: list[str], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(words)
    assert text in str(caught.value)
