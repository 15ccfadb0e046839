"""What `trace=` names: a recording of ours or another program's record, and the model that it is of."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
import torch
from moe_models.base import ModelConfig
from moe_models.registry import load_config
from torch import Tensor

from moe_runtime.balance.measures import rank_loads
from moe_runtime.balance.trace import PHASES, Trace, TraceHeader, has_trace, read_trace
from moe_runtime.balance.trace_parts import TOKEN_COLUMNS
from moe_runtime.balance.trace_readers import read_any
from moe_runtime.config import RuntimeConfig
from moe_runtime.errors import ConfigError, TraceError
from moe_runtime.launch.data import model_path
from moe_runtime.launch.recording import trace_header
from moe_runtime.launch.topology import RANKS_PER_NODE
from moe_runtime.parallel.placement import ExpertPlacement
from moe_tools.expert_load.facts import Facts, facts_of, find_model
from moe_tools.expert_load.run_file import RUN_FILE, read_run
from moe_tools.expert_load.words import Words, asked, config_of

BATCH: Final = 64
"""Sequences of an engine's step, by default"""


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """A trace with windows. `place`: its folder or file. `name`: of the model, for `model=`; empty where not known.
    `model`, `facts`: None where the model is not here."""

    trace: Trace
    place: Path
    name: str
    model: ModelConfig | None
    facts: Facts | None

    @property
    def folder(self) -> Path:
        """Where files about it go."""
        return self.place if self.place.is_dir() else self.place.parent

    @property
    def ours(self) -> bool:
        return has_trace(self.place)

    @property
    def can_run(self) -> bool:
        """Whether the model's weights are here."""
        return self.model is not None and any(model_path(self.name).glob("*.safetensors"))

    @property
    def num_groups(self) -> int | None:
        """The model's groups of experts, which say nothing where shared experts are dispatched too."""
        dispatched = self.trace.header.num_logical > self.trace.header.num_routed
        return None if self.model is None or dispatched else self.model.n_group


def open_source(words: Words) -> Source:
    """What the words name, with `model=` as its model where it is given.

    Raises TraceError for the trace, and ConfigError where it is of another model than the words say, or where a record
    of another program needs words that are missing.
    """
    place = Path(words.need("trace"))
    ours = has_trace(place) or not place.exists()
    if ours and "num_routed" in words.own:
        raise ConfigError(f"num_routed={words.own['num_routed']}: a recording of this tool says it. Leave it out.")
    trace = read_trace(place) if ours else _imported(words, place)
    return _source(words, trace, place)


def recorded_source(words: Words, trace: Trace, folder: Path) -> Source:
    """Of a recording that has just been made by `words`."""
    return _source(Words(words.command, {}, ()), trace, folder)


def check_same(header: TraceHeader, wanted: TraceHeader, *, name: str, fine_tune: bool) -> None:
    """ConfigError where a trace is of another model than `wanted`'s; `name`: the words that say which. `fine_tune`: its
    name may differ."""
    try:
        header.check_model(num_layers=wanted.num_layers, num_logical=wanted.num_logical, top_k=wanted.top_k)
    except TraceError as error:
        raise ConfigError(f"{name}: {error}") from None
    if not fine_tune and header.model and wanted.model != header.model:
        raise ConfigError(
            f"{name}: the trace is of {header.model!r}, and this is {wanted.model!r}. Use a trace of this model, or, "
            "if one is a fine-tune of the other, say so: fine_tune=true"
        )


def _source(words: Words, trace: Trace, place: Path) -> Source:
    if not trace.num_windows:
        raise ConfigError(
            f"trace={place}: holds no window of steps yet. Wait until balance.window_steps steps have run, or record "
            "again with a smaller balance.window_steps."
        )
    header, given, run = trace.header, words.value("model"), read_run(place)
    own = [] if run is None else [word for word in run.launch if word.startswith(("dtype=", "device=", "fp8_weights="))]
    ran = None if run is None else Words(words.command, {}, run.launch).value("model")
    if ran is not None and Path(ran).name != header.model:
        run, ran, own = None, None, []  # the file is of another run
    shared = "dispatched" if header.num_logical > header.num_routed else "replicated"
    name = given or ran or header.model
    try:
        config = _config([f"model={name}", *own, f"shared_experts={shared}"], header) if name else None
    except ConfigError as error:
        if not own:
            raise
        raise ConfigError(f"{place / RUN_FILE}: {error} Put that right there, or remove the file.") from None
    if given is not None:
        load_config(model_path(given))  # raises where there is none
    elif words.flag("fine_tune"):
        raise ConfigError("fine_tune=true: says that model=… is one. Add model=NAME, or leave fine_tune= out.")
    model = None if config is None else find_model(config)
    if config is None or model is None:
        return Source(trace, place, name, None, None)
    wanted = trace_header(config, model, None)
    if given is not None:
        check_same(header, wanted, name=f"model={given}", fine_tune=words.flag("fine_tune"))
    elif (wanted.num_layers, wanted.num_logical, wanted.top_k) != (header.num_layers, header.num_logical, header.top_k):
        return Source(trace, place, name, None, None)  # another one that has its name
    return Source(trace, place, name, model, facts_of(config, model))


