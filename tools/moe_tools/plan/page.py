"""An answer as one HTML page that loads nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape
from typing import Final

from moe_tools.plan.evaluate import Answer, Decode, Whole
from moe_tools.plan.report import (
    DECODE_HEAD,
    PREFILL_HEAD,
    TERM_HEAD,
    WHOLE_HEAD,
    Cells,
    decode_cells,
    intro,
    memory_text,
    prefill_cells,
    term_cells,
    whole_cells,
)

_STYLE: Final = """
:root{--ink:#17202e;--soft:#5b6879;--line:#dfe4ea;--paper:#fbfaf7;--card:#fff;--accent:#0d6e6e}
*{box-sizing:border-box}body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
main{max-width:1280px;margin:0 auto;padding:32px 24px 64px}h1{font-size:28px;margin:0 0 4px}
h2{font-size:18px;margin:40px 0 10px}p,.soft{color:var(--soft)}p{margin:4px 0;max-width:90ch}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(320px,1fr));gap:16px;margin-top:20px}
.card{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:16px 18px}
.big{font-size:34px;font-weight:650;color:var(--accent);line-height:1.15}.big small{font-size:14px;color:var(--soft)}
pre{background:#17202e;color:#e8edf2;padding:12px 14px;border-radius:8px;
white-space:pre-wrap;overflow-wrap:anywhere;font-size:12px}
.scroll{overflow-x:auto;background:var(--card);border:1px solid var(--line);border-radius:10px}
table{border-collapse:collapse;width:100%;font-size:12.5px;font-variant-numeric:tabular-nums}
th,td{padding:6px 8px;text-align:right;white-space:nowrap;border-bottom:1px solid var(--line)}
th{color:var(--soft);font-weight:550}td:first-child,th:first-child,td:last-child,th:last-child{text-align:left}
tr:last-child td{border-bottom:0}tbody tr:first-child td{font-weight:600}svg{display:block;width:100%;height:auto}
.key span{display:inline-block;margin-right:16px;font-size:13px;color:var(--soft)}
.key i{display:inline-block;width:11px;height:11px;border-radius:3px;margin-right:6px;vertical-align:-1px}
details summary{cursor:pointer;color:var(--soft)}li{font-size:13px;color:var(--soft)}
"""

_PARTS: Final = (
    ("attention", "#2f6fb0"), ("experts", "#d9822b"), ("shared expert", "#e9b872"), ("dense layers", "#7a9a5b"),
    ("head", "#9a8fb8"), ("exposed transfers", "#c2413b"), ("waiting", "#c9ced6"),
)  # fmt: skip


def page(answer: Answer) -> str:
    """The page's text."""
    top = answer.plan.top
    head = "".join(f"<p>{escape(line)}</p>" for line in intro(answer).splitlines())
    body = [
        f"<h1>Capacity plan: {escape(answer.plan.model)} on {escape(answer.machine.rates.name)}</h1>{head}",
        '<div class="cards">' + "".join(_cards(answer)) + "</div>",
        "<h2>Where a decode step goes</h2>", _bars(answer.decodes[:top]),
        "<h2>Speed per user and per GPU</h2>", _scatter(answer.decodes),
        _section("Decode units", DECODE_HEAD, [decode_cells(one) for one in answer.decodes[:top]]),
        *[_section(f"Best decode unit, {one.deployment.layout}", TERM_HEAD, term_cells(one))
          for one in answer.decodes[:1]],
        _section("Prefill units", PREFILL_HEAD, [prefill_cells(one) for one in answer.prefills[:top]]),
        _section("Prefill and decode apart", WHOLE_HEAD, [whole_cells(one) for one in answer.apart[:top]]),
        _section("One unit for both", WHOLE_HEAD, [whole_cells(one) for one in answer.together[:top]]),
        _details(f"Not possible: {len(answer.refused)} cases",
                 [f"{one.layout} {one.phase}: {one.reason}" for one in answer.refused]),
        _details("Constants and sources", _sources(answer)),
    ]  # fmt: skip
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1"><title>Capacity plan</title>'
        f"<style>{_STYLE}</style><main>{''.join(body)}</main></html>\n"
    )


def _cards(answer: Answer) -> Iterator[str]:
    for title, found in (("Fastest as one unit", answer.together), ("Fastest apart", answer.apart)):
        if found:
            yield _card(title, found[0])
    if not answer.together and not answer.apart:
        yield '<div class="card"><div class="big">Nothing fits</div><p>The reasons are below.</p></div>'


def _card(title: str, best: Whole) -> str:
    deployment = best.decode.deployment
    prefill = f"<pre>{escape(best.prefill.deployment.command())}</pre>" if best.apart else ""
    share = f"; {best.prefill_share:.0%} of the GPUs prefill" if best.apart else ""
    return (
        f'<div class="card"><div class="soft">{title}</div><div class="big">{best.tokens_per_s:,.0f} '
        f"<small>tok/s/GPU</small></div><p>{escape(str(deployment.layout))}, batch {best.decode.batch}, TPOT "
        f"{best.tpot_ms:.1f} ms, TTFT {best.prefill.ttft_ms:.0f} ms{share}</p><p>{escape(memory_text(best.decode))}</p>"
        f"<pre>{escape(deployment.command())}</pre>{prefill}</div>"
    )


