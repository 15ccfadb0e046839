"""Whether decode steps are captured, in which sizes, and what stands against it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from moe_models.base import ModelConfig

from moe_runtime.cli.doctor import doctor
from moe_runtime.config import EngineConfig, RuntimeConfig
from moe_runtime.errors import ConfigError
from moe_runtime.launch.compose import compose
from moe_runtime.launch.graphs import graphs_mode
from moe_runtime.launch.wire import decode_run, encode_run


@pytest.mark.parametrize(
    ("words", "why", "remedy"),
    [
        ("device=cpu", "device=cpu has no CUDA graphs", "device=cuda"),
        ("engine.padding=own", "engine.padding=own gives every DP group rows of its own", "engine.padding=auto"),
        ("engine.dispatch_buffer_bytes=512KiB engine.cuda_graph_sizes=[64]", "cuts steps of 64 rows", "or more"),
    ],
)
def test_what_stands_against_graphs(words: str, why: str, remedy: str) -> None:
    config, model = run_of(f"device=cuda dispatch=all_gather ep=4 {words}")
    assert graphs_mode(config, model)[0] == "off"
    assert why in graphs_mode(config, model).reason
    asked = replace(config, engine=replace(config.engine, cuda_graphs="on"))
    with pytest.raises(ConfigError, match=rf"engine.cuda_graphs=on: .*Set .*{remedy}") as caught:
        graphs_mode(asked, model)
    assert why in str(caught.value)


def test_where_nothing_stands_against_graphs() -> None:
    mode, reason, sizes = graphs_mode(*run_of("device=cuda dispatch=all_gather ep=8 tp=4 engine.max_num_seqs=30"))
    assert (mode, sizes) == ("on", (4, 8, 16, 24, 32))
    assert "up to 32 rows per DP group, in 5 sizes" in reason
    found = graphs_mode(*run_of("device=cuda dispatch=local engine.cuda_graph_sizes=[8,1] engine.max_num_seqs=30"))
    assert found.sizes == (1, 8) and "9 to 30 tokens run without" in found.reason
    assert graphs_mode(*run_of("device=cuda dispatch=local engine.cuda_graphs=off")).mode == "off"


@pytest.mark.parametrize("words", ["device=cpu", "device=cuda engine.cuda_graphs=off", "device=cuda dispatch=local"])
def test_sizes_that_are_none(words: str) -> None:
    with pytest.raises(ConfigError, match=r"engine.cuda_graph_sizes=\[4, 0\]: .*at least 1"):
        graphs_mode(*run_of(f"{words} engine.cuda_graph_sizes=[4,0]"))


def run_of(words: str) -> tuple[RuntimeConfig, ModelConfig]:
    problems: list[Exception] = []
    composed = compose(words.split(), report=problems.append)  # no CUDA device here
    return composed.config, composed.model


def test_sizes_cross_between_processes() -> None:
    composed = compose(["engine.cuda_graph_sizes=[1,4]"])
    assert composed.config.engine.cuda_graph_sizes == (1, 4)
    assert decode_run(encode_run(composed)).config == composed.config
    assert compose(["engine.cuda_graph_sizes=null"]).config.engine == EngineConfig()


def test_doctor_says_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor(["engine.cuda_graphs=on"]) == 1
    assert "device=cpu has no CUDA graphs. Set device=cuda" in capsys.readouterr().out
    assert doctor([]) == 0
    assert "off: device=cpu has no CUDA graphs" in capsys.readouterr().out
