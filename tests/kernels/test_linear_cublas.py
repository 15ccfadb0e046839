"""linear by cuBLASLt's block-scaled product, on a double that enforces its contract or on a device.

The double's clauses are those of ScaledBlas.cpp's 1x128 by 128x128 recipe.
"""

from __future__ import annotations

import pytest
import torch
from moe_kernels.errors import KernelError
from moe_kernels.linear import cublas, linear
from moe_kernels.quant import dequantize, quantize_blocks, quantize_rows
from moe_kernels.scaled import BlockScaled
from torch import Tensor
from torch.nn import functional as F

from tests.kernels.devices import DEVICE, ON_GPU


def scaled_mm(
    x: Tensor, w: Tensor, x_scale: Tensor, x_recipe: object, w_scale: Tensor, w_recipe: object, *, output_dtype: object
) -> Tensor:
    """What cuBLASLt does, or refuses."""
    rows, width = x.shape
    columns, blocks = w.shape[1], -(-width // 128)
    assert x.is_contiguous() and w.stride() == (1, width), "row-major by column-major"
    assert width % 16 == 0 and columns % 16 == 0 and rows % 4 == 0, "16 bytes"
    assert (x_recipe, w_recipe) == (F.ScalingType.BlockWise1x128, F.ScalingType.BlockWise128x128)
    assert x_scale.shape == (rows, blocks) and x_scale.stride() == (1, rows) and x_scale.dtype is torch.float32
    padded = -(-blocks // 4) * 4
    assert w_scale.shape == (padded, -(-columns // 128)) and w_scale.stride() == (1, padded), "scales in whole fours"
    assert output_dtype is torch.bfloat16
    plain = dequantize(BlockScaled(x, x_scale), backend="torch")
    weight = dequantize(BlockScaled(w.t(), w_scale.t()), block=(128, 128), backend="torch")
    return (plain @ weight.t()).to(torch.bfloat16)


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> None:
    if not ON_GPU:
        monkeypatch.setattr(F, "scaled_mm", scaled_mm)
        monkeypatch.setattr(cublas, "check_device", lambda x: None)


def weight(n: int, k: int) -> BlockScaled:
    return quantize_blocks(torch.randn(n, k, device=DEVICE).div(k**0.5), backend="torch")


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("rows", [1, 4, 7])
@pytest.mark.parametrize("shape", [(256, 512), (80, 1024)])
def test_gpu_equals_the_torch_backend(shape: tuple[int, int], rows: int) -> None:
    w = weight(*shape)
    x = torch.randn(1, rows, shape[1], device=DEVICE, dtype=torch.bfloat16 if ON_GPU else torch.float32)
    got = linear(x, w, backend="cublas")
    want = linear(x, w, backend="torch")
    assert got.dtype == x.dtype and got.shape == want.shape
    torch.testing.assert_close(got, want.to(got.dtype), atol=2e-2, rtol=2e-2)
    mutant = BlockScaled(w.data, w.scale.mul(torch.linspace(1, 3, w.scale.shape[1], device=DEVICE)))
    wrong = linear(x, mutant, backend="cublas")
    with pytest.raises(AssertionError):
        torch.testing.assert_close(wrong, want.to(got.dtype), atol=2e-2, rtol=2e-2)


@pytest.mark.usefixtures("double")
def test_no_rows() -> None:
    assert linear(torch.randn(0, 512, device=DEVICE), weight(64, 512), backend="cublas").shape == (0, 64)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(
    ("x", "n", "message"),
    [
        (torch.randn(4, 384), 64, "K must be a multiple of 512"),
        (torch.randn(4, 512), 72, "and N of 16"),
        (quantize_rows(torch.randn(5, 512), backend="torch"), 64, "rows must be a multiple of 4"),
        (quantize_rows(torch.randn(8, 512), backend="torch"), 64, r"strides \(4, 1\); for cublas .* \(1, 8\)"),
    ],
)
def test_what_it_does_not_take(x: Tensor | BlockScaled, n: int, message: str) -> None:
    moved = x.to(DEVICE) if isinstance(x, Tensor) else BlockScaled(x.data.to(DEVICE), x.scale.to(DEVICE))
    with pytest.raises(KernelError, match=message):
        linear(moved, weight(n, x.shape[1]), backend="cublas")


def test_it_is_never_a_silent_choice() -> None:
    with pytest.raises(KernelError, match="no batch-invariant mode"):
        linear(torch.randn(4, 512, device=DEVICE), weight(64, 512), backend="cublas", batch_invariant=True)
    if not ON_GPU:
        with pytest.raises(KernelError, match="x is on cpu; cublas needs a CUDA device"):
            linear(torch.randn(4, 512), weight(64, 512), backend="cublas")
