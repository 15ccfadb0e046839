"""What vLLM, Megatron and TensorRT-LLM write, read as traces; each file is built here as those programs lay it out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from moe_runtime.balance.trace import TraceHeader, TraceWriter, routed_loads
from moe_runtime.balance.trace_readers import read_any, read_megatron, read_trtllm, read_vllm
from moe_runtime.errors import TraceError

E, L, K = 6, 2, 3


def routes(count: int, seed: int) -> np.ndarray[Any, Any]:
    """[count, L, K] distinct ids."""
    draw = np.random.default_rng(seed)
    return np.array([[draw.permutation(E)[:K] for _ in range(L)] for _ in range(count)], dtype=np.int16)


def loads_of(array: np.ndarray[Any, Any]) -> list[list[int]]:
    return [np.bincount(array[:, layer].ravel(), minlength=E).tolist() for layer in range(L)]


def test_vllm_prompts_and_outputs() -> None:
    prompt, output, whole = routes(4, 0), routes(2, 1), routes(5, 2)
    trace = read_vllm([(prompt, output), (None, output), whole], num_routed=E, model="m")
    assert trace.phases == ("mixed", "decode", "decode", "mixed")
    assert trace.loads.tolist() == [loads_of(array) for array in (prompt, output, output, whole)]
    assert torch.equal(routed_loads(trace), trace.loads)
    assert trace.request.tolist() == [0] * 6 + [1] * 2 + [2] * 5
    assert trace.position.tolist() == [*range(6), 0, 1, *range(5)]
    assert trace.is_prompt.tolist() == [True] * 4 + [False] * 9, "of one array it is not known"
    assert trace.rank_loads.tolist() == [[[count * K]] * L for count in (4, 2, 2, 5)]
    assert (trace.header.source, trace.header.mode, trace.header.top_k) == ("vllm", "per_token", K)


def test_vllm_files(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", routes(3, 0))
    np.savez(tmp_path / "b.npz", prompt_routed_experts=routes(2, 1), routed_experts=routes(1, 2))
    trace = read_any(tmp_path, num_routed=E)
    assert trace.num_tokens.tolist() == [3, 2, 1]
    assert read_any(tmp_path / "a.npy", num_routed=E).num_tokens.tolist() == [3]
    with pytest.raises(TraceError, match="does not say how many experts the model has. Give num_routed"):
        read_any(tmp_path)
    np.savez(tmp_path / "b.npz", other=routes(2, 1))
    with pytest.raises(TraceError, match=r"holds \['other'\]: must hold routed_experts or prompt_routed_experts"):
        read_any(tmp_path, num_routed=E)


def test_vllm_missing_routes_count_nowhere() -> None:
    array = routes(2, 0)
    array[1, 0, 2] = -1
    trace = read_vllm([array], num_routed=E)
    assert trace.loads.sum(2).tolist() == [[2 * K - 1, 2 * K]]
    assert torch.equal(routed_loads(trace), trace.loads)


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        ([routes(2, 0)[0]], r"request 0: int16 \(2, 3\): must be integers \[tokens, layers, top_k\]"),
        ([routes(2, 0).astype(np.float32)], "float32"),
        ([routes(2, 0), routes(2, 0) + E], r"request 1: expert \d+: must lie in 0..5"),
        ([routes(2, 0), routes(2, 0)[:, :1]], "all must be of one model"),
        ([], "there is no token in it"),
    ],
    ids=["two dims", "floats", "unknown expert", "two models", "nothing"],
)
def test_vllm_arrays_are_checked(requests: list[np.ndarray[Any, Any]], message: str) -> None:
    with pytest.raises(TraceError, match=message):
        read_vllm(requests, num_routed=E)


def test_no_pickle_is_opened(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([{"routed_experts": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(TraceError, match=r"a.npy' cannot be read as numpy's: .*pickle"):
        read_any(tmp_path, num_routed=E)


def record(step: int, layer: int, rank: int, ids: np.ndarray[Any, Any], **more: object) -> str:
    own = {"step": step, "stage": "pre_dispatch", "block": "decoder", "layer": layer, "rank": rank}
    return json.dumps({**own, "num_tokens": len(ids), "topk": K, "top_indices": ids.tolist(), **more}) + "\n"


def test_megatron(tmp_path: Path) -> None:
    """Two ranks, two steps, layers 3 and 5; a record of an MTP block is passed over."""
    arrays = {(step, rank): routes(2 + rank, 10 * step + rank) for step in (0, 1) for rank in (0, 1)}
    for rank in (0, 1):
        lines = [
            record(step, layer, rank, arrays[step, rank][:, index])
            for step in (0, 1)
            for index, layer in enumerate((3, 5))
        ]
        lines.append(record(1, 3, rank, arrays[1, rank][:, 0], block="mtp", mtp_idx=0))
        (tmp_path / f"rank{rank}.jsonl").write_text("".join(lines))
    trace = read_any(tmp_path, num_routed=E)
    assert trace.phases == ("mixed", "mixed")
    assert trace.num_tokens.tolist() == [5, 5]
    both = [loads_of(np.concatenate([arrays[step, 0], arrays[step, 1]])) for step in (0, 1)]
    assert trace.loads.tolist() == both
    assert torch.equal(routed_loads(trace), trace.loads)
    assert trace.request.tolist() == [0, 0, 1, 1, 1] * 2
    assert trace.header.source == "megatron"


def test_megatron_files_are_checked(tmp_path: Path) -> None:
    file = tmp_path / "r.jsonl"
    file.write_text(record(0, 3, 0, routes(2, 0)[:, 0]) + record(0, 5, 0, routes(3, 0)[:, 1]))
    with pytest.raises(TraceError, match=r"step 0, rank 0: 2 of 2 layers, with \[2, 3\] tokens"):
        read_megatron([file], num_routed=E)
    file.write_text(record(0, 3, 0, routes(2, 0)[:, 0]) + record(0, 5, 1, routes(2, 0)[:, 1]))
    with pytest.raises(TraceError, match=r"step 0, rank 0: 1 of 2 layers"):
        read_megatron([file], num_routed=E)
    file.write_text(record(0, 3, 0, routes(2, 0)[:, 0])[:-9])
    with pytest.raises(TraceError, match=r"r.jsonl', line 1: no JSON: .*cut short"):
        read_megatron([file], num_routed=E)
    file.write_text(record(0, 3, 0, routes(2, 0)[:, 0], block="mtp", mtp_idx=0))
    with pytest.raises(TraceError, match=r"only records of stage 'pre_dispatch' of block 'mtp': read is stage"):
        read_megatron([file], num_routed=E)
    file.write_text('{"step": 1}\n')
    with pytest.raises(TraceError, match=r"line 1: no record of a router: KeyError\('rank'\)"):
        read_megatron([file], num_routed=E)


def trtllm(folder: Path, change: Callable[[dict[str, torch.Tensor]], object] = lambda _: None) -> Path:
    """Iterations 100 and 101, layers 3 and 4, two ranks."""
    meta = {"num_experts": E, "num_experts_per_token": K}
    (folder / "meta_info.json").write_text(json.dumps(meta))
    for rank in (0, 1):
        counts = {
            f"{step}_{layer}": torch.tensor([rank, 1, 2, 3, 3 - rank, step - 100 + layer - layer])
            for step in (100, 101)
            for layer in (3, 4)
        }
        change(counts)
        save_file(counts, folder / f"rank{rank}.safetensors")
    return folder


def test_trtllm(tmp_path: Path) -> None:
    trace = read_any(trtllm(tmp_path))
    assert trace.loads.tolist() == [[[1, 2, 4, 6, 5, 0]] * 2, [[1, 2, 4, 6, 5, 2]] * 2]
    assert trace.first_step.tolist() == [100, 101]
    assert trace.num_tokens.tolist() == [6, 6]
    assert trace.rank_loads.tolist() == [[[18]] * 2, [[20]] * 2]
    assert (trace.header.mode, trace.header.source, len(trace.routes)) == ("per_pass", "tensorrt_llm", 0)


def test_trtllm_counts_of_a_few_assignments(tmp_path: Path) -> None:
    """They need a token, though less than its top-k were counted in a layer."""
    few = torch.tensor([0, 0, 0, 0, 0, 1])
    changed = {"100_3": torch.zeros(E, dtype=torch.int64), "100_4": few, "101_3": few - few, "101_4": few - few}
    assert read_any(trtllm(tmp_path, lambda counts: counts.update(changed))).num_tokens.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda counts: counts.pop("101_4"), "iteration 101 lacks layer 4"),
        (lambda counts: counts.update({"x": torch.zeros(E)}), r"'x' \(6,\): must be iteration_layer, \[6\]"),
        (lambda counts: counts.update({"101_4": torch.full((E,), -2)}), r"'101_4' holds -2: counts must be"),
        (lambda counts: counts.update({"101_4": torch.full((E,), torch.nan)}), r"'101_4' holds nan: counts must be"),
        (lambda counts: counts.clear(), "there is no rank.*safetensors with counts"),
    ],
    ids=["layer", "name", "negative", "nan", "empty"],
)
def test_trtllm_files_are_checked(
    change: Callable[[dict[str, torch.Tensor]], object], message: str, tmp_path: Path
) -> None:
    trtllm(tmp_path, change)
    with pytest.raises(TraceError, match=message):
        read_trtllm(tmp_path)


def test_what_lies_there_decides(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="is no trace: it must hold trace.json"):
        read_any(tmp_path)
    writer = TraceWriter(tmp_path, TraceHeader(model="m", num_layers=1, num_logical=4, num_routed=4, top_k=1))
    writer.close()
    assert read_any(tmp_path).num_windows == 0
    with pytest.raises(TraceError, match="no TensorRT-LLM statistics"):
        read_trtllm(tmp_path)
