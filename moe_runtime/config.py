"""Every setting of a run, as frozen dataclasses whose field metadata is the documentation.

The defaults here and in configs/config.yaml are equal (a test compares them), except that ep, tp, dp and ranks_per_node
are null there: unset ones follow from the others (launch/topology.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from moe_runtime.errors import ConfigError
from moe_runtime.schema import Key, keys_of, setting

Job = Literal["generate", "doctor"]
DtypeName = Literal["auto", "float32", "bfloat16"]
Fp8Weights = Literal["auto", "keep", "dequantize"]
Device = Literal["cpu", "cuda"]
Launcher = Literal["auto", "virtual", "process", "torchrun"]
DispatchName = Literal["auto", "local", "all_to_all", "all_gather", "deep_ep", "nvshmem", "symm_mem"]
SharedExperts = Literal["replicated", "dispatched"]
ReplicaChoice = Literal["static", "round_robin", "nearest", "waterfill"]
Padding = Literal["auto", "max", "own"]
CudaGraphs = Literal["auto", "on", "off"]
TwoBatchOverlap = Literal["auto", "on", "off"]
SingleBatchOverlap = Literal["auto", "on", "off"]
KvCacheDtype = Literal["auto", "fp8"]
RecordMode = Literal["off", "stat", "per_pass", "per_token"]
Rebalance = Literal["off", "on"]
BalancePolicy = Literal["best", "eplb"]

_MAX_SEED = 2**63 - 1


@dataclass(frozen=True, slots=True)
class PlacementConfig:
    """Which rank holds which expert."""

    num_redundant_experts: int = setting(0, "extra expert slots; each holds a second copy of an expert", minimum=0)
    file: str | None = setting(None, "placement file (JSON) to use instead of the uniform placement", verbatim=True)
    replica_choice: ReplicaChoice = setting("static", "which copy of an expert a token goes to")


@dataclass(frozen=True, slots=True)
class BalanceConfig:
    """What is recorded of the experts' loads, and whether experts move with them while the engine serves."""

    record: RecordMode = setting(
        "stat", "tokens per layer and expert: stat: per window of steps, per_pass: per step, per_token: every route"
    )
    window_steps: int = setting(100, "steps with tokens of a window of loads, traced or moved by", minimum=1)
    trace: str | None = setting(
        None, "folder to write the recorded loads to; must hold no trace yet; docs/balance.md", verbatim=True
    )
    trace_bytes: int = setting(
        2**30, "most bytes of the trace; the oldest parts are dropped", minimum=1, size_in_bytes=True
    )
    rebalance: Rebalance = setting("off", "move experts to where their loads are even, while serving goes on")
    interval_steps: int = setting(1000, "steps with tokens from one decision to move to the next", minimum=1)
    threshold: float = setting(
        0.9, "nothing moves while ranks are this busy: mean over busiest, 0..1", minimum=0.0, maximum=1.0
    )
    bytes_per_step: int = setting(
        64 * 2**20,
        "most bytes of experts that a rank sends, and receives, between two steps",
        minimum=4096,
        size_in_bytes=True,
    )
    policy: BalancePolicy = setting("best", "how placements are planned: best, or DeepSeek's eplb")
    deadline_s: float = setting(
        30.0, "seconds after which a plan, or a layer on its way, is abandoned", minimum=10.0, maximum=86400
    )
    save_placement: str | None = setting(
        None, "placement file to write after each move and at the end; for placement.file", verbatim=True
    )


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Limits and modes of the engine. Token, sequence and cache limits hold for each DP group."""

    batch_invariant: bool = setting(
        False,
        "bits that no batch, placement or ep changes (one tp; all_gather, deep_ep: one ep, no copies); slower",
    )
    max_num_batched_tokens: int = setting(
        2048, "most tokens of one step and DP group; longer prompts run in chunks", minimum=1
    )
    max_num_seqs: int = setting(
        64, "most sequences that one DP group runs at once, within max_num_batched_tokens", minimum=1
    )
    max_model_len: int | None = setting(
        None, "most tokens of prompt and output together; null: the model's own limit", minimum=2
    )
    page_size: int | None = setting(
        None,
        "tokens per page of the latent cache, on cuda a power of two; null: 16 on cpu, 64 on cuda",
        minimum=1,
        maximum=1024,
    )
    kv_cache_bytes: int | None = setting(
        None,
        "latent cache per rank, e.g. 512MiB; null: room for max_num_seqs full sequences, at most 1GiB per process",
        minimum=1,
        size_in_bytes=True,
    )
    kv_cache_dtype: KvCacheDtype = setting(
        "auto", "cached latents: auto: in the computation's dtype, fp8: e4m3 with a scale per row and 128 values"
    )
    prefix_caching: bool = setting(True, "reuse cached pages of equal prompt beginnings")
    padding: Padding = setting(
        "auto", "token rows of a DP group: max: as many as the largest, own: its own; auto: the graph's, else own"
    )
    cuda_graphs: CudaGraphs = setting(
        "auto", "capture decode steps as CUDA graphs at start; auto: on a GPU, where the dispatch allows it"
    )
    cuda_graph_sizes: tuple[int, ...] | None = setting(
        None, "rows of a DP group to capture, e.g. [1,2,4,8]; null: 1, 2, 4, 8, 16, 24, … up to max_num_seqs"
    )
    two_batch_overlap: TwoBatchOverlap = setting(
        "auto", "cut large steps into two micro-batches: one computes while the other's tokens travel; auto: on GPUs"
    )
    two_batch_tokens: int = setting(
        512, "rows of the largest DP group from which on steps with prompt tokens are cut in two", minimum=2
    )
    two_batch_decode_tokens: int = setting(
        128, "the same for steps without prompt tokens; auto: only where ep spans several nodes", minimum=2
    )
    single_batch_overlap: SingleBatchOverlap = setting(
        "auto",
        "outputs of some experts travel while others compute, in uncut steps with prompts; auto: off, unmeasured",
    )
    dispatch_buffer_bytes: int | None = setting(
        None,
        "most bytes of a rank for one dispatch; larger steps run in chunks; null: 256MiB on cpu, 4GiB on cuda",
        minimum=1,
        size_in_bytes=True,
    )


@dataclass(frozen=True, slots=True)
class SamplingConfig:
    """Defaults of a request, with the names of SamplingParams."""

    n: int = setting(1, "completions per prompt", minimum=1, maximum=128)
    temperature: float = setting(0.0, "0 is greedy; higher is more varied", minimum=0.0)
    top_k: int = setting(0, "sample among the k likeliest tokens; 0: all", minimum=0)
    top_p: float = setting(
        1.0, "sample among the likeliest tokens that hold this much probability", minimum=0.0, maximum=1.0
    )
    min_p: float = setting(
        0.0, "drop tokens below this share of the likeliest one's probability", minimum=0.0, maximum=1.0
    )
    repetition_penalty: float = setting(
        1.0, "above 1 disfavours tokens of prompt and output", minimum=0.01, maximum=100.0
    )
    presence_penalty: float = setting(
        0.0, "subtracted once from the logit of each token already written", minimum=-2.0, maximum=2.0
    )
    frequency_penalty: float = setting(0.0, "subtracted per occurrence in the output", minimum=-2.0, maximum=2.0)
    seed: int | None = setting(
        None, "seed of each request; null: from `seed` and the request's number", minimum=0, maximum=_MAX_SEED
    )
    logprobs: int | None = setting(
        None, "write to `output` the log-probabilities of this many likeliest tokens per output token", minimum=0
    )
    prompt_logprobs: int | None = setting(None, "the same for prompt tokens", minimum=0)
    stop: tuple[str, ...] = setting((), "texts that end the output, e.g. 'sampling.stop=[\"\\n\\n\"]'")
    stop_token_ids: tuple[int, ...] = setting((), "token ids that end the output, e.g. [1,7]")
    max_tokens: int = setting(32, "most new tokens per request", minimum=1)
    min_tokens: int = setting(0, "no stop before this many new tokens", minimum=0)
    ignore_eos: bool = setting(False, "write on after the end-of-sequence token")
    skip_special_tokens: bool = setting(True, "leave special tokens out of the text")
    include_stop_str_in_output: bool = setting(False, "keep the text or token that ended the output")


@dataclass(frozen=True, slots=True)
class RuntimeConfig:
    """A whole run. `world = pp·dp·tp`, `ep = dp·tp`: experts are spread over all ranks of a pipeline stage."""

    job: Job = setting(
        "generate", "what to do: write text, or check the settings without loading weights", verbatim=True
    )
    preset: str = setting("none", "settings of a known deployment, from configs/preset; other keys win over it")
    model: str = setting(
        "demo", "checkpoint folder, or a name: demo, deepseek_v3, …; a folder of such a name: ./demo", verbatim=True
    )
    prompts: str | None = setting(
        None, 'file of prompts: one per line, or JSON lines with "prompt"; null: the model\'s own', verbatim=True
    )
    output: str | None = setting(None, "JSON lines file to write, one line per request", verbatim=True)
    dtype: DtypeName = setting(
        "auto",
        "computation in this dtype; auto: the checkpoint's; on a CPU, small models use it for their experts only",
    )
    fp8_weights: Fp8Weights = setting(
        "auto", "weights stored in FP8: keep them so, or dequantize them when loading; auto: keep on cuda"
    )
    device: Device = setting("cpu", "where tensors live")
    seed: int = setting(0, "seed of all sampling", minimum=0, maximum=_MAX_SEED)
    ep: int = setting(1, "ranks that share the experts", minimum=1, follows="dp·tp, or torchrun's world")
    tp: int = setting(1, "ranks that share the attention heads", minimum=1, follows="4 where ep ≥ 32 allows it, else 1")
    dp: int = setting(1, "attention groups, each with its own requests", minimum=1, follows="ep/tp")
    pp: int = setting(1, "pipeline stages", minimum=1)
    ranks_per_node: int = setting(8, "ranks on one machine", minimum=1, follows="torchrun's on this machine, else 8")
    launcher: Launcher = setting(
        "auto", "how ranks run; auto: torchrun's where it started us, else virtual (in this process)"
    )
    dispatch: DispatchName = setting(
        "auto", "how tokens travel to the experts; auto: by size and by what is installed (job=doctor says why)"
    )
    decode_dispatch: DispatchName | None = setting(
        None,
        "the same for steps without prompt tokens; null: as dispatch; auto, and null with dispatch=auto: fewer bytes",
    )
    shared_experts: SharedExperts = setting(
        "replicated", "shared experts on every rank, or dispatched as always-chosen experts"
    )
    num_threads: int | None = setting(
        None, "CPU threads of each process; null: torch's choice", minimum=1, maximum=1024
    )
    comm_timeout_s: float = setting(60.0, "seconds after which a missing rank is reported", minimum=0.1, maximum=86400)
    load_timeout_s: float = setting(
        1800.0, "seconds after which a rank that is still loading is reported", minimum=0.1, maximum=86400
    )
    snapshot_file: str | None = setting(
        None,
        "JSON file that shows the running engine, replaced twice a second; null: snapshot.json in balance.trace",
        verbatim=True,
    )
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        if self.dp * self.tp != self.ep:
            raise ConfigError(
                f"ep={self.ep}, dp={self.dp}, tp={self.tp}: ep must equal dp·tp = {self.dp * self.tp}. "
                f"Set ep={self.dp * self.tp}, or leave one of them out."
            )


def keys() -> tuple[Key, ...]:
    """Every setting under its dotted name, in the order of the documentation."""
    return keys_of(RuntimeConfig)


def build_config(values: Mapping[str, object]) -> RuntimeConfig:
    """The configuration from flat checked values, in which ep, tp, dp and ranks_per_node are numbers."""
    missing = [name for name in ("ep", "tp", "dp", "ranks_per_node") if values[name] is None]
    if missing:
        raise ConfigError(f"{', '.join(missing)}: not set. Derive them first (launch.topology.resolve), or set them.")
    sections: dict[str, dict[str, Any]] = {"": {}, "placement": {}, "balance": {}, "engine": {}, "sampling": {}}
    for name, value in values.items():
        section, _, leaf = name.rpartition(".")
        sections[section][leaf] = value
    return RuntimeConfig(
        **sections[""],
        placement=PlacementConfig(**sections["placement"]),
        balance=BalanceConfig(**sections["balance"]),
        engine=EngineConfig(**sections["engine"]),
        sampling=SamplingConfig(**sections["sampling"]),
    )
