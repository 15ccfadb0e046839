"""What the planner's models rest on: hardware files that are checked, DeepEP's forwarding, traces of this model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from moe_models.base import ModelConfig
from moe_models.registry import load_config
from moe_tools.plan.__main__ import main
from moe_tools.plan.hardware import MEASURED, Machine, hardware_names, load_machine
from moe_tools.plan.replay import Replay
from moe_tools.plan.routes import recorded
from moe_tools.plan.settings import parse_words
from moe_tools.plan.wire import Transfer, Way, Wire, slower_link

from moe_runtime.balance.trace import TraceHeader, TraceWriter, Window
from moe_runtime.dispatch.rows import RowLayout
from moe_runtime.dispatch.spec import DispatchSpec
from moe_runtime.errors import ConfigError, TraceError
from moe_runtime.launch.data import data_path, model_path
from moe_runtime.parallel.placement import ExpertPlacement

# Hardware files


def _entry() -> dict[str, Any]:
    text = data_path("configs", "hardware", f"{MEASURED}.json").read_text(encoding="utf-8")
    return dict(json.loads(text))


def _set(*keys: str | int, to: object) -> Callable[[Any], None]:
    def change(entry: Any) -> None:
        for key in keys[:-1]:
            entry = entry[key]
        entry[keys[-1]] = to

    return change


def _drop(*keys: str) -> Callable[[Any], None]:
    def change(entry: Any) -> None:
        for key in keys[:-1]:
            entry = entry[key]
        del entry[keys[-1]]

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_set("memory_bytes_per_s", "value", to=float("inf")), "memory_bytes_per_s=.*Infinity.*finite number above 0"),
        (_set("fp8_flops", "value", to=float("nan")), "fp8_flops=.*finite"),
        (_set("nvlink_ranks", "value", to=True), "nvlink_ranks=.*true.*number above 0"),
        (_set("nvlink_ranks", "value", to=0.5), "nvlink_ranks=0.5: must be a whole number of at least 1. Nearest: 1"),
        (_set("host_ranks", "value", to=7.6), "host_ranks=7.6: .* Nearest: 8"),
        (_set("memory_bytes", "source", to=""), "memory_bytes=.*source"),
        (_set("memory_bytes", "units", to="B"), "units: unknown key"),
        (_set("kernles", to={}), "kernles: unknown key. Did you mean 'kernels'"),
        (_set("kernels", "maskde", to={}), "kernels: maskde: unknown key. Did you mean 'masked'"),
        (_set("wire", "normal", to={}), "wire: normal: unknown key. Did you mean 'normal_"),
        (_drop("kernels", "masked", "us"), "kernels.masked: lacks us. It must have source, slots, rows, us, fixed_us"),
        (_drop("wire", "low_latency", "tokens"), "wire.low_latency: lacks tokens"),
        (_drop("kernels", "absorb", "source"), "kernels.absorb: lacks source"),
        (_set("kernels", "masked", "us", 2, to=[1, 2]), r"masked.us\[2\]: has 2 entries; its axis has 4"),
        (_set("kernels", "absorb", "us", 1, to=True), "absorb.us: True: must be a finite number"),
        (_set("kernels", "absorb", "rows", to=[256, 128, 1024]), "absorb.rows=.*each above the last"),
        (_set("kernels", "mla_prefill", "tokens", to=[1, 2, 3]), "mla_prefill.tokens=.* list of 2 finite numbers"),
        (_set("kernels", "absorb", "fixed_us", to=50), "absorb.fixed_us=50: must be below the least of us, 18.9"),
        (_set("wire", "nvlink_fixed_us", "value", to=-8), "nvlink_fixed_us.value=-8: must be a finite number above 0"),
        (_set("wire", to=[]), "wire must be a JSON object"),
    ],
)
def test_wrong_hardware_files_get_an_answer(change: Callable[[Any], None], says: str, tmp_path: Path) -> None:
    entry, file = _entry(), tmp_path / "mine.json"
    file.write_text(json.dumps(entry), encoding="utf-8")
    assert load_machine(str(file)).rates == load_machine(MEASURED).rates
    change(entry)
    file.write_text(json.dumps(entry), encoding="utf-8")
    with pytest.raises(ConfigError, match=f"hardware={re.escape(str(file))}.*{says}"):
        load_machine(str(file))


def test_every_source_has_an_address_and_a_date() -> None:
    for name in hardware_names():
        for number, source in load_machine(name).sources:
            if not source.startswith("assumption"):
                assert "https://" in source and re.search(r"20\d\d-\d\d-\d\d", source), f"{name}: {number}: {source}"


# Prefill over several nodes

PUBLISHED = {8: (153, 158), 16: (43, 43), 32: (58, 57), 64: (51, 50)}
"""DeepEP's normal kernels on H800, GB/s by EP (dispatch, combine): of copies to distinct ranks (8) or nodes."""


