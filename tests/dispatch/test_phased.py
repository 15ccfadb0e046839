"""Two backends in one: which steps go which way, and what may be said of both."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_runtime.dispatch.base import Capabilities, DispatchStep, Layout, Phase, Rows
from moe_runtime.dispatch.local import LocalDispatcher
from moe_runtime.dispatch.phased import PhasedDispatcher
from moe_runtime.dispatch.rows import RowLayout
from moe_runtime.types import Pending, PhysicalRouting
from tests.dispatch import contract
from tests.dispatch.contract import make_case

MIXED = Capabilities(True, 0.0, (Layout.GROUPED, Layout.PADDED), counts_on_host=True, graph_safe=False)
DECODE = Capabilities(False, 1e-5, (Layout.PADDED,), counts_on_host=False, graph_safe=True, dedups_per_rank=True)


@dataclass
class Watched:
    """`local` that writes down what it is asked for."""

    capabilities: Capabilities
    calls: list[str] = field(default_factory=list)
    inner: LocalDispatcher = field(default_factory=lambda: LocalDispatcher(RowLayout(2)))

    def dispatch_begin(self, x: Tensor, routing: PhysicalRouting, step: DispatchStep) -> Pending[tuple[Rows, Any]]:
        self.calls.append("dispatch")
        return self.inner.dispatch_begin(x, routing, step)

    def combine_begin(self, y: Tensor, handle: Any) -> Pending[Tensor]:
        self.calls.append("combine")
        return self.inner.combine_begin(y, handle)

    def close(self) -> None:
        self.calls.append("close")


@pytest.mark.parametrize("phase", list(Phase))
def test_the_phase_decides(phase: Phase) -> None:
    mixed, decode = Watched(MIXED), Watched(DECODE)
    dispatcher = PhasedDispatcher(mixed, decode)
    case = replace(make_case(ep=1, slots=2, top_k=2, tokens=[3]), phase=phase)
    y = contract.through(dispatcher, case, 0, contract.marked)
    assert torch.equal(y, contract.oracle(case, 0, contract.marked))
    taken, other = (mixed, decode) if phase is Phase.MIXED else (decode, mixed)
    assert taken.calls == ["dispatch", "combine"] and not other.calls
    dispatcher.close()
    assert taken.calls[-1] == other.calls[-1] == "close"


def test_what_holds_for_both() -> None:
    found = PhasedDispatcher(Watched(MIXED), Watched(DECODE)).capabilities
    assert found == Capabilities(False, 1e-5, (Layout.PADDED,), counts_on_host=True, graph_safe=True), "decode's graphs"
    turned = PhasedDispatcher(Watched(DECODE), Watched(MIXED)).capabilities
    assert not turned.graph_safe and turned.counts_on_host and not turned.dedups_per_rank
