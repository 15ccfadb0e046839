"""Rotary position embedding in Triton against complex rotation in fp64. T tokens, R rotary width."""

from __future__ import annotations

import pytest
import torch
from moe_kernels.errors import KernelError
from moe_kernels.rope import apply_rope
from moe_kernels.rope.reference import apply_rope_reference
from torch import Tensor

from tests.kernels.devices import DEVICE, DTYPES, ON_GPU

# A product and a sum in fp32, one rounding of the output's dtype.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
SHAPES = [(1, 2), (5, 14), (3, 1, 64), (4, 5, 8), (2, 3, 2, 6), *([(64, 128, 64)] if ON_GPU else [])]


def tables(tokens: int, half: int) -> tuple[Tensor, Tensor]:
    """Slices of one table, as the runtime has them."""
    angle = torch.rand(tokens, half, device=DEVICE) * 6.28
    both = torch.cat((angle.cos(), angle.sin()), dim=1)
    return both[:, :half], both[:, half:]


def close(got: Tensor, want: Tensor) -> None:
    bound = TOLERANCE[got.dtype]
    torch.testing.assert_close(got.double(), want, atol=bound, rtol=bound)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rope(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(*shape, device=DEVICE).to(dtype)
    cos, sin = tables(shape[0], shape[-1] // 2)
    got = apply_rope(x, cos, sin, backend="triton")
    close(got, apply_rope_reference(x, cos, sin))
    assert torch.equal(got, apply_rope(x, cos, sin, backend="torch"))
    assert apply_rope(x[:0], cos[:0], sin[:0], backend="triton").shape == (0, *shape[1:])
    with pytest.raises(AssertionError):  # a mutant: turned backwards
        close(apply_rope(x, cos, -sin, backend="triton"), apply_rope_reference(x, cos, sin))
    if shape[0] > 1:  # a mutant: the neighbour's position
        with pytest.raises(AssertionError):
            close(apply_rope(x, cos.roll(1, 0), sin.roll(1, 0), backend="triton"), apply_rope_reference(x, cos, sin))


def test_slices_and_neighbours() -> None:
    """The rope part is a slice of the query's last dim; a token's bits do not depend on the others."""
    x = torch.randn(5, 3, 20, device=DEVICE)
    cos, sin = tables(5, 4)
    got = apply_rope(x[..., 12:], cos, sin, backend="triton")
    assert torch.equal(got, apply_rope(x[..., 12:].clone(), cos, sin, backend="triton"))
    for t in range(5):
        here = slice(t, t + 1)
        assert torch.equal(apply_rope(x[here, :, 12:], cos[here], sin[here], backend="triton")[0], got[t])


def test_errors() -> None:
    x, (cos, sin) = torch.zeros(2, 8, device=DEVICE), tables(2, 4)
    with pytest.raises(KernelError, match=r"must be \(2, 4\)"):
        apply_rope(x, cos[:, :3], sin[:, :3], backend="triton")
    with pytest.raises(KernelError, match="rows must have unit stride"):
        apply_rope(torch.zeros(8, 2, device=DEVICE).t(), cos, sin, backend="triton")
    with pytest.raises(KernelError, match="cos and sin have strides"):
        apply_rope(x, cos.t().contiguous().t(), sin, backend="triton")
