"""An answer as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from moe_runtime.launch.sizing import format_bytes
from moe_tools.plan.advice import advice, refusals
from moe_tools.plan.answer import Answer, Apart, Decode, Prefill, Together
from moe_tools.plan.evaluate import Evaluator
from moe_tools.plan.placed import NO_FILES, Files, command
from moe_tools.plan.timing import Step

Cells = Sequence[str]

_STEP_HEAD = ("tok/s/GPU", "GB/rank", "network MB/rank/step", "imbalance", "attention ms", "experts ms", "exposed ms",
              "bound by")  # fmt: skip
DECODE_HEAD = ("decode unit", "batch", "TPOT ms", *_STEP_HEAD)
PREFILL_HEAD = ("prefill unit", "tokens", "TTFT ms", *_STEP_HEAD)
APART_HEAD = ("decode unit", "batch", "prefill units for it", "TPOT ms", "TTFT ms", "tok/s/GPU", "prefill unit")
TOGETHER_HEAD = ("unit", "batch", "TPOT ms", "step with prompts ms", "share of steps", "TTFT ms", "tok/s/GPU",
                 "GB/rank", "network MB/rank/step", "imbalance", "bound by")  # fmt: skip
MOST_STARTS: Final = 1 / 3
"""Of a step: from here on a word is said"""
SMALL_HIDDEN: Final = 2048
"""Models less wide are far from DeepSeek-V3, whatever their steps wait for"""
TERM_HEAD = ("term", "ms", "of the step", "bound by")


def decode_cells(one: Decode) -> Cells:
    return (str(one.deployment.layout), str(one.batch), short(one.tpot_ms), *_common(one))


def prefill_cells(one: Prefill) -> Cells:
    return (str(one.deployment.layout), str(one.tokens), short(one.ttft_ms), *_common(one))


def _common(one: Decode | Prefill) -> Cells:
    step = one.step
    terms = step.terms
    return (
        short(one.tokens_per_s),
        short(one.memory.total / 1e9),
        _network(step.network_bytes),
        f"{step.imbalance:.2f}",
        short(terms["attention"] / 1e3),
        short(terms["experts"] / 1e3),
        short(step.summary.exposed_us[0] / 1e3),
        _bound(step),
    )


def _network(num_bytes: float) -> str:
    return short(num_bytes / 1e6) if num_bytes else "none"


def _bound(one: Step | Together) -> str:
    return f"{one.bound}: {one.bounds[one.bound]}" if one.bound in one.bounds else one.bound


def apart_cells(one: Apart) -> Cells:
    return (
        str(one.decode.deployment.layout),
        str(one.decode.batch),
        short(one.prefill_units),
        short(one.tpot_ms),
        short(one.ttft_ms),
        short(one.tokens_per_s),
        str(one.prefill.deployment.layout),
    )


def together_cells(one: Together) -> Cells:
    return (
        str(one.decode.deployment.layout),
        str(one.decode.batch),
        short(one.tpot_ms),
        short(one.mixed_ms),
        f"{one.share:.1%}",
        short(one.ttft_ms),
        short(one.tokens_per_s),
        short(one.memory.total / 1e9),
        _network(one.network_bytes),
        f"{one.decode.step.imbalance:.2f}",
        _bound(one),
    )


def short(value: float) -> str:
    """Three digits, but whole numbers whole: 0.0123, 1.23, 45.6, 7890."""
    if 0 < value < 0.001:
        return "<0.001"
    if not value or abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3g}"


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


def intro(asked: Answer | Evaluator) -> str:
    """What was asked, and what the figures rest on."""
    plan, machine = asked.plan, asked.machine
    slo = [f"TPOT ≤ {plan.tpot_ms:g} ms" if plan.tpot_ms else "any TPOT"]
    slo += [f"TTFT ≤ {plan.ttft_ms:g} ms"] if plan.ttft_ms else []
    again = f"\n{asked.routes.repeat}" if asked.routes.repeat else ""
    own = "" if machine.kernels else f"\nno kernel was timed on {machine.rates.name}: {_SCALED}"
    return (
        f"{plan.model} on {machine.rates.name}: {plan.prompt_tokens} tokens in, {plan.output_tokens} out, "
        f"{', '.join(slo)}\nroutes {asked.routes.source}; placed by {plan.policy}, copies "
        f"{plan.replica_choice}{again}\n"
        f"predicted from published kernel tables and exactly counted routes; nothing was measured here{own}"
    )


_SCALED: Final = "an H200's tables are scaled by physical floors; take the times for a direction"


def lines(answer: Answer, files: Files = NO_FILES) -> Iterator[str]:
    """The whole answer as text, below `intro`."""
    top = answer.plan.top
    for title, head, cells in (
        ("decode", DECODE_HEAD, [decode_cells(one) for one in answer.decodes[:top]]),
        ("prefill", PREFILL_HEAD, [prefill_cells(one) for one in answer.prefills[:top]]),
        ("prefill and decode apart", APART_HEAD, [apart_cells(one) for one in answer.apart[:top]]),
        ("one unit for both", TOGETHER_HEAD, [together_cells(one) for one in answer.together[:top]]),
    ):
        yield f"\n{title}\n" + (table(head, cells) if cells else "nothing fits")
    if answer.together:
        yield TOGETHER_NOTE
    best: list[Decode | Prefill | Together] = [*answer.decodes[:1], *answer.prefills[:1], *answer.together[:1]]
    for unit in best:
        yield from _terms(unit)
    if notes := starts_note(answer):
        yield f"\n{notes}"
    if answer.refused:
        refused = refusals(answer)
        yield f"\nnot possible ({len(refused)})"
        yield from [f"  {one}" for one in refused[:top]]
    yield from _winners(answer, files)
    if remedies := advice(answer):
        yield ""
        yield from remedies
    elif answer.plan.policy != "uniform" and not files:
        yield (
            f"\nthe tables hold for experts placed by {answer.plan.policy}; a run spreads them evenly unless "
            "placement.file= says otherwise (trace=DIR placement=FILE writes one)"
        )


TOGETHER_NOTE: Final = (
    "TPOT is the mean: a step that carries prompts makes all who decode wait. It takes all DP groups to have their "
    "prompts\nin the same steps; where they take turns, every step may last like one with prompts."
)


def starts_note(answer: Answer) -> str:
    """A word where a step of a unit that is shown as the best is largely starts of kernels, or where the model is far
    from the tables' one, else nothing."""
    best: list[tuple[str, Decode | Prefill]] = [("the best decode", one) for one in answer.decodes[:1]]
    best += [("the best prefill", one) for one in answer.prefills[:1]]
    for both in answer.together[:1]:
        best += [("the best one unit's decode", both.decode), ("the best one unit's prefill", both.prefill)]
    shares = {name: starts_share(one.step) for name, one in best}
    largest = max(shares, key=shares.__getitem__, default="")
    small = answer.model.hidden_size < SMALL_HIDDEN
    if not shares or (shares[largest] < MOST_STARTS and not small):
        return ""
    why = f"starts of kernels are {shares[largest]:.0%} of {largest} step"
    if small:
        why = f"a model {answer.model.hidden_size} wide is far from DeepSeek-V3's 7168; {why}"
    return (
        f"{why}, and the tables\nknow those of DeepSeek-V3 only, in a graph: for a model or a batch this small the "
        "figures are far too fast"
    )


