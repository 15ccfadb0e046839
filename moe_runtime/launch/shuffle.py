"""Which dispatcher a run takes and why not the others, the sizes for which its buffers are made, and what overlaps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
from moe_models.base import ModelConfig

from moe_runtime.config import DispatchName, PlacementConfig, RuntimeConfig
from moe_runtime.dispatch import all_gather, equal_split
from moe_runtime.dispatch.base import Phase
from moe_runtime.dispatch.factory import (
    BACKENDS,
    buffer_bytes,
    library_of,
    max_capacity,
    most_tokens,
    obstacle,
    sums_at_home,
    with_tokens,
)
from moe_runtime.dispatch.missing import Missing
from moe_runtime.dispatch.rows import RowLayout
from moe_runtime.dispatch.spec import DispatchSpec
from moe_runtime.engine.lockstep import default_graph_sizes
from moe_runtime.errors import ConfigError
from moe_runtime.launch.placing import num_dispatched_shared, num_local_slots
from moe_runtime.launch.sizing import compute_dtype, kept_weights, max_num_seqs

CPU_BUFFER_BYTES = 256 * 2**20
CUDA_BUFFER_BYTES = 4 * 2**30
FIXED_BYTES = 16 * 2**20
FIXED_BYTES_IN_A_NODE = 64 * 2**20
"""Beyond these a decode step goes by counts, without a graph: 0.4 ms a layer at 40 GB/s of RDMA or 150 of NVLink, about
what launching a layer's kernels one by one takes. By reasoning, not measured on hardware."""
"""What engine.dispatch_buffer_bytes=null allows: on a GPU, DeepSeek-V3's decode with 128 tokens on any fabric."""


@dataclass(frozen=True, slots=True)
class DispatchChoice:
    """What `dispatch=auto` takes, in one sentence; `others`: why each other backend is not it; `unavailable`: those of
    them that cannot serve, a sentence for each reason."""

    name: DispatchName
    decode: DispatchName | None
    reason: str
    others: tuple[tuple[str, str], ...]
    unavailable: tuple[str, ...]


def buffer_cap(config: RuntimeConfig) -> int:
    """Most bytes of a rank for one dispatch."""
    given = config.engine.dispatch_buffer_bytes
    return given or (CUDA_BUFFER_BYTES if config.device == "cuda" else CPU_BUFFER_BYTES)


