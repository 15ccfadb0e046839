"""permute and unpermute. T tokens, K top-k, H hidden, E slots, R rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_kernels.errors import KernelError
from moe_kernels.permute import permute, unpermute
from moe_kernels.permute.eager import _sum_in_order
from moe_kernels.permute.reference import permute_reference, unpermute_reference
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16)


def test_order_by_hand() -> None:
    """Token 0 goes to slots 2 and 0, token 1 to 0 and nowhere, token 2 to 2 and 1."""
    x = torch.tensor([[0.0], [1.0], [2.0]])
    got = permute(x, torch.tensor([[2, 0], [0, -1], [2, 1]]), 3)
    assert got.data.flatten().tolist() == [0, 1, 2, 0, 2]
    assert got.psum.tolist() == [2, 3, 5]
    assert got.psum.dtype == torch.int32
    assert got.row_of.tolist() == [[3, 0], [1, -1], [4, 2]]


def test_alignment_by_hand() -> None:
    x = torch.tensor([[0.0], [1.0], [2.0]])
    got = permute(x, torch.tensor([[2, 0], [0, -1], [2, 1]]), 3, alignment=4)
    assert got.psum.tolist() == [2, 5, 10]
    assert got.row_of.tolist() == [[8, 0], [1, -1], [9, 4]]
    assert got.data.shape == (12, 1)
    assert got.data[[0, 1, 4, 8, 9], 0].tolist() == [0, 1, 2, 0, 2]


@st.composite
def routings(draw: st.DrawFn) -> tuple[Tensor, int]:
    """`slots [T, K]`, E."""
    num_slots = draw(st.integers(1, 9))
    k = draw(st.integers(1, 3))
    rows = draw(st.lists(st.lists(st.integers(-1, num_slots - 1), min_size=k, max_size=k), max_size=12))
    return torch.tensor(rows, dtype=torch.int64).view(-1, k), num_slots


@settings(deadline=None, max_examples=60, derandomize=True)
@given(routing=routings(), alignment=st.sampled_from([1, 2, 8]))
def test_matches_reference_and_returns(routing: tuple[Tensor, int], alignment: int) -> None:
    slots, num_slots = routing
    x = torch.arange(1.0, 1 + slots.shape[0] * 2).view(-1, 2)
    got = permute(x, slots, num_slots, alignment=alignment)
    data, psum, row_of = permute_reference(x, slots, num_slots, alignment=alignment)
    assert torch.equal(got.row_of, row_of)
    assert got.psum.tolist() == psum
    assert got.data.shape == data.shape
    held = row_of[row_of >= 0]
    assert torch.equal(got.data[held], data[held])
    weights = torch.rand(slots.shape)
    back = unpermute(got.data, got.row_of, weights)
    torch.testing.assert_close(back.double(), unpermute_reference(data, row_of, weights), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_of_one_return_the_token(dtype: torch.dtype) -> None:
    x = torch.randn(6, 33).to(dtype)
    slots = torch.randperm(12).view(6, 2)
    moved = permute(x, slots, 12)
    assert torch.equal(unpermute(moved.data, moved.row_of, torch.full((6, 2), 0.5)), x)


def test_absent_rows_are_never_read() -> None:
    """A row of NaN belongs to somebody else."""
    y = torch.tensor([[torch.nan], [2.0]])
    got = unpermute(y, torch.tensor([[1, -1], [-1, -1]]), torch.tensor([[0.5, 3.0], [torch.nan, 1.0]]))
    assert got.tolist() == [[1.0], [0.0]]
    assert unpermute(y[:0], torch.full((2, 2), -1), torch.ones(2, 2)).tolist() == [[0.0], [0.0]]


def test_sum_is_in_top_k_order() -> None:
    """1e8 + 1 - 1e8 is 0 in fp32, in any other order 1."""
    y = torch.tensor([[1e8], [1.0], [-1e8]])
    assert unpermute(y, torch.tensor([[0, 1, 2]]), torch.ones(1, 3)).item() == 0.0
    assert unpermute(y, torch.tensor([[0, 2, 1]]), torch.ones(1, 3)).item() == 1.0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 7, 33, 100, 515])
@pytest.mark.parametrize("k", [1, 6, 8])
def test_tokens_are_independent(k: int, width: int, dtype: torch.dtype) -> None:
    """The same rows and weights give the same bits whichever rows they are and whoever else is there."""
    y = torch.randn(40, k, width).to(dtype)
    weights = torch.rand(40, k)
    rows = torch.arange(40 * k).view(40, k)
    alone = torch.cat([unpermute(y[t], rows[:1], weights[t : t + 1]) for t in range(40)])
    for count in (2, 3, 15, 16, 17, 33):
        shuffled = torch.randperm(count * k)
        scattered = torch.empty(count * k, width, dtype=dtype)
        scattered[shuffled] = y[:count].flatten(0, 1)
        places = shuffled.view(count, k)
        assert torch.equal(unpermute(scattered, places, weights[:count]), alone[:count])
        padded = torch.cat((places, torch.full((1, k), -1)))
        assert torch.equal(
            unpermute(scattered, padded, torch.cat((weights[:count], weights[:1])))[:count], alone[:count]
        )


def test_device_neutral_form_agrees() -> None:
    y, rows, weights = torch.randn(20, 9), torch.randint(-1, 20, (8, 3)), torch.rand(8, 3)
    got = _sum_in_order(y, rows, weights, rows < 0)
    torch.testing.assert_close(got, unpermute(y, rows, weights), atol=1e-6, rtol=1e-6)


def test_errors() -> None:
    with pytest.raises(KernelError, match="3 tokens"):
        permute(torch.zeros(3, 2), torch.zeros(2, 1, dtype=torch.int64), 1)
    with pytest.raises(KernelError, match=r"\(1, 3\)"):
        unpermute(torch.zeros(3, 2), torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 3))


def test_ids_of_other_slots_go_nowhere() -> None:
    """As a rank sees the slots of all others, counted from its own."""
    x, slots = torch.randn(3, 4), torch.tensor([[-5, 0], [2, 7], [1, -1]])
    rows = permute(x, slots, 2)
    assert rows.row_of.tolist() == [[-1, 0], [-1, -1], [1, -1]]
    assert rows.psum.tolist() == [1, 2]
    assert torch.equal(rows.data, x[[0, 2]])


def test_unpermute_rounds_once_to_the_dtype_that_is_asked_for() -> None:
    y, rows, weights = torch.randn(4, 3).bfloat16(), torch.tensor([[0, 3], [-1, 2]]), torch.rand(2, 2)
    wide = unpermute(y, rows, weights, out_dtype=torch.float32)
    torch.testing.assert_close(wide, unpermute(y.float(), rows, weights))
    assert torch.equal(wide.bfloat16(), unpermute(y, rows, weights))
    assert unpermute(y[:0], rows[:0], weights[:0], out_dtype=torch.float32).dtype is torch.float32
