"""What job=doctor says of the dispatch: the backend, why not the others, capacities and bytes."""

from __future__ import annotations

from dataclasses import replace

from moe_runtime.cli.console import Console, count
from moe_runtime.dispatch.factory import FABRICS, buffer_bytes
from moe_runtime.errors import ConfigError
from moe_runtime.launch.compose import Composed
from moe_runtime.launch.graphs import graphs_mode
from moe_runtime.launch.shuffle import (
    choose_dispatch,
    dispatch_names,
    dispatch_spec,
    overlap_line,
    split_line,
    whole_spec,
)
from moe_runtime.launch.sizing import format_bytes
from moe_runtime.parallel.placement import ExpertPlacement


def show_dispatch(console: Console, composed: Composed, placement: ExpertPlacement) -> None:
    config, model = composed.config, composed.model
    whole = whole_spec(config, model, num_slots=placement.num_local)
    names, choice = dispatch_names(config), choose_dispatch(config, model)
    try:
        spec = dispatch_spec(config, model, num_slots=placement.num_local)
    except ConfigError:
        spec = replace(whole, max_tokens=1, max_decode_tokens=1)  # among the problems
    fp8 = ", in fp8 on their way out" if whole.rows.quantize and config.dispatch in FABRICS else ""
    rows = [("backend", f"{config.dispatch}, top-{whole.top_k}, rows of {format_bytes(whole.row_bytes)}{fp8}")]
    if len(names) > 1:
        rows.append(("", f"{names[1]} for steps without prompt tokens"))
    if not composed.has_weights and set(names) & set(FABRICS):
        rows.append(("", "by its limits alone: a shape without weights asks nothing of this machine"))
    rows.append(("auto", choice.reason))
    rows += [("", f"not {name}: {why}") for name, why in choice.others]
    for phase, name, tokens, chunk in (
        ("decode", names[-1], whole.max_decode_tokens, spec.max_decode_tokens),
        ("prefill", names[0], whole.max_tokens, spec.max_tokens),
    ):
        at_once = min(tokens, chunk)
        held = format_bytes(buffer_bytes(name, replace(spec, max_tokens=at_once, max_decode_tokens=at_once)))
        turns = -(-tokens // chunk)
        even = -(-tokens // turns)  # as the lockstep cuts them
        rows.append((phase, f"{tokens} tokens per rank in {count(turns, 'chunk')} of {even}, {held} at worst"))
    rows += [("overlap", overlap_line(config)), ("", split_line(config))]
    rows.append(("graphs", _graphs(composed)))
    console.pairs("dispatch", rows)


def _graphs(composed: Composed) -> str:
    try:
        found = graphs_mode(composed.config, composed.model)
    except ConfigError:
        return "unknown before the problems below are solved"
    sizes = f": {', '.join(map(str, found.sizes))}" if found.sizes else ""
    return f"{found.mode}: {found.reason}{sizes}"
