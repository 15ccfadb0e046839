"""An answer as one HTML page that loads nothing and runs nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Final

from moe_tools.plan.advice import advice, refusals
from moe_tools.plan.answer import Answer, Apart, Together
from moe_tools.plan.charts import bars, scatter
from moe_tools.plan.deployment import Deployment
from moe_tools.plan.placed import NO_FILES, Files, command
from moe_tools.plan.report import (
    APART_HEAD,
    DECODE_HEAD,
    PREFILL_HEAD,
    TERM_HEAD,
    TOGETHER_HEAD,
    TOGETHER_NOTE,
    Cells,
    apart_cells,
    both_text,
    decode_cells,
    intro,
    memory_text,
    prefill_cells,
    shape_text,
    short,
    starts_note,
    term_cells,
    together_cells,
    units_text,
)

_STYLE: Final = Path(__file__).with_name("page.css")
_POLICY: Final = "default-src 'none'; style-src 'unsafe-inline'"
_LEFT: Final = frozenset({"bound by", "prefill unit"})
"""Columns of words"""


def page(answer: Answer, files: Files = NO_FILES) -> str:
    """The page's text. `files`: the placements that its commands name."""
    title = f"Capacity plan: {escape(answer.plan.model)} on {escape(answer.machine.rates.name)}"
    said = "".join(f"<p>{escape(line)}</p>" for line in intro(answer).splitlines())
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f"<title>{title}</title>\n<style>\n{_STYLE.read_text(encoding='utf-8')}</style>\n</head>\n<body>\n"
        f'<a class="skip" href="#decode">Skip to the tables</a>\n<header><h1>{title}</h1>{said}</header>\n'
        f"<main>{''.join(_body(answer, files))}</main>\n"
        f"<footer>{_list(_sources(answer), 'Constants and sources')}</footer>\n</body>\n</html>\n"
    )


def _body(answer: Answer, files: Files) -> Iterator[str]:
    top = answer.plan.top
    if remedies := advice(answer):
        yield '<div class="advice">' + "".join(f"<p>{escape(line)}</p>" for line in remedies) + "</div>"
    if notes := starts_note(answer):
        yield f"<p>{escape(notes)}</p>"
    yield '<div class="cards">'
    if answer.together:
        yield _together(answer.together[0], files)
    if answer.apart:
        yield _apart(answer.apart[0], files)
    yield "</div>"
    if answer.decodes:
        yield "<h2>Where a decode step goes</h2><p>Of the busiest rank, which all others wait for. Transfers that hide "
        yield "behind computing take no part.</p>" + _scroll("parts of a decode step", bars(answer.decodes[:top]))
        yield "<h2>Speed per user and per GPU</h2><p>Numbers as above. The tab key or the mouse names a point.</p>"
        yield f"<figure>{scatter(answer.decodes, labelled=top)}</figure>"
    yield _section("Decode units", DECODE_HEAD, [decode_cells(one) for one in answer.decodes[:top]], name="decode")
    for decode in answer.decodes[:1]:
        yield _section("The best decode unit", TERM_HEAD, term_cells(decode), note=shape_text(decode), plain=True)
    yield _section("Prefill units", PREFILL_HEAD, [prefill_cells(one) for one in answer.prefills[:top]])
    for prefill in answer.prefills[:1]:
        yield _section("The best prefill unit", TERM_HEAD, term_cells(prefill), note=shape_text(prefill), plain=True)
    yield _section("Prefill and decode apart", APART_HEAD, [apart_cells(one) for one in answer.apart[:top]])
    rows = [together_cells(one) for one in answer.together[:top]]
    yield _section("One unit for both", TOGETHER_HEAD, rows, note=TOGETHER_NOTE)
    for both in answer.together[:1]:
        yield _section("The best unit for both", TERM_HEAD, term_cells(both), note=both_text(both), plain=True)
    if answer.refused:
        yield _list(refusals(answer), "Not possible")


def _together(best: Together, files: Files) -> str:
    unit = best.decode.deployment
    text = (
        f"{unit.layout}, batch {best.decode.batch}. TPOT {short(best.tpot_ms)} ms in the mean, "
        f"{short(best.mixed_ms)} ms in steps with prompts. TTFT {short(best.ttft_ms)} ms."
    )
    commands = [("Command", unit)]
    return _card("Fastest as one unit", best.tokens_per_s, [text, memory_text(best.decode)], commands, files)


def _apart(best: Apart, files: Files) -> str:
    decode, prefill = best.decode.deployment, best.prefill.deployment
    text = (
        f"{decode.layout}, batch {best.decode.batch}. TPOT {short(best.tpot_ms)} ms. Prefill {prefill.layout}, TTFT "
        f"{short(best.ttft_ms)} ms."
    )
    commands = [("Decode", decode), ("Prefill", prefill)]
    notes = [text, units_text(best), memory_text(best.decode)]
    return _card("Fastest apart", best.tokens_per_s, notes, commands, files)


def _card(
    title: str, rate: float, notes: Sequence[str], commands: Sequence[tuple[str, Deployment]], files: Files
) -> str:
    said = "".join(f"<p>{escape(note)}</p>" for note in notes)
    figure = f"{rate:,.0f}" if rate >= 100 else short(rate)
    lines = "".join(f"<h4>{name}</h4><pre>{escape(command(unit, files))}</pre>" for name, unit in commands)
    return (
        f'<section class="card"><h3>{title}</h3><p class="figure">{figure} <small>tok/s/GPU</small></p>'
        f"{said}{lines}</section>"
    )


def _section(
    title: str, head: Cells, rows: Sequence[Cells], *, name: str = "", note: str = "", plain: bool = False
) -> str:
    start = f"<h2{_id(name)}>{title}</h2>" + (f"<p>{escape(note)}</p>" if note and rows else "")
    if not rows:
        return f"{start}<p>Nothing fits.</p>"
    sides = [' class="left"' if i == 0 or cell in _LEFT else "" for i, cell in enumerate(head)]
    names = "".join(f'<th scope="col"{side}>{escape(cell)}</th>' for side, cell in zip(sides, head, strict=True))
    lines = "".join(f"<tr>{_row(sides, row)}</tr>" for row in rows)
    kind = ' class="plain"' if plain else ""
    return start + _scroll(title, f"<table{kind}><thead><tr>{names}</tr></thead><tbody>{lines}</tbody></table>")


def _row(sides: Sequence[str], row: Cells) -> str:
    first, *rest = [escape(cell) for cell in row]
    cells = "".join(f"<td{side}>{cell}</td>" for side, cell in zip(sides[1:], rest, strict=True))
    return f'<th scope="row"{sides[0]}>{first}</th>{cells}'


def _scroll(title: str, table: str) -> str:
    """Wide tables scroll within themselves, under the arrow keys too."""
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(title)}">{table}</div>'


def _list(rows: Sequence[str], title: str) -> str:
    items = "".join(f"<li>{escape(row)}</li>" for row in rows)
    return f"<h2>{title}</h2><ul>{items}</ul>"


def _sources(answer: Answer) -> list[str]:
    constants = answer.constants
    return [
        f"fitted: gap {constants.gap_us:g} µs per layer and micro-batch; transfers over a network × "
        f"{constants.wire_stretch:g}; prefill × {constants.prefill_stretch:g} (validate=true lists the runs)",
        *[f"{name}: {source}" for name, source in answer.machine.sources],
    ]


def _id(name: str) -> str:
    return f' id="{name}"' if name else ""
