"""FP8 blocks: dequantising a region equals cutting the dequantised whole."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_tools.fp8 import quantize

from moe_runtime.loading.fp8 import block_region, dequantize, scale_name, scale_shape

BLOCK = (128, 128)


def oracle(data: torch.Tensor, scales: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """Every weight times the scale of its block, written with indices."""
    rows = torch.arange(data.shape[0]) // block[0]
    columns = torch.arange(data.shape[1]) // block[1]
    return data.double() * scales.double()[rows][:, columns]


@pytest.mark.parametrize(
    ("shape", "expected"), [((128, 128), (1, 1)), ((129, 1), (2, 1)), ((1, 129), (1, 2)), ((7168, 2048), (56, 16))]
)
def test_scale_shape_rounds_up(shape: tuple[int, int], expected: tuple[int, int]) -> None:
    assert scale_shape(shape, BLOCK) == expected


def test_scale_name_is_the_published_one() -> None:
    assert scale_name("model.layers.0.mlp.up_proj.weight") == "model.layers.0.mlp.up_proj.weight_scale_inv"


def test_round_trip_error_is_that_of_three_mantissa_bits() -> None:
    weight = torch.randn(300, 200, generator=torch.Generator().manual_seed(0)) * 0.02
    weight[:, 128:] *= 1000.0  # a block of another magnitude needs its own scale
    data, scales = quantize(weight, block=BLOCK)
    assert data.dtype == torch.float8_e4m3fn
    assert scales.shape == (3, 2)
    back = dequantize(data, scales, block=BLOCK, dtype=torch.float32)
    # Half a unit of 3 bits is 1/16 of the value; subnormals of a block end at 2^-10 of 448 times its scale.
    bound = weight.abs() / 16 + scales.repeat_interleave(128, 0)[:300].repeat_interleave(128, 1)[:, :200] * 2**-10
    assert bool(((back - weight).abs() <= bound).all())
    assert float((back - weight).abs().max()) > 0.0


def test_a_block_of_zeros_stays_finite() -> None:
    data, scales = quantize(torch.zeros(130, 4), block=BLOCK)
    assert torch.equal(dequantize(data, scales, block=BLOCK, dtype=torch.float32), torch.zeros(130, 4))


@settings(deadline=None, max_examples=150, derandomize=True)
@given(data=st.data())
def test_region_equals_the_cut_of_the_whole(data: st.DataObject) -> None:
    block = data.draw(st.sampled_from([(128, 128), (4, 8), (3, 5)]))
    shape = (data.draw(st.integers(1, 30)), data.draw(st.integers(1, 30)))
    if block[0] == 128:
        shape = (shape[0] * 10, shape[1] * 10)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    stored = torch.randn(shape, generator=generator).to(torch.float8_e4m3fn)
    scales = torch.rand(scale_shape(shape, block), generator=generator) + 0.5
    r0 = data.draw(st.integers(0, shape[0]))
    r1 = data.draw(st.integers(r0, shape[0]))
    c0 = data.draw(st.integers(0, shape[1]))
    c1 = data.draw(st.integers(c0, shape[1]))
    got = dequantize(
        stored.view(torch.uint8)[r0:r1, c0:c1].contiguous().view(torch.float8_e4m3fn),
        scales[block_region(((r0, r1), (c0, c1)), block)],
        block=block,
        row_offset=r0 % block[0],
        column_offset=c0 % block[1],
        dtype=torch.float32,
    )
    expected = oracle(stored.float(), scales, block)[r0:r1, c0:c1]
    assert got.shape == expected.shape
    assert torch.equal(got, expected.float())


def test_forgetting_the_offset_is_seen() -> None:
    """The mutant of the property above: a region that starts inside a block, read as if on its border."""
    weight = torch.ones(256, 128)
    weight[128:] = 2.0
    data, scales = quantize(weight, block=BLOCK)
    part = data.view(torch.uint8)[64:192].clone().view(torch.float8_e4m3fn)
    right = dequantize(part, scales, block=BLOCK, row_offset=64, dtype=torch.float32)
    wrong = dequantize(part, scales, block=BLOCK, dtype=torch.float32)
    assert torch.equal(right, weight[64:192])
    assert not torch.equal(wrong, weight[64:192])
