"""linear with block-scaled weights, on torch and Triton. T tokens, K input width, N output width."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from moe_kernels.errors import KernelError
from moe_kernels.linear import linear, prepare_weight
from moe_kernels.linear.reference import linear_reference
from moe_kernels.quant import dequantize, quantize_blocks, quantize_rows
from moe_kernels.scaled import BlockScaled
from torch import Tensor

from tests.kernels.devices import DEVICE, ON_GPU

CheckRows = Callable[[Callable[[Tensor], Tensor], Tensor], None]
BACKENDS = ("torch", "triton")
# Both operands are rounded to fp8 before either side multiplies; fp32 sums, at less on tensor cores.
TOLERANCE = 5e-3 if ON_GPU else 1e-5


def weight(n: int, k: int) -> BlockScaled:
    w = quantize_blocks(torch.randn(n, k, device=DEVICE).div(k**0.5), backend="torch")
    w.scale.mul_(torch.rand(w.scale.shape, device=DEVICE).add_(0.5))
    return w


def reference(x: Tensor, w: BlockScaled, *, ue8m0: bool = False) -> Tensor:
    """The product of what the fp8 operands stand for, fp64."""
    rows = dequantize(quantize_rows(x.reshape(-1, x.shape[-1]), ue8m0=ue8m0, backend="torch"), backend="torch")
    want = linear_reference(rows, dequantize(w, block=(128, 128), backend="torch"))
    return want.view(*x.shape[:-1], w.shape[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("shape", [(300, 272), (128, 128), (64, 400)])
def test_matches_reference(shape: tuple[int, int], batch_invariant: bool, backend: str) -> None:
    w = prepare_weight(weight(*shape))
    assert isinstance(w, BlockScaled), "fp8 stays as it is"
    x = torch.randn(2, 9, shape[1], device=DEVICE)
    got = linear(x, w, batch_invariant=batch_invariant, backend=backend)
    want = reference(x, w)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, atol=TOLERANCE, rtol=TOLERANCE)
    if shape == (300, 272):
        mutant = BlockScaled(w.data, w.scale.roll(1, 0))  # a block's scale for its neighbour's
        with pytest.raises(AssertionError):
            torch.testing.assert_close(linear(x, mutant, backend=backend).double(), want, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("backend", BACKENDS)
def test_activation_scales_of_powers_of_two(backend: str) -> None:
    w, x = weight(130, 272), torch.randn(9, 272, device=DEVICE)
    got = linear(x, w, ue8m0=True, backend=backend).double()
    torch.testing.assert_close(got, reference(x, w, ue8m0=True), atol=TOLERANCE, rtol=TOLERANCE)
    with pytest.raises(AssertionError):  # mutant: plain scales
        torch.testing.assert_close(got, reference(x, w), atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_are_quantised_already(backend: str) -> None:
    w, x = weight(130, 256), torch.randn(5, 256, device=DEVICE)
    got = linear(quantize_rows(x, backend="torch"), w, backend=backend)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), reference(x, w), atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens_and_one(backend: str) -> None:
    w = weight(128, 128)
    assert linear(torch.empty(0, 128, device=DEVICE), w, backend=backend).shape == (0, 128)
    one = torch.randn(1, 128, device=DEVICE)
    torch.testing.assert_close(linear(one, w, backend=backend).double(), reference(one, w), atol=1e-2, rtol=1e-2)


def test_rows_are_independent_on_torch(check_rows: CheckRows) -> None:
    w = weight(131, 129)
    check_rows(lambda x: linear(x, w, batch_invariant=True, backend="torch"), torch.randn(40, 129))


def test_rows_are_independent_on_triton() -> None:
    """Their number moves the tiles of the ordinary mode, not of the invariant one."""
    w, x = weight(130, 144), torch.randn(70, 144, device=DEVICE)
    whole = linear(x, w, batch_invariant=True, backend="triton")
    for start, stop in ((0, 1), (3, 20), (60, 70)):
        part = linear(x[start:stop].clone(), w, batch_invariant=True, backend="triton")
        assert torch.equal(part, whole[start:stop])


def test_bad_input() -> None:
    w = weight(130, 256)
    with pytest.raises(KernelError, match=r"\(2, 5\).*\[\.\.\., 256\]"):
        linear(torch.zeros(2, 5, device=DEVICE), w)
    with pytest.raises(KernelError, match=r"\(1, 2\).*must be float8_e4m3fn and \(2, 2\) float32"):
        linear(torch.zeros(2, 256, device=DEVICE), BlockScaled(w.data, w.scale[:1]))
    with pytest.raises(KernelError, match="contiguous"):
        linear(torch.zeros(2, 256, device=DEVICE), BlockScaled(w.data, w.scale.t().contiguous().t()))
    with pytest.raises(KernelError, match="int64"):
        linear(torch.zeros(2, 256, dtype=torch.int64, device=DEVICE), w)
    with pytest.raises(KernelError, match="w must be BlockScaled"):
        linear(quantize_rows(torch.zeros(2, 256, device=DEVICE), backend="torch"), torch.zeros(3, 256, device=DEVICE))
    narrow = BlockScaled(torch.zeros(2, 256, device=DEVICE), torch.zeros(2, 1, device=DEVICE))
    with pytest.raises(KernelError, match=r"scales \[T, 2\]"):
        linear(narrow, w)