def whole_spec(config: RuntimeConfig, model: ModelConfig, *, num_slots: int | None = None) -> DispatchSpec:
    """The largest steps that the scheduler makes, dispatched in one turn. `num_slots` of each rank, where known."""
    slots = num_local_slots(config, model) if num_slots is None else num_slots
    kept, engine = kept_weights(config, model), config.engine
    decode = max(engine.cuda_graph_sizes or default_graph_sizes(max_num_seqs(engine)), default=1)
    decode = max(decode, max_num_seqs(engine))
    spec = DispatchSpec(
        ep=config.ep,
        rows=RowLayout(slots, quantize="experts" in kept.parts, ue8m0=kept.ue8m0),
        hidden=model.hidden_size,
        dtype=compute_dtype(config, model),
        top_k=model.num_experts_per_tok + num_dispatched_shared(config, model),
        max_tokens=-(-max(engine.max_num_batched_tokens, decode) // config.tp),
        max_decode_tokens=-(-decode // config.tp),
        in_flight=2 if overlaps(config) else 1,
        ranks_per_node=config.ranks_per_node,
        one_form=config.engine.batch_invariant,
        deadline_s=config.comm_timeout_s,
    )
    return replace(spec, equal_blocks=engine.cuda_graphs == "on" or equal_split.step_bytes(spec) <= _fixed_bytes(spec))


def _fixed_bytes(spec: DispatchSpec) -> int:
    """What fixed shapes may move in a layer of a decode step, both ways."""
    return FIXED_BYTES_IN_A_NODE if spec.ep <= spec.ranks_per_node else FIXED_BYTES


def dispatch_spec(config: RuntimeConfig, model: ModelConfig, *, num_slots: int | None = None) -> DispatchSpec:
    """The same within engine.dispatch_buffer_bytes and what the backends take at once; larger steps take several turns.

    ConfigError where not one token per rank fits.
    """
    whole, cap = whole_spec(config, model, num_slots=num_slots), buffer_cap(config)
    names = dispatch_names(config)
    most = [
        most_tokens(name, spec, cap_bytes=cap) for name, spec in zip(names, spec_of_each(names, whole), strict=True)
    ]
    if min(most) < 1:
        need = max(buffer_bytes(name, with_tokens(whole, 1)) for name in names)
        raise ConfigError(
            f"engine.dispatch_buffer_bytes={cap}: a rank may need {need} bytes (dispatch={' and '.join(names)}) when "
            f"each of ep={config.ep} ranks sends one token to top-{whole.top_k} experts. "
            f"Nearest: engine.dispatch_buffer_bytes={need}."
        )
    limits = max_capacity(names[0], whole, Phase.MIXED), max_capacity(names[-1], whole, Phase.DECODE)
    mixed, decode = (min(fits, limit or fits) for fits, limit in zip((most[0], most[-1]), limits, strict=True))
    return replace(whole, max_tokens=mixed, max_decode_tokens=min(decode, whole.max_decode_tokens))


def spec_of_each(names: Sequence[str], spec: DispatchSpec) -> tuple[DispatchSpec, ...]:
    """For what each of the backends `names` of a run makes its buffers: a second one sees no steps with prompts."""
    return (spec, with_tokens(spec, spec.max_decode_tokens))[: len(names)]


def dispatch_names(config: RuntimeConfig) -> tuple[str, ...]:
    """The backends of a run: of steps with prompts, and of those without where that is another."""
    decode = config.decode_dispatch
    return (config.dispatch,) if decode in (None, config.dispatch) else (config.dispatch, str(decode))


def summed_by_rank(config: RuntimeConfig, spec: DispatchSpec) -> list[str]:
    """The backends of a run that do not sum at a token's home: their bits tell which rank served a token."""
    return [name for name in dispatch_names(config) if not sums_at_home(name, spec)]


def with_dispatch(config: RuntimeConfig, model: ModelConfig) -> tuple[RuntimeConfig, tuple[str, ...]]:
    """`config` with what is auto decided, and the sentences that say why."""
    try:
        num_local_slots(config, model)
        placed = config
    except ConfigError:  # a problem of the placement, told by itself
        placed = replace(config, placement=PlacementConfig())
    if config.dispatch != "auto":  # so decode_dispatch is
        decode = _decode(config, whole_spec(placed, model)) if config.dispatch == "all_to_all" else None
        why = (f"decode_dispatch={decode or config.dispatch}: {'fewer bytes' if decode else 'as dispatch'}",)
        return replace(config, decode_dispatch=decode), why
    choice = choose_dispatch(placed, model)
    by_hand = config.decode_dispatch not in (None, "auto")
    decode = config.decode_dispatch if by_hand else choice.decode
    reason = _reason(choice.name, None) if by_hand else choice.reason
    return replace(config, dispatch=choice.name, decode_dispatch=decode), (reason, *choice.unavailable)


def choose_dispatch(config: RuntimeConfig, model: ModelConfig) -> DispatchChoice:
    """What `dispatch=auto` means for this run on this machine."""
    spec = whole_spec(config, model)
    missing = dict(_against(config, spec))
    against = {name: str(why) for name, why in missing.items()}
    fitting = [name for name in _PREFERENCE if name not in against]
    name = fitting[0]
    decode = _decode(config, spec) if name == "all_to_all" else None
    others = tuple((other, against.get(other) or _second(other, name)) for other in BACKENDS if other != name)
    return DispatchChoice(name, decode, _reason(name, decode), others, tuple(_unavailable(missing)))


_PREFERENCE: Final[tuple[DispatchName, ...]] = ("local", "deep_ep", "nvshmem", "all_to_all", "all_gather")


def _against(config: RuntimeConfig, spec: DispatchSpec) -> Iterator[tuple[str, Missing]]:
    """Every backend that cannot serve this run, and why."""
    for name in BACKENDS:
        missing = obstacle(name, spec, device=torch.device(config.device), virtual=config.launcher == "virtual")
        if missing is not None:
            yield name, missing
        elif config.engine.batch_invariant and not sums_at_home(name, spec):
            wants = "engine.batch_invariant wants sums at a token's home in top-k order"
            yield name, Missing(wants, "Set engine.batch_invariant=false")


def _unavailable(missing: Mapping[str, Missing]) -> Iterator[str]:
    """`not A, B: reason`: what stands against several is told once."""
    for reason in dict.fromkeys(why.reason for why in missing.values()):
        yield f"not {', '.join(name for name, why in missing.items() if why.reason == reason)}: {reason}"


def _second(name: str, taken: str) -> str:
    if name == "symm_mem":
        return "never chosen unasked: its operators leave the order of reads and writes to the device's scheduling"
    return f"could serve; {taken} is preferred: {_VIRTUES[taken]}"


_VIRTUES: Final = {
    "local": "nothing is sent",
    "deep_ep": "its kernels send a token once per rank, beside the computation",
    "nvshmem": "rows go straight into the slots of their destination",
    "all_to_all": "bits that no ep changes, on any fabric",
    "all_gather": "fixed shapes on any fabric",
}


def _reason(name: str, decode: str | None) -> str:
    also = f", {decode} for steps without prompts (fewer bytes)" if decode is not None else ""
    library = library_of(name)
    return f"dispatch={name}{also}: {_VIRTUES[name]}" + ("" if library is None else f" ({library})")


def _decode(config: RuntimeConfig, spec: DispatchSpec) -> DispatchName | None:
    """all_gather where it moves fewer bytes than equal blocks, and not too many for what a graph saves."""
    on_device = spec.rows.stays_on(torch.device(config.device))
    worth = config.engine.cuda_graphs == "on" or all_gather.step_bytes(spec) <= _fixed_bytes(spec)
    fewer = worth and all_gather.step_bytes(spec) < equal_split.step_bytes(spec)
    return "all_gather" if on_device and fewer and not config.engine.batch_invariant else None


def overlaps(config: RuntimeConfig) -> bool:
    """Whether large steps are cut into two micro-batches that overlap."""
    wanted = config.engine.two_batch_overlap
    return wanted == "on" or (wanted == "auto" and _no_overlap(config) is None)


def overlaps_decode(config: RuntimeConfig) -> bool:
    """The same for steps without prompt tokens: within a node a step is too short for reading every weight twice."""
    return overlaps(config) and (config.engine.two_batch_overlap == "on" or _no_decode_overlap(config) is None)


def overlap_line(config: RuntimeConfig) -> str:
    """One line: whether, from how many rows on, or why not."""
    if not overlaps(config):
        return f"off: {_no_overlap(config) or 'engine.two_batch_overlap=off'}"
    mixed, decode = config.engine.two_batch_tokens, config.engine.two_batch_decode_tokens
    least = 2 * config.tp  # a row for each rank in both
    never = f"never ({_no_decode_overlap(config)})"
    in_decode = f"{max(decode, least)} rows" if overlaps_decode(config) else never
    return f"two batches from {max(mixed, least)} rows of a DP group with prompts on, in decode {in_decode}"


def splits_combine(config: RuntimeConfig) -> bool:
    """Whether steps with prompts that run as one micro-batch combine in two parts. Not by itself before a device has
    shown a gain: each part is a smaller product, and a transfer of its own with a start of its own."""
    return config.engine.single_batch_overlap == "on"


def split_line(config: RuntimeConfig) -> str:
    """One line: whether, or why not."""
    if splits_combine(config):
        return "with prompts, if not cut: first experts' outputs travel beside the others' products"
    why = "no gain measured yet" if config.engine.single_batch_overlap == "auto" else "engine.single_batch_overlap=off"
    return f"off within a batch: {why}"


def _no_overlap(config: RuntimeConfig) -> str | None:
    """Why two micro-batches would gain nothing."""
    if config.ep == 1:
        return "ep=1, nothing travels"
    if config.device != "cuda":
        return "on a CPU sending takes the cores that compute"
    if config.dispatch in _ON_STREAM:
        return f"dispatch={config.dispatch} moves rows on the stream that computes"
    return "the ranks of one process do not wait for a wire" if config.launcher == "virtual" else None


def _no_decode_overlap(config: RuntimeConfig) -> str | None:
    """The same of steps without prompt tokens alone."""
    if (name := dispatch_names(config)[-1]) in _ON_STREAM:
        return f"{name} moves rows on the stream that computes"
    return "one node" if config.ep <= config.ranks_per_node else None


_ON_STREAM: Final = ("nvshmem", "symm_mem")
"""Backends whose rows travel in kernels and copies of the stream that computes: a second micro-batch waits for them."""
