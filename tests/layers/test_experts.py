"""Experts over rows as dispatchers deliver them, and MLPs in fp8 blocks. E slots, R rows, C rows per slot, H hidden."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from moe_kernels.experts import ExpertWeights, prepare_experts
from moe_kernels.experts.reference import expert_mlp_ragged_reference
from moe_kernels.quant import dequantize, quantize_blocks, quantize_rows
from moe_kernels.scaled import BlockScaled
from torch import Tensor

from moe_runtime.dispatch.base import GroupedRows, PaddedRows
from moe_runtime.layers.experts import DenseMLP, Experts, ScaledMLP
from moe_runtime.layers.linear import Linear

SLOTS, HIDDEN, WIDTH = 3, 144, 128
COUNTS = (2, 0, 4)
PSUM = torch.tensor([2, 2, 6], dtype=torch.int32)


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


def blocks(w: BlockScaled) -> Tensor:
    return dequantize(w, block=(128, 128))


def scaled_weights(slots: int = SLOTS) -> ExpertWeights:
    w13 = quantize_blocks(torch.randn(slots, 2 * WIDTH, HIDDEN).div(HIDDEN**0.5))
    return ExpertWeights(w13, quantize_blocks(torch.randn(slots, HIDDEN, WIDTH).div(WIDTH**0.5)))


def reference(x: Tensor, weights: ExpertWeights, psum: Tensor = PSUM) -> Tensor:
    assert isinstance(weights.w13, BlockScaled)
    assert isinstance(weights.w2, BlockScaled)
    return expert_mlp_ragged_reference(x, blocks(weights.w13), blocks(weights.w2), psum)


def padded(rows: Tensor) -> Tensor:
    """`[R, ...]` as `[E, C, ...]`, C = 5."""
    out = rows.new_zeros(SLOTS, 5, *rows.shape[1:])
    for slot, part in enumerate(torch.split(rows, list(COUNTS))):
        out[slot, : len(part)] = part
    return out


def real(y: Tensor) -> Tensor:
    """Of padded results."""
    return torch.cat([y[slot, :count] for slot, count in enumerate(COUNTS)])


def test_rows_keep_their_dtype_with_fp8_weights() -> None:
    """No detour over bf16: 1e-5 is out of its reach."""
    weights, x = scaled_weights(), torch.randn(6, HIDDEN)
    got = Experts(weights)(GroupedRows(x, PSUM))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), reference(x, weights), atol=1e-5, rtol=1e-5)
    got = Experts(weights)(PaddedRows(padded(x), torch.tensor(COUNTS, dtype=torch.int32)))
    torch.testing.assert_close(real(got).double(), reference(x, weights), atol=1e-5, rtol=1e-5)


def test_rows_that_arrive_in_fp8() -> None:
    weights, x = scaled_weights(), quantize_rows(torch.randn(6, HIDDEN))
    want = reference(dequantize(x), weights)
    got = Experts(weights)(GroupedRows(x.data, PSUM, scales=x.scale))
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), want, atol=4e-2, rtol=4e-2)
    mutant = Experts(weights)(GroupedRows(x.data, PSUM, scales=x.scale.roll(1, 0)))
    with pytest.raises(AssertionError):  # another row's scales
        torch.testing.assert_close(mutant.double(), want, atol=4e-2, rtol=4e-2)
    data = padded(x.data.view(torch.uint8)).view(torch.float8_e4m3fn)
    got = Experts(weights)(PaddedRows(data, torch.tensor(COUNTS, dtype=torch.int32), scales=padded(x.scale)))
    torch.testing.assert_close(real(got).double(), want, atol=4e-2, rtol=4e-2)


def test_rows_weights_are_applied_where_they_come_along() -> None:
    w13, w2 = torch.randn(SLOTS, 2 * WIDTH, HIDDEN).div(HIDDEN**0.5), torch.randn(SLOTS, HIDDEN, WIDTH).div(WIDTH**0.5)
    experts, x, factors = Experts(prepare_experts(w13, w2)), torch.randn(6, HIDDEN), torch.rand(6)
    want = expert_mlp_ragged_reference(x, w13, w2, PSUM) * factors.unsqueeze(1)
    got = experts(GroupedRows(x, PSUM, weights=factors, expected_rows=2))
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)
    counts = torch.tensor(COUNTS, dtype=torch.int32)
    got = experts(PaddedRows(padded(x), counts, weights=padded(factors), expected_rows=2))
    torch.testing.assert_close(real(got).double(), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 40])
def test_a_scaled_mlp_is_the_dense_one_of_its_weights(tokens: int, batch_invariant: bool) -> None:
    weights, x = scaled_weights(1), torch.randn(tokens, HIDDEN)
    assert isinstance(weights.w13, BlockScaled)
    assert isinstance(weights.w2, BlockScaled)
    plain = DenseMLP(
        Linear.of(blocks(weights.w13)[0], batch_invariant=batch_invariant),
        Linear.of(blocks(weights.w2)[0], batch_invariant=batch_invariant),
    )
    got, want = ScaledMLP(weights, batch_invariant)(x), plain(x)
    assert got.shape == x.shape
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    if batch_invariant:
        assert torch.equal(got, want)


def test_a_layer_over_fp8_blocks_adds_its_bias() -> None:
    w, bias, x = quantize_blocks(torch.randn(130, 256)), torch.randn(130), torch.randn(4, 256).to(torch.bfloat16)
    layer = Linear.of(w, bias.to(torch.bfloat16))
    assert layer.weight is w
    got = layer(x)
    want = dequantize(quantize_rows(x)) @ blocks(w).t() + bias
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want, atol=0.3, rtol=2e-2)  # sums of size 16 in bf16
