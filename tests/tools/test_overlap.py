"""`moe_tools.overlap`: its costs are the slice's terms, its halves are the whole, what it prints says what it is."""

from __future__ import annotations

from dataclasses import replace

import pytest
from moe_tools import overlap
from moe_tools.bench.floor import H200
from moe_tools.bench.layer_slice import sums
from moe_tools.bench.slice_shapes import UNITS, V3, Unit, modelled_network_us, modelled_transfers_us
from moe_tools.bench.slice_terms import Slice
from moe_tools.overlap import Model, halves

from moe_runtime.dispatch.timeline import summarize

NAMED = {unit.name: unit for unit in UNITS}


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_costs_are_all_terms_of_a_step(unit: Unit) -> None:
    terms = Slice(unit, V3).terms()
    assert set(overlap.PARTS) - {"MLA plan"} <= {term.name for term in terms}
    step_us = 1e3 * sums(terms, [H200.floor_us(term.work) for term in terms], V3).step_ms
    network_us = modelled_network_us(unit, V3, H200) * V3.moe_layers
    found = summarize(Model().no_overlap(unit))
    assert found.busy_us == pytest.approx((step_us, step_us))
    assert [found.step_us, found.serial_us] == pytest.approx([step_us + network_us] * 2)
    assert found.exposed_us[0] == pytest.approx(network_us)


def test_transfers() -> None:
    """128 tokens x 8 copies of 7392 bytes there and 14336 home, 3/4 of them over the network at EP32."""
    dispatch, combine = modelled_transfers_us(NAMED["decode EP32 TP1"], V3, H200)
    assert dispatch == pytest.approx(128 * 8 * 7392 * 0.75 / 50e3)
    assert combine == pytest.approx(128 * 8 * 14336 * 0.75 / 50e3)


def test_halves_of_a_prompt_are_the_prompt() -> None:
    """Pairs of query and key add up; the keys and values of the first half are made twice."""
    unit = NAMED["prefill EP8 TP1"]

    def core(of: Unit) -> float:
        return next(term.work.flops for term in Slice(of, V3).terms() if term.name == "MLA expanded")

    first, second = halves(unit)
    assert (first.tokens, first.kv_len, second.tokens, second.kv_len) == (2048, 2048, 2048, 4096)
    again = 2.0 * 2048 * V3.heads * (V3.nope + V3.value) * V3.latent
    assert core(first) + core(second) == core(unit) + again
    assert halves(NAMED["decode EP320 TP4"]) == (replace(NAMED["decode EP320 TP4"], tokens=64),) * 2


def test_what_overlap_gains() -> None:
    """Two micro-batches read every weight twice: a gain where transfers are long, a loss where weights are."""
    model = Model()
    for name, gains in (("decode EP32 TP1", True), ("prefill EP32 TP1", True), ("decode EP8 TP1", False)):
        none, beside, two = (f(NAMED[name]) for f in (model.no_overlap, model.shared_beside, model.two_batches))
        assert beside.step_us < none.step_us
        assert (two.step_us < beside.step_us) is gains, name


def test_the_busiest_rank_and_the_wire() -> None:
    unit = NAMED["decode EP32 TP1"]
    plain, hot = (summarize(Model(hottest=more).no_overlap(unit)) for more in (1.0, 3.0))
    assert hot.wire_us == pytest.approx(3 * plain.wire_us)
    assert hot.busy_us[0] > hot.busy_us[1] == pytest.approx(plain.busy_us[1])
    assert plain.waiting_us == pytest.approx((0.0, 0.0), abs=1e-6)
    assert hot.waiting_us[1] > 0.0 == pytest.approx(hot.waiting_us[0], abs=1e-6)
    assert summarize(Model(wire=0.5).no_overlap(unit)).wire_us == pytest.approx(plain.wire_us / 2)


def test_prints(capsys: pytest.CaptureFixture[str]) -> None:
    overlap.main(["--ep", "32", "--phase", "decode", "--width", "90"])
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert "decode EP32" in lines[0] and "floors of H200" in lines[1] and "modelled" in lines[1]
    assert "not measured" in lines[1] and "ms" in text
    pictures = [line for line in lines if line.startswith(("compute |", "wire    |"))]
    assert len(pictures) == 6 and {len(line) for line in pictures} == {90}
    rows = [line.split() for line in lines if line.endswith("x")]
    assert [row[-1] for row in rows] == ["1.00x", "1.02x", "1.33x"] and rows[0][-2] == "0%"
    overlap.main(["--ep", "32", "--width", "90", "--tokens", "128"])
    assert capsys.readouterr().out == text


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["--ep", "16"], "invalid choice"),
        (["--ep", "320", "--phase", "prefill"], "no such unit. Nearest: --ep 32"),
        (["--ep", "320", "--tokens", "27"], "multiple of 2·tp = 8. Nearest: --tokens 24"),
        (["--tokens", "0"], "Nearest: --tokens 2"),
        (["--layers", "0"], "--layers 0: 1..38"),
        (["--width", "20"], "at least 40 columns"),
        (["--hottest", "0.5"], "at least 1"),
    ],
)
def test_bad_words(words: list[str], fault: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        overlap.main(words)
    assert fault in capsys.readouterr().err
