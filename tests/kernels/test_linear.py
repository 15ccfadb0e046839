"""linear, head_linear, packed weights. R rows, K input width, N output width, h heads."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from moe_kernels.errors import KernelError
from moe_kernels.linear import PackedWeight, head_linear, linear, prepare_weight
from moe_kernels.linear.packed import has_onednn, pack
from moe_kernels.linear.reference import linear_reference
from torch import Tensor

CheckRows = Callable[[Callable[[Tensor], Tensor], Tensor], None]
DTYPES = (torch.float32, torch.bfloat16)
# fp32: rounding of K-term sums; bf16: one rounding of the result, 2^-8 relative.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def weight(n: int, k: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(n, k).div(k**0.5).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shape", [(5, 7), (33, 65), (128, 64)])
def test_matches_reference(shape: tuple[int, int], packed: bool, batch_invariant: bool, dtype: torch.dtype) -> None:
    w = weight(*shape, dtype)
    x = torch.randn(2, 9, shape[1]).to(dtype)
    got = linear(x, pack(w) if packed else w, batch_invariant=batch_invariant)
    want = linear_reference(x, w)
    assert got.shape == want.shape
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), want, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    with pytest.raises(AssertionError):  # a mutant: two outputs swapped
        torch.testing.assert_close(got.roll(1, -1).double(), want, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shape", [(5, 7), (64, 24), (31, 100), (65, 33), (131, 129), (70, 515)])
def test_rows_are_independent(check_rows: CheckRows, shape: tuple[int, int], packed: bool, dtype: torch.dtype) -> None:
    w = weight(*shape, dtype)
    prepared = pack(w) if packed else w
    check_rows(lambda x: linear(x, prepared, batch_invariant=True), torch.randn(40, shape[1]).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_weight_offset_does_not_matter(dtype: torch.dtype) -> None:
    """A slot of `[E, N, K]` lies anywhere in memory."""
    x = torch.randn(5, 33).to(dtype)
    many = weight(4 * 7, 33, dtype).view(4, 7, 33)
    for slot in range(4):
        got = linear(x, many[slot], batch_invariant=True)
        assert torch.equal(got, linear(x, many[slot].clone(), batch_invariant=True))


def test_plain_rows_do_depend_on_their_number() -> None:
    """Why the invariant mode exists: if this fails, the library became invariant and the mode may go."""
    x, w = torch.randn(33, 515), weight(70, 515, torch.float32)
    alone = torch.cat([linear(row, w) for row in torch.split(x, 1)])
    assert not torch.equal(linear(x, w), alone)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_no_rows(batch_invariant: bool, dtype: torch.dtype) -> None:
    w = weight(8, 4, dtype)
    for prepared in (w, pack(w)):
        assert linear(torch.empty(0, 4, dtype=dtype), prepared, batch_invariant=batch_invariant).shape == (0, 8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_packing_is_exact_and_costs_no_memory(dtype: torch.dtype) -> None:
    w = weight(512, 256, dtype)
    prepared = prepare_weight(w)
    assert isinstance(prepared, PackedWeight) == has_onednn(w.device, dtype)
    if isinstance(prepared, PackedWeight):
        assert prepared.num_bytes == w.nbytes
        assert torch.equal(prepared.dense(), w)
    assert prepare_weight(w[:8, :8]) is not prepared
    assert isinstance(prepare_weight(w[:8, :8]), Tensor), "a small weight stays plain"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_heads(batch_invariant: bool, dtype: torch.dtype) -> None:
    x, w = torch.randn(5, 3, 12).to(dtype), weight(3 * 7, 12, dtype).view(3, 7, 12)
    got = head_linear(x, w, batch_invariant=batch_invariant)
    want = torch.einsum("thk,hnk->thn", x.double(), w.double())
    torch.testing.assert_close(got.double(), want, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_heads_are_independent_of_other_tokens(check_rows: CheckRows) -> None:
    w = weight(2 * 9, 13, torch.float32).view(2, 9, 13)
    check_rows(lambda x: head_linear(x, w, batch_invariant=True), torch.randn(40, 2, 13))


def test_errors_name_both_shapes() -> None:
    with pytest.raises(KernelError, match=r"\(2, 5\).*\(3, 4\)"):
        linear(torch.zeros(2, 5), torch.zeros(3, 4))
    with pytest.raises(KernelError, match="bfloat16"):
        linear(torch.zeros(2, 4), torch.zeros(3, 4, dtype=torch.bfloat16))
    with pytest.raises(KernelError, match=r"\[T, 2, 4\]"):
        head_linear(torch.zeros(1, 2, 5), torch.zeros(2, 3, 4))
