"""What dispatch=auto takes and says, and sizes within bytes and limits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from moe_models.base import ModelConfig
from moe_models.registry import load_config

from moe_runtime.config import RuntimeConfig
from moe_runtime.dispatch import deep_ep, factory
from moe_runtime.dispatch.base import Phase
from moe_runtime.dispatch.deep_ep.detect import Library
from moe_runtime.dispatch.missing import Missing
from moe_runtime.errors import ConfigError
from moe_runtime.launch.compose import compose
from moe_runtime.launch.conflicts import conflicts
from moe_runtime.launch.data import model_path
from moe_runtime.launch.shuffle import (
    choose_dispatch,
    dispatch_names,
    dispatch_spec,
    spec_of_each,
    whole_spec,
    with_dispatch,
)


@pytest.fixture(scope="module")
def v3() -> ModelConfig:
    return load_config(model_path("deepseek_v3"))


def cluster(*words: str, **changes: Any) -> RuntimeConfig:
    """A run over NCCL, one process per GPU; `changes` of the engine's keys."""
    config = compose(["model=deepseek_v3", *words], report=lambda _: None).config
    engine = replace(config.engine, **changes)
    return replace(config, device="cuda", launcher="torchrun", dispatch="auto", decode_dispatch=None, engine=engine)


def install(monkeypatch: pytest.MonkeyPatch, *generations: int) -> None:
    monkeypatch.setattr(deep_ep, "find", lambda: Library(None, "2.1.0", generations))


