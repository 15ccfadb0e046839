"""An answer as tables for a terminal and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from moe_runtime.launch.sizing import format_bytes
from moe_tools.plan.evaluate import Answer, Decode, Prefill, Whole
from moe_tools.plan.published import NETWORK_BOUND_MS, Row, network_bound_ms, summary

Cells = Sequence[str]

DECODE_HEAD = ("decode unit", "batch", "TPOT ms", "tok/s/GPU", "GB/rank", "network MB/step", "imbalance",
               "attention ms", "experts ms", "exposed ms", "bound by")  # fmt: skip
PREFILL_HEAD = ("prefill unit", "tokens", "TTFT ms", "tok/s/GPU", "GB/rank", "network MB/step", "imbalance",
                "attention ms", "experts ms", "exposed ms", "bound by")  # fmt: skip
WHOLE_HEAD = ("layout", "prefill unit", "prefill GPUs", "TPOT ms", "TTFT ms", "tok/s/GPU")
TERM_HEAD = ("term", "ms", "of the step", "bound by")
PUBLISHED_HEAD = ("run", "published", "planner", "error", "left out", "error", "assumptions")


def decode_cells(one: Decode) -> Cells:
    return (str(one.deployment.layout), str(one.batch), f"{one.tpot_ms:.1f}", *_common(one))


def prefill_cells(one: Prefill) -> Cells:
    return (str(one.deployment.layout), str(one.tokens), f"{one.ttft_ms:.0f}", *_common(one))


def _common(one: Decode | Prefill) -> Cells:
    step = one.step
    terms = step.terms
    return (
        f"{one.tokens_per_s:.0f}",
        f"{one.memory.total / 1e9:.1f}",
        f"{step.network_bytes / 1e6:.0f}",
        f"{step.imbalance:.2f}",
        f"{terms['attention'] / 1e3:.1f}",
        f"{terms['experts'] / 1e3:.1f}",
        f"{step.summary.exposed_us[0] / 1e3:.1f}",
        f"{step.bound}: {step.bounds[step.bound]}" if step.bound in step.bounds else step.bound,
    )


def whole_cells(one: Whole) -> Cells:
    return (
        str(one.decode.deployment.layout) + f" batch {one.decode.batch}",
        str(one.prefill.deployment.layout) if one.apart else "the same",
        f"{one.prefill_share:.0%}" if one.apart else "all",
        f"{one.tpot_ms:.1f}",
        f"{one.prefill.ttft_ms:.0f}",
        f"{one.tokens_per_s:.0f}",
    )


def published_cells(row: Row) -> Cells:
    unit = "ms" if row.run.kind == "decode" else "tok/s/GPU"
    return (
        row.run.name,
        f"{row.run.value:g} {unit}",
        _figure(row, row.fitted),
        f"{row.error:+.0%}",
        _figure(row, row.left_out),
        f"{row.left_out_error:+.0%}",
        f"{row.run.hardware}, batch {row.run.batch}, length {row.run.length}; {row.run.assumptions}",
    )


def _figure(row: Row, value: float) -> str:
    return f"{value:.1f}" if row.run.kind == "decode" else f"{value:.0f}"


def table(head: Cells, rows: Sequence[Cells]) -> str:
    """Columns as wide as their widest cell, the first and the last to the left."""
    columns = list(zip(head, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    last = len(widths) - 1
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i in (0, last) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (head, *rows)
    )


def intro(answer: Answer) -> str:
    """What was asked, in three lines."""
    plan = answer.plan
    slo = [f"TPOT ≤ {plan.tpot_ms:g} ms" if plan.tpot_ms else "any TPOT"]
    slo += [f"TTFT ≤ {plan.ttft_ms:g} ms"] if plan.ttft_ms else []
    return (
        f"{plan.model} on {answer.machine.rates.name}: {plan.prompt_tokens} tokens in, {plan.output_tokens} out, "
        f"{', '.join(slo)}\nroutes {answer.routes.source}; placed by {plan.policy}, copies {plan.replica_choice}\n"
        "predicted from published kernel tables and exactly counted routes; nothing was measured here"
    )


def lines(answer: Answer) -> Iterator[str]:
    """The whole answer as text."""
    top = answer.plan.top
    yield intro(answer)
    for title, head, cells in (
        ("decode", DECODE_HEAD, [decode_cells(one) for one in answer.decodes[:top]]),
        ("prefill", PREFILL_HEAD, [prefill_cells(one) for one in answer.prefills[:top]]),
        ("prefill and decode apart", WHOLE_HEAD, [whole_cells(one) for one in answer.apart[:top]]),
        ("one unit for both", WHOLE_HEAD, [whole_cells(one) for one in answer.together[:top]]),
    ):
        yield f"\n{title}\n" + (table(head, cells) if cells else "nothing fits")
    units: list[Decode | Prefill] = [*answer.decodes[:1], *answer.prefills[:1]]
    for unit in units:
        yield from _terms(unit)
    if answer.refused:
        yield f"\nnot possible ({len(answer.refused)})"
        for one in answer.refused[:top]:
            yield f"  {one.layout} {one.phase}: {one.reason.splitlines()[0][:160]}"
    yield from _winners(answer)
    if answer.plan.policy != "uniform" and answer.plan.placement is None:
        yield (
            f"\nthe tables hold for experts placed by {answer.plan.policy}; a run spreads them evenly unless "
            "placement.file= says otherwise (trace=DIR placement=FILE writes one)"
        )


def term_cells(one: Decode | Prefill) -> list[Cells]:
    """(term, milliseconds of the busiest rank, share of the step, what bounds it)."""
    step = one.step
    parts = dict(step.terms) | {"transfers": step.summary.exposed_us[0], "waiting": step.summary.waiting_us[0]}
    return [
        (name, f"{us / 1e3:.2f}", f"{us / step.us:.0%}", step.bounds.get(name, "slower ranks"))
        for name, us in parts.items()
    ]


def _terms(one: Decode | Prefill) -> Iterator[str]:
    hidden = one.step.summary.wire_us - one.step.summary.exposed_us[0]
    agreed = one.step.agreed
    yield (
        f"\n{one.deployment.layout}: {agreed.num_micro_batches} micro-batch(es) of {agreed.num_chunks} dispatch(es), "
        f"{hidden / 1e3:.1f} ms of transfers hidden; {memory_text(one)}"
    )
    yield table(TERM_HEAD, term_cells(one))


def _winners(answer: Answer) -> Iterator[str]:
    if answer.together:
        best = answer.together[0]
        yield f"\nfastest as one unit: {best.tokens_per_s:.0f} tok/s/GPU\n  {best.decode.deployment.command()}"
    if answer.apart:
        best = answer.apart[0]
        gpus = best.decode.deployment.layout.ep
        others = gpus * best.prefill_share / (1 - best.prefill_share)
        yield (
            f"\nfastest apart: {best.tokens_per_s:.0f} tok/s/GPU, {others:.0f} GPUs that prefill for {gpus} that decode"
            f" (the runtime hands no caches from one unit to another yet)\n"
            f"  decode:  {best.decode.deployment.command()}\n  prefill: {best.prefill.deployment.command()}"
        )


def published_text(rows: Sequence[Row], held_out: Sequence[Row] = ()) -> str:
    """The table of published runs. `held_out`: those that no fit has seen."""
    found = summary(rows)
    return "\n".join(
        [
            table(PUBLISHED_HEAD, [published_cells(row) for row in rows]),
            "",
            f"mean error {found['mean']:.0%}, largest {found['max']:.0%}; each run from the others alone: mean "
            f"{found['leave_one_out_mean']:.0%}, largest {found['leave_one_out_max']:.0%}",
            *(["", "in no fit", table(PUBLISHED_HEAD, [published_cells(row) for row in held_out])] if held_out else []),
            "",
            f"DeepSeek's network bound {NETWORK_BOUND_MS} ms: {network_bound_ms():.2f} ms with their 7K, "
            f"{network_bound_ms(hidden=7168):.2f} ms with 7168",
        ]
    )


def as_json(answer: Answer) -> str:
    """Everything, one object."""
    return json.dumps(
        {
            "plan": asdict(answer.plan),
            "model_layers": answer.model.num_layers,
            "hardware": {"name": answer.machine.rates.name, "sources": dict(answer.machine.sources)},
            "routes": answer.routes.source,
            "constants": asdict(answer.constants),
            "decode": [_unit(one) | {"batch": one.batch, "tpot_ms": one.tpot_ms} for one in answer.decodes],
            "prefill": [_unit(one) | {"tokens": one.tokens, "ttft_ms": one.ttft_ms} for one in answer.prefills],
            "apart": [_whole(one) for one in answer.apart],
            "together": [_whole(one) for one in answer.together],
            "refused": [
                {"layout": asdict(one.layout), "phase": one.phase, "reason": one.reason} for one in answer.refused
            ],
        },
        indent=1,
    )


def _unit(one: Decode | Prefill) -> dict[str, Any]:
    step, layout = one.step, one.deployment.layout
    return {
        "layout": asdict(layout) | {"dp": layout.dp},
        "tokens_per_s_per_gpu": one.tokens_per_s,
        "memory_bytes": asdict(one.memory) | {"total": one.memory.total},
        "step_us": step.us,
        "terms_us": dict(step.terms),
        "wire_us": step.summary.wire_us,
        "exposed_us": step.summary.exposed_us[0],
        "waiting_us_of_a_mean_rank": step.summary.waiting_us[1],
        "network_bytes": step.network_bytes,
        "imbalance": step.imbalance,
        "bounds": dict(step.bounds),
        "bound": step.bound,
        "micro_batches": step.agreed.num_micro_batches,
        "chunks": step.agreed.num_chunks,
        "graph": step.agreed.graph,
        "command": one.deployment.command(),
    }


def _whole(one: Whole) -> Mapping[str, Any]:
    return {
        "decode": asdict(one.decode.deployment.layout),
        "prefill": asdict(one.prefill.deployment.layout),
        "batch": one.decode.batch,
        "tpot_ms": one.tpot_ms,
        "ttft_ms": one.prefill.ttft_ms,
        "tokens_per_s_per_gpu": one.tokens_per_s,
        "prefill_share": one.prefill_share,
        "command": one.decode.deployment.command(),
    }


def memory_text(one: Decode | Prefill) -> str:
    """Parts of a rank's memory."""
    memory = one.memory
    return (
        f"weights {format_bytes(memory.weights)}, cache {format_bytes(memory.cache)}, "
        f"dispatch {format_bytes(memory.dispatch)}, other {format_bytes(memory.other)}"
    )
