"""What DeepEP V1 takes, and its bytes, against the library's own arithmetic as its double has it."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from moe_runtime.comm.base import Communicator
from moe_runtime.dispatch.base import Phase
from moe_runtime.dispatch.deep_ep import legacy_sizes as sizes
from moe_runtime.dispatch.deep_ep.legacy import buffer_bytes, max_capacity, normal_unfit, unfit
from moe_runtime.dispatch.rows import RowLayout
from moe_runtime.dispatch.spec import DispatchSpec
from moe_runtime.errors import CommunicationError, ConfigError
from tests.dispatch.legacy_fabric import Fabric, bf16_case, on_ranks
from tests.doubles.deep_ep.legacy import Library

MIB = 2**20
V3 = DispatchSpec(
    ep=32,
    rows=RowLayout(8, quantize=True),
    hidden=7168,
    dtype=torch.bfloat16,
    top_k=8,
    max_tokens=4096,
    max_decode_tokens=128,
)
"""DeepSeek-V3's 256 experts on 32 ranks."""


def test_known_sizes_of_the_low_latency_buffer() -> None:
    """128 tokens, hidden 7168, 256 experts: 1820 MiB of rows, two signal areas and the library's rounding."""
    assert sizes.low_latency_bytes(128, 7168, 256) == 1820 * MIB + 2 * 1024 + 128
    buffer = Library().Buffer
    for tokens, width, slots in ((1, 2048, 2), (4, 2560, 12), (64, 4096, 288), (508, 8192, 1848), (128, 7168, 320)):
        hint = buffer.get_low_latency_rdma_size_hint(tokens, width, 8, slots)
        assert sizes.low_latency_bytes(tokens, width, slots) == hint


@pytest.mark.parametrize("ep", [2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 144, 160])
@pytest.mark.parametrize("hidden", [16, 7168])
def test_normal_buffers_are_the_librarys_for_all_numbers_of_ranks(ep: int, hidden: int) -> None:
    spec = replace(V3, ep=ep, hidden=hidden, rows=RowLayout(1))
    assert normal_unfit(spec) is None
    buffer, row = Library().Buffer, 2 * sizes.normal_hidden(spec)
    configs = (buffer.get_dispatch_config(ep), buffer.get_combine_config(ep))
    nvlink, rdma = sizes.normal_bytes(spec)
    assert nvlink == max(config.get_nvl_buffer_size_hint(row, ep) for config in configs)
    assert rdma == max(config.get_rdma_buffer_size_hint(row, ep) for config in configs)


def test_bytes_of_a_rank() -> None:
    """By hand: workspace, NVLink buffer and signals, RDMA buffer, and the larger of both phases' results."""
    nvlink, rdma = sizes.normal_bytes(V3)
    low_latency = sizes.low_latency_bytes(128, 7168, 256)
    assert rdma < low_latency
    buffers = 32 * MIB + nvlink + 160 + low_latency
    row = 7168 + 56 * 4
    prompts = 32 * 4096 * (row + 8 + 8 * (8 + 4 + 8)) + 32 * 4096 * 8 * row
    assert buffer_bytes(V3) == buffers + prompts
    assert buffer_bytes(replace(V3, in_flight=2)) == buffers + 2 * prompts
    decode = replace(V3, max_tokens=1)
    assert buffer_bytes(decode) == buffers + 8 * (32 * (128 * (row + 4) + 8) + 4)


