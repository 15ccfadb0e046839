"""swiglu, rms_norm, add_rms_norm, apply_rope. T tokens, H width, R rotary width."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from moe_kernels.errors import KernelError
from moe_kernels.norm import add_rms_norm, rms_norm
from moe_kernels.norm.reference import rms_norm_reference
from moe_kernels.rope import apply_rope
from moe_kernels.rope.reference import apply_rope_reference
from moe_kernels.swiglu import swiglu
from moe_kernels.swiglu.reference import swiglu_reference
from torch import Tensor

CheckRows = Callable[[Callable[[Tensor], Tensor], Tensor], None]
DTYPES = (torch.float32, torch.bfloat16)
# fp32: a few roundings; bf16: one or two roundings of 2^-8 relative.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2e-2}
WIDTHS = (1, 7, 16, 31, 33, 100, 129, 515, 1031)


def close(got: Tensor, want: Tensor) -> None:
    bound = TOLERANCE[got.dtype]
    torch.testing.assert_close(got.double(), want, atol=bound, rtol=bound)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fast", [False, True])
def test_swiglu(fast: bool, dtype: torch.dtype) -> None:
    x = (torch.randn(3, 5, 34) * 3).to(dtype)
    close(swiglu(x, fast=fast), swiglu_reference(x))
    with pytest.raises(AssertionError):  # a mutant: halves swapped
        close(swiglu(x.roll(17, -1), fast=fast), swiglu_reference(x))


def test_swiglu_extremes() -> None:
    x = torch.tensor([[-200.0, 200.0, 0.0, 1.0, 1.0, 1.0]])
    assert swiglu(x).tolist() == [[0.0, 200.0, 0.0]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_swiglu_values_do_not_depend_on_place(check_rows: CheckRows, width: int, dtype: torch.dtype) -> None:
    check_rows(swiglu, (torch.randn(40, 2 * width) * 3).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(dtype: torch.dtype) -> None:
    x, weight = torch.randn(4, 65).to(dtype), torch.randn(65).to(dtype)
    close(rms_norm(x, weight, 1e-6), rms_norm_reference(x, weight, 1e-6))
    with pytest.raises(AssertionError):  # a mutant: no epsilon matters only for tiny rows
        close(rms_norm(x * 0.001, weight, 1e-6), rms_norm_reference(x * 0.001, weight, 0.0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_rms_norm(dtype: torch.dtype) -> None:
    x, residual, weight = torch.randn(4, 65).to(dtype), torch.randn(4, 65).to(dtype), torch.randn(65).to(dtype)
    normed, total = add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, rms_norm(total, weight, 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_norm_rows_are_independent(check_rows: CheckRows, width: int, dtype: torch.dtype) -> None:
    weight = torch.randn(width).to(dtype)
    check_rows(lambda x: rms_norm(x, weight, 1e-6), torch.randn(40, width).to(dtype))


def tables(tokens: int, half: int) -> tuple[Tensor, Tensor]:
    angle = torch.rand(tokens, half) * 6.28
    return angle.cos(), angle.sin()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(), (3,)])
def test_rope(heads: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(5, *heads, 14).to(dtype)
    cos, sin = tables(5, 7)
    close(apply_rope(x, cos, sin), apply_rope_reference(x, cos, sin))
    with pytest.raises(AssertionError):  # a mutant: turned backwards
        close(apply_rope(x, cos, -sin), apply_rope_reference(x, cos, sin))


def test_rope_of_a_slice() -> None:
    """The rope part is a slice of the query's last dim."""
    x = torch.randn(5, 2, 20)
    cos, sin = tables(5, 4)
    assert torch.equal(apply_rope(x[..., 12:], cos, sin), apply_rope(x[..., 12:].clone(), cos, sin))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rope_values_do_not_depend_on_place(check_rows: CheckRows, dtype: torch.dtype) -> None:
    cos, sin = tables(1, 9)
    check_rows(
        lambda x: apply_rope(x, cos.expand(len(x), -1), sin.expand(len(x), -1)), torch.randn(40, 3, 18).to(dtype)
    )


def test_errors() -> None:
    with pytest.raises(KernelError, match="width 5"):
        swiglu(torch.zeros(1, 5))
    with pytest.raises(KernelError, match=r"must be \(2, 4\)"):
        apply_rope(torch.zeros(2, 8), torch.zeros(2, 3), torch.zeros(2, 3))
