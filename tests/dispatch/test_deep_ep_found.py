"""What of DeepEP is installed, and what V2 takes: known before a run."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_runtime.comm.virtual import VirtualCluster, virtual_groups
from moe_runtime.dispatch import deep_ep
from moe_runtime.dispatch.deep_ep import detect
from moe_runtime.dispatch.deep_ep.elastic_sizes import (
    WORKSPACE,
    buffer_bytes,
    capacities,
    max_capacity,
    result_bytes,
    symmetric_bytes,
    unfit,
)
from moe_runtime.dispatch.factory import make_dispatcher
from moe_runtime.dispatch.missing import Missing
from moe_runtime.dispatch.rows import RowLayout
from moe_runtime.dispatch.spec import DispatchSpec
from moe_runtime.errors import ConfigError
from moe_runtime.launch.env import deep_ep_holds_tensors
from tests.doubles.deep_ep.elastic import Library
from tests.doubles.fabric_group import FabricGroup

MiB = 1 << 20


def spec(
    ep: int = 8,
    tokens: int = 128,
    hidden: int = 7168,
    top_k: int = 8,
    slots: int = 32,
    *,
    fp8: bool = False,
    **more: Any,
) -> DispatchSpec:
    rows = RowLayout(slots, alignment=128, quantize=fp8)
    return DispatchSpec(ep=ep, rows=rows, hidden=hidden, dtype=torch.bfloat16, top_k=top_k, max_tokens=tokens, **more)


def legacy_buffer(**but: Any) -> Any:
    names = ("combine", "dispatch", "get_dispatch_layout", "low_latency_combine", "low_latency_dispatch")
    return SimpleNamespace(**dict.fromkeys(names) | but)


def elastic_module() -> dict[str, Any]:
    """What the double has of the module deep_ep."""
    double = Library()
    names = ("__version__", "ElasticBuffer", "get_physical_domain_size", "topk_idx_t")
    return {name: getattr(double, name) for name in names}


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts something in place of the module deep_ep."""

    def put(**attributes: Any) -> None:
        module = ModuleType("deep_ep")
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, "deep_ep", module)

    return put


def test_nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "deep_ep", raising=False)
    found = detect.find()
    assert isinstance(found, Missing)
    assert "deep_ep is not installed" in str(found)
    assert "docs/dispatch.md#deepep" in found.remedy


def test_both_generations(install: Any) -> None:
    install(**elastic_module(), Buffer=legacy_buffer())
    found = detect.find()
    assert isinstance(found, detect.Library)
    assert found.generations == (2, 1)
    assert str(found) == "deep_ep 2.1.0 (V2, V1)"


