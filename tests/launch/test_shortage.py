"""Too little device memory while a run starts: an error of the settings that take it, whoever met it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from moe_kernels import backends

from moe_runtime import LLM
from moe_runtime.cache.latent import LatentKVCache
from moe_runtime.engine.step_buffers import StepBuffers
from moe_runtime.errors import CommunicationError, ConfigError
from moe_runtime.launch import graphs as launch_graphs
from moe_runtime.launch.compose import compose
from moe_runtime.launch.graphs import graph_bytes, graphs_mode
from moe_runtime.launch.memory import enough_memory
from moe_runtime.layers.router import Router
from tests.api.tiny import write_tiny
from tests.doubles.cuda_graph import RecordedGraphs

CPU = torch.device("cpu")
SEEN = "CUDA out of memory. Tried to allocate 2.00 GiB.\nMore of torch's text."


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError(SEEN), RuntimeError("CUDA error: out of memory"),
              RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")]
)  # fmt: skip
def test_it_is_found_among_the_causes(error: RuntimeError) -> None:
    with (
        pytest.raises(
            ConfigError, match=r"^x=1: the thing does not fit into the memory of cpu \(CUDA[^\n]*\)\. Lower x\.$"
        ),
        enough_memory(CPU, "x=1: the thing", remedy="Lower x."),
    ):
        raise CommunicationError("rank 3 raised something") from error


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="illegal memory access"), enough_memory(CPU, "x", remedy="y"):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


@pytest.mark.parametrize("words", [["ep=1"], ["ep=2"]], ids=" ".join)
def test_the_cache_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    def full(*_: object, **__: object) -> LatentKVCache:
        raise torch.OutOfMemoryError(SEEN)

    monkeypatch.setattr(LatentKVCache, "zeros", full)
    folder = write_tiny(tmp_path, text=False)
    with pytest.raises(
        ConfigError, match=r"engine.kv_cache_bytes=1048576: rank 0's latent cache of \d+ bytes does not fit"
    ):
        LLM(str(folder), overrides=["engine.kv_cache_bytes=1MiB", *words])


@pytest.mark.skipif(not backends.interpreted(), reason="needs TRITON_INTERPRET=1: kernels on CPU tensors")
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("where", ["a rank's step", "the end of the capture"])
def test_the_graphs_do_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    def full(*_: object, **__: object) -> None:
        if where == "a rank's step":
            raise torch.OutOfMemoryError(SEEN)
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(backends, "default_backend", lambda device: "triton")
    monkeypatch.setattr(launch_graphs, "graph_api", lambda device: RecordedGraphs())
    owner, name = (Router, "place") if where == "a rank's step" else (RecordedGraphs, "end")
    monkeypatch.setattr(owner, name, full)
    folder = write_tiny(tmp_path, text=False)
    words = ["dispatch=all_gather", "ep=2", "engine.cuda_graph_sizes=[1]", "engine.max_num_seqs=1"]
    words += ["engine.kv_cache_bytes=1MiB", "engine.page_size=4", "engine.max_model_len=16"]
    with pytest.raises(ConfigError, match=r"engine.cuda_graph_sizes=\[1\].*out of memory.*engine.cuda_graphs=off"):
        LLM(str(folder), overrides=words)


def test_stated_bytes_of_graphs_are_those_held() -> None:
    problems: list[Exception] = []
    words = ["device=cuda", "dispatch=local", "engine.max_num_seqs=20", "engine.max_model_len=1000"]
    composed = compose(words, report=problems.append)  # no CUDA device here
    config, model = composed.config, composed.model
    sizes = graphs_mode(config, model).sizes
    assert sizes[-1] == 24
    buffers = StepBuffers(24, max_pages=16, page_size=64, device=CPU)
    held = sum(x.nbytes for x in (buffers._device, buffers._rows)) + 24 * model.vocab_size * 4
    assert graph_bytes(config, model, sizes) == held
