"""The DeepGEMM backend against a double that holds it to the library's documented contract."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from moe_kernels.errors import KernelError
from moe_kernels.experts import ExpertWeights, expert_mlp_padded, expert_mlp_ragged
from moe_kernels.grouped_gemm import deep_gemm, grouped_gemm_padded, grouped_gemm_ragged
from moe_kernels.linear import linear
from moe_kernels.quant import dequantize, quantize_blocks, quantize_rows
from moe_kernels.scaled import BlockScaled
from torch import Tensor

FP8, SLOTS, N, K = torch.float8_e4m3fn, 3, 256, 384
Pair = tuple[Tensor, Tensor]


def _check_weights(b: Pair) -> Tensor:
    """`[G, N, K]` K-major with `[G, ceil(N/128), ceil(K/128)]` contiguous fp32 scales."""
    data, scale = b
    groups, n, k = data.shape
    assert data.dtype == FP8 and data.is_contiguous()
    assert scale.dtype == torch.float32 and scale.is_contiguous()
    assert scale.shape == (groups, -(-n // 128), -(-k // 128))
    return dequantize(BlockScaled(data, scale), block=(128, 128))


def contiguous(
    a: Pair,
    b: Pair,
    d: Tensor,
    grouped_layout: Tensor,
    recipe: Any = None,
    use_psum_layout: bool = False,
    ensure_zero_padding: bool = True,
    expected_m_for_psum_layout: int | None = None,
) -> None:
    x, w = dequantize(BlockScaled(*a)), _check_weights(b)
    assert a[0].is_contiguous() and d.is_contiguous() and d.dtype == torch.bfloat16
    assert d.shape == (x.shape[0], w.shape[1]) and use_psum_layout
    assert grouped_layout.dtype == torch.int32 and grouped_layout.shape == (w.shape[0],)
    start = 0
    for slot, end in enumerate(grouped_layout.tolist()):
        assert start % 128 == 0
        d[start:end] = (x[start:end] @ w[slot].T).bfloat16()
        start = -(-end // 128) * 128


def masked(a: Pair, b: Pair, d: Tensor, masked_m: Tensor, expected_m: int) -> None:
    w = _check_weights(b)
    groups, most, k = a[0].shape
    assert a[1].shape == (groups, most, -(-k // 128)) and a[0].is_contiguous() and d.is_contiguous()
    assert d.shape == (groups, most, w.shape[1]) and d.dtype == torch.bfloat16
    assert masked_m.dtype == torch.int32 and masked_m.shape == (groups,) and 0 < expected_m <= most
    for slot, count in enumerate(masked_m.tolist()):
        x = dequantize(BlockScaled(a[0][slot], a[1][slot].contiguous()))
        d[slot, :count] = (x[:count] @ w[slot].T).bfloat16()


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    double = ModuleType("deep_gemm")
    double.__dict__.update(
        __version__="2.6.1", m_grouped_fp8_gemm_nt_contiguous=contiguous, m_grouped_fp8_gemm_nt_masked=masked
    )
    monkeypatch.setitem(sys.modules, "deep_gemm", double)
    deep_gemm.library.cache_clear()
    yield double
    deep_gemm.library.cache_clear()


def operands(rows: int) -> tuple[BlockScaled, BlockScaled]:
    return quantize_rows(torch.randn(rows, K)), quantize_blocks(torch.randn(SLOTS, N, K).div(K**0.5))


def close(got: Tensor, want: Tensor) -> None:
    """Both round the same fp32 sums to bf16, in another order."""
    torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2)


def test_ragged(library: ModuleType) -> None:
    psum = torch.tensor([100, 128, 300], dtype=torch.int32)
    x, w = operands(384)
    real = torch.zeros(384, dtype=torch.bool)
    real[:100] = real[128:300] = True
    got, want = (grouped_gemm_ragged(x, w, psum, alignment=128, backend=b)[real] for b in ("deep_gemm", "torch"))
    close(got, want)
    wrong = BlockScaled(w.data.roll(1, 0), w.scale)
    with pytest.raises(AssertionError):  # a mutant: slots swapped
        close(grouped_gemm_ragged(x, wrong, psum, alignment=128, backend="deep_gemm")[real], want)
    with pytest.raises(KernelError, match=r"multiples of 1 rows; it needs 128; permute with alignment=128"):
        grouped_gemm_ragged(x, w, psum, backend="deep_gemm")
    with pytest.raises(KernelError, match="no batch-invariant mode"):
        grouped_gemm_ragged(x, w, psum, alignment=128, backend="deep_gemm", batch_invariant=True)
    plain = torch.zeros(SLOTS, N, K)
    with pytest.raises(KernelError, match="serves block-scaled"):
        grouped_gemm_ragged(torch.zeros(384, K), plain, psum, alignment=128, backend="deep_gemm")


def test_linear(library: ModuleType) -> None:
    """One slot; its end is the number of rows, exactly."""
    w, x = quantize_blocks(torch.randn(N, K).div(K**0.5)), torch.randn(37, K).to(torch.bfloat16)
    close(linear(x, w, backend="deep_gemm"), linear(x, w, backend="torch"))
    assert linear(x[:0], w, backend="deep_gemm").shape == (0, N)
    with pytest.raises(KernelError, match="no batch-invariant mode"):
        linear(x, w, backend="deep_gemm", batch_invariant=True)


def test_padded(library: ModuleType) -> None:
    counts = torch.tensor([5, 0, 9], dtype=torch.int32)
    x, w = operands(SLOTS * 10)
    scale = x.scale.view(SLOTS, 10, -1).transpose(1, 2).contiguous().transpose(1, 2)
    rows = BlockScaled(x.data.view(SLOTS, 10, K), scale)
    real = torch.arange(10) < counts.unsqueeze(1)
    got, want = (grouped_gemm_padded(rows, w, counts, backend=b)[real] for b in ("deep_gemm", "torch"))
    close(got, want)


@pytest.mark.parametrize("padded", [False, True])
def test_experts(library: ModuleType, padded: bool) -> None:
    """Also from plain rows, which are quantised first; the hidden row in fp8 is what separates it from torch."""
    width = N // 2
    weights = ExpertWeights(
        quantize_blocks(torch.randn(SLOTS, N, K).div(K**0.5)), quantize_blocks(torch.randn(SLOTS, K, width).div(9))
    )
    x = torch.randn(SLOTS * 128, K).bfloat16()
    for backend_x in (x, quantize_rows(x)):
        if padded:
            counts = torch.tensor([128, 3, 0], dtype=torch.int32)
            held: Tensor | BlockScaled = x.view(SLOTS, 128, K)
            if isinstance(backend_x, BlockScaled):
                held = BlockScaled(backend_x.data.view(SLOTS, 128, K), backend_x.scale.view(SLOTS, 128, -1))
            got, want = (
                expert_mlp_padded(held, weights, counts=counts, backend=b)[torch.arange(128) < counts.unsqueeze(1)]
                for b in ("deep_gemm", "torch")
            )
        else:
            psum = torch.tensor([128, 256, 300], dtype=torch.int32)
            got, want = (
                expert_mlp_ragged(backend_x, weights, psum=psum, alignment=128, backend=b)[:300]
                for b in ("deep_gemm", "torch")
            )
        assert got.dtype == torch.bfloat16
        error = float((got - want).float().norm() / want.float().norm())
        assert error < 0.06  # x and the hidden row in e4m3: 2.6 % of a value each
    narrow = ExpertWeights(quantize_blocks(torch.zeros(SLOTS, 128, K)), quantize_blocks(torch.zeros(SLOTS, K, 64)))
    rows = quantize_rows(x)
    with pytest.raises(KernelError, match="with scales"):
        expert_mlp_ragged(rows, narrow, psum=torch.zeros(SLOTS, dtype=torch.int32), alignment=128, backend="deep_gemm")


def test_missing_or_old_library(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = operands(128)
    psum = torch.tensor([1, 1, 1], dtype=torch.int32)
    monkeypatch.setitem(sys.modules, "deep_gemm", None)
    deep_gemm.library.cache_clear()
    with pytest.raises(KernelError, match="cannot be imported.*github.com/deepseek-ai/DeepGEMM.*take backend='triton'"):
        grouped_gemm_ragged(x, w, psum, alignment=128, backend="deep_gemm")
    old = ModuleType("deep_gemm")
    old.__dict__["__version__"] = "1.0.0"
    monkeypatch.setitem(sys.modules, "deep_gemm", old)
    with pytest.raises(KernelError, match=r"deep_gemm 1\.0\.0 has no m_grouped_fp8_gemm_nt_contiguous"):
        grouped_gemm_ragged(x, w, psum, alignment=128, backend="deep_gemm")

    def without_psum(a: Pair, b: Pair, d: Tensor, m_indices: Tensor) -> None:
        raise AssertionError("never called")

    old.__dict__.update(m_grouped_fp8_gemm_nt_contiguous=without_psum, m_grouped_fp8_gemm_nt_masked=masked)
    with pytest.raises(KernelError, match="takes no end offsets"):
        grouped_gemm_ragged(x, w, psum, alignment=128, backend="deep_gemm")
    deep_gemm.library.cache_clear()