def test_the_old_generation_alone(install: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """V1 states no version: its package does."""
    install(Buffer=legacy_buffer(), topk_idx_t=torch.int64)
    monkeypatch.setattr(detect, "installed_version", lambda name: "1.2.1+73b6ea4")
    found = detect.find()
    assert isinstance(found, detect.Library)
    assert (found.version, found.generations) == ("1.2.1+73b6ea4", (1,))


def test_the_index_upload_is_refused(install: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    install(Buffer=legacy_buffer(), topk_idx_t=torch.int64)
    monkeypatch.setattr(detect, "installed_version", lambda name: "1.0.0")
    found = detect.find()
    assert isinstance(found, Missing)
    assert "package index's upload of that name, not DeepEP" in found.reason


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [
        ({}, "lacks ElasticBuffer, Buffer"),
        ({"ElasticBuffer": Library().ElasticBuffer}, "lacks get_physical_domain_size, Buffer"),
        ({"Buffer": SimpleNamespace(dispatch=None)}, "lacks ElasticBuffer, Buffer.combine"),
        ({"Buffer": legacy_buffer()}, "too old: it lacks topk_idx_t"),
    ],
)
def test_something_else_of_that_name(attributes: dict[str, Any], reason: str, install: Any) -> None:
    install(__version__="1.1.0", **attributes)
    found = detect.find()
    assert isinstance(found, Missing)
    assert reason in found.reason


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ModuleNotFoundError("no", name="deep_ep._C"), "its import needs deep_ep._C"),
        (ImportError("libnccl.so.2: cannot open shared object file."), "fails: libnccl.so.2: cannot open"),
        (AssertionError(), "fails: AssertionError()"),
    ],
)
def test_an_import_that_fails(error: Exception, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> Any:
        raise error

    monkeypatch.setattr(detect, "import_module", fail)
    found = detect.find()
    assert isinstance(found, Missing)
    assert reason in found.reason
    assert ".." not in str(found)


def test_make_says_what_is_missing(install: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with VirtualCluster(1) as cluster:
        ep = virtual_groups(cluster, dp=1)[0].ep
        monkeypatch.setitem(sys.modules, "deep_ep", None)
        with pytest.raises(ConfigError, match=r"dispatch=deep_ep: deep_ep is.*docs/dispatch\.md#deepep"):
            deep_ep.make(ep, spec(ep=1), device="cpu")
        install(**elastic_module())
        with pytest.raises(ConfigError, match="needs one process with a GPU per rank"):
            deep_ep.make(ep, spec(ep=1), device="cpu")


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (spec(ep=16, tokens=4096, slots=16), 1_218_445_312),  # as others printed it for two nodes of eight
        (spec(ep=8, tokens=128), 16 * MiB),
        (spec(ep=32, tokens=128, slots=8), 142 * MiB),
        (spec(ep=8, tokens=4096), 452 * MiB),
        (spec(ep=8, tokens=8192, fp8=True), 900 * MiB),
        (spec(ep=8, tokens=100), 16 * MiB),  # rounded up to 128
    ],
)
def test_buffer_sizes(wanted: DispatchSpec, expected: int) -> None:
    assert symmetric_bytes(wanted) == expected
    assert buffer_bytes(wanted) == expected + WORKSPACE + result_bytes(wanted)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.data())