def starts_share(step: Step) -> float:
    """Of a step: the parts that are more than half starts."""
    return sum(us for name, us in step.parts.items() if step.bounds.get(name) == "starts") / step.us


def term_cells(one: Decode | Prefill | Together) -> list[Cells]:
    """(term, milliseconds of the busiest rank, share of the step, what bounds it); of one unit for both: of the mean
    step."""
    parts, bounds, us = (
        (one.parts_us, one.bounds, one.tpot_ms * 1e3)
        if isinstance(one, Together)
        else (one.step.parts, one.step.bounds, one.step.us)
    )
    rows: list[Cells] = [
        (name, short(own / 1e3), f"{own / us:.0%}", bounds.get(name, "") if own else "none")
        for name, own in parts.items()
    ]
    return [*rows, ("a mean rank waits", short(waits_ms(one)), "within", "the busiest rank")]


def waits_ms(one: Decode | Prefill | Together) -> float:
    """Milliseconds of a step for which a rank of mean load stands still; a part of what the busiest one computes."""
    if isinstance(one, Together):
        return waits_ms(one.decode) + one.share * waits_ms(one.prefill)
    us = one.step.summary.waiting_us[1]
    return us / 1e3 if us > 1e-3 else 0.0  # sums of floats leave a rest


def _terms(one: Decode | Prefill | Together) -> Iterator[str]:
    yield f"\n{both_text(one) if isinstance(one, Together) else shape_text(one)}; {memory_text(one)}"
    yield table(TERM_HEAD, term_cells(one))


def shape_text(one: Decode | Prefill) -> str:
    """How its step is cut, and what that hides."""
    hidden = one.step.summary.wire_us - one.step.summary.exposed_us[0]
    agreed = one.step.agreed
    parts = [f"{agreed.num_micro_batches} micro-batch{'es' if agreed.num_micro_batches > 1 else ''}"]
    parts += [f"{agreed.num_chunks} dispatches each{_FEWER}"] if agreed.num_chunks > 1 else []
    return f"{one.deployment.layout}: {' of '.join(parts)}, {short(hidden / 1e3)} ms of transfers hidden"


def both_text(one: Together) -> str:
    """What the parts of one unit for both are of."""
    return (
        f"one unit, {one.decode.deployment.layout}, batch {one.decode.batch}: the mean step, with {one.share:.1%} "
        f"of the {short(one.prefill.step.us / 1e3)} ms of {one.prefill.tokens} prompt tokens"
    )


_FEWER: Final = " (fewer with a larger dispatch_buffer_bytes=)"


def _winners(answer: Answer, files: Files) -> Iterator[str]:
    if answer.together:
        best = answer.together[0]
        yield f"\nfastest as one unit: {short(best.tokens_per_s)} tok/s/GPU"
        yield f"  one unit: {command(best.decode.deployment, files)}"
    if answer.apart:
        found = answer.apart[0]
        yield f"\nfastest apart: {short(found.tokens_per_s)} tok/s/GPU; {units_text(found)}"
        yield "  (the runtime hands no caches from one unit to another yet)"
        yield f"  decode:   {command(found.decode.deployment, files)}"
        yield f"  prefill:  {command(found.prefill.deployment, files)}"


def units_text(one: Apart) -> str:
    """How many units of each kind."""
    prefills, decodes, rate = one.whole_units()
    sizes = one.prefill.deployment.layout.ep, one.decode.deployment.layout.ep
    units = f"{short(one.prefill_units)} prefill units of {sizes[0]} GPU{'s' if sizes[0] > 1 else ''}"
    whole = f"with whole units {prefills} for {decodes}: {short(rate)} tok/s/GPU"
    return f"{units} for each decode unit of {sizes[1]}; {whole}"


def memory_text(one: Decode | Prefill | Together) -> str:
    """Parts of a rank's memory."""
    memory = one.memory
    return (
        f"weights {format_bytes(memory.weights)}, cache {format_bytes(memory.cache)}, "
        f"dispatch {format_bytes(memory.dispatch)}, other {format_bytes(memory.other)}"
    )