def _config(launch: list[str], header: TraceHeader) -> RuntimeConfig:
    return config_of(launch, ep=header.ep, tp=header.tp, dp=header.dp, ranks_per_node=header.ranks_per_node)


def _imported(words: Words, place: Path) -> Trace:
    """Another program's record, with its experts where the words say."""
    given, name, num_routed = asked(words.launch), words.value("model"), words.whole("num_routed", None, least=1)
    if num_routed is None and name is not None:
        num_routed = load_config(model_path(name)).n_routed_experts
    trace = read_any(place, num_routed=num_routed)
    ep = given["ep"]
    if ep is None:
        raise ConfigError(
            f"trace={place}: {trace.header.source} does not record where experts were. Add ep=N, the number of ranks "
            "that they were spread over, and placement.file=FILE where that was not evenly and in order."
        )
    layers, experts = trace.header.num_layers, trace.header.num_logical
    if file := given["placement.file"]:
        placement = ExpertPlacement.from_file(file, num_layers=layers, num_logical=experts, ep=ep)
    else:
        spare = given["placement.num_redundant_experts"] if words.command == "report" else 0
        placement = ExpertPlacement.uniform(layers, experts, ep=ep, num_redundant=spare)
    model = "" if name is None else Path(name).name
    return placed(trace, placement, model=model, ranks_per_node=given["ranks_per_node"] or RANKS_PER_NODE)


def placed(trace: Trace, placement: ExpertPlacement, *, model: str, ranks_per_node: int) -> Trace:
    """Another program's record as if its experts had lain as in `placement`: the tokens of a window enter at all ranks
    in turn, and an expert's tokens spread evenly over its replicas."""
    trace = _in_batches(trace) if trace.header.source == "vllm" else trace
    header = replace(
        trace.header,
        model=model,
        ep=placement.ep,
        dp=placement.ep,
        ranks_per_node=ranks_per_node,
        phy2log=tuple(map(tuple, placement.phy2log.tolist())),
    )
    home = torch.arange(len(trace.window)) % placement.ep
    order = torch.from_numpy(np.lexsort((home.numpy(), trace.window.numpy())))
    tokens = {name: getattr(trace, name)[order] for name in TOKEN_COLUMNS} | {"home": home[order]}
    even = rank_loads(trace.loads, placement).round().long()
    return replace(trace, header=header, rank_loads=even, **tokens)


def _in_batches(trace: Trace) -> Trace:
    """vLLM's windows are completions, and which of them shared a step is not recorded: BATCH of one phase are taken to
    have run together."""
    number = torch.zeros(trace.num_windows, dtype=torch.int64)
    for phase in set(trace.phases):
        own = torch.tensor([other == phase for other in trace.phases])
        number[own] = torch.arange(int(own.sum())) // BATCH * len(PHASES) + PHASES.index(phase)
    kinds, numbers = np.unique(number.numpy(), return_inverse=True)
    number, count = torch.from_numpy(numbers), len(kinds)

    def added(values: Tensor) -> Tensor:
        return torch.zeros(count, *values.shape[1:], dtype=torch.int64).index_add(0, number, values)

    last = torch.zeros(count, dtype=torch.int64).scatter_reduce(0, number, trace.last_step, "amax")
    first = last.scatter_reduce(0, number, trace.first_step, "amin")
    columns = {name: added(getattr(trace, name)) for name in ("loads", "rank_loads", "window_steps", "num_tokens")}
    window = number[trace.window]
    order = window.argsort(stable=True)
    tokens = {name: getattr(trace, name)[order] for name in TOKEN_COLUMNS} | {"window": window[order]}
    phases = tuple([PHASES[int(kind) % len(PHASES)] for kind in kinds])
    return replace(trace, header=trace.header, phases=phases, first_step=first, last_step=last, **columns, **tokens)
