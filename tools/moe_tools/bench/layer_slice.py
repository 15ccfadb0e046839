"""One rank's real work in a layer of DeepSeek-V3 at EP 8, 32, 144 and 320, every term against its floor.

    python -m moe_tools.bench slice [--ep 8 32 144 320] [--phase decode prefill] [--dry-run] [--turns 30]

Received rows are what balanced routing sends. A term's figure is the median of CUDA graph replays, L2 flushed before
each; "in one graph" runs all terms of an MoE layer, one after the other. A step is the sum over all layers (three dense
ones, the head once): extrapolated. The network is modelled from bytes and link rates, never measured here. Without a
GPU, or with --dry-run, the terms are printed with bytes, FLOPs and floors alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from moe_tools.bench.floor import H200, Hardware
from moe_tools.bench.kernels import require_gpu
from moe_tools.bench.record import append_record
from moe_tools.bench.slice_shapes import UNITS, V3, Unit, Widths, modelled_network_us
from moe_tools.bench.slice_terms import Slice, Term, per_layer
from moe_tools.bench.timing import Timing, measure

ONE_LAYER = "one layer, one graph"


@dataclass(frozen=True, slots=True)
class Sums:
    """Microseconds of one MoE layer with its attention, and milliseconds of a whole step, without the network."""

    layer_us: float
    step_ms: float


def sums(terms: Sequence[Term], us: Sequence[float], widths: Widths) -> Sums:
    """Every term as often as a layer, and as a step, runs it."""
    pairs = list(zip(terms, us, strict=True))
    layer = sum(per_layer(term, widths) * time for term, time in pairs)
    return Sums(layer, sum(term.per_step * time for term, time in pairs) / 1e3)


def main(arguments: Sequence[str]) -> None:
    """A table per unit; a JSON line per term and one per unit."""
    parser = argparse.ArgumentParser(
        prog="python -m moe_tools.bench slice", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--ep", type=int, nargs="*", choices=sorted({unit.ep for unit in UNITS}), help="default: all")
    parser.add_argument("--phase", nargs="*", choices=("decode", "prefill"), default=("decode", "prefill"))
    parser.add_argument("--dry-run", action="store_true", help="measure nothing")
    parser.add_argument("--turns", type=int, default=30, help="timed calls of each term")
    parser.add_argument("--record", type=Path, default=Path("docs/measurements/gpu.jsonl"))
    options = parser.parse_args(arguments)
    chosen = [unit for unit in UNITS if unit.phase in options.phase and (not options.ep or unit.ep in options.ep)]
    if options.dry_run or not torch.cuda.is_available():
        print(f"floors of {H200.name} by its datasheet; nothing is measured")
        for unit in chosen:
            show(unit, V3, Slice(unit, V3).terms(), {}, H200)
        return
    hardware = require_gpu()
    print(f"{hardware.name}, torch {torch.__version__}; µs, medians of {options.turns}; floor = datasheet")
    for unit in chosen:
        terms = Slice(unit, V3).terms()
        timings = measure_terms(terms, V3, turns=options.turns)
        show(unit, V3, terms, timings, hardware)
        record(options.record, unit, V3, terms, timings, hardware)


def measure_terms(terms: Sequence[Term], widths: Widths, *, turns: int) -> dict[str, Timing]:
    """Each term by itself, then one MoE layer's in one graph; tensors of the others are freed in between."""
    timings: dict[str, Timing] = {}
    for term in terms:
        timings |= measure({term.name: term.build()}, turns=turns)
        torch.cuda.empty_cache()
    timings |= measure({ONE_LAYER: whole_layer(terms, widths)}, turns=turns)
    torch.cuda.empty_cache()
    return timings


def whole_layer(terms: Sequence[Term], widths: Widths) -> Callable[[], None]:
    """Runs the terms of one MoE layer with its attention, each as often as the layer does; holds all their tensors."""
    runs = [(term.build(), per_layer(term, widths)) for term in terms if per_layer(term, widths)]

    def layer() -> None:
        for run, times in runs:
            for _ in range(times):
                run()

    return layer


