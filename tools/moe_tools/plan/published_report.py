"""Published runs beside the planner's figures, as text: what `validate=true` prints and docs/planning.md shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from moe_tools.plan.published import FITTED, Row, network_bound_ms, summary
from moe_tools.plan.published_runs import NETWORK_BOUND_MS, Published
from moe_tools.plan.report import Cells, table
from moe_tools.plan.sensitivity import Sensitivity

HEAD: Final = ("run", "published", "planner", "error", "left out", "error", "assumptions")
_OTHERWISE: Final = ("run", "if instead", "planner", "error")


def cells(row: Row) -> Cells:
    """One run's row of the table."""
    run, left_out = row.run, row.left_out
    return (
        run.name,
        f"{run.value:g} {'ms' if run.kind == 'decode' else 'tok/s/GPU'}",
        _figure(run, row.fitted),
        f"{row.error:+.0%}",
        *(("", "") if left_out is None else (_figure(run, left_out), f"{row.left_out_error:+.0%}")),
        f"{run.hardware}, batch {run.batch}, length {run.length}; {run.assumptions}",
    )


def _figure(run: Published, value: float) -> str:
    return f"{value:.1f}" if run.kind == "decode" else f"{value:.0f}"


def published_text(rows: Sequence[Row], held_out: Sequence[Row] = (), otherwise: Sequence[Sensitivity] = ()) -> str:
    """The table of published runs. `held_out`: those that no fit has seen; `otherwise`: what other assumptions give."""
    found = summary(rows)
    lines = [
        table(HEAD, [cells(row) for row in rows]),
        "",
        f"mean error {found['mean']:.0%}, largest {found['max']:.0%}; each run from the others alone: mean "
        f"{found['leave_one_out_mean']:.0%}, largest {found['leave_one_out_max']:.0%}",
    ]
    if held_out:
        lines += ["", "in no fit", table(HEAD, [cells(row) for row in held_out])]
    bound = network_bound_ms()
    lines += [
        "",
        f"DeepSeek's network bound {NETWORK_BOUND_MS} ms; from the planner's own copies {bound:.2f} ms "
        f"({bound / NETWORK_BOUND_MS - 1:+.0%}: 7168 wide where they write 7K, and the scales of fp8 rows)",
    ]
    if otherwise:
        rest = [(one.run.name, one.instead, _figure(one.run, one.value), f"{one.error:+.0%}") for one in otherwise]
        lines += ["", "other assumptions", table(_OTHERWISE, rest)]
    lines += [
        "",
        f"fitted: gap {FITTED.gap_us:g} us per layer and micro-batch, transfers x {FITTED.wire_stretch:g}, prefill x "
        f"{FITTED.prefill_stretch:g}",
    ]
    return "\n".join(lines)
