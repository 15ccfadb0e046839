"""job=doctor: what a configuration means and where it contradicts itself, without weights and without a GPU."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch

from moe_runtime.cli.console import Console, count, open_console
from moe_runtime.cli.dispatch_report import show_dispatch
from moe_runtime.cli.next_command import next_command
from moe_runtime.cli.prompts import OWN_PROMPTS, check_output, read_prompts
from moe_runtime.dispatch.factory import FABRICS, find_library
from moe_runtime.dispatch.missing import Missing
from moe_runtime.errors import ConfigError, MoeRuntimeError, RequestError
from moe_runtime.launch.compose import Composed, compose
from moe_runtime.launch.env import TorchrunEnv
from moe_runtime.launch.graphs import graph_bytes, graphs_mode
from moe_runtime.launch.kernels import kernel_report, triton_state
from moe_runtime.launch.placing import expert_placement, num_dispatched_shared
from moe_runtime.launch.process_size import process_bytes, staging_bytes
from moe_runtime.launch.recording import route_bytes
from moe_runtime.launch.shuffle import buffer_cap, choose_dispatch
from moe_runtime.launch.sizing import (
    cache_size,
    compute_dtype,
    expert_dtype,
    format_bytes,
    kept_weights,
    max_model_len,
    rotary_bytes,
    weight_bytes,
)
from moe_runtime.parallel.placement import ExpertPlacement

_ROWS_SHOWN = 16
_PACKAGES = ("torch", "safetensors", "transformers", "numpy", "hydra-core", "greenlet", "rich")
_BACKENDS = (
    # import name, distribution, what it is for, where it comes from
    ("triton", "triton", "GPU kernels", "pip install 'moe-runtime[gpu]'"),
    ("deep_gemm", "deep_gemm", "FP8 grouped GEMM", "build it from its repository; PyPI's deep_gemm 1.0.0 is not it"),
)


def doctor(words: Sequence[str], *, torchrun: TorchrunEnv | None = None, console: Console | None = None) -> int:
    """Print the report; returns the number of problems. Raises ConfigError where there is no model to speak of."""
    console = open_console() if console is None else console
    problems: list[MoeRuntimeError] = []
    try:
        composed = compose(words, torchrun=torchrun, report=problems.append)
    except ConfigError as error:
        problems.append(error)
    else:
        problems += _file_problems(composed)
        _report(console, composed)
        _show_software(console, composed)
    if problems:
        console.pairs(
            count(len(problems), "problem"),
            [(f"{i}.", str(p)) for i, p in enumerate(problems, 1)],
        )
        return len(problems)
    console.line("no conflicts")
    console.line(f"next: {next_command(composed)}")
    return 0


def _file_problems(composed: Composed) -> Iterator[MoeRuntimeError]:
    """What is wrong with the files of prompts and results; nothing is written."""
    config = composed.config
    prompts = composed.model_path / OWN_PROMPTS if config.prompts is None else Path(config.prompts)
    try:
        if config.prompts is not None:
            read_prompts(prompts)
    except (ConfigError, RequestError) as error:
        yield error
    try:
        if config.output is not None:
            check_output(Path(config.output), prompts=prompts)
    except ConfigError as error:
        yield error


def _report(console: Console, composed: Composed) -> None:
    try:
        placement = expert_placement(composed.config, composed.model)
    except ConfigError:
        return  # among the problems
    _show_topology(console, composed)
    _show_ranks(console, composed, placement)
    _show_experts(console, composed, placement)
    _show_bytes(console, composed, placement)
    show_dispatch(console, composed, placement)
    _show_kernels(console, composed)


def _show_topology(console: Console, composed: Composed) -> None:
    topology, model = composed.topology, composed.model
    told = choose_dispatch(composed.config, model).unavailable  # by show_dispatch, with remedies
    weights = "" if composed.has_weights else ", from its configuration alone"
    rows = [
        ("model", f"{composed.config.model} ({model.family}){weights}"),
        (
            "shape",
            f"{model.num_layers} layers, hidden {model.hidden_size}, {model.num_heads} heads, vocabulary "
            f"{model.vocab_size}",
        ),
        ("mesh", f"{topology}, {count(topology.num_nodes, 'node')} of {topology.ranks_per_node}"),
        *(("", reason) for reason in topology.reasons if reason not in told),
    ]
    console.pairs("topology", rows)


def _show_ranks(console: Console, composed: Composed, placement: ExpertPlacement) -> None:
    world = composed.topology.world
    shown = list(range(world)) if world <= _ROWS_SHOWN else [*range(_ROWS_SHOWN - 4), -1, world - 2, world - 1]
    rows: list[tuple[str, ...]] = []
    for rank in shown:
        if rank < 0:
            rows.append(("…",) * 7)
            continue
        mesh = composed.topology.mesh(rank)
        places = (rank, mesh.node, mesh.local_rank, mesh.dp_rank, mesh.tp_rank, mesh.ep_rank)
        rows.append((*map(str, places), _ids(placement.local_logical(0, mesh.ep_rank))))
    header = ("rank", "node", "local", "dp", "tp", "ep", "experts in its slots (first MoE layer)")
    console.table(count(world, "rank"), header, rows)


def _ids(ids: Sequence[int]) -> str:
    """`0–7 12`: runs are joined."""
    runs: list[list[int]] = []
    for i in ids:
        if runs and i == runs[-1][-1] + 1:
            runs[-1].append(i)
        else:
            runs.append([i])
    return " ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)


def _show_experts(console: Console, composed: Composed, placement: ExpertPlacement) -> None:
    model, shared = composed.model, num_dispatched_shared(composed.config, composed.model)
    counts = placement.logcnt[0].tolist()
    copied = [expert for expert, count in enumerate(counts) if count > 1]
    parts = [f"{model.n_routed_experts} routed"] + ([f"{shared} shared, dispatched"] if shared else [])
    rows = [
        ("logical", f"{placement.num_logical} = {' + '.join(parts)}, in each of {placement.num_layers} MoE layers"),
        ("slots", f"{placement.num_physical} = {placement.num_local} on each of {placement.ep} ranks"),
        (
            "copies",
            f"{placement.num_physical - placement.num_logical} slots hold further copies of {len(copied)} experts",
        ),
    ]
    if shared:
        each = sorted({*counts[model.n_routed_experts :]})
        slots = str(each[0]) if len(each) == 1 else f"{each[0]} to {each[-1]}"
        rows.append(("shared", f"{shared} with {slots} slots each, chosen by every token"))
    elif model.n_shared_experts:
        rows.append(("shared", f"{model.n_shared_experts} on every rank, beside the dispatch"))
    console.pairs("experts", rows)


def _show_bytes(console: Console, composed: Composed, placement: ExpertPlacement) -> None:
    config, model = composed.config, composed.model
    dtype, kept = compute_dtype(config, model), kept_weights(config, model)
    weights = weight_bytes(
        model,
        composed.topology.mesh(),
        num_local_slots=placement.num_local,
        shared=config.shared_experts,
        itemsize=dtype.itemsize,
        expert_itemsize=expert_dtype(config, model).itemsize,
        batch_invariant=config.engine.batch_invariant,
        kept=kept,
    )
    rows = [(part.name.replace("_", " "), format_bytes(getattr(weights, part.name))) for part in fields(weights)]
    names = _dtype_names(dtype, expert_dtype(config, model))
    held = f"as {names}" if not kept.parts else f"in FP8 as stored, with scales, else as {names}"
    rows.append(("weights in all", f"{format_bytes(weights.total)} {held}"))
    if kept.notice is not None:
        rows.append(("FP8 weights", kept.notice))
    if staged := staging_bytes(config, model, num_local_slots=placement.num_local):
        each = f"{format_bytes(staged.scratch)} for one more, {format_bytes(staged.exchange // 2)} each way between two"
        rows.append(("moving experts", f"{format_bytes(staged.slots)} for one layer's slots, {each} steps"))
    if routes := route_bytes(config, model):
        rows.append(("routes of a step", format_bytes(routes)))
    virtual = composed.has_weights and config.launcher == "virtual"
    try:
        cache = cache_size(
            config.engine,
            model,
            itemsize=dtype.itemsize,
            ranks_in_process=config.ep if virtual else 1,
            device=config.device,
        )
    except ConfigError:
        console.pairs("bytes of rank 0", rows)
        return  # among the problems
    length = max_model_len(config.engine, model)
    in_fp8 = ", latents in FP8 with scales" if config.engine.kv_cache_dtype == "fp8" else ""
    rows += [
        ("KV per token", f"{format_bytes(cache.bytes_per_token)} over {model.num_layers} layers{in_fp8}"),
        (
            "KV cache",
            f"{format_bytes(cache.num_bytes)}: {cache.num_pages} pages of {cache.page_size} = {cache.num_tokens} "
            f"tokens, {cache.num_tokens / length:.1f} sequences of {length}",
        ),
        ("rotary table", format_bytes(rotary_bytes(config.engine, model))),
        ("dispatch buffers", f"at most {format_bytes(buffer_cap(config))}"),
        *_graph_rows(composed),
    ]
    if virtual:
        held = format_bytes(process_bytes(config, model, num_local_slots=placement.num_local))
        rows.append(("this process", f"{held} for {count(config.ep, 'rank')}: equal slices are held once"))
    console.pairs("bytes of rank 0", rows)


def _graph_rows(composed: Composed) -> Iterator[tuple[str, str]]:
    try:
        sizes = graphs_mode(composed.config, composed.model).sizes
    except ConfigError:
        return  # among the problems
    if sizes:
        held = format_bytes(graph_bytes(composed.config, composed.model, sizes))
        pool = f"a pool that fits one step of {sizes[-1]} rows, known once it is captured"
        yield "decode graphs", f"{held} of page tables and logits; beside it {pool}"


def _show_kernels(console: Console, composed: Composed) -> None:
    config, rows = composed.config, []
    try:
        report = kernel_report(config, composed.model)
    except ConfigError:
        return  # among the problems
    if config.device == "cuda":
        rows.append(("device", triton_state(config)))
    for served in report:
        first, *more = served.why.split("; ")
        rows += [(served.op, f"{served.backend}: {first}"), *(("", text) for text in more)]
    console.pairs("kernels", rows)


def _show_software(console: Console, composed: Composed) -> None:
    gpu = f"{torch.cuda.device_count()} GPUs" if torch.cuda.is_available() else "no GPU"
    rows = [("python", platform.python_version()), *((name, _version(name)) for name in _PACKAGES), ("devices", gpu)]
    console.pairs("software", [*rows, *_backends(), *_fabrics()])


def _backends() -> Iterator[tuple[str, str]]:
    for module, package, purpose, remedy in _BACKENDS:
        if find_spec(module) is None:
            yield module, f"not installed ({purpose}): {remedy}"
        elif not torch.cuda.is_available():
            yield module, f"{_version(package)}, idle: {purpose} needs a CUDA device"
        else:
            yield module, f"{_version(package)} ({purpose})"


def _fabrics() -> Iterator[tuple[str, str]]:
    """The libraries of the dispatch's fabrics as they are really found, whatever this run asks for."""
    for name in FABRICS:
        found = find_library(name)
        if isinstance(found, Missing):
            yield name, f"{found.reason}: {found.remedy.removesuffix(', or set dispatch=all_to_all')}"
        else:
            yield name, str(found)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "installed, version unknown"


def _dtype_names(dtype: torch.dtype, experts: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    return name if experts == dtype else f"{name}, experts as {str(experts).removeprefix('torch.')}"
