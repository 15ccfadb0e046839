"""The report as one HTML file that needs nothing else: no network, no other file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

_FOLDER: Final = Path(__file__).with_name("page")
_SCRIPTS: Final = ("draw.js", "heatmap.js", "charts.js", "page.js")


def page_html(data: dict[str, Any]) -> str:
    """The page that shows `data` (document.Document.data)."""
    # "</script>" within a text of the trace would end the data's element.
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    head, _, rest = _read("page.html").partition("{{style}}")
    middle, _, rest = rest.partition("{{data}}")
    last, _, end = rest.partition("{{script}}")
    scripts = "".join(_read(name) for name in _SCRIPTS)
    return "".join([head, _read("page.css"), middle, text, last, scripts, end])


def _read(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")