def test_bytes_count_padding_redundancy_and_capacity() -> None:
    decode = replace(V3, max_tokens=1)
    redundant = replace(decode, rows=RowLayout(9, quantize=True))
    more = buffer_bytes(redundant) - buffer_bytes(decode)
    assert more > sizes.low_latency_bytes(128, 7168, 288) - sizes.low_latency_bytes(128, 7168, 256) > 200 * MIB
    narrow = replace(V3, hidden=5000, rows=RowLayout(8), max_tokens=1)
    exact = replace(narrow, hidden=5120)
    cut = 8 * 32 * 128 * 2 * 5000
    assert buffer_bytes(narrow) == buffer_bytes(exact) + cut, "columns of padding are cut off a copy"
    growing = [buffer_bytes(replace(V3, max_tokens=tokens)) for tokens in (1, 2, 64, 65, 4096)]
    assert growing == sorted(growing)
    growing = [buffer_bytes(replace(V3, max_tokens=1, max_decode_tokens=tokens)) for tokens in (0, 1, 4, 100, 511)]
    assert growing == sorted(growing)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float32}, r"float32; DeepEP V1 carries bf16\. Set dtype=bfloat16\."),
        ({"ep": 1}, r"ep=1; .* no kernels for one rank\. Use dispatch=local"),
        ({"ep": 12}, r"ep=12; .* 2\.\.7 ranks or a multiple of 8\. Set ep=8 or ep=16\."),
        ({"hidden": 8193}, r"hidden=8193; .* up to 8192"),
        ({"top_k": 12}, r"12 slots per token; .* up to 11"),
        (
            {"rows": RowLayout(58)},
            r"1856 slots; .* up to 1848\. Lower placement.num_redundant_experts: at most 1824 physical experts",
        ),
        ({"in_flight": 3}, r"3 micro-batches; .* keeps 2 results"),
    ],
)
def test_what_does_not_fit_is_told_with_the_nearest_value(change: dict[str, object], reason: str) -> None:
    assert unfit(V3) is None
    spec = replace(V3, **change)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="dispatch=deep_ep: .*" + reason):
        buffer_bytes(spec)


@pytest.mark.parametrize(
    ("change", "ranks_per_node", "reason"),
    [
        ({"ep": 320, "rows": RowLayout(1)}, 8, "320 ranks"),
        ({"ep": 3}, 8, "3 ranks"),
        ({}, 4, "32 ranks, 4 in a node"),
        ({"ep": 8}, 4, "8 ranks, 4 in a node"),
        ({"ep": 16, "rows": RowLayout(65)}, 8, "65 slots on a rank; .* up to 64"),
        ({"ep": 8, "rows": RowLayout(129)}, 8, "129 slots on a rank; .* up to 128"),
        ({"ep": 8, "hidden": 8192, "rows": RowLayout(8)}, 8, "8192; .* up to 8176"),
        ({"hidden": 7937}, 8, "7937 as 8192; .* up to 7936"),
    ],
)
def test_low_latency_serves_prompts_where_there_are_no_normal_kernels(
    change: dict[str, object], ranks_per_node: int, reason: str
) -> None:
    spec = replace(V3, **change)  # type: ignore[arg-type]
    missing = normal_unfit(spec, ranks_per_node=ranks_per_node)
    assert unfit(spec) is None and missing is not None
    assert re.search(reason, str(missing))
    assert max_capacity(spec, Phase.MIXED, ranks_per_node=ranks_per_node) == 128
    assert max_capacity(V3, Phase.MIXED) is None


def test_capacity_of_decode_steps() -> None:
    """Two queue entries per token, four rows at a time, and 32 GiB of buffer."""
    assert [max_capacity(replace(V3, ep=ep)) for ep in (2, 3, 4, 5, 6, 32)] == [510, 508, 511, 508, 510, 511]
    wanted = {(2, 3): 4, (3, 5): 8, (8, 5): 5, (8, 600): 511, (3, 600): 508, (8, 0): 511}
    for (ep, tokens), capacity in wanted.items():
        assert sizes.low_latency_capacity(replace(V3, ep=ep, max_decode_tokens=tokens)) == capacity
    huge = replace(V3, ep=8, rows=RowLayout(231), hidden=8192)
    most = max_capacity(huge)
    assert most is not None and most < 511
    assert sizes.low_latency_bytes(most, 8192, 1848) < 2**35 <= sizes.low_latency_bytes(most + 1, 8192, 1848)


def test_short_queues_are_refused_before_the_first_step() -> None:
    fabric = Fabric(case=bf16_case(2, Phase.DECODE, tokens=4), library=Library(qp_depth=8))

    def program(ep: Communicator) -> None:
        fabric.make(ep, 2)

    with pytest.raises(
        CommunicationError, match=r"NVSHMEM_QP_DEPTH=8; decode steps of 4 .* need 10\. .* decode at most 3"
    ):
        on_ranks(2, program)


def test_a_spec_that_does_not_fit_makes_no_buffer() -> None:
    fabric = Fabric(case=bf16_case(2, Phase.DECODE, top_k=12, slots=6))
    with pytest.raises(CommunicationError, match="ConfigError.* 12 slots per token"):
        on_ranks(2, lambda ep: fabric.make(ep, 6))
