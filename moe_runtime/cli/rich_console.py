"""The terminal's view, with rich. Values are never read as rich's markup."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

from rich import box
from rich.console import Console as Rich
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from moe_runtime.cli.console import Advance, printable


class RichConsole:
    """See console.Console. NO_COLOR and the terminal's width are rich's to respect."""

    def __init__(self, stream: TextIO) -> None:
        self._rich = Rich(file=stream, markup=False, highlight=False, emoji=False)

    def line(self, text: str = "") -> None:
        self._rich.print(Text(text), soft_wrap=True)  # a command that is printed can be copied in one piece

    def pairs(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        grid = Table.grid(padding=(0, 2))
        for name, value in rows:
            grid.add_row(Text(name, style="dim"), Text(value))
        self._rich.print(
            Panel(grid, title=Text(title, style="bold"), title_align="left", border_style="dim", expand=False)
        )

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        table = Table(title=Text(title, style="bold"), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for name in header:
            table.add_column(Text(name))
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        self._rich.print(table)

    def text(self, prompt: str, answer: str) -> None:
        self._rich.print(Text.assemble((printable(prompt), "dim"), (printable(answer).rstrip(), "bold")))
        self._rich.rule(style="dim")

    @contextmanager
    def progress(self, title: str, total: int) -> Iterator[Advance]:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self._rich, transient=True) as bar:
            task = bar.add_task(title, total=total or None, state="")
            yield lambda done, state: bar.update(task, completed=done, state=state)

    def error(self, text: str) -> None:
        self._rich.print(Panel(Text(printable(text)), title="error", title_align="left", border_style="red"))
