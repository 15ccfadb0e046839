"""RMS norm in Triton against fp64. T tokens, H width."""

from __future__ import annotations

import pytest
import torch
from moe_kernels.errors import KernelError
from moe_kernels.norm import add_rms_norm, rms_norm
from moe_kernels.norm.reference import rms_norm_reference
from torch import Tensor

from tests.kernels.devices import DEVICE, DTYPES, ON_GPU

EPS = 1e-6
WIDTHS = (1, 7, 128, 7168) if ON_GPU else (1, 7, 128)
# One or two roundings of the output's dtype.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def close(got: Tensor, want: Tensor) -> None:
    bound = TOLERANCE[got.dtype]
    torch.testing.assert_close(got.double(), want, atol=bound, rtol=bound)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(width: int, dtype: torch.dtype) -> None:
    x, weight = torch.randn(5, width, device=DEVICE).to(dtype), torch.randn(width, device=DEVICE).to(dtype)
    close(rms_norm(x, weight, EPS, backend="triton"), rms_norm_reference(x, weight, EPS))
    with pytest.raises(AssertionError):  # a mutant: a row scaled by another row's norm
        close(rms_norm(x * 1e-3, weight, EPS, backend="triton"), rms_norm_reference(x * 1e-3, weight, 0.0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_rms_norm(dtype: torch.dtype) -> None:
    x, residual, weight = (torch.randn(*shape, device=DEVICE).to(dtype) for shape in ((3, 65), (3, 65), (65,)))
    normed, total = add_rms_norm(x, residual, weight, EPS, backend="triton")
    assert torch.equal(total, x + residual)
    close(normed, rms_norm_reference(total, weight, EPS))


def test_strided_rows_and_none() -> None:
    wide, weight = torch.randn(4, 96, device=DEVICE), torch.ones(64, device=DEVICE)
    got = rms_norm(wide[:, 16:80], weight, EPS, backend="triton")
    close(got, rms_norm_reference(wide[:, 16:80], weight, EPS))
    assert rms_norm(wide[:0, :64], weight, EPS, backend="triton").shape == (0, 64)


def test_a_row_does_not_depend_on_the_others() -> None:
    x, weight = torch.randn(9, 100, device=DEVICE), torch.randn(100, device=DEVICE)
    alone = torch.cat([rms_norm(row, weight, EPS, backend="triton") for row in torch.split(x, 1)])
    assert torch.equal(rms_norm(x, weight, EPS, backend="triton"), alone)


def test_bad_input() -> None:
    x, weight = torch.randn(3, 64, device=DEVICE), torch.ones(64, device=DEVICE)
    with pytest.raises(KernelError, match="strides .*rows must be contiguous"):
        rms_norm(x.t(), torch.ones(3, device=DEVICE), EPS, backend="triton")
    with pytest.raises(KernelError, match="backend='cuda' is not there; choose one of torch, triton"):
        rms_norm(x, weight, EPS, backend="cuda")