def _section(title: str, head: Cells, rows: Sequence[Cells]) -> str:
    if not rows:
        return f"<h2>{title}</h2><p>Nothing fits.</p>"
    names = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    inside = f"<thead><tr>{names}</tr></thead><tbody>{lines}</tbody>"
    return f'<h2>{title}</h2><div class="scroll"><table>{inside}</table></div>'


def _details(title: str, rows: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(row)}</li>" for row in rows)
    return f"<h2></h2><details><summary>{escape(title)}</summary><ul>{items}</ul></details>"


def _parts(one: Decode) -> list[float]:
    """Milliseconds of `_PARTS`."""
    step = one.step
    names = [name for name, _ in _PARTS[:-2]]
    return [step.terms[name] / 1e3 for name in names] + [
        step.summary.exposed_us[0] / 1e3, max(0.0, step.summary.waiting_us[0]) / 1e3,
    ]  # fmt: skip


def _bars(decodes: Sequence[Decode]) -> str:
    if not decodes:
        return "<p>Nothing fits.</p>"
    widest = max(sum(_parts(one)) for one in decodes)
    rows, left, width = [], 330, 700
    for number, one in enumerate(decodes):
        y, x = 8 + number * 30, float(left)
        rows.append(f'<text x="0" y="{y + 15}">{escape(str(one.deployment.layout))} ×{one.batch}</text>')
        for value, (name, colour) in zip(_parts(one), _PARTS, strict=True):
            w = value / widest * width
            rows.append(
                f'<rect x="{x:.1f}" y="{y}" width="{w:.1f}" height="20" fill="{colour}">'
                f"<title>{name}: {value:.2f} ms</title></rect>"
            )
            x += w
        rows.append(f'<text x="{x + 8:.1f}" y="{y + 15}">{one.tpot_ms:.1f} ms</text>')
    key = "".join(f'<span><i style="background:{colour}"></i>{name}</span>' for name, colour in _PARTS)
    height = 16 + 30 * len(decodes)
    return (
        f'<div class="card"><div class="key">{key}</div><svg viewBox="0 0 1110 {height}" font-size="13" '
        f'fill="#17202e" role="img" aria-label="parts of a decode step">{"".join(rows)}</svg></div>'
    )


def _scatter(decodes: Sequence[Decode]) -> str:
    if not decodes:
        return "<p>Nothing fits.</p>"
    most_x = _round_up(max(1e3 / one.tpot_ms for one in decodes))
    most_y = _round_up(max(one.tokens_per_s for one in decodes))
    marks = []
    for one in decodes:
        x, y = 70 + 980 * 1e3 / one.tpot_ms / most_x, 300 - 280 * one.tokens_per_s / most_y
        marks.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="6" fill="#0d6e6e" fill-opacity=".65"><title>'
            f"{escape(str(one.deployment.layout))} batch {one.batch}: {1e3 / one.tpot_ms:.0f} tok/s per user, "
            f"{one.tokens_per_s:.0f} tok/s/GPU</title></circle>"
        )
    for part in range(5):
        x, y = 70 + 980 * part / 4, 300 - 280 * part / 4
        marks.append(f'<text x="{x:.0f}" y="320" text-anchor="middle">{most_x * part / 4:g}</text>')
        marks.append(f'<text x="60" y="{y + 4:.0f}" text-anchor="end">{most_y * part / 4:g}</text>')
        marks.append(f'<line x1="70" x2="1050" y1="{y:.0f}" y2="{y:.0f}" stroke="#dfe4ea"/>')
    return (
        '<div class="card"><svg viewBox="0 0 1110 350" font-size="13" fill="#5b6879" role="img" '
        f'aria-label="tokens per second, per user and per GPU">{"".join(marks)}'
        '<text x="560" y="344" text-anchor="middle">tokens/s of one user</text>'
        '<text x="70" y="12">tokens/s/GPU while decoding</text></svg></div>'
    )


def _round_up(value: float) -> float:
    """The next of 4, 6, 8, 10, 12, 16, 20, 40, … times a power of ten: its quarters are short numbers."""
    power = 10.0 ** math.floor(math.log10(value) - 0.5)
    return next(step * power for step in (4, 6, 8, 10, 12, 16, 20, 24, 32, 40) if step * power >= value)


def _sources(answer: Answer) -> list[str]:
    constants = answer.constants
    return [
        f"fitted: gap {constants.gap_us:g} µs per layer and micro-batch; transfers over a network × "
        f"{constants.wire_stretch:g}; prefill × {constants.prefill_stretch:g} (validate=true lists the runs)",
        *[f"{name}: {source}" for name, source in answer.machine.sources],
    ]