def test_what_auto_takes(v3: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    one = choose_dispatch(cluster("ep=1", "tp=1"), v3)
    assert (one.name, one.decode, one.reason) == ("local", None, "dispatch=local: nothing is sent")
    wide = choose_dispatch(cluster("ep=32", max_num_seqs=32), v3)
    assert (wide.name, wide.decode) == ("all_to_all", "all_gather"), "8 slots: equal blocks carry 8 rows of a token"
    assert "all_gather for steps without prompts (fewer bytes)" in wide.reason
    many = choose_dispatch(cluster("ep=32", max_num_seqs=64), v3)
    assert many.decode is None, "22 MB a layer between nodes take longer than launches without a graph"
    assert choose_dispatch(cluster("ep=8", max_num_seqs=64), v3).decode == "all_gather", "within a node they do not"
    forced = cluster("ep=32", max_num_seqs=64, cuda_graphs="on")
    assert choose_dispatch(forced, v3).decode == "all_gather"
    others = dict(wide.others)
    assert others["deep_ep"].startswith("deep_ep is not installed. Build DeepEP from its repository")
    assert others["nvshmem"].startswith("nvshmem4py is not installed")
    assert others["local"].startswith("reaches the experts of one rank, and ep=32")
    thin = choose_dispatch(cluster("ep=256", "tp=4"), v3)
    assert (thin.name, thin.decode) == ("all_to_all", None), "one slot: a row there and back"
    install(monkeypatch, 2, 1)
    found = choose_dispatch(cluster("ep=32"), v3)
    assert (found.name, found.decode) == ("deep_ep", None)
    assert found.reason.endswith("(deep_ep 2.1.0 (V2, V1))")
    assert dict(found.others)["all_to_all"].startswith("could serve; deep_ep is preferred")
    assert "never chosen unasked" in dict(found.others)["symm_mem"] or "torch" in dict(found.others)["symm_mem"]
    invariant = choose_dispatch(cluster("ep=32", batch_invariant=True), v3)
    assert (invariant.name, invariant.decode) == ("all_to_all", None)
    assert "sums at a token's home" in dict(invariant.others)["deep_ep"]


def test_what_cannot_serve_says_why(v3: ModelConfig) -> None:
    virtual = replace(cluster("ep=32"), launcher="virtual")
    assert "all ranks live in one process" in dict(choose_dispatch(virtual, v3).others)["deep_ep"]
    on_cpu = replace(virtual, device="cpu")
    assert choose_dispatch(on_cpu, v3).decode is None, "on a CPU rows go by counts"
    assert "device=cpu, and it needs a GPU per rank" in dict(choose_dispatch(on_cpu, v3).others)["deep_ep"]
    for name, text in (("deep_ep", "device=cpu"), ("nvshmem", "device=cpu"), ("local", "reaches the experts of one")):
        asked = replace(on_cpu, dispatch=name)  # type: ignore[arg-type]
        problems = [str(problem) for problem in conflicts(asked, v3, has_weights=True)]
        assert any(problem.startswith(f"dispatch={name}: {text}") for problem in problems), problems
        assert not any("device=cpu" in str(problem) for problem in conflicts(asked, v3, has_weights=False))


def test_auto_is_decided_once() -> None:
    decided = compose(["ep=8"])
    assert decided.config.dispatch == "all_to_all"
    assert any(reason.startswith("dispatch=all_to_all: ") for reason in decided.topology.reasons)
    assert decided.topology.reasons[-2:] == (
        "not local: reaches the experts of one rank, and ep=8",
        "not deep_ep, nvshmem, symm_mem: device=cpu, and it needs a GPU per rank",
    ), "a reason of several is told once"
    given = compose(["ep=8", "dispatch=all_gather"])
    assert not any(reason.startswith("dispatch=") for reason in given.topology.reasons)
    assert compose(["ep=8", "dispatch=all_gather", "decode_dispatch=auto"]).config.decode_dispatch is None
    both = compose(["ep=8", "decode_dispatch=all_gather"]).config
    assert dispatch_names(both) == ("all_to_all", "all_gather")
    with pytest.raises(ConfigError, match=r"decode_dispatch=all_gather with dispatch=all_to_all: they round"):
        compose(["ep=8", "decode_dispatch=all_gather", "engine.batch_invariant=true"])
    with pytest.raises(ConfigError, match=r"decode_dispatch=local: reaches .*ep=8\. Set decode_dispatch=all_to_all"):
        compose(["ep=8", "decode_dispatch=local"])


def test_auto_for_steps_without_prompts_alone(v3: ModelConfig) -> None:
    """dispatch by hand, decode_dispatch=auto: what dispatch=auto would take beside it."""
    by_hand = replace(cluster("ep=32", max_num_seqs=32), dispatch="all_to_all", decode_dispatch="auto")
    decided, why = with_dispatch(by_hand, v3)
    assert dispatch_names(decided) == ("all_to_all", "all_gather")
    assert why == ("decode_dispatch=all_gather: fewer bytes",)
    decided, why = with_dispatch(replace(by_hand, dispatch="all_gather"), v3)
    assert dispatch_names(decided) == ("all_gather",) and why == ("decode_dispatch=all_gather: as dispatch",)
    decided, why = with_dispatch(replace(by_hand, dispatch="auto", decode_dispatch="all_to_all"), v3)
    assert dispatch_names(decided) == ("all_to_all",)
    assert why[0] == "dispatch=all_to_all: bits that no ep changes, on any fabric", "nothing that is not done"


def test_buffers_for_steps_without_prompts_are_no_larger(v3: ModelConfig) -> None:
    """NVSHMEM would hold many times as much for the prompts that it never sees."""
    config = cluster("ep=32", max_num_batched_tokens=16384)
    config = replace(config, dispatch="all_to_all", decode_dispatch="nvshmem")
    spec = dispatch_spec(config, v3)
    assert spec.max_decode_tokens == whole_spec(config, v3).max_decode_tokens == 16
    assert spec.max_tokens == dispatch_spec(replace(config, decode_dispatch=None), v3).max_tokens
    first, second = spec_of_each(dispatch_names(config), spec)
    assert first is spec and second.max_tokens == second.max_decode_tokens == 16
    held = factory.buffer_bytes("nvshmem", second)
    assert 20 * held < 4 * 2**30 < factory.buffer_bytes("nvshmem", whole_spec(config, v3))
    assert spec_of_each(("nvshmem",), spec) == (spec,)


def test_steps_are_cut_to_what_a_fabric_takes(v3: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, 1)
    config, _ = with_dispatch(cluster("ep=32", max_num_seqs=4096, max_num_batched_tokens=8192), v3)
    assert config.dispatch == "deep_ep"
    config = replace(config, engine=replace(config.engine, dispatch_buffer_bytes=2**40))
    whole, spec = whole_spec(config, v3), dispatch_spec(config, v3)
    assert (whole.max_tokens, whole.max_decode_tokens) == (2048, 1024)
    assert (spec.max_tokens, spec.max_decode_tokens) == (2048, 511), "queues of 1024 entries"
    assert factory.max_capacity("deep_ep", whole, Phase.DECODE) == 511
    small = replace(config, engine=replace(config.engine, dispatch_buffer_bytes=4 * 2**30))
    held = factory.buffer_bytes("deep_ep", dispatch_spec(small, v3))
    assert held <= 4 * 2**30 < factory.buffer_bytes("deep_ep", whole)
    none = replace(config, engine=replace(config.engine, dispatch_buffer_bytes=2**20))
    with pytest.raises(ConfigError, match=r"dispatch_buffer_bytes=1048576: a rank may need \d+ bytes \(dispatch=deep"):
        dispatch_spec(none, v3)


def test_redundant_experts_count(v3: ModelConfig) -> None:
    """More slots, more room: the sizes are those of physical experts."""
    plain, copies = cluster("ep=32"), cluster("ep=32", "placement.num_redundant_experts=32")
    specs = [whole_spec(config, v3) for config in (plain, copies)]
    assert [spec.num_physical for spec in specs] == [256, 288]
    sizes = [deep_ep.legacy_sizes.buffer_bytes(spec) for spec in specs]
    assert sizes[0] < sizes[1]


def test_a_rank_that_lacks_the_library_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deep_ep, "find", lambda: Missing("deep_ep is not installed", "Build it"))
    spec = whole_spec(*_demo())
    with pytest.raises(ConfigError, match=r"dispatch=deep_ep: deep_ep is not installed. Build it."):
        deep_ep.make(None, spec, device=torch.device("cpu"))  # type: ignore[arg-type]


def _demo() -> tuple[RuntimeConfig, ModelConfig]:
    run = compose(["ep=8"])
    return run.config, run.model


@pytest.mark.parametrize(
    ("words", "seqs", "graphs", "equal"),
    [
        (("ep=8", "tp=1"), 16, "auto", True),
        (("ep=8", "tp=1"), 64, "auto", False),
        (("ep=8", "tp=1"), 64, "on", True),
        (("ep=256", "tp=4"), 64, "auto", False),
    ],
)
def test_equal_blocks_are_worth_so_many_bytes(
    v3: ModelConfig, words: tuple[str, ...], seqs: int, graphs: str, equal: bool
) -> None:
    """Beyond, all_to_all goes by counts in decode too, and is not captured."""
    spec = whole_spec(cluster(*words, max_num_seqs=seqs, cuda_graphs=graphs), v3)
    assert spec.equal_blocks is equal
    assert factory.graph_safe("all_to_all", spec, device=torch.device("cuda")) is equal
    assert factory.graph_safe("all_gather", spec, device=torch.device("cuda"))
