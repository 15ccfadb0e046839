"""The report's page: one file, whole, with nothing fetched and nothing of the trace read as markup; and its PNGs."""

from __future__ import annotations

import json
import re
import shutil
import struct
import subprocess
import zlib
from collections import Counter
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from moe_tools.expert_load.document import make_document
from moe_tools.expert_load.facts import Facts
from moe_tools.expert_load.page import page_html
from moe_tools.expert_load.pictures import load_map, write_pictures
from moe_tools.expert_load.planning import make_plan
from moe_tools.expert_load.png import GLYPH_HEIGHT, RAMP, blank, png_bytes, shades, write_text
from moe_tools.expert_load.source import placed

from moe_runtime.balance.trace_readers import read_any
from moe_runtime.parallel.placement import ExpertPlacement
from tests.tools.expert_load_traces import EXPERTS, LAYERS, random_routes, write_trace

EVIL = "</script><b id=evil>&{{data}}"
VOID = {"meta", "input", "link", "br"}


def data_of(folder: Path, model: str = "demo") -> dict[str, Any]:
    trace = write_trace(folder, model=model)
    return make_document(trace, plan=make_plan(trace), plan_name="A plan", facts=Facts(256, 1000)).data


class Page(HTMLParser):
    """Raises where tags do not close in order; collects what the tests ask for."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: Counter[str] = Counter()
        self.scripts: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "srcset", "action", "data"):
                self.links.append(value or "")
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "script":
            self.scripts.append(data)


def test_page_is_well_formed_and_alone(tmp_path: Path) -> None:
    text = page_html(data_of(tmp_path))
    page = Page(text)
    assert len(page.ids) == len(set(page.ids))
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert "default-src 'none'" in text
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|WebSocket|import\(", text)
    assert [
        found for found in re.findall(r"https?://[^\"' )]+", text) if not found.startswith("http://www.w3.org/")
    ] == []
    for tag in ("main", "header", "nav", "footer", "h1", "noscript"):
        assert page.tags[tag] == 1, tag


def test_script_and_page_name_the_same_places(tmp_path: Path) -> None:
    page = Page(page_html(data_of(tmp_path)))
    asked = set(re.findall(r'(?:byId|fill|radios|readout|frame)\("([a-z-]+)"', page.scripts[-1]))
    asked |= set(re.findall(r'\bid: "([a-z-]+)"', page.scripts[-1]))
    assert len(asked) > 20
    assert asked <= set(page.ids)


def test_data_survives_and_is_never_markup(tmp_path: Path) -> None:
    data = data_of(tmp_path, model=EVIL)
    page = Page(page_html(data))
    assert json.loads(page.scripts[0]) == data
    assert data["model"] == EVIL
    assert "evil" not in page.ids
    assert "innerHTML" not in page.scripts[-1].replace("outerHTML", "")


def pixels_of(png: bytes) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A decoder of what `png_bytes` writes, from the format's text."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    at, packed, size = 8, b"", (0, 0)
    while at < len(png):
        length, kind = struct.unpack(">I4s", png[at : at + 8])
        body = png[at + 8 : at + 8 + length]
        assert struct.unpack(">I", png[at + 8 + length : at + 12 + length])[0] == zlib.crc32(kind + body)
        if kind == b"IHDR":
            width, height, depth, color = struct.unpack(">IIBB", body[:10])
            assert (depth, color) == (8, 2)
            size = (height, width)
        packed += body if kind == b"IDAT" else b""
        at += 12 + length
    rows = np.frombuffer(zlib.decompress(packed), dtype=np.uint8).reshape(size[0], 1 + 3 * size[1])
    assert not rows[:, 0].any()
    return rows[:, 1:].reshape(*size, 3)


def test_png_round_trip() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    assert (pixels_of(png_bytes(pixels)) == pixels).all()


def test_shades_fall_evenly_in_lightness() -> None:
    """So a map reads the same without colour vision and in grey."""
    ends = shades(np.array([[0.0, 5.0, 10.0]]), 10.0)[0]
    assert [tuple(ends[0]), tuple(ends[2])] == [RAMP[0], RAMP[-1]]
    light = shades(np.linspace(0, 1, 64)[None], 1.0)[0].astype(float) @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(light) < 0).all()
    assert (shades(np.zeros((2, 2)), 0.0) == np.array(RAMP[0])).all()


def test_text_in_pictures() -> None:
    pixels = blank(GLYPH_HEIGHT + 2, 8)
    write_text(pixels, "1é", top=1, left=1, scale=1)
    ink = (pixels != 255).any(axis=2)
    assert ink[1:8, 1:6].astype(int).sum(axis=1).tolist() == [1, 2, 1, 1, 1, 1, 3]
    assert not ink[:, 6:].any()


def test_pictures(tmp_path: Path) -> None:
    files = write_pictures(data_of(tmp_path / "trace"), tmp_path / "report.html")
    names = ["experts", "ranks", "traffic", "planned", "planned-traffic"]
    assert [file.name for file in files] == [f"report-{name}.png" for name in names]
    for file in files:
        assert len({tuple(color) for color in pixels_of(file.read_bytes()).reshape(-1, 3)[::7]}) > 5


def test_no_script_passes_data_as_arguments(tmp_path: Path) -> None:
    """Browsers take 65,536 arguments; a trace of 94 layers on 320 ranks has more cells."""
    script = Page(page_html(data_of(tmp_path))).scripts[-1]
    spread = re.findall(r"Math\.(?:max|min)\((?:[^()]|\([^()]*\))*\.\.\.([a-z]+)", script)
    assert set(spread) <= {"values", "lines"}, "these hold a number for each placement"


@pytest.mark.parametrize("shape", [(1, 1), (58, 320), (61, 2000)])
def test_maps_of_all_sizes(shape: tuple[int, int]) -> None:
    assert load_map(np.ones(shape), "a title", "rank", None).shape[1] >= shape[1]


MEASURE = """<script>
const root = document.documentElement, all = [...document.querySelectorAll("body *:not(.compare *)")];
const wide = all.filter((one) => one.getBoundingClientRect().right > innerWidth + 0.5).map((one) => one.outerHTML);
const curve = document.querySelector("#curve svg");
for (let i = 0; i < 99; i += 1) curve.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight" }));
root.dataset.seen = JSON.stringify({ wide, dark: matchMedia("(prefers-color-scheme: dark)").matches,
  width: innerWidth, content: root.scrollWidth, last: document.querySelector("#curve .said").textContent,
  rows: [...document.querySelectorAll("#plan tr")].map((row) => row.textContent),
  captions: [...document.querySelectorAll("#traffic-maps .caption b")].map((one) => one.textContent),
  scales: [...document.querySelectorAll("#traffic-maps .scale")].map((one) => one.textContent) });
