"""SwiGLU in Triton against fp64. R rows, I intermediate width."""

from __future__ import annotations

import pytest
import torch
from moe_kernels.errors import KernelError
from moe_kernels.quant import dequantize, quantize_rows
from moe_kernels.scaled import BlockScaled
from moe_kernels.swiglu import swiglu, swiglu_quantized
from moe_kernels.swiglu import triton as kernels
from moe_kernels.swiglu.reference import swiglu_reference
from torch import Tensor

from tests.kernels.devices import DEVICE, DTYPES, ON_GPU

# fp32: exp errs by two units in the last place; else one rounding of the output's dtype.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
WIDTHS = (1, 7, 32, 130, 2048, 18_432) if ON_GPU else (1, 7, 32, 130)


def close(got: Tensor, want: Tensor) -> None:
    bound = TOLERANCE[got.dtype]
    torch.testing.assert_close(got.double(), want, atol=bound / 10, rtol=bound)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_swiglu(width: int, dtype: torch.dtype) -> None:
    x = (torch.randn(2, 3, 2 * width, device=DEVICE) * 3).to(dtype)
    close(swiglu(x, backend="triton"), swiglu_reference(x))
    assert swiglu(x[:0], backend="triton").shape == (0, 3, width)
    with pytest.raises(AssertionError):  # a mutant: halves swapped
        close(swiglu(x.roll(width, -1), backend="triton"), swiglu_reference(x))


def test_extremes() -> None:
    x = torch.tensor([[-200.0, 200.0, 0.0, 1.0, 1.0, 1.0]], device=DEVICE)
    assert swiglu(x, backend="triton").tolist() == [[0.0, 200.0, 0.0]]


def test_values_do_not_depend_on_place(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = torch.randn(9, 150, device=DEVICE) * 3
    together = swiglu(wide[:, 10:110], backend="triton")
    for row, got in zip(torch.split(wide, 1), together, strict=True):
        assert torch.equal(swiglu(row[:, 10:110], backend="triton")[0], got)
    monkeypatch.setattr(kernels, "_tile", lambda rows, width: (2, 16, 1))
    assert torch.equal(swiglu(wide[:, 10:110], backend="triton"), together), "another tile, the same bits"


@pytest.mark.parametrize("layout", ["row", "mn"])
@pytest.mark.parametrize("width", [32, 200])
def test_quantized(width: int, layout: str) -> None:
    for dtype in DTYPES:
        x = (torch.randn(6, 2 * width, device=DEVICE) * 3).to(dtype)
        got = swiglu_quantized(x, scale_layout=layout, backend="triton")
        want = swiglu_quantized(x, scale_layout=layout, backend="torch")
        assert got.scale.stride() == want.scale.stride()
        torch.testing.assert_close(got.scale, want.scale, atol=0, rtol=2e-6)
        check_one_step(got, want)
        with pytest.raises(AssertionError):  # a mutant: the neighbour's scales
            check_one_step(BlockScaled(got.data, got.scale.roll(1, 0)), want)
    assert swiglu_quantized(x[:0], backend="triton").data.shape == (0, width)


def check_one_step(got: BlockScaled, want: BlockScaled) -> None:
    """Values agree to one step of e4m3 (exp may differ in its last bit), nearly all of them exactly."""
    ours, theirs = dequantize(got, backend="torch"), dequantize(want, backend="torch")
    step = theirs.abs() / 8 + want.scale.repeat_interleave(128, 1)[:, : ours.shape[1]] * 2**-9
    assert bool(((ours - theirs).abs() <= step).all())
    assert (got.data.view(torch.uint8) == want.data.view(torch.uint8)).float().mean() > 0.98


def test_quantized_is_the_quantiser_of_the_values() -> None:
    """fp32 in and out: the very values that `swiglu` gives, quantised."""
    x = torch.randn(5, 300, device=DEVICE)
    for ue8m0 in (False, True):
        got = swiglu_quantized(x, ue8m0=ue8m0, backend="triton")
        want = quantize_rows(swiglu(x, backend="triton"), ue8m0=ue8m0, backend="torch")
        assert torch.equal(got.scale, want.scale)
        assert torch.equal(got.data.view(torch.uint8), want.data.view(torch.uint8))


def test_rows_past_the_end_are_left_alone() -> None:
    x = torch.randn(9, 300, device=DEVICE)
    whole = swiglu_quantized(x, backend="triton")
    for end in (0, 5, 9, 2**31 - 1):
        x[end:] = torch.nan
        mark = torch.tensor([end], dtype=torch.int32, device=DEVICE)
        got = swiglu_quantized(x, end=mark, backend="triton")
        assert torch.equal(got.data[:end].view(torch.uint8), whole.data[:end].view(torch.uint8))
        assert torch.equal(got.scale[:end], whole.scale[:end])
        x = torch.where(x.isnan(), 0.0, x)
        whole = swiglu_quantized(x, backend="triton")


def test_errors() -> None:
    x = torch.zeros(4, 6, device=DEVICE)
    with pytest.raises(KernelError, match="width 5"):
        swiglu(x[:, :5], backend="triton")
    with pytest.raises(KernelError, match="rows must have unit stride"):
        swiglu(x.t()[:, :4], backend="triton")
    with pytest.raises(KernelError, match=r"must be \[R, 2I\]"):
        swiglu_quantized(x.view(2, 2, 6), backend="triton")
