"""`bench kernels`: a baseline that fails is left out, ours is not."""

from __future__ import annotations

import pytest
from moe_tools.bench import timing
from moe_tools.bench.timing import Run


def test_a_failing_baseline_is_named_and_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def captured(fn: Run, warmups: int) -> tuple[Run, bool]:
        fn()
        return fn, True

    def broken() -> None:
        raise AttributeError("no such product")

    monkeypatch.setattr(timing, "_captured", captured)
    runs = timing._runs({"triton": list, "library": broken}, 3, {"library"})
    assert list(runs) == ["triton"]
    assert capsys.readouterr().err == "library is left out: AttributeError: no such product\n"
    with pytest.raises(AttributeError):
        timing._runs({"triton": broken}, 3, {"library"})
