"""Loads and routes that other programs have recorded, as a Trace. Their layouts stand in docs/balance.md, "Traces".

None of them says where its experts were, so `header.ep` is 1 and `rank_loads` sums over all experts. L MoE layers, E
experts, K top-k, n tokens. No pickle is ever opened.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from moe_runtime.balance.trace import Trace, TraceHeader, has_trace, read_trace
from moe_runtime.balance.trace_import import (
    Piece,
    Routed,
    Windows,
    checked_counts,
    checked_routes,
    trace_of_routes,
    trace_of_windows,
)
from moe_runtime.errors import TraceError

_TRTLLM_META: Final = "meta_info.json"
_TRTLLM_KEY: Final = re.compile(r"(\d+)_(\d+)")
_MEGATRON_STAGE, _MEGATRON_BLOCK = "pre_dispatch", "decoder"
_VLLM_PROMPT, _VLLM_OUTPUT = "prompt_routed_experts", "routed_experts"


def read_any(path: str | Path, *, num_routed: int | None = None) -> Trace:
    """A trace of ours or of another program, told by what lies at `path`.

    A folder with trace.json is ours; with meta_info.json, TensorRT-LLM's statistics; with *.jsonl (or such a file),
    Megatron's router traces; with *.npy or *.npz (or such a file), vLLM's routed experts. The last two do not say how
    many experts there are: `num_routed`. Raises TraceError.
    """
    place = Path(path)
    if has_trace(place):
        return read_trace(place)
    if (place / _TRTLLM_META).exists():
        return read_trtllm(place)
    files = sorted(place.iterdir()) if place.is_dir() else [place]
    lines = [file for file in files if file.suffix == ".jsonl"]
    arrays = [file for file in files if file.suffix in (".npy", ".npz")]
    if not (lines or arrays):
        raise TraceError(
            f"{str(path)!r} is no trace: it must hold trace.json, {_TRTLLM_META}, *.jsonl, *.npy or *.npz."
        )
    if num_routed is None:
        raise TraceError(f"{str(path)!r} does not say how many experts the model has. Give num_routed=…, e.g. 256.")
    if lines:
        return read_megatron(lines, num_routed=num_routed)
    return read_vllm([request for file in arrays for request in _load_arrays(file)], num_routed=num_routed)


# vLLM


def read_vllm(
    requests: Sequence[Routed | tuple[Routed | None, Routed | None]], *, num_routed: int, model: str = ""
) -> Trace:
    """vLLM's routed experts, one item per completion: `prompt_routed_experts` and `routed_experts`, or one array.

    Each completion is a window of its own, one for its prompt ("mixed") and one for its output ("decode"); of a single
    array, which does not tell them apart, one ("mixed"). -1 stands for a route that is missing. Raises TraceError.
    """
    pieces: list[Piece] = []
    for number, request in enumerate(requests):
        prompt, output = request if isinstance(request, tuple) else (request, None)
        start = 0
        for array, phase in ((prompt, "mixed"), (output, "decode")):
            if array is None or not len(array):
                continue
            routes = checked_routes(array, f"request {number}", num_routed)
            asked = phase == "mixed" and isinstance(request, tuple)
            pieces.append(Piece(phase, number, routes, number, start, is_prompt=asked))
            start += len(routes)
    return trace_of_routes(pieces, num_routed=num_routed, model=model, source="vllm")


def _load_arrays(file: Path) -> Iterator[Routed | tuple[Routed | None, Routed | None]]:
    try:
        loaded = np.load(file, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            yield loaded
            return
        with loaded:
            names = set(loaded.files)
            if not names & {_VLLM_PROMPT, _VLLM_OUTPUT}:
                raise TraceError(f"{str(file)!r} holds {sorted(names)}: must hold {_VLLM_OUTPUT} or {_VLLM_PROMPT}.")
            prompt, output = (loaded[name] if name in names else None for name in (_VLLM_PROMPT, _VLLM_OUTPUT))
            yield (prompt, output)
    except (OSError, ValueError, EOFError) as error:
        if isinstance(error, TraceError):
            raise
        raise TraceError(f"{str(file)!r} cannot be read as numpy's: {error}. Save arrays of integers.") from error


# Megatron


def read_megatron(files: Sequence[str | Path], *, num_routed: int, model: str = "") -> Trace:
    """Megatron's router traces: JSON lines with step, stage, block, layer, rank and `top_indices [n][K]`.

    Read are records of block "decoder" before the dispatch. Each step is a window, "mixed" since its phase is not
    recorded; a token's request is its rank's number, its position the row within the step. Give files of ranks that
    had tokens of their own: which of them saw the same ones is not recorded. Raises TraceError, also where a rank lacks
    layers that another has (pipeline stages).
    """
    found: dict[tuple[int, int], dict[int, list[Routed]]] = {}
    others = set[str]()
    for file in files:
        for where, record in _lines(Path(file)):
            stage, block = record.get("stage", _MEGATRON_STAGE), record.get("block", _MEGATRON_BLOCK)
            if (stage, block) != (_MEGATRON_STAGE, _MEGATRON_BLOCK):
                others.add(f"stage {stage!r} of block {block!r}")
                continue
            try:
                key, layer = (int(record["step"]), int(record["rank"])), int(record["layer"])
                rows = np.asarray(record["top_indices"]).reshape(-1, int(record["topk"]))
            except (KeyError, TypeError, ValueError) as error:
                raise TraceError(f"{where}: no record of a router: {error!r}. Give Megatron's own files.") from error
            found.setdefault(key, {}).setdefault(layer, []).append(rows)
    if others and not found:
        raise TraceError(
            f"there are only records of {', '.join(sorted(others))}: read is stage {_MEGATRON_STAGE!r} of block "
            f"{_MEGATRON_BLOCK!r}. Trace that one."
        )
    layers = sorted({layer for own in found.values() for layer in own})
    pieces = []
    for (step, rank), own in sorted(found.items()):
        arrays = [np.concatenate(own[layer]) for layer in layers if layer in own]
        if len(arrays) < len(layers) or len({array.shape for array in arrays}) != 1:
            raise TraceError(
                f"step {step}, rank {rank}: {len(arrays)} of {len(layers)} layers, with "
                f"{sorted({len(array) for array in arrays})} tokens: every layer must be there, with equal tokens. The "
                "file was cut short, or ranks held different layers, which cannot be read."
            )
        routes = checked_routes(np.stack(arrays, axis=1), f"step {step}, rank {rank}", num_routed)
        pieces.append(Piece("mixed", step, routes, rank, 0, is_prompt=False))
    return trace_of_routes(pieces, num_routed=num_routed, model=model, source="megatron")


def _lines(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(f"{str(file)!r} cannot be read: {error}. Give a file of JSON lines.") from error
    for number, line in enumerate(text.splitlines(), start=1):
        where = f"{str(file)!r}, line {number}"
        if line.strip():
            try:
                record = json.loads(line)
            except ValueError as error:
                raise TraceError(f"{where}: no JSON: {error}. The file was cut short; remove that line.") from error
            if not isinstance(record, dict):
                raise TraceError(f"{where}: must be an object. Give Megatron's own files.")
            yield where, record


# TensorRT-LLM


def read_trtllm(folder: str | Path, *, model: str = "") -> Trace:
    """TensorRT-LLM's expert statistics: meta_info.json and rank*.safetensors with `"<iteration>_<layer>": [E]` counts.

    Each iteration is a window, "mixed" since its phase is not recorded. Raises TraceError.
    """
    place = Path(folder)
    try:
        meta = json.loads((place / _TRTLLM_META).read_text(encoding="utf-8"))
        experts, top_k = int(meta["num_experts"]), int(meta["num_experts_per_token"])
        ranks = {file: load_file(file) for file in sorted(place.glob("rank*.safetensors"))}
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise TraceError(
            f"{str(folder)!r}: no TensorRT-LLM statistics: {error!r}. Give the folder of EXPERT_STATISTIC_PATH."
        ) from error
    counts: dict[tuple[int, int], Tensor] = {}
    for file, tensors in ranks.items():
        for name, tensor in tensors.items():
            match = _TRTLLM_KEY.fullmatch(name)
            if match is None or tensor.shape != (experts,):
                raise TraceError(
                    f"{str(file)!r}: {name!r} {tuple(tensor.shape)}: must be iteration_layer, [{experts}]."
                )
            key = int(match[1]), int(match[2])
            counts[key] = counts.get(key, 0) + checked_counts(tensor, f"{str(file)!r}: {name!r}")
    steps, layers = (sorted({key[index] for key in counts}) for index in (0, 1))
    if missing := [(step, layer) for step in steps for layer in layers if (step, layer) not in counts]:
        raise TraceError(f"{str(folder)!r}: iteration {missing[0][0]} lacks layer {missing[0][1]}: it was cut short.")
    if not counts:
        raise TraceError(f"{str(folder)!r}: there is no rank*.safetensors with counts.")
    header = TraceHeader(
        model=model,
        num_layers=len(layers),
        num_logical=experts,
        num_routed=experts,
        top_k=top_k,
        mode="per_pass",
        window_steps=1,
        source="tensorrt_llm",
        complete=True,
    )
    loads = torch.stack([torch.stack([counts[step, layer] for layer in layers]) for step in steps])
    assigned = loads.sum(2).amax(1)
    num_tokens = torch.where(assigned > 0, (assigned // top_k).clamp_min(1), 0).tolist()
    return trace_of_windows(header, Windows(loads, ["mixed"] * len(steps), steps, num_tokens))
