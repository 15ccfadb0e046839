"""Grouped GEMM and the experts' MLP. E slots, R rows, C rows per slot, H hidden, I intermediate."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_kernels.errors import KernelError
from moe_kernels.experts import (
    ExpertWeights,
    allocate_experts,
    expert_mlp_padded,
    expert_mlp_ragged,
    prepare_experts,
)
from moe_kernels.experts import weights as experts_weights
from moe_kernels.experts.reference import expert_mlp_padded_reference, expert_mlp_ragged_reference
from moe_kernels.grouped_gemm import PackedSlots, grouped_gemm_padded, grouped_gemm_ragged
from moe_kernels.grouped_gemm.layout import cut, ragged_rows
from moe_kernels.grouped_gemm.reference import padded_reference, ragged_reference, slot_of_rows
from moe_kernels.linear.packed import has_onednn, pack
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16)
# fp32: rounding of short sums; bf16: the hidden row and the result are rounded to 2^-8.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
COUNTS = ([2, 0, 5, 1], [0, 0, 0, 7], [33, 1, 0, 16], [1, 1, 1, 1], [0, 0, 0, 0], [0, 40, 0, 0])


def weights(slots: int, hidden: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    w13 = torch.randn(slots, 2 * width, hidden).div(hidden**0.5)
    w2 = torch.randn(slots, hidden, width).div(width**0.5)
    return w13.to(dtype), w2.to(dtype)


def packed(w: Tensor) -> PackedSlots:
    return PackedSlots([pack(one) for one in w])


def marks(counts: list[int], alignment: int = 1) -> tuple[Tensor, int]:
    """`psum [E] int32` and the rows that hold all spans."""
    psum, start = [], 0
    for count in counts:
        psum.append(start + count)
        start = -(-psum[-1] // alignment) * alignment
    return torch.tensor(psum, dtype=torch.int32), start


def real_rows(psum: Tensor, rows: int, alignment: int) -> Tensor:
    return torch.tensor([owner >= 0 for owner in slot_of_rows(psum, rows, alignment=alignment)], dtype=torch.bool)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("pack_slots", [False, True])
@pytest.mark.parametrize("alignment", [1, 4])
@pytest.mark.parametrize("counts", COUNTS)
def test_ragged(counts: list[int], alignment: int, pack_slots: bool, batch_invariant: bool, dtype: torch.dtype) -> None:
    w13, w2 = weights(4, 24, 20, dtype)
    psum, rows = marks(counts, alignment)
    x = torch.randn(rows + 3, 24).to(dtype)
    x[rows:] = torch.nan
    real = real_rows(psum, rows + 3, alignment)
    held = ExpertWeights(packed(w13), packed(w2)) if pack_slots else ExpertWeights(w13, w2)
    bound = TOLERANCE[dtype]
    got = grouped_gemm_ragged(x, held.w13, psum, alignment=alignment, batch_invariant=batch_invariant)
    want = ragged_reference(x, w13, psum, alignment=alignment)
    torch.testing.assert_close(got[real].double(), want[real], atol=bound, rtol=bound)
    got = expert_mlp_ragged(x, held, psum=psum, alignment=alignment, batch_invariant=batch_invariant)
    want = expert_mlp_ragged_reference(x, w13, w2, psum, alignment=alignment)
    torch.testing.assert_close(got[real].double(), want[real], atol=bound, rtol=bound)
    if sum(counts):
        with pytest.raises(AssertionError):  # a mutant: slots rotated
            torch.testing.assert_close(
                expert_mlp_ragged_reference(x, w13.roll(1, 0), w2, psum, alignment=alignment)[real], want[real]
            )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("pack_slots", [False, True])
@pytest.mark.parametrize("counts", COUNTS)
def test_padded(counts: list[int], pack_slots: bool, batch_invariant: bool, dtype: torch.dtype) -> None:
    w13, w2 = weights(4, 24, 20, dtype)
    capacity = max(counts) + 2
    x = torch.full((4, capacity, 24), torch.nan, dtype=dtype)
    for slot, count in enumerate(counts):
        x[slot, :count] = torch.randn(count, 24).to(dtype)
    real = torch.arange(capacity) < torch.tensor(counts).unsqueeze(1)
    marks = torch.tensor(counts, dtype=torch.int32)
    held = ExpertWeights(packed(w13), packed(w2)) if pack_slots else ExpertWeights(w13, w2)
    bound = TOLERANCE[dtype]
    got = grouped_gemm_padded(x, held.w13, marks, batch_invariant=batch_invariant)
    torch.testing.assert_close(got[real].double(), padded_reference(x, w13, marks)[real], atol=bound, rtol=bound)
    got = expert_mlp_padded(x, held, counts=marks, batch_invariant=batch_invariant)
    assert got.shape == x.shape
    want = expert_mlp_padded_reference(x, w13, w2, marks)
    torch.testing.assert_close(got[real].double(), want[real], atol=bound, rtol=bound)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("hidden", "width"), [(13, 9), (24, 18), (24, 20), (256, 80), (200, 100)])
@pytest.mark.parametrize("counts", [[20, 9, 0, 40], [1, 0, 0, 2], [0, 90, 0, 0, 0, 0, 0]])
def test_every_way_of_running(counts: list[int], hidden: int, width: int, dtype: torch.dtype) -> None:
    """Small and large slots, many and few rows, widths that grouped_mm takes and refuses."""
    w13, w2 = weights(len(counts), hidden, width, dtype)
    psum, rows = marks(counts)
    x = torch.randn(rows, hidden).to(dtype)
    want = expert_mlp_ragged_reference(x, w13, w2, psum)
    for held in (ExpertWeights(w13, w2), prepare_experts(w13, w2)):
        got = expert_mlp_ragged(x, held, psum=psum)
        torch.testing.assert_close(got.double(), want, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("slots", [1, 3])
def test_no_rows_at_all(slots: int, batch_invariant: bool) -> None:
    w13, w2 = weights(slots, 8, 4, torch.float32)
    none = torch.zeros(slots, dtype=torch.int32)
    held = ExpertWeights(w13, w2)
    assert expert_mlp_ragged(torch.empty(0, 8), held, psum=none, batch_invariant=batch_invariant).shape == (0, 8)
    empty = torch.empty(slots, 0, 8)
    assert expert_mlp_padded(empty, held, counts=none, batch_invariant=batch_invariant).shape == (slots, 0, 8)
    assert grouped_gemm_ragged(torch.empty(0, 8), w13, none, batch_invariant=batch_invariant).shape == (0, 8)
    assert grouped_gemm_padded(empty, w13, none, batch_invariant=batch_invariant).shape == (slots, 0, 8)


def test_cut_by_hand() -> None:
    """Slots hold rows [0, 1, 2 | - | 3, 4]; blocks of 2."""
    blocks = cut(ragged_rows(torch.tensor([3, 3, 5]), 5, alignment=1), 2)
    assert blocks.slots.tolist() == [0, 0, 2]
    assert blocks.gather is not None
    assert blocks.back is not None
    assert blocks.gather.tolist() == [0, 1, 2, 3, 3, 4]
    assert blocks.back.tolist() == [0, 1, 2, 4, 5]


@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    counts=st.lists(st.integers(0, 20), min_size=1, max_size=6),
    alignment=st.sampled_from([1, 3, 8]),
    height=st.sampled_from([1, 2, 16]),
    extra=st.integers(0, 3),
)
def test_cut_brings_every_row_back(counts: list[int], alignment: int, height: int, extra: int) -> None:
    psum, rows = marks(counts, alignment)
    total = rows + extra
    if not sum(counts):
        return
    blocks = cut(ragged_rows(psum, total, alignment=alignment), height)
    owners = torch.tensor(slot_of_rows(psum, total, alignment=alignment))
    real = owners >= 0
    places = torch.arange(total).unsqueeze(1)
    assert torch.equal(blocks.bring_back(blocks.collect(places))[real], places[real])
    assert blocks.back is not None
    assert torch.equal(blocks.slots[blocks.back // height][real], owners[real])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pack_slots", [False, True])
@pytest.mark.parametrize(("hidden", "width"), [(24, 20), (65, 33), (128, 31), (7, 5)])
def test_a_row_does_not_depend_on_its_companions(hidden: int, width: int, pack_slots: bool, dtype: torch.dtype) -> None:
    """Alone in a rank with one slot, in a crowd, with alignment, padded: the same bits."""
    w13, w2 = weights(3, hidden, width, dtype)
    held = ExpertWeights(packed(w13), packed(w2)) if pack_slots else ExpertWeights(w13, w2)
    x = torch.randn(70, hidden).to(dtype)

    def alone(row: int, slot: int) -> Tensor:
        one = prepare_experts(w13[slot : slot + 1], w2[slot : slot + 1])
        if pack_slots:
            one = ExpertWeights(packed(w13[slot : slot + 1]), packed(w2[slot : slot + 1]))
        ends = torch.tensor([1], dtype=torch.int32)
        return expert_mlp_ragged(x[row : row + 1], one, psum=ends, batch_invariant=True)[0]

    for counts in ([1, 2, 3], [15, 16, 17], [33, 0, 1], [0, 0, 5], [40, 20, 10]):
        for alignment in (1, 8):
            psum, rows = marks(counts, alignment)
            data = torch.zeros(rows, hidden, dtype=dtype)
            owners = torch.tensor(slot_of_rows(psum, rows, alignment=alignment))
            data[owners >= 0] = x[: sum(counts)]
            got = expert_mlp_ragged(data, held, psum=psum, alignment=alignment, batch_invariant=True)[owners >= 0]
            for row, slot in enumerate(owners[owners >= 0].tolist()):
                assert torch.equal(got[row], alone(row, slot)), (counts, alignment, row)
        capacity = max(counts) + 1
        padded = torch.full((3, capacity, hidden), torch.nan, dtype=dtype)
        real = torch.arange(capacity) < torch.tensor(counts).unsqueeze(1)
        padded[real] = x[: sum(counts)]
        same = expert_mlp_padded(padded, held, counts=torch.tensor(counts, dtype=torch.int32), batch_invariant=True)
        assert torch.equal(same[real], got), counts


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("hidden", "width"), [(16, 8), (512, 192)])
def test_slots_are_written_and_read(hidden: int, width: int, dtype: torch.dtype) -> None:
    """Small slots stay plain, large ones are packed; both give back what was written and compute the same."""
    w13, w2 = weights(3, hidden, width, dtype)
    held = allocate_experts(3, hidden, width, dtype=dtype, device=torch.device("cpu"))
    assert isinstance(held.w13, PackedSlots) == (hidden == 512 and has_onednn(w13.device, dtype))
    for slot in range(3):
        held.write_slot_(slot, w13=w13[slot], w2=w2[slot])
    assert held.num_bytes == w13.nbytes + w2.nbytes
    for slot in range(3):
        got13, got2 = held.slot_tensors(slot)
        assert torch.equal(got13, w13[slot])
        assert torch.equal(got2, w2[slot])
    x, psum = torch.randn(6, hidden).to(dtype), torch.tensor([2, 2, 6], dtype=torch.int32)
    want = expert_mlp_ragged(x, prepare_experts(w13, w2), psum=psum)
    assert torch.equal(expert_mlp_ragged(x, held, psum=psum), want)
    last = held.slots(1, 3)
    assert (last.num_slots, last.hidden, last.num_bytes) == (2, hidden, held.num_bytes * 2 // 3)
    for ours, whole in zip(last.slot_tensors(1), held.slot_tensors(2), strict=True):
        assert torch.equal(ours, whole)
    torch.testing.assert_close(expert_mlp_ragged(x[2:], last, psum=psum[1:] - 2), want[2:])


@pytest.mark.parametrize(("hidden", "width"), [(16, 8), (512, 192)])
def test_slots_are_taken_or_left(hidden: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever memory is lacking: both tensors, or none; and the way back needs no memory at all."""
    dtype = torch.bfloat16
    (a13, a2), (b13, b2) = weights(2, hidden, width, dtype), weights(2, hidden, width, dtype)
    b13, b2 = b13 + 1, b2 + 1
    held = prepare_experts(a13.clone(), a2.clone())
    staging, scratch = (experts_weights.plain_like(held, count) for count in (2, 1))
    staging.write_slot_(1, w13=b13[1], w2=b2[1])
    before = [] if not held.is_fixed else [part.data_ptr() for part in held.slot_tensors(1)]

    def holds(w13: Tensor, w2: Tensor) -> bool:
        return all(torch.equal(x, y) for x, y in zip(held.slot_tensors(1), (w13, w2), strict=True))

    def lacking(failing: int) -> None:
        calls = [0]

        def lacks(w: Tensor) -> object:
            calls[0] += 1
            if calls[0] >= failing:
                raise MemoryError("no room")
            return pack(w)

        monkeypatch.setattr("moe_kernels.experts.weights.pack", lacks)

    for failing in () if held.is_fixed else (1, 2):
        lacking(failing)
        with pytest.raises(MemoryError):
            held.take_slot_(1, staging, scratch)
        assert holds(a13[1], a2[1]), failing
    lacking(3)
    back = held.take_slot_(1, staging, scratch)
    assert holds(b13[1], b2[1])
    back()
    assert holds(a13[1], a2[1])
    assert torch.equal(held.slot_tensors(0)[0], a13[0])
    assert not before or before == [part.data_ptr() for part in held.slot_tensors(1)]


def test_errors() -> None:
    w13, w2 = weights(2, 8, 4, torch.float32)
    held = prepare_experts(w13, w2)
    ends = torch.tensor([1, 2], dtype=torch.int32)
    with pytest.raises(KernelError, match=r"\(2, 8, 4\)"):
        prepare_experts(w13, w2.transpose(1, 2))
    with pytest.raises(KernelError, match=r"x must be \[\.\.\., 8\]"):
        expert_mlp_ragged(torch.zeros(2, 7), held, psum=ends)
    with pytest.raises(KernelError, match="2 slots need one each"):
        expert_mlp_padded(torch.zeros(2, 1, 8), held, counts=ends[:1])
    with pytest.raises(KernelError, match="choose one of torch, triton, deep_gemm"):
        grouped_gemm_ragged(torch.zeros(2, 8), w13, ends, backend="cuda")
    with pytest.raises(KernelError, match=r"\[\.\.\., 8\]"):
        grouped_gemm_padded(torch.zeros(2, 1, 7), w13, ends)
    with pytest.raises(KernelError, match="slot 1 got w2"):
        held.write_slot_(1, w13=w13[0], w2=w2[0].t())
