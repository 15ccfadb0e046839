"""Decode steps over DeepEP V2 as a CUDA graph would take them: no wait for the device, shapes from what was agreed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moe_runtime.comm.base import Communicator
from moe_runtime.dispatch.base import DispatchStep, GroupedRows, Phase
from tests.dispatch.elastic_adapters import Elastic, spec_for
from tests.dispatch.elastic_wrong import bf16_case
from tests.dispatch.test_contract import on_ranks
from tests.doubles.deep_ep.elastic import Library


class _NoWaits(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses what waits for the device, but inside the library."""

    inside = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert self.inside or name not in ("_local_scalar_dense", "nonzero", "bincount", "equal"), name
        return func(*args, **(kwargs or {}))

    @contextmanager
    def library(self) -> Iterator[None]:
        before, self.inside = self.inside, True
        try:
            yield
        finally:
            self.inside = before


@pytest.mark.parametrize("quantize", [False, True])
def test_decode_is_captured_without_a_wait_and_with_fixed_shapes(quantize: bool) -> None:
    case = bf16_case(ep=1, slots=3, tokens=3, hidden=192)
    library, mode = Library(), _NoWaits()  # type: ignore[no-untyped-call]
    buffer = library.ElasticBuffer
    for name in ("dispatch", "combine"):
        call = getattr(buffer, name)

        def inside(*args: Any, _call: Any = call, **kwargs: Any) -> Any:
            with mode.library():
                return _call(*args, **kwargs)

        setattr(buffer, name, inside)

    def program(ep: Communicator) -> None:
        dispatcher = Elastic(spec_for(case, quantize=quantize), library).make(ep, 3)
        assert dispatcher.capabilities.graph_safe
        shapes = set()
        for ids in ([[0, 1]] * 3, [[-1, -1]] * 3, [[2, 0]] * 3):
            routing = replace(case.routing[0], expert_ids=torch.tensor(ids))
            with library.capturing(), mode:
                rows, handle = dispatcher.dispatch_begin(case.x[0], routing, DispatchStep(3, Phase.DECODE)).wait()
                assert isinstance(rows, GroupedRows)
                y = dispatcher.combine_begin(torch.zeros(rows.data.shape, dtype=torch.bfloat16), handle).wait()
            shapes.add((rows.data.shape, y.shape))
        assert shapes == {((4 * 2 + 3 * 3 + 3, 192), (3, 192))}, "4 tokens of capacity, 2 rows each, gaps; rounded up"

    on_ranks(1, program)
