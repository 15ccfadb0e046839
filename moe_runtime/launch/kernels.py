"""Which backend serves each operation of a run, and why: the kernels' own choices, from the configuration alone.

T tokens of a rank, K top-k, E local slots.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch
from moe_kernels import backends
from moe_kernels.errors import KernelError
from moe_kernels.grouped_gemm.configs import Entry, columns, configure, separate_swiglu
from moe_models.base import ModelConfig

from moe_runtime.config import RuntimeConfig
from moe_runtime.dispatch.factory import sums_at_home
from moe_runtime.launch.placing import num_dispatched_shared, num_local_slots
from moe_runtime.launch.shuffle import dispatch_names, whole_spec
from moe_runtime.launch.sizing import compute_dtype, expert_dtype, kept_weights, max_num_seqs, page_size

FP8 = torch.float8_e4m3fn


@dataclass(frozen=True, slots=True)
class Served:
    """One operation, the backend that serves it in this run, and why that one or how."""

    op: str
    backend: str
    why: str


def kernel_report(config: RuntimeConfig, model: ModelConfig) -> tuple[Served, ...]:
    """Every operation of a step. Nothing is loaded; without a GPU it says what would run on one.

    Raises ConfigError where the page size or the slots do not fit.
    """
    if backends.default_backend(torch.device(config.device)) == "torch":
        return (Served("all operations", "torch", f"device={config.device}: Triton's kernels need a CUDA device"),)
    return tuple(_on_triton(config, model))


def kernel_line(config: RuntimeConfig, model: ModelConfig) -> str:
    """The same in one line: operations by backend."""
    groups: dict[str, list[str]] = {}
    for served in kernel_report(config, model):
        groups.setdefault(served.backend, []).append(served.op)
    return "; ".join(f"{backend}: {', '.join(ops)}" for backend, ops in groups.items())


def triton_state(config: RuntimeConfig) -> str:
    """The Triton of this machine, and what keeps its kernels from running in this configuration, if anything does."""
    try:
        found = f"triton {version('triton')}"
    except PackageNotFoundError:
        return "triton is not installed: the run is refused; pip install 'moe-runtime[gpu]'"
    if not torch.cuda.is_available():
        return f"{found}; no CUDA device here: this is what one would run"
    try:
        backends.check_triton(torch.empty(0, device=config.device), op="kernels")
    except KernelError as error:
        return f"{found}; the run is refused: {error}"
    return f"{found} on {torch.cuda.get_device_name()}"


def _on_triton(config: RuntimeConfig, model: ModelConfig) -> Iterator[Served]:
    invariant = config.engine.batch_invariant
    yield from _linear(config, model)
    yield _experts(config, model)
    yield Served("gate", "triton", "choice, slots and load counts in one launch")
    yield from _permute(config, model)
    size = page_size(config.engine, device=config.device)
    heads = f"{model.num_heads // config.tp} heads, pages of {size} rows"
    parts = "parts of a length that nothing else changes" if invariant else "cut to fill the device"
    fp8 = ", latents in fp8" if config.engine.kv_cache_dtype == "fp8" else ""
    yield Served("MLA decode", "triton", f"{heads}{fp8}, {parts}; {_optional('flash_mla')}")
    if invariant:
        yield Served("MLA prefill", "triton", "engine.batch_invariant: the decode kernel serves prompts too")
    else:
        yield Served("MLA prefill", "torch", f"fused attention of torch {torch.__version__} (flash or cuDNN)")
    yield Served("latent rows", "triton", f"rope, norm and cache write in one launch{fp8}")
    yield Served("norm, SwiGLU", "triton", "one launch each")
    if (kept := kept_weights(config, model)).parts:
        powers = ", powers of two (scale_fmt=ue8m0)" if kept.ue8m0 else ""
        yield Served("quantise", "triton", f"rows before each fp8 product, a scale per 128 values{powers}")


def _permute(config: RuntimeConfig, model: ModelConfig) -> Iterator[Served]:
    """Who sorts rows by slot and sums outputs: of steps with prompts, then of those without where that is another."""
    names = dispatch_names(config)
    yield from (Served(*row) for row in _permuting(names[0], config, model))
    if len(names) > 1 or (names == ("all_to_all",) and whole_spec(config, model).equal_blocks):
        for op, backend, why in _permuting(names[-1], config, model, decode=True):
            yield Served(f"{op}, decode", backend, why)


def _permuting(
    name: str, config: RuntimeConfig, model: ModelConfig, *, decode: bool = False
) -> Iterator[tuple[str, str, str]]:
    home = "summed in top-k order in fp32"
    match name:
        case "all_to_all" if decode and whole_spec(config, model).equal_blocks:
            yield "permute", "triton", f"equal blocks, sorted on the device; {home}"
        case "all_to_all":
            yield "permute", "torch", "by counts that the host knows"
            yield "unpermute", "triton", home
        case "deep_ep":
            yield "permute, unpermute", "deep_ep", "by its dispatch and combine; V1 with prompts: triton beside them"
        case "nvshmem" if sums_at_home(name, whole_spec(config, model)):
            yield "permute, unpermute", "triton", f"rows put into their destination's slots, pulled home, {home}"
        case _:
            yield "permute", "triton", "sorted on the device, in room for the worst case; summed in top-k order"


def _linear(config: RuntimeConfig, model: ModelConfig) -> Iterator[Served]:
    kept, dtype = kept_weights(config, model), _name(compute_dtype(config, model))
    names = {"down": "q_a + kv_a", "query": "q", "out": "o", "dense": "dense MLP", "shared": "shared experts"}
    mine = [text for part, text in names.items() if part in kept.parts]
    rest = "tiles of 16 rows (engine.batch_invariant)" if config.engine.batch_invariant else "cuBLAS"
    if mine:
        yield Served("linear (fp8)", "triton", f"{', '.join(mine)}: the grouped GEMM with one slot")
    others = "router (fp32), head and heads' up-projections: " if mine else ""
    yield Served("linear", "torch", f"{others}{rest} in {dtype}" + ("" if kept.notice is None else f"; {kept.notice}"))


def _experts(config: RuntimeConfig, model: ModelConfig) -> Served:
    dtype = FP8 if "experts" in kept_weights(config, model).parts else expert_dtype(config, model)
    slots = num_local_slots(config, model)
    texts = []
    for phase, tokens in (("decode", max_num_seqs(config.engine)), ("prefill", config.engine.max_num_batched_tokens)):
        mine = -(-tokens // config.tp)
        texts.append(f"{phase} {_tiles(config, model, dtype, slots=slots, tokens=mine, phase=phase)}")
    fixed = ", fixed tiles (engine.batch_invariant)" if config.engine.batch_invariant else ""
    slots_text = f"{slots} {'slot' if slots == 1 else 'slots'}"
    why = f"{_name(dtype)}, {slots_text}{fixed}; {'; '.join(texts)}; {_optional('deep_gemm')}"
    return Served("experts", "triton", why)


def _tiles(
    config: RuntimeConfig, model: ModelConfig, dtype: torch.dtype, *, slots: int, tokens: int, phase: str
) -> str:
    """What the shape table chooses where every rank brings `tokens` and routing is balanced."""
    top_k = model.num_experts_per_tok + num_dispatched_shared(config, model)
    width, hidden, invariant = model.moe_intermediate_size, model.hidden_size, config.engine.batch_invariant
    rows = -(-tokens * top_k // slots)
    name = dispatch_names(config)[-1 if phase == "decode" else 0]
    equal = name == "all_to_all" and phase == "decode" and whole_spec(config, model).equal_blocks
    worst = name == "all_gather" or equal
    room = config.ep * tokens * min(top_k, slots) if worst else tokens * top_k

    def entry(n: int, k: int, *, swiglu: bool) -> Entry:
        return configure(
            rows_per_slot=rows, slots=slots, n=n, k=k, dtype=dtype, swiglu=swiglu, batch_invariant=invariant
        )

    apart = dtype is FP8 and not invariant
    apart = apart and separate_swiglu(rows_per_slot=rows, total_rows=room, slots=slots, width=width, k=hidden)
    first = entry(2 * width, hidden, swiglu=False) if apart else entry(width, hidden, swiglu=True)
    kind = "then SwiGLU" if apart else "with SwiGLU"
    second = entry(hidden, width, swiglu=False)
    return (
        f"({rows} rows a slot): tiles of {_size(first, swiglu=not apart)} {kind} ({first.source}), "
        f"{_size(second, swiglu=False)} ({second.source})"
    )


def _size(entry: Entry, *, swiglu: bool) -> str:
    return f"{entry.config.block_m} rows × {columns(entry.config, swiglu=swiglu)} columns"


def _optional(package: str) -> str:
    """A library that kernels can be asked for by name; none is chosen unasked."""
    found = "importable, never chosen unasked" if find_spec(package) is not None else "not importable"
    return f"{package} {found}"


def _name(dtype: torch.dtype) -> str:
    return "fp8" if dtype is FP8 else str(dtype).removeprefix("torch.")
