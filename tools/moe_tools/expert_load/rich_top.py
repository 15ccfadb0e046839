"""The live terminal view of `top`, with rich. Values are never read as rich's markup."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from moe_runtime.cli.console import count
from moe_tools.expert_load.top import HEADER, View

_UNEVEN, _MIDDLING = 0.5, 0.75
_BESIDE_ROWS: Final = 8
"""Lines of the panel's frame, the table's head and the hint"""
_NUMBERS: Final = 4
"""Columns that are never cut: the layer, two numbers and the bar"""
_WIDE: Final = 110
"""Columns from which a bar of 24 has room; below it has 8"""


def watch(look: Callable[[], View], *, every_s: float) -> None:
    """Show `look()` again and again, until the engine has ended or Ctrl-C; what was shown last stays."""
    console = Console(markup=False, highlight=False, emoji=False)
    view = look()
    with Live(_fitted(view, console), console=console, auto_refresh=False, screen=True) as live:
        try:
            while not view.over:
                time.sleep(every_s)
                view = look()
                live.update(_fitted(view, console), refresh=True)
        except KeyboardInterrupt:
            pass
    console.print(render(view, width=console.width))


def _fitted(view: View, console: Console) -> RenderableType:
    return render(view, width=console.width, most_rows=max(1, console.height - len(view.pairs) - _BESIDE_ROWS))


def render(view: View, *, width: int, most_rows: int | None = None) -> RenderableType:
    """The panel and the table of one look; of more than `most_rows` layers, the least even ones."""
    grid = Table.grid(padding=(0, 2))
    for name, value in view.pairs:
        grid.add_row(Text(name, style="dim"), Text(value, no_wrap=True, overflow="ellipsis"))
    panel = Panel(grid, title=Text(view.title, style="bold"), title_align="left", border_style="dim", expand=False)
    if not view.rows:
        return panel
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    bar_width = 24 if width >= _WIDE else 8
    for number, name in enumerate((*HEADER[:2], "", *HEADER[2:])):
        least = (len(name) or bar_width) if number < _NUMBERS else None
        table.add_column(Text(name), no_wrap=True, overflow="ellipsis", min_width=least)
    shown = view.rows
    if most_rows is not None and most_rows < len(shown):
        shown = tuple(sorted(sorted(shown, key=_evenness)[:most_rows], key=view.rows.index))
    for row in shown:
        even = bar(_evenness(row), bar_width) if _evenness(row) <= 1 else ""
        table.add_row(*map(Text, row[:2]), Text(f"{even:<{bar_width}}", style=_style(row)), *map(Text, row[2:]))
    hints = [] if view.over else ["Ctrl-C ends this view; the engine runs on."]
    if len(shown) < len(view.rows):
        hints.insert(0, f"The {count(len(shown), 'least even layer')} of {len(view.rows)}; once=true prints all.")
    return Group(panel, table, Text(" ".join(hints), style="dim", no_wrap=True, overflow="ellipsis"))


def bar(part: float, width: int) -> str:
    """A bar of `part` of `width`, in eighths of a character."""
    whole, eighths = divmod(round(min(max(part, 0.0), 1.0) * width * 8), 8)
    return "█" * whole + " ▏▎▍▌▋▊▉"[eighths].strip()


def _evenness(row: tuple[str, ...]) -> float:
    """Balancedness of a layer's row; one without tokens comes last."""
    try:
        return float(row[1])
    except ValueError:
        return 2.0


def _style(row: tuple[str, ...]) -> str:
    """Blue to orange: told apart without red and green too."""
    value = _evenness(row)
    return "dark_orange" if value < _UNEVEN else "gold3" if value < _MIDDLING else "deep_sky_blue3"
