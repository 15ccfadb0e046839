"""What overlap can gain on DeepSeek-V3: one step of one rank under a simulated clock. Nothing is measured.

    python -m moe_tools.overlap --ep 32 --phase decode [--tokens 128] [--layers 2] [--hottest 1.0] [--wire 1.0]

Compute takes its floor by the datasheet (`bench slice --dry-run` lists the terms), transfers take what their bytes need
at the links' rates. Real kernels take longer, and real transfers have latencies: see in which order things run and what
is the most to be had, not how long a step lasts. Transfers between tp ranks are left out.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

from moe_runtime.dispatch.overlap import Stage, Stages, interleave
from moe_runtime.dispatch.timeline import Costs, Timeline, Turn, simulate, summarize
from moe_runtime.dispatch.timeline_check import check
from moe_runtime.dispatch.timeline_text import LEAST_WIDTH, LEGEND, render
from moe_tools.bench.floor import H200, Hardware
from moe_tools.bench.slice_shapes import UNITS, V3, Unit, Widths, modelled_transfers_us
from moe_tools.bench.slice_terms import Slice, Term, per_layer

Part = Literal["first", "attention", "send", "shared", "experts", "sum", "last"]

PARTS: Final[dict[str, Part]] = {
    "MLA plan": "first", "dense MLP": "first", "quantise": "send", "permute": "send", "shared expert": "shared",
    "routed experts": "experts", "combine": "sum", "routed + shared": "sum", "head": "last",
}  # fmt: skip
"""Where a term of the slice runs; those that are not here run before the gate has chosen."""

FIRST_LAYER: Final = 20
"""Of the picture: far from the dense layers and from the end."""


@dataclass(frozen=True, slots=True)
class Model:
    """What the clock takes for granted.

    `hottest`: rows that the busiest rank receives, times the mean. `wire`: what transfers take, times their model.
    """

    widths: Widths = V3
    hardware: Hardware = H200
    hottest: float = 1.0
    wire: float = 1.0

    def costs(self, unit: Unit, *, busiest: bool) -> Costs:
        """Of one micro-batch of `unit.tokens` tokens, on the busiest rank or on any other."""
        more = self.hottest if busiest else 1.0
        us: dict[Part, float] = dict.fromkeys([*PARTS.values(), "attention"], 0.0)
        for term in Slice(unit, self.widths).terms():
            part = PARTS.get(term.name, "attention")
            time = self._floor_us(term, more)
            us[part] += time * (per_layer(term, self.widths) or term.per_step)
            if part == "attention" and term.per_step >= self.widths.layers:
                us["first"] += time * (term.per_step - self.widths.moe_layers * per_layer(term, self.widths))
        dispatch, combine = modelled_transfers_us(unit, self.widths, self.hardware)
        return Costs(
            first_us=us["first"], attention_us=us["attention"], send_us=us["send"], shared_us=us["shared"],
            experts_us=us["experts"], sum_us=us["sum"], last_us=us["last"],
            dispatch_us=dispatch * self.wire * more, combine_us=combine * self.wire * more,
        )  # fmt: skip

    def _floor_us(self, term: Term, more: float) -> float:
        work = term.work
        return self.hardware.floor_us(replace(work, flops=work.flops * more) if term.name == "routed experts" else work)

    def no_overlap(self, unit: Unit) -> Timeline:
        """All tokens at once; the shared expert runs before the dispatch is begun."""
        costs = [self.costs(unit, busiest=busiest) for busiest in (True, False)]
        return self._simulate([[replace(c, attention_us=c.attention_us + c.shared_us, shared_us=0.0)] for c in costs])

    def shared_beside(self, unit: Unit) -> Timeline:
        """All tokens at once; the shared expert runs while they travel."""
        return self._simulate([[self.costs(unit, busiest=busiest)] for busiest in (True, False)])

    def two_batches(self, unit: Unit) -> Timeline:
        """Halves that take turns; the head runs once, for the rows of both."""
        rows = []
        for busiest in (True, False):
            head = self.costs(unit, busiest=busiest).last_us
            first, second = (self.costs(half, busiest=busiest) for half in halves(unit))
            rows.append([replace(first, last_us=0.0), replace(second, last_us=head)])
        return self._simulate(rows)

    def _simulate(self, costs: Sequence[Sequence[Costs]]) -> Timeline:
        log: list[Turn] = []
        programs = [_program(self.widths.moe_layers) for _ in costs[0]]
        interleave(programs, lambda micro_batch, stage: log.append((micro_batch, stage)))
        timeline = simulate([log for _ in costs], costs)
        check(timeline)
        return timeline


def halves(unit: Unit) -> tuple[Unit, Unit]:
    """The micro-batches of `unit`: half the tokens each; a prompt's second half attends to its first."""
    half = replace(unit, tokens=unit.tokens // 2)
    return (half if unit.phase == "decode" else replace(half, kv_len=unit.kv_len - half.tokens)), half


def with_tokens(unit: Unit, tokens: int) -> Unit:
    """A step of so many decoded tokens, or a prompt of this length."""
    return replace(unit, tokens=tokens, kv_len=unit.kv_len if unit.phase == "decode" else tokens)


def _program(moe_layers: int) -> Stages[None]:
    """The stages of a model's layers, as `MoELayer.stages` begins them; dense layers have none."""
    for _ in range(moe_layers):
        yield Stage.DISPATCH
        yield Stage.COMBINE


def show(unit: Unit, model: Model, *, layers: int, width: int) -> None:
    """Print the pictures and the table of one unit."""
    print(f"{unit.name}, {unit.tokens // unit.tp} tokens a rank, {unit.slots} slots")
    print(
        f"floors of {model.hardware.name} by its datasheet, transfers modelled from bytes and link rates; not measured"
    )
    modes = {
        "no overlap": model.no_overlap(unit),
        "shared expert beside dispatch": model.shared_beside(unit),
        "two micro-batches": model.two_batches(unit),
    }
    for name, timeline in modes.items():
        print(f"\n{name}\n{render(timeline, layers=range(FIRST_LAYER, FIRST_LAYER + layers), width=width)}")
    print(f"\n{LEGEND}\n")
    print(f"{'modelled':<32}{'step ms':>10}{'compute ms':>12}{'exposed ms':>12}{'hidden':>8}{'gain':>8}")
    base = modes["no overlap"].step_us
    for name, timeline in modes.items():
        found = summarize(timeline)
        hidden = 1 - found.exposed_us[0] / found.wire_us if found.wire_us else 0.0
        print(
            f"{name:<32}{found.step_us / 1e3:10.2f}{found.busy_us[0] / 1e3:12.2f}{found.exposed_us[0] / 1e3:12.2f}"
            f"{hidden:8.0%}{base / found.step_us:7.2f}x"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Pictures and a table."""
    parser = argparse.ArgumentParser(
        prog="python -m moe_tools.overlap", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--ep", type=int, choices=sorted({unit.ep for unit in UNITS}), default=32)
    parser.add_argument("--phase", choices=("decode", "prefill"), default="decode")
    parser.add_argument("--tokens", type=int, help="of a tp group in the step, or of the prompt; default: the unit's")
    parser.add_argument("--layers", type=int, default=2, help="MoE layers in the pictures")
    parser.add_argument("--hottest", type=float, default=1.0, help="rows of the busiest rank, times the mean")
    parser.add_argument("--wire", type=float, default=1.0, help="time of a transfer, times its model")
    parser.add_argument("--width", type=int, default=100, help="columns of a picture")
    options = parser.parse_args(arguments)
    units = [unit for unit in UNITS if (unit.ep, unit.phase) == (options.ep, options.phase)]
    if not units:
        near = max(unit.ep for unit in UNITS if unit.phase == options.phase)
        parser.error(f"--ep {options.ep} --phase {options.phase}: no such unit. Nearest: --ep {near}.")
    most = V3.moe_layers - FIRST_LAYER
    if not 1 <= options.layers <= most:
        parser.error(f"--layers {options.layers}: 1..{most} fit into a picture")
    if options.width < LEAST_WIDTH:
        parser.error(f"--width {options.width}: a picture takes at least {LEAST_WIDTH} columns")
    if options.hottest < 1.0 or options.wire < 0.0:
        parser.error(f"--hottest {options.hottest} --wire {options.wire}: at least 1, and at least 0")
    unit = units[0] if options.tokens is None else with_tokens(units[0], options.tokens)
    if unit.tokens < 2 * unit.tp or unit.tokens % (2 * unit.tp):
        nearest = max(1, round(unit.tokens / (2 * unit.tp))) * 2 * unit.tp
        parser.error(f"--tokens {unit.tokens}: a multiple of 2·tp = {2 * unit.tp}. Nearest: --tokens {nearest}.")
    show(unit, Model(hottest=options.hottest, wire=options.wire), layers=options.layers, width=options.width)


if __name__ == "__main__":
    main()
