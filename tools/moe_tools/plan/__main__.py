"""Which layout, before there is a cluster.

python -m moe_tools.plan model=deepseek_v3 hardware=h200 prompt_tokens=2048 output_tokens=1024 tpot_ms=50
python -m moe_tools.plan trace=DIR hardware=gb200 json=plan.json html=plan.html
python -m moe_tools.plan validate=true
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moe_runtime.errors import ConfigError, MoeRuntimeError
from moe_tools.plan.settings import PlanConfig, help_text, parse_words

if TYPE_CHECKING:
    from moe_tools.plan.evaluate import Answer


def main(words: Sequence[str] | None = None) -> int:
    """0: answered, 2: a wrong question (the error's text says how to put it right), 3: nothing fits."""
    given = list(sys.argv[1:] if words is None else words)
    if {"help", "--help", "-h"} & set(given):
        print(help_text())
        return 0
    try:
        plan = parse_words(given)
        return _validate(plan) if plan.validate else _plan(plan)
    except MoeRuntimeError as error:
        print(error, file=sys.stderr)
        return 2


def _plan(plan: PlanConfig) -> int:
    from moe_tools.plan.evaluate import evaluate
    from moe_tools.plan.page import page
    from moe_tools.plan.report import as_json, lines

    quiet = not sys.stderr.isatty()
    answer = evaluate(plan, on_layout=lambda one: None if quiet else print(f"\r{one!s:<60}", end="", file=sys.stderr))
    if not quiet:
        print("\r" + " " * 60, end="\r", file=sys.stderr)
    for line in lines(answer):
        print(line)
    if plan.placement is not None:
        _place(plan, answer)
    if plan.json is not None:
        _write("json", plan.json, as_json(answer))
    if plan.html is not None:
        _write("html", plan.html, page(answer))
    return 0 if answer.apart or answer.together else 3


def _place(plan: PlanConfig, answer: Answer) -> None:
    """The fastest unit's placement for all layers, and its command with it."""
    from moe_runtime.balance.planner import plan_placement
    from moe_runtime.balance.trace import read_trace

    found = [*answer.together[:1], *answer.apart[:1]]
    if not found or plan.placement is None or plan.trace is None or plan.policy == "uniform":
        return
    unit = found[0].decode.deployment
    loads, nodes = read_trace(plan.trace).loads, answer.machine.nvlink_ranks
    placement = plan_placement(
        loads, ep=unit.layout.ep, ranks_per_node=nodes, num_redundant=unit.layout.redundant, policy=plan.policy
    )
    _write("placement", plan.placement, placement.to_json())
    print(f"  {unit.command(placement_file=plan.placement)}")


def _validate(plan: PlanConfig) -> int:
    from moe_tools.plan.published import FITTED, Predictor, held_out, leave_one_out
    from moe_tools.plan.report import published_text

    predictor = Predictor(seed=plan.seed)
    print(published_text(leave_one_out(predictor), held_out(predictor)))
    print(
        f"fitted: gap {FITTED.gap_us:g} us per layer and micro-batch, transfers x {FITTED.wire_stretch:g}, prefill x "
        f"{FITTED.prefill_stretch:g}"
    )
    return 0


def _write(key: str, file: str, text: str) -> None:
    try:
        Path(file).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{key}={file}: cannot be written ({error.strerror}). Give a file in a folder that exists."
        ) from error
    print(f"{key}: {file}")


if __name__ == "__main__":
    sys.exit(main())
