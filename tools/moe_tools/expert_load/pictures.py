"""The report's maps as PNG files, for chats and slides. L layers, S ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from moe_runtime.launch.sizing import format_bytes
from moe_tools.expert_load.png import (
    GLYPH_HEIGHT,
    QUIET,
    Pixels,
    blank,
    enlarge,
    paste,
    png_bytes,
    shades,
    text_width,
    write_text,
)

_SCALE: Final = 2
_LINE: Final = GLYPH_HEIGHT * _SCALE
_MARGIN: Final = 32
_LEFT: Final = 132
_TOP: Final = 92
_WIDE: Final = 1280
_SQUARE: Final = 800
_RAMP: Final = 160
_GAP: Final = 16


def write_pictures(data: dict[str, Any], page: Path) -> list[Path]:
    """`report-experts.png`, `-ranks.png`, `-traffic.png` and, with a plan, `-planned.png` and `-planned-traffic.png`
    beside `page` (report.html)."""
    experts = np.asarray(data["expert_load"], dtype=np.float64)
    named = {own["key"]: np.asarray(own["rank_load"], dtype=np.float64) for own in data["placements"]}
    about = {own["key"]: f"{data['model']}, ep={own['ep']}, {data['tokens']} tokens" for own in data["placements"]}
    here, how = about["recorded"], "as recorded" if data["measured"] else "as placed (assumed)"
    most = max(float(_relative(load).max()) for load in named.values())
    found = {"experts": load_map(_relative(experts), f"{here}: load of the experts", "expert", None)}
    found["ranks"] = load_map(_relative(named["recorded"]), f"{here}: rows of the ranks, {how}", "rank", most)
    sent = {key: np.asarray(data["traffic"][key]["ranks"], dtype=np.float64) for key in named}
    unit, busiest = data["traffic"]["unit"], _scales(data)
    found["traffic"] = traffic_map(sent["recorded"], f"{here}: dispatch, {how}", unit, busiest["recorded"])
    if "plan" in named:
        there = about["plan"]
        found["planned"] = load_map(_relative(named["plan"]), f"{there}: rows of the ranks, planned", "rank", most)
        found["planned-traffic"] = traffic_map(sent["plan"], f"{there}: dispatch, planned", unit, busiest["plan"])
    files = []
    for name, pixels in found.items():
        files.append(page.with_name(f"{page.stem}-{name}.png"))
        files[-1].write_bytes(png_bytes(pixels))
    return files


def _scales(data: dict[str, Any]) -> dict[str, float]:
    """The most that a rank sends another, by placement: one number for all on as many ranks and known as exactly."""
    most: dict[tuple[int, bool], float] = {}
    kinds = {own["key"]: (own["ep"], data["traffic"][own["key"]]["exact"]) for own in data["placements"]}
    for key, kind in kinds.items():
        most[kind] = max(most.get(kind, 0.0), float(np.max(data["traffic"][key]["ranks"])))
    return {key: most[kind] for key, kind in kinds.items()}


def load_map(values: NDArray[np.float64], title: str, column: str, most: float | None) -> Pixels:
    """`values [L, columns]`, loads over their layer's mean, with a title, axes and a scale up to `most` (None: the
    largest value)."""
    layers, columns = values.shape
    most = max(1.0, float(values.max()) if most is None else most)
    cell = (min(40, max(14, 320 // layers)), max(1, _WIDE // columns))
    return _map(values, title, "LAYER", cell, most, f"{column}, load over its layer mean: 0", f"{most:.2f}X")


def traffic_map(matrix: NDArray[np.float64], title: str, unit: str, most: float) -> Pixels:
    """`matrix [S, S]` of bytes or rows, from the rank of the row to that of the column, on a scale up to `most`."""
    side = max(3, _SQUARE // len(matrix))
    last = format_bytes(int(most)) if unit == "bytes" else f"{most:.0f} rows"
    return _map(matrix, title, "RANK", (side, side), max(1.0, most), "down: from rank, across: to rank. 0", last)


def _map(
    values: NDArray[np.float64], title: str, row: str, cell: tuple[int, int], most: float, about: str, last: str
) -> Pixels:
    """`cell`: its height and width in pixels; `about`, the colours up to `most`, and `last` stand under the map."""
    (rows, columns), (high, wide) = values.shape, cell
    body = enlarge(shades(values, most), high, wide)
    if wide > 4:
        body[:, wide - 1 :: wide] = 255
    if high > 4:
        body[high - 1 :: high] = 255
    scale = text_width(about, _SCALE) + _RAMP + text_width(last, _SCALE) + 2 * _GAP
    width = _LEFT + max(body.shape[1], text_width(title, _SCALE), scale) + _MARGIN
    pixels = blank(_TOP + body.shape[0] + 3 * _LINE + 2 * _MARGIN, width)
    write_text(pixels, title, top=_MARGIN, left=_MARGIN, scale=_SCALE)
    paste(pixels, body, top=_TOP, left=_LEFT)
    for number in range(0, rows, _step(high, _LINE + 10)):
        top = _TOP + number * high + (high - _LINE) // 2
        write_text(pixels, f"{row} {number}", top=top, left=_MARGIN, scale=_SCALE, color=QUIET)
    below = _TOP + body.shape[0] + 8
    for number in range(0, columns, _step(wide, 48)):
        left = _LEFT + number * wide + (wide - text_width(str(number), _SCALE)) // 2
        write_text(pixels, str(number), top=below, left=left, scale=_SCALE, color=QUIET)
    _scale(pixels, about, last, top=below + _LINE + 20)
    return pixels


def _step(pixels: int, least: int) -> int:
    """Lines from one number to the next, where a line has `pixels` and a number takes `least`."""
    return next(n for n in (1, 2, 4, 8, 16, 32, 64, 128, 256) if n * pixels >= least or n == 256)


def _scale(pixels: Pixels, text: str, last: str, *, top: int) -> None:
    write_text(pixels, text, top=top, left=_LEFT, scale=_SCALE, color=QUIET)
    left = _LEFT + text_width(text, _SCALE) + _GAP
    paste(pixels, shades(np.linspace(0, 1, _RAMP)[None], 1.0).repeat(_LINE, axis=0), top=top, left=left)
    write_text(pixels, last, top=top, left=left + _RAMP + _GAP, scale=_SCALE, color=QUIET)


def _relative(load: NDArray[np.float64]) -> NDArray[np.float64]:
    mean = load.mean(axis=1, keepdims=True)
    relative: NDArray[np.float64] = np.divide(load, mean, out=np.zeros(load.shape), where=mean > 0)
    return relative
