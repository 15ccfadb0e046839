"""Ahead-of-time cases of the kernels that put rows; with NVSHMEM's device library where that is installed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from moe_kernels.aot import AotCase
from moe_kernels.put_rows import geometry
from moe_kernels.put_rows import triton_kernels as kernels
from moe_kernels.put_rows.block import ROWS, Block, Spans, find_bitcode
from moe_kernels.put_rows.triton_return import publish_kernel, pull_kernel


def cases() -> Iterator[AotCase]:
    """DeepSeek-V3's decode unit (32 ranks of 9 slots, 128 tokens), plain and fp8, and a prompt's 4096 tokens."""
    block = Block(32, 9, 32 * 128 * 8 + 9 * 127, 14336, 56)
    numbers = dict.fromkeys(("N", "rank", "polls", "blocks", "room"), "i32")
    numbers |= dict.fromkeys(("x_stride", "scale_stride", "to_row_stride", "to_group_stride"), "i32")
    pointers = {"addresses_ptr": "*i64", "step_ptr": "*i64", "slots_ptr": "*i64", "row_of_ptr": "*i64"}
    pointers |= dict.fromkeys(("totals_ptr", "earlier_ptr", "first_row_ptr", "ends_ptr"), "*i32")
    pointers |= {"scale_ptr": "*fp32", "weights_ptr": "*fp32", "x_ptr": "*i16", "y_ptr": "*i16", "out_ptr": "*bf16"}

    bitcode = find_bitcode()

    def case(name: str, kernel: Any, constants: dict[str, Any], *, warps: int = 4, **types: str) -> AotCase:
        signature = {n: t for n, t in ({**pointers, **numbers, **types}).items() if n in kernel.arg_names}
        aligned = tuple(n for n in ("x_ptr", "y_ptr", "out_ptr", "x_stride") if n in signature)
        quick = name in ("place 4096", "pull", "offsets grouped", "arrive", "announce")
        linked = {"libnvshmem_device": str(bitcode)} if constants.get("FAR") else {}
        options: dict[str, Any] = {
            "aligned": aligned,
            "quick": quick,
            "linked": linked,
            "asserts": "polls" in signature,
            "max_narrow": 0,  # on NVLink, and beyond it, a row by single values takes many times as long
        }
        return AotCase("put_rows", name, kernel, signature, constants, warps, fp_fusion=False, **options)

    few = {"S": 32, "LANES": 32, "FAR": False}
    yield case("announce", kernels.announce_kernel, geometry.announce_constants(block, one=True))
    yield case("announce 4096", kernels.announce_kernel, geometry.announce_constants(block, one=False))
    yield case("offsets grouped", kernels.offsets_kernel, geometry.offsets_constants(block, Spans(128)))
    yield case("offsets padded", kernels.offsets_kernel, geometry.offsets_constants(block, Spans(room=4096)))
    yield case("place", kernels.place_kernel, geometry.place_constants(block, 7168, 2, 8, one=True))
    yield case("place 4096", kernels.place_kernel, geometry.place_constants(block, 7168, 2, 8, one=False))
    fp8 = geometry.place_constants(block, 7168, 1, 8, one=True, groups=56)
    yield case("place fp8", kernels.place_kernel, fp8, x_ptr="*u8")
    yield case("signal", kernels.signal_kernel, few | {"CHANNEL": ROWS}, warps=1)
    yield case("arrive", kernels.arrive_kernel, few | {"CHANNEL": ROWS}, warps=1)
    spans = {
        "DATA_AT": block.data_at,
        "H": 7168,
        "ALIGNMENT": 128,
        "PADDED": False,
        "COLUMNS": geometry.columns_of(7168, 2),
    }
    yield case("publish", publish_kernel, spans)
    yield case("pull", pull_kernel, geometry.pull_constants(block, 7168, 2, 8))
    if bitcode is None:
        return
    wide = replace(block, groups=0, staged=128, top_k=8)
    beyond = {"FAR": True}
    yield case("announce far", kernels.announce_kernel, geometry.announce_constants(wide, one=True, far=True))
    yield case("offsets far", kernels.offsets_kernel, geometry.offsets_constants(wide, Spans(128), far=True))
    yield case("place far", kernels.place_kernel, geometry.place_constants(wide, 7168, 2, 8, one=True) | beyond)
    yield case("signal far", kernels.signal_kernel, few | beyond | {"CHANNEL": ROWS}, warps=1)
    yield case("arrive far", kernels.arrive_kernel, few | beyond | {"CHANNEL": ROWS}, warps=1)
    yield case("pull far", pull_kernel, geometry.pull_constants(wide, 7168, 2, 8) | beyond)