def show(unit: Unit, widths: Widths, terms: Sequence[Term], timings: dict[str, Timing], hardware: Hardware) -> None:
    """Print one unit's table; columns of measured times are there where `timings` are."""
    each = f"{unit.slots} slots × {unit.rows_per_slot(widths)} rows"
    print(f"\n{unit.name}: {each}, {unit.tokens} tokens of {widths.heads // unit.tp} heads, {unit.kv_len} rows cached")
    print(f"  {'term':<20}{'by':<8}{'per step':>8}{'MB':>9}{'GFLOP':>9}{'floor µs':>10}" + " µs, ratio" * bool(timings))
    for term in terms:
        floor = hardware.floor_us(term.work)
        text = f"  {term.name:<20}{term.backend:<8}{term.per_step:>8}{term.work.num_bytes / 1e6:9.2f}"
        text += f"{term.work.flops / 1e9:9.2f}{floor:10.2f} {hardware.bound(term.work):<6}"
        if timings:
            timing = timings[term.name]
            text += f"{timing.us:9.1f} ×{timing.us / floor:.2f}{'' if timing.graph else ' (no graph)'}"
        print(text)
    network = modelled_network_us(unit, widths, hardware)
    floors = sums(terms, [hardware.floor_us(term.work) for term in terms], widths)
    print(f"  floor: {floors.layer_us:.1f} µs an MoE layer, {floors.step_ms:.2f} ms a step of {widths.layers} layers")
    if timings:
        found = sums(terms, [timings[term.name].us for term in terms], widths)
        whole = timings[ONE_LAYER]
        ratio = found.layer_us / floors.layer_us
        print(f"  measured: {found.layer_us:.1f} µs an MoE layer (×{ratio:.2f}), in one graph {whole.us:.1f}")
        print(f"  extrapolated: {found.step_ms:.2f} ms a step (×{found.step_ms / floors.step_ms:.2f}), network apart")
    print(
        f"  network, modelled: {network:.1f} µs a layer, {network * widths.moe_layers / 1e3:.2f} ms a step, from "
        f"{hardware.nvlink_bytes_per_s / 1e9:.0f} GB/s NVLink and {hardware.network_bytes_per_s / 1e9:.0f} GB/s network"
    )


def record(
    path: Path, unit: Unit, widths: Widths, terms: Sequence[Term], timings: dict[str, Timing], hardware: Hardware
) -> None:
    """A line per term, and one of the sums, in which the network is marked as modelled."""
    shared: dict[str, object] = {"benchmark": "slice", "device": hardware.name, "phase": unit.phase, "ep": unit.ep}
    if torch.cuda.is_available():
        shared["device"] = torch.cuda.get_device_name()
    shared |= {"tp": unit.tp, "slots": unit.slots, "tokens": unit.tokens, "kv_len": unit.kv_len}
    for term in terms:
        timing, floor = timings[term.name], hardware.floor_us(term.work)
        append_record(
            path, **shared, term=term.name, backend=term.backend, bytes=term.work.num_bytes, flops=term.work.flops,
            arithmetic=term.work.arithmetic, floor_us=floor, us=timing.us, low_us=timing.low_us,
            high_us=timing.high_us, graph=timing.graph, ratio=timing.us / floor, per_step=term.per_step,
        )  # fmt: skip
    found = sums(terms, [timings[term.name].us for term in terms], widths)
    floors = sums(terms, [hardware.floor_us(term.work) for term in terms], widths)
    append_record(
        path, **shared, term="sums", layer_us=found.layer_us, layer_floor_us=floors.layer_us,
        layer_in_one_graph_us=timings[ONE_LAYER].us, extrapolated_step_ms=found.step_ms, step_floor_ms=floors.step_ms,
        modelled_network_us=modelled_network_us(unit, widths, hardware),
    )  # fmt: skip
