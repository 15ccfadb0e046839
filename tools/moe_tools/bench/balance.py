"""`python -m moe_tools.bench balance [TABLE …] [--write]`: how even plans and replica choices are, and what planning
beside the steps costs them, as tables of docs/balance.md.

One core, but for `planning`. Loads are synthetic, or recorded from the demo model.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from moe_runtime.balance.exact import optimality_gap
from moe_runtime.balance.planner import PlanPolicy, balancedness, gain_at_moves, plan_placement, rank_loads
from moe_runtime.parallel.placement import ExpertPlacement
from moe_tools.bench.balance_choice import choice_table
from moe_tools.bench.balance_loads import SYNTHETIC, Recorded, record_demo
from moe_tools.bench.balance_planning import planning_table

DOCUMENT: Final = Path("docs/balance.md")
_REPEATS: Final = 5
TABLES: Final = ("plans", "moves", "windows", "choices", "planning")
Loads = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Size:
    """Ranks and slots of a plan; with `num_groups` the hierarchical policy."""

    ep: int
    num_redundant: int
    num_groups: int | None = None

    def __str__(self) -> str:
        return f"{256 + self.num_redundant} on {self.ep}{', groups' if self.num_groups else ''}"

    def plan(self, loads: Loads, policy: PlanPolicy, previous: ExpertPlacement | None = None) -> ExpertPlacement:
        return plan_placement(
            loads,
            ep=self.ep,
            ranks_per_node=8,
            num_groups=self.num_groups,
            num_redundant=self.num_redundant,
            policy=policy,
            previous=previous,
        )


SIZES: Final = (Size(32, 32), Size(32, 32, 8), Size(144, 32), Size(320, 64))


def plan_table(recorded: Loads) -> Iterator[str]:
    """Mean over layers of balancedness (and the worst layer) of each policy, the proven gap of `best`, plan times."""
    yield from _head(
        ("load", "slots on ranks", "no balancing", "`eplb`", "`best`", "gap to the bound", "`eplb` ms", "`best` ms")
    )
    loads = {name: make(np.random.default_rng(0)) for name, make in SYNTHETIC.items()} | {"demo, recorded": recorded}
    for name, values in loads.items():
        for size in SIZES:
            uniform = ExpertPlacement.uniform(len(values), 256, ep=size.ep, num_redundant=size.num_redundant)
            eplb, eplb_s = _timed(lambda v=values, s=size: s.plan(v, "eplb"))  # type: ignore[misc]
            best, best_s = _timed(lambda v=values, s=size: s.plan(v, "best"))  # type: ignore[misc]
            gap = optimality_gap(values, best)
            even = [_even(values, placement) for placement in (uniform, eplb, best)]
            times = (f"{1e3 * eplb_s:.0f}", f"{1e3 * best_s:.0f}") if len(values) == 58 else ("–", "–")
            yield _row((name, str(size), *even, f"{100 * gap.mean():.1f} % ({100 * gap.max():.1f})", *times))


def moves_table() -> Iterator[str]:
    """A lognormal load drifts (each expert by a factor of e^±0.4); what part of the moves gains."""
    yield from _head(("slots on ranks", "moves of the whole plan", "before", "5 %", "10 %", "25 %", "50 %", "100 %"))
    rng = np.random.default_rng(1)
    loads = SYNTHETIC["lognormal"](rng)
    later = np.round(loads * rng.lognormal(0.0, 0.4, loads.shape))
    for size in SIZES:
        old = size.plan(loads, "best")
        points = gain_at_moves(later, old, ranks_per_node=8, num_groups=size.num_groups)
        even = [f"{point.balancedness:.3f} ({100 * point.gain:.0f} %)" for point in points]
        share = points[-1].num_moves / old.phy2log.numel()
        yield _row((str(size), f"{points[-1].num_moves} ({100 * share:.0f} %)", _even(later, old), *even))


def windows_table() -> Iterator[str]:
    """Two domains with loads of their own take turns, in ten windows each a little different."""
    yield from _head(("288 on 32, planned by", "whole load", "over time", "worst window"))
    rng = np.random.default_rng(2)
    domains = [SYNTHETIC["lognormal"](rng) for _ in range(2)]
    windows = np.stack([np.round(domains[w % 2] * rng.lognormal(0.0, 0.1, domains[0].shape)) for w in range(10)])
    size, total = Size(32, 32), windows.sum(axis=0)
    plans = {
        "`eplb`": size.plan(total, "eplb"),
        "`best` on the sum": size.plan(total, "best"),
        "`best` on the windows": size.plan(windows, "best"),
    }
    for name, placement in plans.items():
        per_rank = rank_loads(windows, placement)
        over_time = per_rank.mean(dim=2).sum(dim=0) / per_rank.amax(dim=2).sum(dim=0)
        worst = balancedness(per_rank).amin(dim=0)
        yield _row((name, _even(total, placement), f"{over_time.mean():.3f}", f"{worst.mean():.3f}"))


def _even(loads: Loads, placement: ExpertPlacement) -> str:
    even = balancedness(rank_loads(loads, placement))
    return f"{even.mean():.3f} ({even.min():.3f})"


def _timed(make: Callable[[], ExpertPlacement]) -> tuple[ExpertPlacement, float]:
    seconds = []
    for _ in range(_REPEATS):
        start = time.process_time()  # of this thread's core, whatever else runs on the machine
        placement = make()
        seconds.append(time.process_time() - start)
    return placement, statistics.median(seconds)


def _head(names: Sequence[str]) -> Iterator[str]:
    yield _row(names)
    yield _row(["---"] * len(names))


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def write_between(text: str, name: str, lines: Sequence[str]) -> str:
    """`text` with what stands between the markers of `name` replaced."""
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
    head, _, rest = text.partition(begin)
    _, found, tail = rest.partition(end)
    if not found:
        raise SystemExit(f"{DOCUMENT} has no markers {begin.strip()} … {end}; put them where the table belongs.")
    return head + begin + "\n".join(lines) + "\n" + found + tail


def _table(name: str, recorded: Recorded | None) -> Iterator[str]:
    match name:
        case "plans" if recorded is not None:
            return plan_table(recorded.loads)
        case "choices" if recorded is not None:
            return choice_table(recorded)
        case "moves":
            return moves_table()
        case "windows":
            return windows_table()
        case _:
            return planning_table()


def main(arguments: Sequence[str]) -> None:
    """Print the tables, or write them into the document."""
    parser = argparse.ArgumentParser(prog="python -m moe_tools.bench balance", description=__doc__)
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"some of {', '.join(TABLES)}; none: all")
    parser.add_argument("--write", action="store_true", help=f"put the tables into {DOCUMENT}")
    args = parser.parse_args(arguments)
    if unknown := set(args.tables) - set(TABLES):
        parser.error(f"{', '.join(sorted(unknown))}: no such table. Choose from {', '.join(TABLES)}.")
    names = args.tables or TABLES
    torch.set_num_threads(1)
    recorded = record_demo() if {"plans", "choices"} & set(names) else None
    found = {}
    for name in names:
        found[name] = list(_table(name, recorded))
        print(f"{name}\n" + "\n".join(found[name]) + "\n", flush=True)
    if args.write:
        text = DOCUMENT.read_text(encoding="utf-8")
        for name, lines in found.items():
            text = write_between(text, name, lines)
        DOCUMENT.write_text(text, encoding="utf-8")
