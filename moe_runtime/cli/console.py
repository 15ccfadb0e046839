"""What a person sees: rich on a terminal, plain lines elsewhere. Both show the same."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, TextIO

Advance = Callable[[int, str], None]
"""(done so far, a word on the state)"""


class Console(Protocol):
    """Where reports go."""

    def line(self, text: str = "") -> None: ...

    def pairs(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """A titled list of name and value."""

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None: ...

    def text(self, prompt: str, answer: str) -> None:
        """A prompt and what the model wrote after it. Control characters are shown, not sent to the terminal."""

    def progress(self, title: str, total: int) -> AbstractContextManager[Advance]:
        """Shows how far the block has come; `total` 0: unknown."""

    def error(self, text: str) -> None: ...


def open_console(stream: TextIO | None = None) -> Console:
    """Rich where the stream is a terminal, else plain."""
    stream = sys.stdout if stream is None else stream
    if not stream.isatty():
        return PlainConsole(stream)
    from moe_runtime.cli.rich_console import RichConsole

    return RichConsole(stream)


class PlainConsole:
    """Lines that tools can read: no colour, no boxes, no cursor movement."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def line(self, text: str = "") -> None:
        self._stream.write(text + "\n")
        self._stream.flush()

    def pairs(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        self.line(title)
        width = max((len(name) for name, _ in rows), default=0)
        for name, value in rows:
            self.line(f"  {name:<{width}}  {value}".rstrip())
        self.line()

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        self.line(title)
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        for row in (header, *rows):
            self.line("  " + "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
        self.line()

    def text(self, prompt: str, answer: str) -> None:
        # The block marks where the model takes over.
        written = f"{printable(prompt)}█{printable(answer).rstrip()}"
        self.line("\n".join("  " + line for line in written.split("\n")) + "\n")

    @contextmanager
    def progress(self, title: str, total: int) -> Iterator[Advance]:
        self.line(f"{title} …")
        yield lambda done, state: None

    def error(self, text: str) -> None:
        self.line(printable(text))


def count(number: int, noun: str) -> str:
    """`1 rank`, `2 ranks`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def printable(text: str) -> str:
    """`text` with control characters spelled out, so that it cannot steer a terminal. Newlines and tabs stay."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)
