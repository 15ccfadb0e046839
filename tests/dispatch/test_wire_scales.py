"""Rows that cross the wire in fp8 do so with scales that are powers of two where the model wants that alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from moe_kernels import backends

from moe_runtime.comm.base import Communicator
from moe_runtime.dispatch.all_to_all import AllToAllDispatcher
from moe_runtime.dispatch.base import Phase
from moe_runtime.dispatch.rows import RowLayout
from tests.dispatch.contract import make_case, slot_rows
from tests.dispatch.elastic_adapters import Elastic, spec_for
from tests.dispatch.nvshmem_backend import Nvshmem
from tests.dispatch.symm_mem_backend import Symmetric
from tests.dispatch.test_contract import on_ranks
from tests.doubles.deep_ep.elastic import Library

CASE = replace(
    make_case(ep=2, slots=2, top_k=2, tokens=[3, 2], hidden=256, dtype=torch.bfloat16),
    phase=Phase.DECODE,
    capacity=3,
)


class EqualBlocks:
    def __init__(self, rows: RowLayout) -> None:
        self.rows = rows

    def make(self, ep: Communicator, slots: int) -> AllToAllDispatcher:
        return AllToAllDispatcher(ep, self.rows)


def backend_of(name: str, *, power: bool) -> Any:
    rows = RowLayout(CASE.slots, quantize=True, ue8m0=power)
    match name.split():
        case ["all_to_all"]:
            return EqualBlocks(rows)
        case ["deep_ep"]:
            return Elastic(replace(spec_for(CASE, quantize=True), rows=rows), Library())
        case ["nvshmem", path]:
            return Nvshmem(path, replace(CASE, capacity=6), quantize=True, ue8m0=power)
    return Symmetric(replace(CASE, capacity=6), quantize=True, ue8m0=power)


@pytest.mark.skipif(not backends.interpreted(), reason="needs TRITON_INTERPRET=1: kernels on CPU tensors")
@pytest.mark.parametrize("power", [False, True])
@pytest.mark.parametrize("name", ["all_to_all", "deep_ep", "nvshmem host", "nvshmem device", "symm_mem"])
def test_powers_of_two(name: str, power: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "default_backend", lambda device: "triton")
    backend, seen = backend_of(name, power=power), []

    def program(ep: Communicator) -> None:
        dispatcher = backend.make(ep, CASE.slots)
        rows, _ = dispatcher.dispatch_begin(CASE.x[ep.rank], CASE.routing[ep.rank], CASE.step).wait()
        assert rows.data.dtype is torch.float8_e4m3fn and rows.scales is not None
        seen.extend(slot_rows(replace(rows, data=rows.scales)))

    on_ranks(2, program)
    scales = torch.cat(seen)
    assert scales.shape == (10, 2), "5 tokens, 2 slots each; 256 columns"
    assert bool((scales.frexp().mantissa == 0.5).all()) is power
