"""fp8 quantisation in Triton and in torch, against plain loops. R rows, K columns."""

from __future__ import annotations

import pytest
import torch
from moe_kernels.errors import KernelError
from moe_kernels.quant import dequantize, quantize_blocks, quantize_rows
from moe_kernels.quant.reference import quantize_reference
from moe_kernels.scaled import BlockScaled
from torch import Tensor

from tests.kernels.devices import DEVICE, DTYPES, ON_GPU

FP8 = torch.float8_e4m3fn
SHAPES = [(0, 128), (1, 1), (1, 128), (3, 200), (5, 384), *([(520, 640), (9, 7168)] if ON_GPU else [])]
BACKENDS = ["torch", "triton"]


def values(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Magnitudes from 1e-6 to 1e3, row by row, and zeros."""
    x = torch.randn(*shape, device=DEVICE) * 10.0 ** torch.randint(-6, 4, (*shape[:-1], 1), device=DEVICE)
    return x.to(dtype)


def check(got: BlockScaled, x: Tensor, block: tuple[int, int], *, ue8m0: bool = False) -> None:
    """Scales and fp8 bytes are those of the rule, to the bit."""
    want, scale = quantize_reference(x.cpu(), block, ue8m0=ue8m0)
    assert got.data.dtype == FP8
    assert torch.equal(got.scale.cpu(), scale)
    held = dequantize(got, block=block, dtype=torch.float64, backend="torch").cpu()
    spread = scale.repeat_interleave(block[0], 0)[: x.shape[0]].repeat_interleave(block[1], 1)[:, : x.shape[1]]
    assert torch.equal(got.data.cpu().float(), (want / spread).float())
    torch.testing.assert_close(held, want, atol=0, rtol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ue8m0", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_rows(shape: tuple[int, int], ue8m0: bool, backend: str) -> None:
    for dtype in DTYPES:
        x = values(*shape, dtype=dtype)
        got = quantize_rows(x, ue8m0=ue8m0, backend=backend)
        check(got, x, (1, 128), ue8m0=ue8m0)
    if shape[0] > 1:  # a mutant: every row has its neighbour's scale
        with pytest.raises(AssertionError):
            check(BlockScaled(got.data, got.scale.roll(1, 0)), x, (1, 128), ue8m0=ue8m0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_and_layouts(backend: str) -> None:
    x = values(6, 100)
    for group in (16, 64, 256):
        check(quantize_rows(x, group=group, backend=backend), x, (1, group))
    row, mn = (quantize_rows(x, group=16, scale_layout=layout, backend=backend) for layout in ("row", "mn"))
    assert torch.equal(row.scale, mn.scale)
    assert row.scale.stride() == (7, 1)
    assert mn.scale.stride() == (1, 8), "columns start at multiples of 4 rows"


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_with_a_stride(backend: str) -> None:
    wide = values(3, 300)
    check(quantize_rows(wide[:, 40:240], backend=backend), wide[:, 40:240], (1, 128))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(1, 1), (130, 200), (64, 128)])
@pytest.mark.parametrize("ue8m0", [False, True])
def test_blocks(ue8m0: bool, shape: tuple[int, int], backend: str) -> None:
    w = values(*shape)
    check(quantize_blocks(w, ue8m0=ue8m0, backend=backend), w, (128, 128), ue8m0=ue8m0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_slots(backend: str) -> None:
    w = values(3, 40, 70)
    got = quantize_blocks(w, block=32, backend=backend)
    for slot in range(3):
        check(BlockScaled(got.data[slot], got.scale[slot]), w[slot], (32, 32))
    assert torch.equal(
        dequantize(got, block=(32, 32), backend=backend), dequantize(got, block=(32, 32), backend="torch")
    )
    with pytest.raises(AssertionError):  # a mutant: the next slot's scales
        check(BlockScaled(got.data[0], got.scale[1]), w[0], (32, 32))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["row", "mn"])
def test_dequantize(layout: str, backend: str) -> None:
    x = values(7, 200)
    scaled = quantize_rows(x, scale_layout=layout, backend="torch")
    got = dequantize(scaled, backend=backend)
    assert torch.equal(got.cpu(), quantize_reference(x.cpu(), (1, 128))[0].float())
    # e4m3 keeps 4 significant bits; the smallest scaled magnitudes are subnormal.
    assert bool(((got - x).abs() <= x.abs() / 16 + scaled.scale.repeat_interleave(128, 1)[:, :200] * 2**-10).all())
    assert dequantize(BlockScaled(scaled.data[:0], scaled.scale[:0]), backend=backend).shape == (0, 200)


@pytest.mark.parametrize("backend", BACKENDS)
def test_zeros_and_values_that_are_not_finite(backend: str) -> None:
    x = torch.zeros(3, 256, device=DEVICE)
    x[1, 5], x[2, 200] = torch.nan, -torch.inf
    got = quantize_rows(x, backend=backend)
    back = dequantize(got, backend="torch")
    smallest = torch.tensor(1e-4) / 448
    assert got.scale.tolist() == [[smallest] * 2, [torch.inf, smallest], [smallest, torch.inf]]
    assert back[0].eq(0).all()
    assert back[1, :128].isnan().all() and back[1, 128:].eq(0).all()
    assert back[2, 128:].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_does_not_depend_on_the_others(backend: str) -> None:
    x = values(9, 160)
    together = quantize_rows(x, backend=backend)
    for i, row in enumerate(torch.split(x, 1)):
        alone = quantize_rows(row, backend=backend)
        assert torch.equal(alone.data[0].view(torch.uint8), together.data[i].view(torch.uint8))
        assert torch.equal(alone.scale[0], together.scale[i])


def test_large_tiles_give_the_same_bits() -> None:
    x = values(520, 16)
    few, many = quantize_rows(x[:5], group=16, backend="triton"), quantize_rows(x, group=16, backend="triton")
    assert torch.equal(few.data.view(torch.uint8), many.data[:5].view(torch.uint8))
    assert torch.equal(many.scale, quantize_rows(x, group=16, backend="torch").scale)


def test_errors() -> None:
    x = torch.zeros(4, 256, device=DEVICE)
    with pytest.raises(KernelError, match="96 values share a scale; it must be a power of two"):
        quantize_rows(x, group=96)
    with pytest.raises(KernelError, match="scale_layout='column' is not there; choose one of row, mn"):
        quantize_rows(x, scale_layout="column")
    with pytest.raises(KernelError, match=r"strides \(1, 256\); it must have 2 dims"):
        quantize_rows(x.t())
    with pytest.raises(KernelError, match="float64"):
        quantize_blocks(x.double())
    with pytest.raises(KernelError, match=r"must be float8_e4m3fn and \(4, 2\) float32"):
        dequantize(BlockScaled(x.to(FP8), torch.ones(4, 3, device=DEVICE)))
