"""Placements that a run with moving experts saves, and disks that refuse."""

from __future__ import annotations

import os
import stat
from functools import partial
from pathlib import Path

import pytest
import torch

from moe_runtime import LLM
from moe_runtime.engine.rebalance import Rebalancer
from moe_runtime.engine.rebalance_state import Stage
from moe_runtime.errors import CommunicationError, EngineClosedError
from moe_runtime.launch import rebalancing
from moe_runtime.parallel.placement import ExpertPlacement
from tests.api.tiny import NUM_EXPERTS, NUM_MOE_LAYERS, greedy, tokens, wait_until_idle
from tests.engine.moving_runs import (
    COMMON,
    COPIES,
    INVARIANT,
    LENGTHS,
    MOVING,
    PROMPTS,
    Bits,
    assert_same_bits,
    at_rest_again,
    run,
)
from tests.engine.moving_world import inline


def test_a_saved_placement_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file's bytes before it has its name, then the name."""
    file, synced = tmp_path / "live.json", list[tuple[bool, bool]]()
    fsync = os.fsync

    def watched(descriptor: int) -> None:
        synced.append((stat.S_ISDIR(os.fstat(descriptor).st_mode), file.exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    placement = ExpertPlacement(torch.tensor([[1, 0, 2, 3]] * NUM_MOE_LAYERS), 4, 2)
    rebalancing._save(str(file), placement)
    assert synced == [(False, False), (True, True)]
    found = ExpertPlacement.from_file(file, num_layers=NUM_MOE_LAYERS, num_logical=4, ep=2)
    assert torch.equal(found.phy2log, placement.phy2log)


def test_a_disk_that_fails_changes_no_bit(
    folder: Path, bits: Bits, shuffled: list[ExpertPlacement], tmp_path: Path
) -> None:
    at_rest, _ = run(folder, INVARIANT, "ep=4", "tp=1")
    wanted = bits.copy()
    bits.clear()
    (tmp_path / "gone").mkdir()
    words = [INVARIANT, "ep=4", "tp=1", *MOVING, f"balance.save_placement={tmp_path / 'gone' / 'live.json'}"]
    with LLM(str(folder), overrides=[*COMMON, *words]) as llm:
        (tmp_path / "gone").rmdir()
        moved = tokens(llm.generate(PROMPTS, [greedy(length) for length in LENGTHS]))
        wait_until_idle(llm)
        state = at_rest_again(llm).rebalance
    assert moved == at_rest
    assert_same_bits(bits, wanted)
    assert state.num_migrations > 1 and state.num_layers_abandoned == 0
    assert state.last_failure is not None and state.last_failure.stage is Stage.SAVE
    assert "FileNotFoundError" in str(state.last_failure)


def test_a_run_that_fails_saves_what_it_has(
    folder: Path, shuffled: list[ExpertPlacement], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of its first migration: one layer has committed."""

    def fail(stage: Stage, rank: int, layer: int | None) -> None:
        if (stage, layer) == (Stage.COMMIT, 1):
            raise CommunicationError("the run ends here")

    monkeypatch.setattr(rebalancing, "Rebalancer", partial(Rebalancer, start=inline, on_stage=fail))
    file = tmp_path / "live.json"
    with (
        LLM(str(folder), overrides=[*COMMON, "ep=4", "tp=1", *MOVING, f"balance.save_placement={file}"]) as llm,
        pytest.raises(EngineClosedError, match="the run ends here"),
    ):
        llm.generate(PROMPTS, [greedy(length) for length in LENGTHS])
    found = ExpertPlacement.from_file(file, num_layers=NUM_MOE_LAYERS, num_logical=NUM_EXPERTS, ep=4)
    first = shuffled[0].phy2log
    assert not torch.equal(found.phy2log[0], first[0]) and torch.equal(found.phy2log[1:], first[1:])


def test_the_placement_is_saved_and_serves_again(
    folder: Path, bits: Bits, shuffled: list[ExpertPlacement], tmp_path: Path
) -> None:
    file = tmp_path / "live.json"
    words = [INVARIANT, "ep=4", "tp=1"]
    moved, snapshot = run(folder, *words, *MOVING, f"balance.save_placement={file}", *COPIES)
    assert snapshot.rebalance.num_migrations > 1
    found = ExpertPlacement.from_file(file, num_layers=NUM_MOE_LAYERS, num_logical=NUM_EXPERTS, ep=4)
    assert not torch.equal(found.phy2log, shuffled[0].phy2log)
    assert [path.name for path in tmp_path.iterdir()] == ["live.json"], "nothing half written stays"
    shuffled.clear()
    again, _ = run(folder, *words, f"placement.file={file}", *MOVING)
    assert again == moved
    assert torch.equal(shuffled[0].phy2log, found.phy2log), "it goes on from there"
