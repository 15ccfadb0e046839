"""The live terminal view of `top`, with rich. Values are never read as rich's markup."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from moe_tools.expert_load.top import HEADER, View

_UNEVEN, _MIDDLING = 0.5, 0.75


def watch(look: Callable[[], View], *, every_s: float) -> None:
    """Show `look()` again and again, until the engine has ended or Ctrl-C; what was shown last stays."""
    console = Console(markup=False, highlight=False, emoji=False)
    view = look()
    with Live(render(view), console=console, auto_refresh=False, screen=True, vertical_overflow="crop") as live:
        try:
            while not view.over:
                time.sleep(every_s)
                view = look()
                live.update(render(view), refresh=True)
        except KeyboardInterrupt:
            pass
    console.print(render(view))


def render(view: View) -> RenderableType:
    """The panel and the table of one look."""
    grid = Table.grid(padding=(0, 2))
    for name, value in view.pairs:
        grid.add_row(Text(name, style="dim"), Text(value))
    panel = Panel(grid, title=Text(view.title, style="bold"), title_align="left", border_style="dim", expand=False)
    if not view.rows:
        return panel
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in HEADER:
        table.add_column(Text(name))
    for layer, even, bar, *rest in view.rows:
        table.add_row(Text(layer), Text(even), Text(f"{bar:<24}", style=_style(even)), *map(Text, rest))
    hint = [] if view.over else [Text("Ctrl-C ends this view; the engine runs on.", style="dim")]
    return Group(panel, table, *hint)


def _style(even: str) -> str:
    """Blue to orange: told apart without red and green too."""
    try:
        value = float(even)
    except ValueError:
        return ""
    return "dark_orange" if value < _UNEVEN else "gold3" if value < _MIDDLING else "deep_sky_blue3"
