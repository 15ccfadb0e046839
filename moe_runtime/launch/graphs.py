"""Whether decode steps run as CUDA graphs, of which sizes, and what captures them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from moe_kernels import backends
from moe_models.base import ModelConfig

from moe_runtime.comm.together import Together
from moe_runtime.config import RuntimeConfig
from moe_runtime.dispatch.factory import buffer_bytes, graph_safe
from moe_runtime.engine.cuda_graph import CudaGraphs, GraphApi
from moe_runtime.engine.graphs import ProcessGraphs
from moe_runtime.engine.lockstep import LockstepLimits, Padding, default_graph_sizes, graph_sizes
from moe_runtime.engine.step_buffers import StepBuffers
from moe_runtime.errors import ConfigError
from moe_runtime.launch.memory import enough_memory
from moe_runtime.launch.shuffle import (
    buffer_cap,
    dispatch_names,
    dispatch_spec,
    overlaps,
    overlaps_decode,
    splits_combine,
    whole_spec,
)
from moe_runtime.launch.sizing import (
    FP32_BYTES,
    max_model_len,
    max_num_seqs,
    page_size,
)


class GraphsMode(NamedTuple):
    """`sizes`: rows of a DP group in each captured step, ascending; empty where the mode is off."""

    mode: Literal["on", "off"]
    reason: str
    sizes: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Capture:
    """What a rank needs to take part in the captures of its process."""

    process: ProcessGraphs
    together: Together


def graphs_mode(config: RuntimeConfig, model: ModelConfig) -> GraphsMode:
    """How decode steps run, and why. ConfigError where engine.cuda_graphs=on and they cannot be captured, and on
    sizes that are none."""
    wanted = config.engine.cuda_graphs
    if config.engine.cuda_graph_sizes is not None:
        _sizes(config)
    if wanted == "off":
        return GraphsMode("off", "engine.cuda_graphs=off")
    limits = lockstep_limits(config, model, graphs=True)
    sizes = limits.captured_sizes
    if not sizes:
        why, remedy = _obstacle(config, model, limits)
        if wanted == "on":
            raise ConfigError(f"engine.cuda_graphs=on: {why}. Set {remedy}, or engine.cuda_graphs=auto.")
        return GraphsMode("off", why)
    most = max_num_seqs(config.engine)
    beyond = "" if sizes[-1] >= most else f"; steps of {sizes[-1] + 1} to {most} tokens run without"
    return GraphsMode(
        "on", f"decode steps of up to {sizes[-1]} rows per DP group, in {len(sizes)} sizes{beyond}", sizes
    )


def lockstep_limits(
    config: RuntimeConfig,
    model: ModelConfig,
    *,
    graphs: bool,
    num_slots: int | None = None,
) -> LockstepLimits:
    """`graphs`: decode steps are captured, where they can be. `num_slots` of each rank, where known."""
    spec = dispatch_spec(config, model, num_slots=num_slots)
    return LockstepLimits(
        tp=config.tp,
        padding=Padding(config.engine.padding),
        graph_sizes=_sizes(config) if graphs and _can_capture(config, model) else (),
        max_tokens=spec.max_tokens,
        max_decode_tokens=spec.max_decode_tokens,
        two_batch_tokens=config.engine.two_batch_tokens if overlaps(config) else None,
        two_batch_decode_tokens=config.engine.two_batch_decode_tokens if overlaps_decode(config) else None,
        split_combine=splits_combine(config),
    )


def process_graphs(
    config: RuntimeConfig, model: ModelConfig, device: torch.device, on_captured: Callable[[int], None]
) -> ProcessGraphs | None:
    """What captures this process's decode steps, nothing captured yet; None where they run without graphs.

    `on_captured` is called with the rows of each size once it is captured. ConfigError as `graphs_mode`.
    """
    found = graphs_mode(config, model)
    return ProcessGraphs(graph_api(device), found.sizes, on_captured) if found.mode == "on" else None


def graphs_fit(sizes: tuple[int, ...], device: torch.device) -> AbstractContextManager[None]:
    """Around the capture: ConfigError where the device has too little memory for it."""
    what = f"engine.cuda_graph_sizes={list(sizes)}: the capture of decode steps of up to {sizes[-1]} rows"
    remedy = "Lower engine.kv_cache_bytes or the largest of engine.cuda_graph_sizes, or set engine.cuda_graphs=off."
    return enough_memory(device, what, remedy=remedy)


def graph_bytes(config: RuntimeConfig, model: ModelConfig, sizes: tuple[int, ...]) -> int:
    """What a rank that samples holds for its captured steps at fixed addresses: the step's numbers and its logits.

    Beside it lies what a step of `sizes[-1]` rows allocates on its way, in one pool of the process for all sizes.
    """
    length, size = max_model_len(config.engine, model), page_size(config.engine, device=config.device)
    numbers = StepBuffers.num_bytes(sizes[-1], -(-length // size))
    return numbers + sizes[-1] * model.vocab_size * FP32_BYTES


def graph_api(device: torch.device) -> GraphApi:
    """Capture on `device`, which is the calling thread's current one."""
    assert device.type == "cuda", "graphs_mode says where there are graphs"
    return CudaGraphs()


def _sizes(config: RuntimeConfig) -> tuple[int, ...]:
    most, wanted = max_num_seqs(config.engine), config.engine.cuda_graph_sizes
    return graph_sizes(default_graph_sizes(most) if wanted is None else wanted, most=most, tp=config.tp)


def _on_kernels(config: RuntimeConfig) -> bool:
    return backends.default_backend(torch.device(config.device)) == "triton"


def _can_capture(config: RuntimeConfig, model: ModelConfig) -> bool:
    """Whether nothing but the size of a step stands against its capture."""
    spec = whole_spec(config, model)
    safe = graph_safe(dispatch_names(config)[-1], spec, device=torch.device(config.device))
    return _on_kernels(config) and safe and config.engine.padding != "own"


def _obstacle(config: RuntimeConfig, model: ModelConfig, limits: LockstepLimits) -> tuple[str, str]:
    """Why no decode step can be captured, and the remedy."""
    if not _on_kernels(config):
        return f"device={config.device} has no CUDA graphs", "device=cuda"
    if not _can_capture(config, model) and config.engine.padding != "own":
        key = "dispatch" if config.decode_dispatch is None else "decode_dispatch"
        other = "all_gather" if config.ep > 1 else "local"
        return f"{key}={dispatch_names(config)[-1]} needs the host in every step", f"{key}={other}"
    if config.engine.padding == "own":
        return "engine.padding=own gives every DP group rows of its own", "engine.padding=auto"
    least = limits.graph_sizes[0]
    spec = replace(whole_spec(config, model), max_tokens=least // config.tp, max_decode_tokens=least // config.tp)
    need = max(buffer_bytes(name, spec) for name in dispatch_names(config))
    return (
        f"engine.dispatch_buffer_bytes={buffer_cap(config)} cuts steps of {least} rows, the least "
        "captured size, into several dispatches",
        f"engine.dispatch_buffer_bytes={need} or more",
    )
