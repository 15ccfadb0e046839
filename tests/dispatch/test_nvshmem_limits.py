"""What NVSHMEM's dispatchers take, what they refuse, how they are found, and how rows travel in fp8."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_kernels import backends
from moe_kernels.put_rows import block
from moe_kernels.quant import dequantize
from moe_kernels.scaled import BlockScaled

from moe_runtime.comm.base import Communicator
from moe_runtime.dispatch import nvshmem
from moe_runtime.dispatch.base import Layout, Phase
from moe_runtime.dispatch.factory import graph_safe, make_dispatcher
from moe_runtime.dispatch.missing import Missing
from moe_runtime.dispatch.nvshmem import detect, device, host
from moe_runtime.dispatch.nvshmem.heap import Heap
from moe_runtime.dispatch.nvshmem.packing import packing
from moe_runtime.dispatch.rows import RowLayout
from moe_runtime.dispatch.spec import DispatchSpec
from moe_runtime.errors import ConfigError
from tests.dispatch.contract import make_case, slot_rows
from tests.dispatch.nvshmem_backend import Nvshmem
from tests.dispatch.test_contract import on_ranks
from tests.doubles.nvshmem import Core

LAYOUTS = [(Layout.GROUPED, 1), (Layout.GROUPED, 128), (Layout.PADDED, 1)]
V3 = DispatchSpec(
    ep=32,
    rows=RowLayout(9, Layout.GROUPED, 128, quantize=True),
    hidden=7168,
    dtype=torch.bfloat16,
    top_k=8,
    max_tokens=1024,
    max_decode_tokens=128,
    in_flight=2,
)


@pytest.mark.parametrize("path", ["host", "device"])
@pytest.mark.parametrize(("layout", "alignment"), LAYOUTS)
def test_allocations_are_as_announced(path: str, layout: Layout, alignment: int) -> None:
    case = make_case(ep=2, slots=3, top_k=2, tokens=[5, 2])
    backend = Nvshmem(path, case, layout, alignment, in_flight=2)

    def program(ep: Communicator) -> int:
        core = backend.core(ep)
        backend.make_with(core, ep)
        return sum(allocation.size for allocation in core.allocations)

    spec = backend.spec(2)
    near, far = device.block_of(spec).num_bytes, device.block_of(spec, apart=True).num_bytes
    assert device.buffer_bytes(spec) == 8 + 2 * far
    assert far - near < 5 * 3 * 64 + 2 * 256, "5 tokens of 64 bytes on their way, and their 2 rows each"
    expected = 8 + 2 * near if path == "device" else 2 * host.symmetric_bytes(spec, packing(spec, stays=False))
    assert on_ranks(2, program) == [expected] * 2


def test_sizes_of_a_known_unit() -> None:
    """DeepSeek-V3's decode unit with prompt chunks of 1024 tokens: every rank, each of two micro-batches."""
    tokens, rows = 32 * 1024, 32 * 1024 * 8 + 9 * 127
    plain = packing(V3, stays=False)
    assert plain.num_bytes == 7168 * 2 + 64
    assert packing(V3, stays=True).num_bytes == 7168 + 4 * 56 + 64
    symmetric = (1024 + 128) * plain.num_bytes + 32 * (1024 * 7168 * 4 + (1024 + 128) * 7168 * 4 + 16)
    assert host.symmetric_bytes(V3, plain) == symmetric
    results = tokens * (plain.num_bytes + 8 * 14336 + 7168 * 4) + rows * 14336
    assert host.buffer_bytes(V3) == 2 * (symmetric + results)
    near = device.block_of(V3)
    assert (near.rows, near.row_bytes, near.groups) == (rows, 14336, 56)
    far = device.block_of(V3, apart=True)
    assert (far.rows, far.groups, far.staged) == (rows, 0, 1024)
    assert device.buffer_bytes(V3) == 8 + 2 * max(near.num_bytes, far.num_bytes)
    assert 0 <= near.num_bytes - rows * (14336 + 4 * 56) - 32 * 32 * 9 * 4 - 3 * 32 * 8 < 4 * 256 + 4 * 4 * 56


@given(st.integers(1, 300), st.integers(0, 64), st.sampled_from(LAYOUTS), st.integers(1, 16), st.integers(1, 12))
@settings(max_examples=50, deadline=None)
def test_more_tokens_never_take_less(tokens: int, decode: int, layout: tuple[Layout, int], ep: int, top_k: int) -> None:
    spec = DispatchSpec(
        ep=ep,
        rows=RowLayout(3, *layout),
        hidden=24,
        dtype=torch.bfloat16,
        top_k=top_k,
        max_tokens=tokens,
        max_decode_tokens=decode,
    )
    for sized in (host.buffer_bytes, device.buffer_bytes):
        assert sized(spec) <= sized(replace(spec, max_tokens=tokens + 1))
        assert sized(replace(spec, in_flight=2)) in (2 * sized(spec), 2 * sized(spec) - 8)


