"""Floors against figures worked out by hand from the datasheets (H200: 4.8 TB/s, 989.5 and 1979 TFLOP/s)."""

from __future__ import annotations

import pytest
from moe_tools.bench.floor import H100, H200, Work, expert_work, hardware_of, linear_work, mla_work


def experts_us(slots: int, rows: int) -> float:
    return H200.floor_us(
        expert_work(slots * rows, slots, hidden=7168, intermediate=2048, weight_bytes=1.0, arithmetic="fp8")
    )


def test_masked_cores_of_deepseek_v3() -> None:
    # One expert is 44.04 MB of fp8: 9.175 us; 1024 rows of it are 90.2 GFLOP: 45.57 us.
    assert experts_us(32, 32) == pytest.approx(293.6, abs=0.1)
    assert experts_us(8, 128) == pytest.approx(73.4, abs=0.1)
    assert experts_us(2, 512) == pytest.approx(45.6, abs=0.1)
    assert experts_us(1, 1024) == pytest.approx(45.6, abs=0.1)


def test_attention_of_128_heads_is_bound_by_arithmetic() -> None:
    work = mla_work(128, 4096, heads=128, latent=512, rope=64)
    assert H200.floor_us(work) == pytest.approx(147.6, abs=0.1)
    assert H200.bound(work) == "flops"
    split = mla_work(128, 4096, heads=32, latent=512, rope=64)
    assert H200.floor_us(split) == pytest.approx(125.8, abs=0.1)
    assert H200.bound(split) == "bytes"


def test_linear_counts_weights_and_rows() -> None:
    work = linear_work(64, n=7168, k=2048, weight_bytes=2.0)
    assert work.num_bytes == 2 * 7168 * 2048 + 2 * 64 * (7168 + 2048)
    assert H200.bound(work) == "bytes"


def test_adding_and_naming() -> None:
    assert Work(1, 2) + Work(3, 4) == Work(4, 6)
    with pytest.raises(ValueError, match="cannot add bf16 and fp8 work"):
        Work(1, 2) + Work(1, 2, "fp8")
    assert hardware_of("NVIDIA H200") is H200
    assert hardware_of("NVIDIA H100 80GB HBM3") is H100
    assert hardware_of("NVIDIA L4") is None