@pytest.mark.parametrize("ep", PUBLISHED)
def test_forwarding_gives_deepeps_bandwidths(ep: int) -> None:
    """Its own test: 4096 tokens of a rank, top-8 of 256 experts within at most four nodes."""
    counted, nodes = 128, ep // 8
    generator = torch.Generator().manual_seed(ep)
    scores = torch.rand(counted * ep, nodes, 256 // nodes, generator=generator)
    best = scores.amax(2).topk(min(nodes, 4), dim=1).indices
    kept = torch.zeros(counted * ep, nodes, 1).scatter_(1, best.unsqueeze(2), 1.0)
    counts = _replay(ep).count_even(0, (scores * kept).flatten(1).topk(8, dim=1).indices)
    machine, scale = load_machine("h800"), 4096 / counted
    reached = counts.rank_copies if ep == 8 else counts.node_copies
    ways: tuple[Way, Way] = ("dispatch", "combine")
    for way, row, gigabytes in zip(ways, (7392, 14336), PUBLISHED[ep], strict=True):
        us = _wire(machine, ep).transfer(counts, way, decode=False, capacity=4096, scale=scale).us
        assert float(reached.sum(1).double().mean()) * scale * row / us / 1e3 == pytest.approx(gigabytes, rel=0.08)


def test_slower_nvlink_slows_what_is_forwarded() -> None:
    """H800 and H100 differ in NVLink alone; at EP16 it is what DeepEP waits for, at EP64 the network."""
    slow, fast = (_transfer(load_machine(name), 16) for name in ("h800", "h100"))
    assert slow.us > 1.3 * fast.us
    assert (slow.network_bytes, slow.nvlink_bytes) == (fast.network_bytes, fast.nvlink_bytes)
    assert slow.network_bytes > 0
    assert slower_link([slow]) == slower_link([fast]) == "nvlink"
    assert slower_link([_transfer(load_machine("h800"), 64)]) == "network"
    assert slower_link([replace(slow, network_us=slow.nvlink_us + 1), slow]) == "nvlink", "both ways together"


def test_a_short_last_node_takes_the_copies_of_several_senders() -> None:
    """12 ranks, nodes of 8 and 4; every rank sends one token to rank 11: eight of them over the network, by rank number
    mod 4 to ranks 8 to 11, which forward what is not their own."""
    placement = ExpertPlacement.uniform(1, 12, ep=12)
    counts = Replay.of(placement, choice="static", ranks_per_node=8).count(0, [torch.tensor([[11]])] * 12)
    spec = DispatchSpec(ep=12, rows=RowLayout(1, quantize=True), hidden=7168, dtype=torch.bfloat16, top_k=1)
    got = Wire.of(load_machine("h200"), spec, "deep_ep").transfer(counts, "dispatch", decode=False, capacity=1)
    assert got.network_bytes == 2 * 7392, "two senders for each rank of the short node"
    assert got.nvlink_bytes == (6 + 3) * 7392, "all that rank 11 gets from others, forwarded or from its node"
    gathered = Wire.of(load_machine("h200"), spec, "all_gather").transfer(counts, "dispatch", decode=True, capacity=1)
    assert gathered.network_bytes == pytest.approx(8 / 4 * spec.row_bytes), "8 ranks' tokens enter over 4 links"


def test_one_domain_has_no_network() -> None:
    machine = load_machine("gb200")
    got = _transfer(machine, 16)
    assert got.network_bytes == 0
    rate = float(machine.wire["nvlink_rate"]["value"]) * machine.rates.nvlink_bytes_per_s
    assert got.us == pytest.approx(2 * 8 + 1e6 * got.nvlink_bytes / rate)


def _transfer(machine: Machine, ep: int) -> Transfer:
    ids = torch.rand(64 * ep, 256, generator=torch.Generator().manual_seed(0)).topk(8, dim=1).indices
    replay = Replay.of(ExpertPlacement.uniform(1, 256, ep=ep), choice="static", ranks_per_node=machine.nvlink_ranks)
    return _wire(machine, ep).transfer(replay.count_even(0, ids), "combine", decode=False, capacity=64, scale=64)


def _replay(ep: int) -> Replay:
    return Replay.of(ExpertPlacement.uniform(1, 256, ep=ep), choice="static", ranks_per_node=8)


def _wire(machine: Machine, ep: int) -> Wire:
    spec = DispatchSpec(ep=ep, rows=RowLayout(256 // ep, quantize=True), hidden=7168, dtype=torch.bfloat16, top_k=8)
    return Wire.of(machine, spec, "deep_ep")


# Traces


@pytest.fixture(scope="module")
def demo() -> ModelConfig:
    return load_config(model_path("demo"))


def _traced(folder: Path, shape: ModelConfig, **other: Any) -> Path:
    """A trace of one token, of a model of this shape but for `other` values of its header."""
    layers, experts, top_k = len(shape.moe_layers), shape.n_routed_experts, shape.num_experts_per_tok
    header = replace(
        TraceHeader(
            model="demo", num_layers=layers, num_logical=experts, num_routed=experts, top_k=top_k, ep=1, dp=1,
            mode="per_token",
        ),
        **other,
    )  # fmt: skip
    routes = torch.arange(header.top_k).expand(1, layers, -1)
    loads = torch.zeros(layers, experts, dtype=torch.int64)
    loads[:, : header.top_k] = 1
    one = torch.zeros(1, dtype=torch.int64)
    writer = TraceWriter(folder, header)
    writer.add(
        [
            Window(
                phase="mixed", first_step=0, last_step=0, num_steps=1, num_tokens=1, loads=loads,
                rank_loads=loads.sum(1, keepdim=True),
            )
        ],
        {
            "routes": routes.to(torch.int16), "request": one, "position": one, "step": one, "home": one,
            "is_prompt": one.bool(), "window": one,
        },
    )  # fmt: skip
    writer.close()
    return folder


def test_a_trace_says_whose_it_is(tmp_path: Path, demo: ModelConfig) -> None:
    found = recorded(_traced(tmp_path / "t", demo), demo, name="demo", num_layers=1)
    assert "of demo: 1 tokens" in found.source
    other = _traced(tmp_path / "other", demo, model="other_model")
    with pytest.raises(TraceError, match=r"of model 'other_model', and this is 'demo'.*fine_tune=true"):
        recorded(other, demo, name="demo", num_layers=1)
    assert "of other_model:" in recorded(other, demo, name=None, num_layers=1).source
    fewer = _traced(tmp_path / "fewer", demo, top_k=demo.num_experts_per_tok - 1)
    with pytest.raises(TraceError, match="top_k="):
        recorded(fewer, demo, name=None, num_layers=1)


def test_a_record_of_another_program_is_replayed(tmp_path: Path, demo: ModelConfig) -> None:
    """vLLM's arrays of two requests. Their windows are requests, which are no times to plan for."""
    layers, top_k = len(demo.moe_layers), demo.num_experts_per_tok
    routes = np.arange(top_k, dtype=np.int16) + np.arange(5, dtype=np.int16)[:, None, None] + np.zeros((1, layers, 1))
    for name in ("a", "b"):
        np.savez(tmp_path / f"{name}.npz", routed_experts=routes.astype(np.int16))
    found = recorded(tmp_path, demo, name="demo", num_layers=2)
    assert found.ids.shape == (2, 10, top_k)
    assert found.loads.shape == (1, 2, demo.n_routed_experts)
    assert int(found.loads.sum()) == 2 * 10 * top_k
    assert found.repeat is None, "it does not say where its experts were"


def test_a_trace_of_another_shape_names_the_model_that_it_is_of(tmp_path: Path, demo: ModelConfig) -> None:
    v3 = load_config(model_path("deepseek_v3"))
    with pytest.raises(TraceError, match=r"num_layers=3.*model=demo"):
        recorded(_traced(tmp_path / "t", demo), v3, name="deepseek_v3", num_layers=1)
    assert parse_words([f"trace={tmp_path / 't'}"]).model == "demo", "unless the words say otherwise"


def test_a_trace_of_another_name_is_refused_by_the_command(
    tmp_path: Path, demo: ModelConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = _traced(tmp_path / "other", demo, model="other_model")
    words = ["model=demo", f"trace={folder}", "ep=2", "tp=1", "redundant=0", "dispatch=all_to_all", "layers=1"]
    words += ["prompt_tokens=16", "output_tokens=8", "prefill_tokens=64"]
    assert main(words) == 2
    assert "fine_tune=true" in capsys.readouterr().err
    assert main([*words, "fine_tune=true"]) == 0
    assert "of other_model" in capsys.readouterr().out
    assert main(["model=demo", "fine_tune=true"]) == 2
    assert "Add trace=DIR" in capsys.readouterr().err