</script></body>"""


def browsed(file: Path, text: str, *, width: int = 1440, dark: bool = False) -> tuple[Page, dict[str, Any], str]:
    """The page as a browser has drawn it, what MEASURE saw there, and its markup. Fails where the console says a
    word."""
    file.write_text(text.replace("</body>", MEASURE), encoding="utf-8")
    words = [
        "chromium",
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={file.parent / 'profile'}",
    ]
    words += [f"--window-size={width},900", f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
    words += ["--enable-logging=stderr", "--virtual-time-budget=3000", "--dump-dom", file.as_uri()]
    result = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in result.stderr, result.stderr
    seen = re.search(r'data-seen="([^"]*)"', result.stdout)
    assert seen is not None, "the script of the page did not come to its end"
    return Page(result.stdout.replace("<!DOCTYPE html>", "")), json.loads(unescape(seen[1])), result.stdout


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no browser here")
@pytest.mark.parametrize(("width", "dark"), [(1440, False), (1440, True), (1024, False), (1024, True)])
def test_a_browser_draws_it(width: int, dark: bool, tmp_path: Path) -> None:
    """At a desktop's and a laptop's width nothing is wider than the window."""
    page = page_html(data_of(tmp_path / "trace", model=EVIL))
    drawn, seen, text = browsed(tmp_path / "report.html", page, width=width, dark=dark)
    assert seen["width"] == width and seen["dark"] == dark
    assert seen["content"] <= width and seen["wide"] == []
    assert drawn.tags["canvas"] == 2 * (3 + 3)  # maps with their scales; traffic has one for each placement
    assert drawn.tags["option"] == 1 + LAYERS
    assert drawn.tags["td"] > 50
    for said in (
        "Rows into the busiest rank from others",
        "Once to each node that it needs",
        "This run was not balanced",
    ):
        assert said in text
    assert "No balancing: the same, so its marks lie under the others" in text
    assert not any("–" in row for row in seen["rows"] if row.startswith("Expert weights per rank"))
    assert len(set(seen["scales"])) == 1
    assert "evil" not in drawn.ids
    assert f"{EXPERTS}, 2 per token" in text


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no browser here")
def test_a_browser_tells_other_ranks_apart(tmp_path: Path) -> None:
    """Of a plan for 3 ranks: shares of time and traffic are compared on 3 ranks alone, and maps of 4 have their own
    scale."""
    trace = write_trace(tmp_path / "trace")
    data = make_document(
        trace, plan=make_plan(trace, ep=3), plan_name="The plan of p.json", facts=Facts(256, 1000)
    ).data
    _, seen, text = browsed(tmp_path / "report.html", page_html(data), width=1024)
    assert seen["wide"] == []
    assert seen["captions"] == ["No balancing, 3 ranks", "As recorded, 4 ranks", "Planned, 3 ranks"]
    ends = [f"(rank {ep} of {ep} from the busiest)" for ep in (3, 4, 3)]
    assert re.findall(r"\(rank[^)]*\)", seen["last"]) == ends, "the last column is each placement's last rank"
    assert seen["scales"][0] == seen["scales"][2] != seen["scales"][1]
    assert "The plan of p.json is for 3 ranks, not 4" in text
    cells = re.findall(r"<tr><th scope=\"row\">[^<]*</th>(.*?)</tr>", text)
    best = [[bool(mark) for mark in re.findall(r"<td( class=\"best\")?", row)] for row in cells]
    assert any(True in row for row in best), "the plan is better than no balancing on as many"
    assert not any(row[1] for row in best), "the recording's are of other ranks"


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no browser here")
def test_a_browser_calls_nothing_recorded_that_is_assumed(tmp_path: Path) -> None:
    for number, own in enumerate(random_routes().numpy()):
        np.save(tmp_path / f"{number}.npy", own)
    trace = placed(
        read_any(tmp_path, num_routed=EXPERTS),
        ExpertPlacement.uniform(LAYERS, EXPERTS, ep=4),
        model="m",
        ranks_per_node=2,
    )
    data = make_document(trace, plan=make_plan(trace), plan_name="A plan", facts=None).data
    _, seen, body = browsed(tmp_path / "report.html", page_html(data), width=1024)
    assert seen["wide"] == []
    body = re.sub(r"<script.*?</script>", "", body, flags=re.S)
    for said in ("As placed, the busiest rank would do", "as placed (assumed), all layers", "vllm (per_token)"):
        assert said in body
    assert not re.search("as recorded|was recorded|measured|This run", body, flags=re.I)