def test_limits() -> None:
    assert host.unfit(V3) is None
    assert device.unfit(V3) is None
    assert str(host.unfit(replace(V3, ep=33))) == (
        "ep=33, and the host path makes 4 calls per rank and layer: at most 32 ranks. "
        "Set ep=32, or dispatch=all_to_all."
    )
    assert device.unfit(replace(V3, ep=320, rows=RowLayout(12))) is None
    assert str(device.unfit(replace(V3, ep=320, rows=RowLayout(13)))) == (
        "320 ranks of 13 slots, and the kernels count in 4096 bins. "
        "Lower placement.num_redundant_experts: at most 12 slots per rank, or set dispatch=all_to_all."
    )
    assert host.max_capacity(V3) is None
    for rows in (V3.rows, RowLayout(9, Layout.PADDED)):
        spec = replace(V3, rows=rows)
        most = device.max_capacity(spec)
        assert most is not None
        assert device.block_of(replace(spec, max_tokens=most)).rows < 2**31
        assert device.block_of(replace(spec, max_tokens=most + 1)).rows >= 2**31


@pytest.mark.parametrize(
    ("path", "layout"), [("host", Layout.GROUPED), ("device", Layout.GROUPED), ("device", Layout.PADDED)]
)
def test_rows_travel_in_fp8(path: str, layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their scales along with them; outputs come back in bf16."""
    monkeypatch.setattr(backends, "default_backend", lambda device: "triton")
    case = make_case(ep=2, slots=2, top_k=2, tokens=[2, 1], hidden=130, dtype=torch.bfloat16)
    backend = Nvshmem(path, case, layout, quantize=True)

    def program(ep: Communicator) -> None:
        dispatcher: Any = backend.make(ep, 2)
        x, routing = case.x[ep.rank], case.routing[ep.rank]
        rows, handle = dispatcher.dispatch_begin(x, routing, case.step).wait()
        assert rows.data.dtype is torch.float8_e4m3fn
        plain = dequantize(BlockScaled(rows.data.reshape(-1, 130), rows.scales.reshape(-1, 2)), backend="torch")
        plain = plain.view(rows.data.shape)
        for slot, found in enumerate(slot_rows(replace(rows, data=plain))):
            wanted = [x[(r.expert_ids == 2 * ep.rank + slot).any(1)] for x, r in zip(case.x, case.routing, strict=True)]
            torch.testing.assert_close(found, torch.cat(wanted).float(), rtol=0.13, atol=0.02)
        y = dispatcher.combine_begin(torch.full(rows.data.shape, 1.5, dtype=torch.bfloat16), handle).wait()
        assert y.dtype is torch.bfloat16
        torch.testing.assert_close(y.float(), torch.full_like(y, 1.5).float(), rtol=0.01, atol=0.0)
        dispatcher.close()

    on_ranks(2, program)


def test_nvshmem_that_runs_for_others_is_refused() -> None:
    case = make_case(ep=2, slots=1, top_k=1, tokens=[1, 1])

    def program(ep: Communicator) -> None:
        backend = Nvshmem("host", case)
        running = backend.core(ep)
        backend.make_with(running, ep)
        if ep.rank == 0:
            running._status = running.InitStatus.STATUS_NOT_INITIALIZED
        with pytest.raises(ConfigError, match="runs on some ranks and not on others"):
            backend.make_with(running, ep)
        running._status = running.InitStatus.STATUS_IS_INITIALIZED
        running.n_pes = lambda: 4  # type: ignore[method-assign]
        with pytest.raises(ConfigError, match=rf"runs as PE {ep.rank} of 4, the ep group has .* rank {ep.rank} of 2"):
            backend.make_with(running, ep)

    on_ranks(2, program)


@pytest.mark.parametrize(
    ("installed", "text"),
    [
        (None, "nvshmem4py is not installed. pip install nvshmem4py-cu13==0.4.1"),
        ("0.1.1", "nvshmem4py 0.1.1 is installed; it must be 0.1.2 to 0.4. pip"),
        ("0.5.0", "nvshmem4py 0.5.0 is installed; it must be 0.1.2 to 0.4. pip"),
        ("0.4.1", "nvshmem4py 0.4.1 is installed, but its import needs nvshmem. pip"),
    ],
)
def test_what_is_missing_is_told(installed: str | None, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detect, "_version", lambda: installed)
    found = detect.find()
    assert isinstance(found, Missing)
    assert str(found).startswith(text)


def test_what_is_found_offers_what_we_call(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    core: Any = SimpleNamespace(rank=0, size=1)
    module = SimpleNamespace(**{name: getattr(Core(core), name) for name in dir(Core) if not name.startswith("_")})
    found = detect.recognize(module, "0.4.1")
    assert isinstance(found, detect.Library)
    assert str(found) == "nvshmem4py 0.4.1, NVSHMEM 3.4.5, without a device library"

    def fails() -> None:
        raise RuntimeError("no libnvshmem_host.so.3.\nSearched: everywhere")

    broken = SimpleNamespace(**(vars(module) | {"get_version": fails}))
    text = "nvshmem4py 0.4.1 is installed, but NVSHMEM itself does not load: no libnvshmem_host.so.3. pip"
    assert str(detect.recognize(broken, "0.4.1")).startswith(text)
    del module.put_signal
    assert "lacks put_signal" in str(detect.recognize(module, "0.4.1"))
    (tmp_path / "lib").mkdir()
    monkeypatch.setattr(block, "find_spec", lambda name: SimpleNamespace(submodule_search_locations=[str(tmp_path)]))
    assert block.find_bitcode() is None
    (tmp_path / "lib" / block.BITCODE).touch()
    assert block.find_bitcode() == tmp_path / "lib" / block.BITCODE


def test_a_module_is_made_known_once() -> None:
    def program(ep: Communicator) -> None:
        core = Core(ep)
        heap = Heap(ep, core)
        for handle in (7, 8, 7):
            heap.prepare(handle)
        heap.close()
        assert core.modules == [7, 8]

    on_ranks(1, program)


@pytest.mark.parametrize("path", ["host", "device"])
def test_more_tokens_than_there_is_room_for_are_refused(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "default_backend", lambda device: "triton")
    case = make_case(ep=1, slots=2, top_k=2, tokens=[2])

    def program(ep: Communicator) -> None:
        dispatcher = Nvshmem(path, case).make(ep, 2)
        with pytest.raises(AssertionError, match="a dispatch of 3 tokens, the .* were made for 2"):
            dispatcher.dispatch_begin(case.x[0], case.routing[0], replace(case.step, capacity=3))

    on_ranks(1, program)


@pytest.mark.parametrize(
    ("ep", "slots", "bitcode", "path"),
    [
        (8, 32, False, "device"),  # one node
        (32, 9, True, "device"),
        (32, 9, False, "host"),
        (320, 1, True, "device"),
        (320, 1, False, "ep=320 on nodes of 8 ranks, and without libnvshmem_device.bc it takes at most 32 ranks"),
        (8, 513, False, "host"),
        (64, 65, True, "64 ranks of 65 slots, and the kernels count in 4096 bins"),
    ],
)
def test_which_path_serves_what(ep: int, slots: int, bitcode: bool, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = replace(V3, ep=ep, rows=RowLayout(slots))
    library = detect.Library(None, "0.4.1", "3.4.5", Path("there") if bitcode else None)
    monkeypatch.setattr(nvshmem, "find", lambda: library)
    found = nvshmem.path_of(spec, bitcode=bitcode)
    if isinstance(found, Missing):
        assert str(found).startswith(path)
        assert nvshmem.obstacle(spec, limits_only=False) == found
        with pytest.raises(ConfigError, match="dispatch=nvshmem: "):
            nvshmem.buffer_bytes(spec)
        return
    assert found == path
    chosen: Any = device if path == "device" else host
    assert nvshmem.obstacle(spec, limits_only=False) is None
    assert nvshmem.buffer_bytes(spec) == chosen.buffer_bytes(spec)
    assert nvshmem.max_capacity(spec, Phase.DECODE) == chosen.max_capacity(spec)
    assert graph_safe("nvshmem", spec, device=torch.device("cuda")) == (path == "device")


def test_without_nvshmem(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its limits and sizes are known all the same."""
    missing = Missing("nvshmem4py is not installed", detect.INSTALL)
    monkeypatch.setattr(nvshmem, "find", lambda: missing)
    assert nvshmem.obstacle(V3, limits_only=False) == missing
    assert nvshmem.obstacle(V3, limits_only=True) is None
    assert nvshmem.buffer_bytes(V3) == device.buffer_bytes(V3)

    def program(ep: Communicator) -> None:
        with pytest.raises(ConfigError, match="dispatch=nvshmem: rank 0 of the ep group: nvshmem4py is not"):
            make_dispatcher("nvshmem", ep, replace(V3, ep=1))

    on_ranks(1, program)