def test_sizes_grow_with_tokens_and_equal_the_library_s(data: st.DataObject) -> None:
    wanted = spec(
        ep=data.draw(st.sampled_from([1, 2, 4, 8, 16, 32, 264, 320])),
        tokens=data.draw(st.integers(1, 5000)),
        hidden=data.draw(st.sampled_from([64, 2048, 7000, 7168])),
        top_k=data.draw(st.integers(1, 10)),
        slots=data.draw(st.integers(1, 6)),
        fp8=data.draw(st.booleans()),
        in_flight=data.draw(st.integers(1, 2)),
    )
    group: Any = SimpleNamespace(size=lambda: wanted.ep)
    nodes = max(1, wanted.ep // 8)
    hint = Library(nodes=nodes).ElasticBuffer.get_buffer_size_hint(
        group,
        capacities(wanted)[0],
        -(-wanted.hidden // 256) * 256,
        wanted.top_k,
        wanted.rows.quantize,
        allow_hybrid_mode=nodes <= 32,
    )
    assert symmetric_bytes(wanted) == hint
    more = replace(wanted, max_tokens=wanted.max_tokens + data.draw(st.integers(1, 300)))
    assert buffer_bytes(wanted) <= buffer_bytes(more)


def test_results_are_counted_row_by_row() -> None:
    """Two ranks of two slots, four tokens each, all to one rank: 8 tokens, 16 rows and the gaps of two slots."""
    wanted = replace(spec(ep=2, tokens=4, hidden=256, top_k=2, slots=2), rows=RowLayout(2, alignment=4))
    rows = 8 * 2 + 2 * 3 + 2
    data, weights = rows * 512, rows * 4
    handle = 8 * (2 + 2) * 4 + 4 * 2 * 4 + 2 * 4 + (2 + 1 + 2) * 4 + 4 * 2 * 8
    assert result_bytes(wanted) == data + weights + handle + 4 * 512
    twice = replace(wanted, in_flight=2)
    assert buffer_bytes(twice) - buffer_bytes(wanted) == result_bytes(wanted)


def test_many_nodes_send_directly() -> None:
    """The hybrid kernels reach 32 nodes; 40 nodes need room for every rank, and a copy of what leaves."""
    wanted = spec(ep=320, tokens=128, slots=1)
    there, back = 14336 + 128, 14336 + 64
    assert symmetric_bytes(wanted) == -(-max(there * 128 * 321, back * 128 * 328) // (2 * MiB)) * 2 * MiB


@pytest.mark.parametrize(
    ("wanted", "reason", "remedy"),
    [
        (replace(spec(), dtype=torch.float32), "tokens are torch.float32", "Set dtype=bfloat16"),
        (spec(top_k=33), "33 slots per token, and DeepEP V2 has room for at most 32", "Set shared_experts=replicated"),
        (spec(ep=1025, slots=1), "1025 ranks", "Set ep=1024, or set dispatch=all_to_all"),
        (spec(slots=257), "257 slots per rank", "Raise ep, or lower placement"),
        (spec(ep=16, slots=129), "2064 slots in all", "Lower placement.num_redundant_experts"),
    ],
)
def test_what_does_not_fit(wanted: DispatchSpec, reason: str, remedy: str) -> None:
    found = unfit(wanted)
    assert found is not None
    assert reason in found.reason
    assert remedy in found.remedy


def test_what_fits() -> None:
    assert unfit(spec(ep=320, slots=1)) is None
    assert max_capacity(spec()) is None
    assert capacities(spec(tokens=100, max_decode_tokens=33)) == (128, 64)
    assert capacities(spec(tokens=1)) == (1, 1)


def on_two_ranks(program: Any) -> list[Any]:
    with VirtualCluster(2, num_threads=1) as cluster:
        groups = virtual_groups(cluster, dp=2)
        return cluster.run(lambda rank: program(groups[rank].ep))


@pytest.mark.parametrize(
    ("of_rank_1", "text"),
    [
        (
            Missing("deep_ep is not installed", "Build it"),
            r"rank 1 of the ep group: deep_ep is not installed. Build it\.",
        ),
        (
            detect.Library(None, "1.2.1", (1,)),
            r"rank 1 of the ep group has deep_ep 1\.2\.1 \(V1\), rank 0 has deep_ep 2",
        ),
    ],
    ids=["missing", "another"],
)
def test_all_ranks_refuse_before_one_of_them_begins(monkeypatch: pytest.MonkeyPatch, of_rank_1: Any, text: str) -> None:
    """Else the others would wait inside the library for a rank that has left."""
    asking: list[int] = []
    library = detect.Library(None, "2.1.0", (2,))
    monkeypatch.setattr(deep_ep, "find", lambda: of_rank_1 if asking[-1] else library)
    monkeypatch.setattr(deep_ep, "device_group", lambda ep, name: pytest.fail("begun"))

    def program(ep: Any) -> str:
        asking.append(ep.rank)  # ranks take turns only where they communicate
        with pytest.raises(ConfigError) as caught:
            make_dispatcher("deep_ep", ep, spec(ep=2))
        return str(caught.value)

    first, second = on_two_ranks(program)
    assert first == second
    assert re.search(text, first)


def test_the_library_s_own_clocks_ring_with_the_run_s(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Library()
    found = detect.Library(module, "2.1.0", (2,))
    monkeypatch.setattr(deep_ep, "find", lambda: found)
    monkeypatch.setattr(deep_ep, "device_group", lambda ep, name: FabricGroup(ep))

    def program(ep: Any) -> tuple[int, int]:
        dispatcher = make_dispatcher("deep_ep", ep, spec(ep=2, tokens=2, slots=2, top_k=2, deadline_s=7.5))
        return dispatcher._buffer.timeouts  # type: ignore[attr-defined, no-any-return]

    assert on_two_ranks(program) == [(8, 8), (8, 8)]


def test_tensors_are_held_by_events_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EP_AVOID_RECORD_STREAM", raising=False)
    deep_ep_holds_tensors()
    assert os.environ["EP_AVOID_RECORD_STREAM"] == "1"
    monkeypatch.setenv("EP_AVOID_RECORD_STREAM", "0")
    deep_ep_holds_tensors()
    assert os.environ["EP_AVOID_RECORD_STREAM"] == "0"
