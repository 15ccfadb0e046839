"""permute and unpermute in Triton. T tokens, K top-k, H hidden, E slots, R rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_kernels.errors import KernelError
from moe_kernels.permute import Permuted, permute, unpermute
from moe_kernels.permute import triton as kernels
from moe_kernels.permute.eager import _sum_in_order
from moe_kernels.permute.reference import permute_reference, unpermute_reference
from moe_kernels.quant import quantize_rows
from moe_kernels.scaled import BlockScaled
from torch import Tensor

from tests.kernels.devices import DEVICE, DTYPES, ON_GPU

FP8 = torch.float8_e4m3fn


def routing(tokens: int, k: int, num_slots: int) -> Tensor:
    """Distinct slots of each token, some of them -1."""
    ids = torch.rand(tokens, num_slots).argsort(dim=1)[:, :k].contiguous()
    return ids.masked_fill(torch.rand(tokens, k) < 0.2, -1).to(DEVICE)


def check(got: Permuted, x: Tensor, slots: Tensor, num_slots: int, alignment: int = 1) -> None:
    data, psum, row_of = permute_reference(x.cpu(), slots.cpu(), num_slots, alignment=alignment)
    assert got.psum.tolist() == psum
    assert got.psum.dtype == torch.int32
    assert torch.equal(got.row_of.cpu(), row_of)
    assert got.data.shape[0] == slots.numel() + (alignment - 1) * num_slots
    held = row_of[row_of >= 0]
    assert torch.equal(got.data.cpu()[held], data[held])


@pytest.fixture(params=[True, False], ids=["one launch", "three launches"])
def launches(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both forms on the same small inputs; blocks of 4 tokens, so that there are several."""
    if not request.param:
        monkeypatch.setattr(kernels, "ONE_LAUNCH", 0)
        monkeypatch.setattr(kernels, "BLOCK_TOKENS", 4)


@pytest.mark.usefixtures("launches")
def test_order_by_hand() -> None:
    """Token 0 goes to slots 2 and 0, token 1 to 0 and nowhere, token 2 to 2 and 1."""
    x = torch.tensor([[0.0], [1.0], [2.0]], device=DEVICE)
    slots = torch.tensor([[2, 0], [0, -1], [2, 1]], device=DEVICE)
    got = permute(x, slots, 3, alignment=4, backend="triton")
    assert got.psum.tolist() == [2, 5, 10]
    assert got.row_of.tolist() == [[8, 0], [1, -1], [9, 4]]
    assert got.data.shape == (15, 1)
    assert got.data[[0, 1, 4, 8, 9], 0].tolist() == [0, 1, 2, 0, 2]
    exact = permute(x, slots, 3, alignment=4, num_rows=12, backend="triton")
    assert exact.data.shape == (12, 1), "the end of the last slot's span"
    assert exact.data[[0, 1, 4, 8, 9], 0].tolist() == [0, 1, 2, 0, 2]


@pytest.mark.usefixtures("launches")
@pytest.mark.parametrize("alignment", [1, 8])
@pytest.mark.parametrize(("tokens", "k", "num_slots"), [(0, 2, 3), (1, 1, 1), (1, 3, 5), (11, 3, 40), (9, 8, 9)])
def test_matches_reference(tokens: int, k: int, num_slots: int, alignment: int) -> None:
    slots = routing(tokens, k, num_slots)
    for dtype in DTYPES:
        x = torch.randn(tokens, 70, device=DEVICE).to(dtype)
        got = permute(x, slots, num_slots, alignment=alignment, backend="triton")
        check(got, x, slots, num_slots, alignment)
    if tokens > 8:  # a mutant: rows of the neighbour
        with pytest.raises(AssertionError):
            check(got, x.roll(1, 0), slots, num_slots, alignment)


@pytest.mark.usefixtures("launches")
def test_one_slot_takes_all_and_none_does() -> None:
    x = torch.randn(10, 4, device=DEVICE)
    for slot in (-1, 0, 2):
        slots = torch.full((10, 1), slot, device=DEVICE)
        check(permute(x, slots, 3, alignment=2, backend="triton"), x, slots, 3, 2)
    twice = torch.ones(10, 2, dtype=torch.int64, device=DEVICE)
    check(permute(x, twice, 3, backend="triton"), x, twice, 3)


@st.composite
def routings(draw: st.DrawFn) -> tuple[Tensor, int]:
    """`slots [T, K]` with repeats, E."""
    num_slots = draw(st.integers(1, 9))
    k = draw(st.integers(1, 3))
    rows = draw(st.lists(st.lists(st.integers(-1, num_slots - 1), min_size=k, max_size=k), max_size=7))
    return torch.tensor(rows, dtype=torch.int64).view(-1, k), num_slots


