"""The planner's page: whole, alone, readable without a mouse, in both themes; and its figures in short form."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from moe_tools.plan import page as page_module
from moe_tools.plan.answer import Answer
from moe_tools.plan.charts import PARTS, parts_ms
from moe_tools.plan.evaluate import Evaluator, evaluate
from moe_tools.plan.page import page
from moe_tools.plan.report import short
from moe_tools.plan.settings import parse_words

from tests.tools.test_expert_load_page import Page

EVIL = "<b id=evil>&"
QUESTION = ["model=demo", "ep=2,4", "tp=1", "redundant=0,4", "dispatch=all_to_all,deep_ep", "batch=4,8",
            "prompt_tokens=16", "output_tokens=8", "prefill_tokens=64"]  # fmt: skip
STYLE = Path(page_module.__file__).with_name("page.css").read_text(encoding="utf-8")


@cache
def _answer() -> Answer:
    found = evaluate(Evaluator(parse_words(QUESTION)))
    return replace(found, plan=replace(found.plan, model=EVIL))


def test_page_is_whole_and_asks_for_nothing() -> None:
    text = page(_answer())
    parsed = Page(text)
    assert "evil" not in parsed.ids
    assert all(link.startswith("#") and link[1:] in parsed.ids for link in parsed.links)
    assert "default-src 'none'" in text
    assert (parsed.tags["script"], parsed.tags["img"], parsed.tags["h1"], parsed.tags["main"]) == (0, 0, 1, 1)
    assert not re.search(r"@import|url\(|\son[a-z]+=", text)


def test_it_is_read_without_a_mouse() -> None:
    text, answer = page(_answer()), _answer()
    assert not re.search(r"<h\d[^>]*>\s*</h\d>", text), "every heading says something"
    assert all("scope=" in head for head in re.findall(r"<th\b[^>]*>", text))
    regions = re.findall(r'<div class="scroll"[^>]*>', text)
    assert len(regions) == text.count("<table")
    assert all('tabindex="0"' in one and 'role="region"' in one and "aria-label=" in one for one in regions)
    assert all(f">The best {unit}</h2>" in text for unit in ("decode unit", "prefill unit", "unit for both"))
    points = re.findall(r'<g class="point" tabindex="0" role="img" aria-label="([^"]+)"', text)
    assert len(points) == len(answer.decodes)
    for number, (said, one) in enumerate(zip(points, answer.decodes, strict=True), 1):
        assert said.startswith(f"{number}: {one.deployment.layout}, batch {one.batch}")


def test_bars_are_numbers_too() -> None:
    for one in _answer().decodes:
        assert sum(parts_ms(one)) == pytest.approx(one.tpot_ms)
        cells = "".join(f"<td>{short(value)}</td>" for value in parts_ms(one))
        assert f"{cells}<td>{short(one.tpot_ms)}</td>" in page(_answer())


def test_nothing_fits_is_said_with_its_remedy() -> None:
    text = page(evaluate(Evaluator(parse_words([*QUESTION, "tpot_ms=0.01"]))))
    assert "nothing meets tpot_ms=0.01" in text
    assert "Nothing fits." in text
    Page(text)


def _themes() -> list[dict[str, str]]:
    """Names of colours → their value, light and dark."""
    light, dark = [
        dict(re.findall(r"--([a-z]+): (#[0-9a-f]{6})", block)) for block in re.findall(r":root \{(.*?)\}", STYLE, re.S)
    ]
    assert light.keys() == dark.keys()
    return [light, dark]


def _contrast(one: str, other: str) -> float:
    """WCAG 2: (lighter + 0.05) / (darker + 0.05)."""

    def luminance(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    bright, dim = sorted((luminance(one), luminance(other)), reverse=True)
    return (bright + 0.05) / (dim + 0.05)


def test_colours_can_be_told_from_their_ground() -> None:
    assert _contrast("#ffffff", "#000000") == pytest.approx(21)
    for theme in _themes():
        for ground in (theme["panel"], theme["ground"]):
            assert all(_contrast(theme[text], ground) >= 4.5 for text in ("ink", "quiet", "accent"))
            assert all(_contrast(theme[fill], ground) >= 3 for _, fill in PARTS)
            assert _contrast(theme["focus"], ground) >= 3


@pytest.mark.parametrize(
    ("value", "said"),
    [(0.0, "0"), (7e-5, "<0.001"), (0.0123456, "0.0123"), (1.234, "1.23"), (45.67, "45.7"), (7890.4, "7890")],
)
def test_short_numbers(value: float, said: str) -> None:
    assert short(value) == said


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="no browser here")
def test_a_browser_reads_it(tmp_path: Path) -> None:
    file = tmp_path / "plan.html"
    file.write_text(page(_answer()), encoding="utf-8")
    words = ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    words += ["--enable-logging=stderr", "--virtual-time-budget=3000", "--dump-dom", file.as_uri()]
    result = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in result.stderr, result.stderr
    assert result.stdout.count("<circle") == len(_answer().decodes)
    assert "&lt;b id=evil&gt;" in result.stdout
