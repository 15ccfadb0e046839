"""The report's maps as PNG files, for chats and slides. L layers; a cell is a load over its layer's mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

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


def write_pictures(data: dict[str, Any], page: Path) -> list[Path]:
    """`report-experts.png`, `-ranks.png` and, with a plan, `-planned.png` beside `page` (report.html)."""
    experts = np.asarray(data["expert_load"], dtype=np.float64)
    named = {own["key"]: np.asarray(own["rank_load"], dtype=np.float64) for own in data["placements"]}
    about = f"{data['model']}, ep={data['ep']}, {data['tokens']} tokens"
    most = max(float(_relative(load).max()) for load in named.values())
    found = {"experts": load_map(_relative(experts), f"{about}: load of the experts", "expert", None)}
    found["ranks"] = load_map(_relative(named["recorded"]), f"{about}: rows of the ranks", "rank", most)
    if "plan" in named:
        found["planned"] = load_map(_relative(named["plan"]), f"{about}: rows of the ranks, planned", "rank", most)
    files = []
    for name, pixels in found.items():
        files.append(page.with_name(f"{page.stem}-{name}.png"))
        files[-1].write_bytes(png_bytes(pixels))
    return files


def load_map(values: NDArray[np.float64], title: str, column: str, most: float | None) -> Pixels:
    """`values [L, columns]` as a map with a title, axes and a scale up to `most` (None: the largest value)."""
    layers, columns = values.shape
    most = max(1.0, float(values.max()) if most is None else most)
    wide = max(1, _WIDE // columns)
    high = min(40, max(14, 320 // layers))
    body = enlarge(shades(values, most), high, wide)
    if wide > 4:
        body[:, wide - 1 :: wide] = 255
    body[high - 1 :: high] = 255
    width = _LEFT + max(body.shape[1], text_width(title, _SCALE), 480) + _MARGIN
    pixels = blank(_TOP + body.shape[0] + 3 * _LINE + 2 * _MARGIN, width)
    write_text(pixels, title, top=_MARGIN, left=_MARGIN, scale=_SCALE)
    paste(pixels, body, top=_TOP, left=_LEFT)
    for layer in range(0, layers, max(1, -(-_LINE // high))):
        top = _TOP + layer * high + (high - _LINE) // 2
        write_text(pixels, f"LAYER {layer}", top=top, left=_MARGIN, scale=_SCALE, color=QUIET)
    below = _TOP + body.shape[0] + 8
    step = next(n for n in (1, 2, 4, 8, 16, 32, 64, 128, 256) if n * wide >= 48 or n == 256)
    for number in range(0, columns, step):
        left = _LEFT + number * wide + (wide - text_width(str(number), _SCALE)) // 2
        write_text(pixels, str(number), top=below, left=left, scale=_SCALE, color=QUIET)
    _scale(pixels, f"{column}, load over its layer mean: 0", most, top=below + _LINE + 20)
    return pixels


def _scale(pixels: Pixels, text: str, most: float, *, top: int) -> None:
    write_text(pixels, text, top=top, left=_LEFT, scale=_SCALE, color=QUIET)
    left = _LEFT + text_width(text, _SCALE) + 16
    ramp = shades(np.linspace(0, most, 160)[None], most).repeat(_LINE, axis=0)
    room = pixels.shape[1] - left
    if room < ramp.shape[1]:
        return
    paste(pixels, ramp, top=top, left=left)
    write_text(pixels, f"{most:.2f}X", top=top, left=left + ramp.shape[1] + 16, scale=_SCALE, color=QUIET)


def _relative(load: NDArray[np.float64]) -> NDArray[np.float64]:
    mean = load.mean(axis=1, keepdims=True)
    relative: NDArray[np.float64] = np.divide(load, mean, out=np.zeros(load.shape), where=mean > 0)
    return relative