@settings(deadline=None, max_examples=40, derandomize=True)
@given(routing=routings(), alignment=st.sampled_from([1, 2, 8]))
def test_property_there_and_back(routing: tuple[Tensor, int], alignment: int) -> None:
    slots, num_slots = routing[0].to(DEVICE), routing[1]
    x = torch.arange(1.0, 1 + slots.shape[0] * 2, device=DEVICE).view(-1, 2)
    got = permute(x, slots, num_slots, alignment=alignment, backend="triton")
    check(got, x, slots, num_slots, alignment)
    weights = torch.rand(slots.shape, device=DEVICE)
    back = unpermute(got.data, got.row_of, weights, backend="triton")
    want = unpermute_reference(got.data.cpu(), got.row_of.cpu(), weights.cpu())
    torch.testing.assert_close(back.cpu().double(), want, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(not ON_GPU, reason="128 MiB of rows")
@pytest.mark.parametrize("tokens", [512, 513, 9000])
def test_matches_torch_at_full_size(tokens: int) -> None:
    x, slots = torch.randn(tokens, 7168, device=DEVICE).bfloat16(), routing(tokens, 8, 256)
    got, want = (permute(x, slots, 256, alignment=128, backend=name) for name in ("triton", "torch"))
    assert torch.equal(got.psum, want.psum) and torch.equal(got.row_of, want.row_of)
    held = got.row_of[got.row_of >= 0]
    assert torch.equal(got.data[held], want.data[held])


@pytest.mark.parametrize("layout", ["row", "mn"])
@pytest.mark.parametrize("width", [64, 300])
def test_fp8(width: int, layout: str) -> None:
    """Quantised on the way, or moved with its scales: the same bytes, those of `quantize_rows`."""
    x, slots = torch.randn(7, width, device=DEVICE), routing(7, 3, 6)
    scaled = quantize_rows(x, backend="torch")
    for backend in ("torch", "triton"):
        fused = permute(x, slots, 6, alignment=4, quantize=True, scale_layout=layout, backend=backend)
        moved = permute(scaled, slots, 6, alignment=4, scale_layout=layout, backend=backend)
        for got in (fused, moved):
            assert got.data.dtype == FP8
            assert got.scale is not None and got.scale.shape == (got.data.shape[0], -(-width // 128))
            assert got.scale.stride(1 if layout == "row" else 0) == 1
            flat = got.row_of.flatten()
            token = torch.arange(7, device=DEVICE).repeat_interleave(3)[flat >= 0]
            held = flat[flat >= 0]
            assert torch.equal(got.data[held].view(torch.uint8), scaled.data[token].view(torch.uint8))
            assert torch.equal(got.scale[held], scaled.scale[token])


def test_unpermute_bits_are_those_of_the_torch_form() -> None:
    for dtype in DTYPES:
        for k, width in ((1, 5), (8, 130)):
            y = torch.randn(50, width, device=DEVICE).to(dtype)
            rows = torch.randint(-1, 50, (6, k), device=DEVICE)
            weights = torch.rand(6, k, device=DEVICE)
            got = unpermute(y, rows, weights, backend="triton")
            exact = _sum_in_order(y, rows, weights, rows < 0)
            assert torch.equal(got, exact.to(dtype))
            wide = unpermute(y, rows, weights, out_dtype=torch.float32, backend="triton")
            assert torch.equal(wide, exact), "not rounded in between"
            for cut in (0, 1, 37, 50):
                ours = unpermute(y[:cut].clone(), rows, weights, rest=y[cut:].clone(), backend="triton")
                assert torch.equal(ours, got), "rows in two places"
            rows[0, 0] = -1 if rows[0, 0] >= 0 else 3
            with pytest.raises(AssertionError):  # a mutant: a dropped row
                assert torch.equal(got, unpermute(y, rows, weights, backend="triton"))


def test_sum_is_in_top_k_order() -> None:
    y = torch.tensor([[1e8], [1.0], [-1e8]], device=DEVICE)
    ones = torch.ones(1, 3, device=DEVICE)
    for order, want in (([0, 1, 2], 0.0), ([0, 2, 1], 1.0)):
        assert unpermute(y, torch.tensor([order], device=DEVICE), ones, backend="triton").item() == want


def test_absent_rows_are_never_read() -> None:
    y = torch.tensor([[torch.nan], [2.0]], device=DEVICE)
    rows = torch.tensor([[1, -1], [-1, -1]], device=DEVICE)
    weights = torch.tensor([[0.5, 3.0], [torch.nan, 1.0]], device=DEVICE)
    assert unpermute(y, rows, weights, backend="triton").tolist() == [[1.0], [0.0]]
    none = torch.full((2, 2), -1, device=DEVICE)
    assert unpermute(y[:0], none, weights, backend="triton").tolist() == [[0.0], [0.0]]
    assert unpermute(y, none[:0], weights[:0], backend="triton").shape == (0, 1)


def test_a_token_does_not_depend_on_the_others() -> None:
    y, rows = torch.randn(30, 33, device=DEVICE), torch.randint(-1, 30, (5, 4), device=DEVICE)
    weights = torch.rand(5, 4, device=DEVICE)
    together = unpermute(y, rows, weights, backend="triton")
    alone = [unpermute(y, rows[t : t + 1], weights[t : t + 1], backend="triton") for t in range(5)]
    assert torch.equal(together, torch.cat(alone))


def test_errors() -> None:
    x, slots = torch.zeros(3, 8, device=DEVICE), torch.zeros(3, 1, dtype=torch.int64, device=DEVICE)
    with pytest.raises(KernelError, match=r"strides \(1, 3\)"):
        permute(torch.zeros(8, 3, device=DEVICE).t(), slots, 1, backend="triton")
    with pytest.raises(KernelError, match="int32"):
        permute(x, slots.int(), 1, backend="triton")
    with pytest.raises(KernelError, match="got x in fp8 already"):
        permute(BlockScaled(x.to(FP8), x[:, :1]), slots, 1, quantize=True)
    with pytest.raises(KernelError, match="choose one of row, mn"):
        permute(x, slots, 1, quantize=True, scale_layout="column", backend="triton")
    with pytest.raises(KernelError, match="row_of is torch.int32"):
        unpermute(x, slots.int(), torch.ones(3, 1, device=DEVICE), backend="triton")
    with pytest.raises(KernelError, match=r"rest torch.float16 of \(\d+, 1\); make them agree"):
        unpermute(x, slots, torch.ones(3, 1, device=DEVICE), rest=x.half(), backend="triton")
