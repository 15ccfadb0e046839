"""What live rebalancing goes by, from the configuration alone, is what the run then has."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from moe_kernels import backends

from moe_runtime import LLM
from moe_runtime.config import RuntimeConfig
from moe_runtime.dispatch.rows import RowLayout
from moe_runtime.dispatch.spec import DispatchSpec
from moe_runtime.engine.mover import Mover
from moe_runtime.engine.rebalance import Rebalancer
from moe_runtime.engine.rebalance_state import Failure, Rules, Stage
from moe_runtime.errors import ConfigError
from moe_runtime.launch import rebalancing
from moe_runtime.launch.compose import compose
from moe_runtime.launch.planning import PlanRule
from moe_runtime.launch.rebalancing import row_bytes
from moe_runtime.launch.sizing import slot_bytes
from moe_runtime.parallel.placement import ExpertPlacement
from tests.api.tiny import write_tiny
from tests.models.fp8_checkpoint import write_fp8

WORDS = ["ep=2", "num_threads=1", "engine.max_model_len=32", "engine.kv_cache_bytes=1MiB", "balance.rebalance=on"]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Mover, Rules]]:
    found: list[tuple[Mover, Rules]] = []

    class Seen(Rebalancer):
        def __init__(self, ep: Any, mover: Mover, *args: Any, **kwargs: Any) -> None:
            found.append((mover, kwargs["rules"]))
            super().__init__(ep, mover, *args, **kwargs)

    monkeypatch.setattr(rebalancing, "Rebalancer", Seen)
    return found


@pytest.mark.parametrize("kept", ["keep", "dequantize", "no fp8"])
def test_a_slot_has_the_bytes_that_are_reckoned_with(
    tmp_path: Path, made: list[tuple[Mover, Rules]], kept: str
) -> None:
    folder = write_tiny(tmp_path, text=False) if kept == "no fp8" else write_fp8(tmp_path)
    words = [*WORDS, "balance.window_steps=7", *([] if kept == "no fp8" else [f"fp8_weights={kept}"])]
    composed = compose([f"model={folder}", *words])
    wanted = slot_bytes(composed.config, composed.model)
    with LLM(str(folder), overrides=words):
        pass
    assert len(made) == 2
    for mover, rules in made:
        assert mover.slot_bytes == rules.terms.slot_bytes == wanted
        assert (rules.window_steps, rules.interval_steps, rules.terms.horizon_steps) == (7, 1000, 1000)
    if kept == "keep":
        assert wanted == 3 * (192 * 256 + 2 * 2 * 4), "a byte each, and the scales of 2 x 2 blocks"


def spec(dtype: torch.dtype, *, quantize: bool) -> DispatchSpec:
    return DispatchSpec(ep=4, rows=RowLayout(2, quantize=quantize), hidden=300, dtype=dtype, top_k=2)


def test_the_terms_are_those_of_the_configuration(tmp_path: Path, made: list[tuple[Mover, Rules]]) -> None:
    folder = str(write_tiny(tmp_path, text=False))
    with LLM(folder, overrides=[*WORDS, "balance.threshold=0.83", "ranks_per_node=1", "balance.bytes_per_step=1MiB"]):
        pass
    for _, rules in made:
        terms = rules.terms
        assert (terms.threshold, terms.ranks_per_node, terms.bytes_per_step) == (0.83, 1, 1 << 20)


@pytest.mark.parametrize("dispatched", [False, True])
def test_the_planner_keeps_the_models_groups(tmp_path: Path, dispatched: bool) -> None:
    """Where shared experts are placed too, groups say nothing of them."""
    folder = str(write_tiny(tmp_path, text=False))
    shared = "dispatched" if dispatched else "replicated"
    composed = compose([f"model={folder}", *WORDS, "ranks_per_node=1", f"shared_experts={shared}"])
    num_logical = composed.model.n_routed_experts + dispatched
    placement = ExpertPlacement.uniform(2, num_logical, ep=2)
    rule = rebalancing._rule(composed.config, composed.model, placement)
    assert rule == PlanRule("best", 1, None if dispatched else 4)


def test_a_row_costs_what_the_dispatch_moves_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """There and back, of three ranks' rows in four; with three scales a row where fp8 travels."""
    config = replace(RuntimeConfig(), ep=4, dp=4, dispatch="all_to_all")
    bf16 = (600 + 600) * 3 // 4
    assert row_bytes(config, spec(torch.bfloat16, quantize=False)) == bf16
    assert row_bytes(config, spec(torch.float32, quantize=False)) == 2 * bf16
    assert row_bytes(config, spec(torch.bfloat16, quantize=True)) == bf16, "on a CPU rows travel as they are"
    fp8 = (300 + 3 * 4 + 600) * 3 // 4
    assert row_bytes(replace(config, dispatch="deep_ep"), spec(torch.bfloat16, quantize=True)) == fp8
    monkeypatch.setattr(backends, "default_backend", lambda device: "triton")
    assert row_bytes(config, spec(torch.bfloat16, quantize=True)) == fp8
    assert row_bytes(config, spec(torch.float32, quantize=True)) == 2 * bf16


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("", r"balance.save_placement=\(nothing\): must be a text"),
        ("FOLDER", "FOLDER': must be a file, not a folder. Nearest: 'FOLDER/FILE.json'"),
        ("FOLDER/none/x.json", "there is no folder 'FOLDER/none'. Make it first"),
        (
            "/proc/x.json",
            "balance.save_placement='/proc/x.json': cannot be written: .*Give a file in a folder of your own",
        ),
        (f"FOLDER/{'x' * 255}", "cannot be written: .*too long"),
    ],
    ids=["empty", "folder", "no folder", "not writable", "long"],
)
def test_a_placement_that_can_never_be_saved(tmp_path: Path, file: str, text: str) -> None:
    folder = str(tmp_path)
    with pytest.raises(ConfigError, match=text.replace("FOLDER", folder)):
        compose([*WORDS, f"balance.save_placement={file.replace('FOLDER', folder)}"])
    compose([*WORDS, f"balance.save_placement={tmp_path / 'x.json'}"])
    assert not list(tmp_path.iterdir()), "what was tried leaves nothing"


def test_a_file_has_one_writer(tmp_path: Path) -> None:
    same = [f"balance.save_placement={tmp_path / 'a.json'}", f"snapshot_file={tmp_path / '.' / 'a.json'}"]
    with pytest.raises(ConfigError, match=r"the snapshot is written to this file too. .*placement-a.json"):
        compose([*WORDS, *same])
    compose([*WORDS, same[0], f"snapshot_file={tmp_path / 'b.json'}"])


def test_a_file_that_cannot_be_replaced(tmp_path: Path) -> None:
    """The draft goes; the failure says what was not done, and what to do."""
    placement = ExpertPlacement(torch.tensor([[1, 0]]), 2, 2)
    (tmp_path / "live.json").mkdir()
    with pytest.raises(IsADirectoryError):
        rebalancing._save(str(tmp_path / "live.json"), placement)
    assert [file.name for file in tmp_path.iterdir()] == ["live.json"]
    text = str(Failure(Stage.SAVE, 31, None, ("rank 0: OSError: no space",)))
    assert text.startswith("the placement was not saved at step 31: rank 0: OSError: no space. What was saved before")
    assert "plan" not in text and "has room" in text
