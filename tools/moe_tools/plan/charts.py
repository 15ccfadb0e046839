"""The page's two pictures, without a script: parts of a decode step as bars, speed per user and per GPU as points."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape
from typing import Final

from moe_tools.plan.answer import Decode
from moe_tools.plan.report import short

PARTS: Final = (
    ("attention", "attention"), ("experts", "experts"), ("shared expert", "shared"), ("dense layers", "dense"),
    ("head", "head"), ("exposed transfers", "transfers"),
)  # fmt: skip
"""What a step's time is made of, with the colours' names in page.css; the parts add up to the step."""
_LEFT, _TOP, _WIDE, _HIGH = 70, 40, 980, 300


def parts_ms(one: Decode) -> list[float]:
    """Milliseconds of `PARTS` on the busiest rank."""
    terms = [one.step.terms[name] / 1e3 for name, _ in PARTS[:-1]]
    return [*terms, one.step.summary.exposed_us[0] / 1e3]


def bars(decodes: Sequence[Decode]) -> str:
    """A table: each unit's parts as a bar and as numbers."""
    widest = max(one.tpot_ms for one in decodes)
    names = "".join(f'<th scope="col"><i class="dot {colour}"></i>{name} ms</th>' for name, colour in PARTS)
    rows = []
    for number, one in enumerate(decodes, 1):
        values = parts_ms(one)
        pieces = "".join(
            f'<i class="{colour}" style="width:{100 * value / widest:.2f}%" title="{name}: {value:.2f} ms"></i>'
            for value, (name, colour) in zip(values, PARTS, strict=True) if value > 0
        )  # fmt: skip
        numbers = "".join(f"<td>{short(value)}</td>" for value in values)
        rows.append(
            f'<tr><td>{number}</td><th scope="row" class="left">{escape(str(one.deployment.layout))} ×{one.batch}</th>'
            f'<td class="bar" aria-hidden="true"><div>{pieces}</div></td>{numbers}<td>{short(one.tpot_ms)}</td></tr>'
        )
    return (
        f'<table class="plain"><thead><tr><th scope="col">#</th><th scope="col" class="left">decode unit × batch</th>'
        f'<th scope="col" class="left">of a step</th>{names}<th scope="col">TPOT ms</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def scatter(decodes: Sequence[Decode], *, labelled: int) -> str:
    """Points numbered as in the table, up to `labelled`; each says what it is under the mouse and the tab key."""
    speeds = [1e3 / one.tpot_ms for one in decodes]
    most_x, most_y = _round_up(max(speeds)), _round_up(max(one.tokens_per_s for one in decodes))
    least_x = most_x / 4 * min(3, math.floor(min(speeds) / (most_x / 4)))
    places = [
        (_LEFT + _WIDE * (x - least_x) / (most_x - least_x), _TOP + _HIGH * (1 - one.tokens_per_s / most_y))
        for x, one in zip(speeds, decodes, strict=True)
    ]
    labels = _labels(places, labelled)
    marks = list(_grid(least_x, most_x, most_y))
    for number, (one, (x, y)) in enumerate(zip(decodes, places, strict=True), 1):
        said = escape(
            f"{number}: {one.deployment.layout}, batch {one.batch}: {1e3 / one.tpot_ms:.0f} tokens/s per user, "
            f"{one.tokens_per_s:.0f} per GPU"
        )
        label = ""
        if number <= labelled:
            dx, dy = labels[number - 1]
            label = f'<text x="{x + dx:.1f}" y="{y + dy:.1f}" text-anchor="middle">{number}</text>'
        marks.append(
            f'<g class="point" tabindex="0" role="img" aria-label="{said}"><circle cx="{x:.1f}" cy="{y:.1f}" '
            f'r="{6 if number <= labelled else 4}"/>{label}'
            f'<text class="tip" x="{_LEFT + _WIDE}" y="18" text-anchor="end">{said}</text></g>'
        )
    return (
        f'<svg viewBox="0 0 1110 {_TOP + _HIGH + 52}" role="group" aria-label="tokens per second, per user and GPU">'
        f'{"".join(marks)}<text x="{_LEFT + _WIDE / 2}" y="{_TOP + _HIGH + 46}" text-anchor="middle">'
        f'tokens/s of one user</text><text x="{_LEFT}" y="18">tokens/s/GPU while decoding</text></svg>'
    )


def _grid(least_x: float, most_x: float, most_y: float) -> Iterator[str]:
    bottom = _TOP + _HIGH
    for part in range(5):
        x, y = _LEFT + _WIDE * part / 4, bottom - _HIGH * part / 4
        speed = least_x + (most_x - least_x) * part / 4
        yield f'<text x="{x:.0f}" y="{bottom + 22}" text-anchor="middle">{speed:g}</text>'
        yield f'<text x="{_LEFT - 10}" y="{y + 5:.0f}" text-anchor="end">{most_y * part / 4:g}</text>'
        yield f'<line class="grid" x1="{_LEFT}" x2="{_LEFT + _WIDE}" y1="{y:.0f}" y2="{y:.0f}"/>'


def _labels(places: Sequence[tuple[float, float]], count: int) -> list[tuple[float, float]]:
    """Offsets of the first `count` labels from their points: the first place around it that nothing else is near."""
    offsets = (
        (0.0, -11.0),
        (14.0, 5.0),
        (-14.0, 5.0),
        (0.0, 21.0),
        (14.0, -8.0),
        (-14.0, -8.0),
        (14.0, 18.0),
        (-14.0, 18.0),
    )
    taken: list[tuple[float, float]] = []
    found: list[tuple[float, float]] = []
    for x, y in places[:count]:
        others = [*taken, *[(px, py + 5) for px, py in places if (px, py) != (x, y)]]
        rooms = [
            min((max(abs(x + dx - ox), abs(y + dy - oy)) for ox, oy in others), default=99.0) for dx, dy in offsets
        ]
        best = next((offset for offset, room in zip(offsets, rooms, strict=True) if room >= 13), None)
        best = offsets[rooms.index(max(rooms))] if best is None else best
        found.append(best)
        taken.append((x + best[0], y + best[1]))
    return found


def _round_up(value: float) -> float:
    """The next of 4, 6, 8, 10, 12, 16, 20, 40, … times a power of ten: its quarters are short numbers."""
    power = 10.0 ** math.floor(math.log10(value) - 0.5)
    return next(step * power for step in (4, 6, 8, 10, 12, 16, 20, 24, 32, 40) if step * power >= value)
