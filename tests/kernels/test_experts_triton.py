"""The experts' MLP in Triton against fp64, block-scaled expert weights. E slots, R rows, H hidden, I intermediate."""

from __future__ import annotations

import pytest
import torch
from moe_kernels.errors import KernelError
from moe_kernels.experts import (
    ExpertWeights,
    allocate_experts,
    expert_mlp_padded,
    expert_mlp_ragged,
    prepare_experts,
)
from moe_kernels.experts import triton as kernels
from moe_kernels.experts.reference import expert_mlp_padded_reference, expert_mlp_ragged_reference
from moe_kernels.grouped_gemm import PackedSlots
from moe_kernels.grouped_gemm.layout import RowMarks
from moe_kernels.grouped_gemm.reference import ragged_reference
from moe_kernels.linear.packed import pack
from moe_kernels.quant import dequantize, quantize_blocks, quantize_rows
from moe_kernels.scaled import BlockScaled
from moe_kernels.swiglu.reference import swiglu_reference
from torch import Tensor

from tests.kernels.conftest import first_difference
from tests.kernels.devices import DEVICE, DTYPES, ON_GPU
from tests.kernels.tiles import pin_tiles

# fp32: rounding of short sums. Others: hidden row and result are each rounded once (2^-11, 2^-8).
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
# A hidden value in e4m3 is off by half a step, 2^-4 of itself. The interpreter truncates, so by a step, and where its
# carry is lost (about 3 % of values) by a factor of 2. Tensor cores sum fp8 products to 2^-13 of the largest: modelled,
# 1 value in 1000 goes the other way, a scale is off by 1e-3 and a result of the second product by 4e-3.
STEP, MISCARRIED = (2**-4, 0.01) if ON_GPU else (2**-3, 0.06)
SCALE_TOLERANCE, FP8_TOLERANCE = (5e-3, 1e-2) if ON_GPU else (1e-4, 1e-5)
HEIGHTS = (16, 32, 64, 128)
CASES = [(dtype, height) for dtype in DTYPES for height in HEIGHTS if dtype is not torch.float32 or height == 16]
COUNTS = [33, 0, 1, 70]


def weights(slots: int, hidden: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    w13 = torch.randn(slots, 2 * width, hidden, device=DEVICE).div(hidden**0.5)
    w2 = torch.randn(slots, hidden, width, device=DEVICE).div(width**0.5)
    return w13.to(dtype), w2.to(dtype)


def scaled_weights(slots: int, hidden: int, width: int) -> tuple[ExpertWeights, Tensor, Tensor]:
    """Block-scaled weights, and what they stand for. Gate and up are quantised apart, as checkpoints hold them."""
    w13, w2 = weights(slots, hidden, width, torch.float32)
    w13[:, :width] *= 3
    halves = [quantize_blocks(half.contiguous(), backend="torch") for half in w13.chunk(2, dim=1)]
    down = quantize_blocks(w2, backend="torch")
    both = BlockScaled(*(torch.cat([getattr(h, name) for h in halves], dim=1) for name in ("data", "scale")))
    values = [dequantize(h, block=(128, 128), backend="torch") for h in (*halves, down)]
    return ExpertWeights(both, down), torch.cat(values[:2], dim=1), values[2]


def marks(counts: list[int], alignment: int = 1) -> tuple[Tensor, Tensor]:
    """`psum [E] int32`, and which rows of all spans are real."""
    psum: list[int] = []
    real: list[bool] = []
    for count in counts:
        psum.append(len(real) + count)
        real += [True] * count
        real += [False] * (-len(real) % alignment)
    return torch.tensor(psum, dtype=torch.int32, device=DEVICE), torch.tensor(real, dtype=torch.bool)


def close(got: Tensor, want: Tensor, bound: float) -> None:
    torch.testing.assert_close(got.cpu().double(), want, atol=bound, rtol=bound)


def close_scales(got: Tensor, want: Tensor, *, ue8m0: bool) -> None:
    """On a GPU a few of the powers of two may be the next one."""
    away = (got.cpu().double() / want - 1).abs() > SCALE_TOLERANCE
    assert away.double().mean() <= (0.02 if ON_GPU and ue8m0 else 0.0)


@pytest.mark.parametrize(("dtype", "height"), CASES)
@pytest.mark.parametrize(("hidden", "width"), [(72, 136), (128, 32)])
def test_ragged(hidden: int, width: int, dtype: torch.dtype, height: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pin_tiles(monkeypatch, height)
    w13, w2 = weights(4, hidden, width, dtype)
    psum, real = marks(COUNTS, 8)
    x = torch.randn(len(real), hidden, device=DEVICE).to(dtype)
    x[~real] = torch.nan
    held = ExpertWeights(w13, w2)
    got = expert_mlp_ragged(x, held, psum=psum, alignment=8, backend="triton")
    want = expert_mlp_ragged_reference(x.cpu(), w13.cpu(), w2.cpu(), psum.cpu(), alignment=8)
    close(got[real], want[real], TOLERANCE[dtype])
    # Mutants: gate and up swapped, one slot's down projection taken for another's.
    for wrong in (ExpertWeights(w13.roll(width, 1), w2), ExpertWeights(w13, w2.roll(1, 0))):
        bad = expert_mlp_ragged(x, wrong, psum=psum, alignment=8, backend="triton")
        with pytest.raises(AssertionError):
            close(bad[real], want[real], TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("counts", [COUNTS, [0, 0, 0, 9], [0, 0, 0, 0]])
def test_padded(counts: list[int], dtype: torch.dtype) -> None:
    w13, w2 = weights(4, 72, 40, dtype)
    capacity = max(counts) + 2
    real = torch.arange(capacity) < torch.tensor(counts).unsqueeze(1)
    x = torch.randn(4, capacity, 72, device=DEVICE).to(dtype)
    x[~real] = torch.nan
    counted = torch.tensor(counts, dtype=torch.int32, device=DEVICE)
    factors = torch.rand(4, capacity, device=DEVICE)
    want = expert_mlp_padded_reference(x.cpu(), w13.cpu(), w2.cpu(), counted.cpu())
    for given, factor in ((None, torch.ones(4, capacity)), (factors, factors.cpu())):
        got = expert_mlp_padded(x, ExpertWeights(w13, w2), counts=counted, row_weights=given, backend="triton")
        assert got.shape == x.shape
        close(got[real], (want * factor.unsqueeze(2))[real], TOLERANCE[dtype])


@pytest.mark.parametrize("height", HEIGHTS)
@pytest.mark.parametrize(("hidden", "width", "ue8m0"), [(144, 272, False), (144, 272, True), (128, 32, False)])
def test_fp8(hidden: int, width: int, ue8m0: bool, height: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each launch by itself: the hidden row within a step of e4m3, the result from the hidden row that it was given."""
    pin_tiles(monkeypatch, height)
    monkeypatch.setattr(kernels, "separate_swiglu", lambda **_: False)
    held, w13, w2 = scaled_weights(4, hidden, width)
    psum, real = marks(COUNTS, 8)
    x = quantize_rows(torch.randn(len(real), hidden, device=DEVICE), backend="torch")
    x.scale[~real] = torch.nan
    rows = RowMarks(psum, None, 8)
    assert isinstance(held.w13, BlockScaled)
    got = kernels.gate_up(x, held.w13, rows, rows_per_slot=height, ue8m0=ue8m0, batch_invariant=False)
    assert isinstance(got, BlockScaled)
    assert got.scale.shape == (len(real), -(-width // 128))
    assert got.scale.stride()[0] == 1
    want = swiglu_reference(ragged_reference(dequantize(x, backend="torch").cpu(), w13.cpu(), psum.cpu(), alignment=8))[
        real
    ]
    hidden_row = dequantize(BlockScaled(got.data[real], got.scale[real]), backend="torch").cpu().double()
    groups = torch.nn.functional.pad(want, (0, -width % 128)).view(len(want), -1, 128)
    scale = groups.abs().amax(2).clamp(min=1e-4) / 448
    scale = scale.log2().ceil().exp2() if ue8m0 else scale
    close_scales(got.scale[real], scale, ue8m0=ue8m0)
    # Below 2^-6 of the scale e4m3 steps are even: 2^-9.
    bound = (want.abs() * STEP).maximum(scale.repeat_interleave(128, 1)[:, :width] * 2**-9) * 1.001 + 1e-6
    assert ((hidden_row - want).abs() > bound).double().mean() <= MISCARRIED

    assert isinstance(held.w2, BlockScaled)
    result = expert_mlp_ragged(x, held, psum=psum, alignment=8, ue8m0=ue8m0, out_dtype=torch.float32, backend="triton")[
        real
    ]
    full = torch.zeros(len(real), width, dtype=torch.float64)
    full[real] = hidden_row
    close(result, ragged_reference(full, w2.cpu(), psum.cpu(), alignment=8)[real], FP8_TOLERANCE)
    wrong = BlockScaled(held.w13.data, held.w13.scale.roll(held.w13.scale.shape[1] // 2, 1))
    bad = kernels.gate_up(x, wrong, rows, rows_per_slot=height, ue8m0=ue8m0, batch_invariant=False)
    assert isinstance(bad, BlockScaled)
    with pytest.raises(AssertionError):  # a mutant: the up half's scales taken for the gate's
        close_scales(bad.scale[real], scale, ue8m0=ue8m0)


@pytest.mark.parametrize("ue8m0", [False, True])
def test_swiglu_apart_makes_the_hidden_row_of_the_fused_launch(ue8m0: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    held, _, _ = scaled_weights(2, 144, 256)
    psum, real = marks([5, 20], 8)
    x = quantize_rows(torch.randn(len(real), 144, device=DEVICE), backend="torch")
    rows = RowMarks(psum, None, 8)
    assert isinstance(held.w13, BlockScaled)
    found = []
    for apart in (False, True):
        monkeypatch.setattr(kernels, "separate_swiglu", lambda apart=apart, **_: apart)
        got = kernels.gate_up(x, held.w13, rows, rows_per_slot=16, ue8m0=ue8m0, batch_invariant=False)
        assert isinstance(got, BlockScaled) and got.scale.stride(0) == 1
        found.append(got)
    fused, apart_ = found
    # fp32 steps in another order: a scale may differ in its last bits, a value by a step of e4m3.
    torch.testing.assert_close(apart_.scale[real], fused.scale[real], rtol=1e-6, atol=0)
    values = [dequantize(BlockScaled(f.data[real], f.scale[real]), backend="torch") for f in found]
    away = (values[0] - values[1]).abs() > values[0].abs() * 1e-5
    assert away.double().mean() < max(MISCARRIED, 0.01)
    # A mutant: one slot's up half taken for another's.
    wrong = BlockScaled(held.w13.data.view(torch.uint8).roll(1, 0).view(torch.float8_e4m3fn), held.w13.scale)
    bad = kernels.gate_up(x, wrong, rows, rows_per_slot=16, ue8m0=ue8m0, batch_invariant=False)
    assert isinstance(bad, BlockScaled)
    assert not torch.equal(bad.data.view(torch.uint8)[real], apart_.data.view(torch.uint8)[real])


def test_few_rows_of_one_wide_slot_take_three_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice reaches the kernels: from static shapes, and never in the invariant mode."""
    asked = []

    def apart(**shape: int) -> bool:
        asked.append(shape)
        return False

    monkeypatch.setattr(kernels, "separate_swiglu", apart)
    held, _, _ = scaled_weights(1, 128, 128)
    x = quantize_rows(torch.randn(3, 128, device=DEVICE), backend="torch")
    counts = torch.tensor([3], dtype=torch.int32, device=DEVICE)
    padded = BlockScaled(x.data.view(1, 3, 128), x.scale.view(1, 3, 1))
    expert_mlp_padded(padded, held, counts=counts, backend="triton", batch_invariant=True)
    assert not asked
    expert_mlp_padded(padded, held, counts=counts, expected_rows=2, backend="triton")
    assert asked == [{"rows_per_slot": 2, "total_rows": 3, "slots": 1, "width": 128, "k": 128}]


def test_plain_rows_are_quantised_for_scaled_weights() -> None:
    held, w13, w2 = scaled_weights(3, 144, 128)
    psum, real = marks([5, 0, 9])
    x = torch.randn(len(real), 144, device=DEVICE)
    got = expert_mlp_ragged(x, held, psum=psum, backend="triton")
    assert got.dtype is torch.float32
    want = expert_mlp_ragged_reference(x.cpu(), w13.cpu(), w2.cpu(), psum.cpu())
    error = (got.cpu().double() - want).norm() / want.norm()
    # Two roundings to e4m3, each 2.6 % of a value in the mean (truncation: 6 %, and all one way).
    assert error < (0.08 if ON_GPU else 0.2)


@pytest.mark.parametrize("kind", ["float16", "fp8"])
def test_a_row_does_not_depend_on_its_companions(kind: str) -> None:
    hidden, width, total = 144, 144, 80
    if kind == "fp8":
        held, _, _ = scaled_weights(2, hidden, width)
        x8 = quantize_rows(torch.randn(total, hidden, device=DEVICE), backend="torch")
    else:
        held = ExpertWeights(*weights(2, hidden, width, torch.float16))
        x = torch.randn(total, hidden, device=DEVICE).half()

    def run(rows: Tensor, counts: list[int]) -> Tensor:
        psum, _ = marks(counts)
        data = BlockScaled(x8.data[rows], x8.scale[rows]) if kind == "fp8" else x[rows]
        return expert_mlp_ragged(data, held, psum=psum, out_dtype=torch.float32, backend="triton", batch_invariant=True)

    order = torch.randperm(total)
    crowd = run(order, [0, total])
    mixed = run(order, [total // 2, total // 2])[total // 2 :]
    assert torch.equal(mixed, crowd[total // 2 :]), first_difference(mixed, crowd[total // 2 :])
    for row in (0, total - 1):
        alone = run(order[row : row + 1], [0, 1])[0]
        assert torch.equal(alone, crowd[row]), first_difference(alone, crowd[row])


# Block-scaled weights in torch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize(("hidden", "width"), [(144, 272), (128, 32)])
def test_torch_dequantises_scaled_weights(hidden: int, width: int, batch_invariant: bool, dtype: torch.dtype) -> None:
    held, w13, w2 = scaled_weights(4, hidden, width)
    psum, real = marks(COUNTS)
    x = torch.randn(len(real), hidden, device=DEVICE).to(dtype)
    want = expert_mlp_ragged_reference(x.cpu(), w13.cpu(), w2.cpu(), psum.cpu())
    bound = {torch.float32: 1e-4, torch.bfloat16: 6e-2}[dtype]
    got = expert_mlp_ragged(x, held, psum=psum, backend="torch", batch_invariant=batch_invariant)
    assert got.dtype is dtype
    close(got, want, bound)
    one = ExpertWeights(*(BlockScaled(w.data[:1], w.scale[:1]) for w in scaled(held)))
    got = expert_mlp_ragged(x[:33], one, psum=psum[:1], backend="torch", batch_invariant=batch_invariant)
    close(got, want[:33], bound)


def scaled(held: ExpertWeights) -> tuple[BlockScaled, BlockScaled]:
    assert isinstance(held.w13, BlockScaled) and isinstance(held.w2, BlockScaled)
    return held.w13, held.w2


def test_scaled_slots_are_written_in_place_and_read() -> None:
    source, _, _ = scaled_weights(3, 144, 40)
    held = allocate_experts(3, 144, 40, dtype=torch.float8_e4m3fn, device=torch.device(DEVICE))
    storage = [t.data_ptr() for w in scaled(held) for t in (w.data, w.scale)]
    for slot in range(3):
        w13, w2 = (BlockScaled(w.data[slot], w.scale[slot]) for w in scaled(source))
        held.write_slot_(slot, w13=w13, w2=w2)
    assert storage == [t.data_ptr() for w in scaled(held) for t in (w.data, w.scale)]
    assert held.num_bytes == source.num_bytes == 3 * (80 * 144 + 144 * 40 + 4 * (2 * 2 + 2 * 1))
    assert (held.num_slots, held.hidden, held.dtype) == (3, 144, torch.bfloat16)
    for ours, theirs in zip(scaled(held), scaled(source), strict=True):
        assert torch.equal(ours.data.view(torch.uint8), theirs.data.view(torch.uint8))
        assert torch.equal(ours.scale, theirs.scale)
    with pytest.raises(KernelError, match=r"slot 2 got w13 .*must be BlockScaled \(80, 144\) with scales \(2, 2\)"):
        held.write_slot_(2, w13=torch.zeros(80, 144, device=DEVICE), w2=w2)
    with pytest.raises(KernelError, match="slot 2 got w2 .*with scales"):
        held.write_slot_(2, w13=w13, w2=w13)
    assert prepare_experts(*scaled(source)).w13 is source.w13


def tensors_of(held: ExpertWeights) -> list[Tensor]:
    if isinstance(held.w13, Tensor) and isinstance(held.w2, Tensor):
        return [held.w13, held.w2]
    return [t for w in scaled(held) for t in (w.data, w.scale)]


@pytest.mark.parametrize("kind", ["float16", "fp8", "fp8 in torch"])
def test_some_slots_are_views_and_compute_the_same(kind: str) -> None:
    """A part's slots need no copy, whatever their number is: they start where loads may start."""
    if kind == "float16":
        held = ExpertWeights(*weights(5, 32, 24, torch.float16))
    else:
        held, _, _ = scaled_weights(5, 144, 48)
    storages = [t.untyped_storage().data_ptr() for t in tensors_of(held)]
    counts = torch.tensor([3, 0, 2, 4, 1])
    psum = counts.cumsum(0).to(torch.int32).to(DEVICE)
    x = torch.randn(10, held.hidden, device=DEVICE).to(torch.float16)
    backend = "torch" if kind.endswith("torch") else "triton"
    whole = expert_mlp_ragged(x, held, psum=psum, backend=backend, batch_invariant=True)
    for cut in (1, 3, 4):
        begin = int(counts[:cut].sum())
        parts = []
        for first, last, rows in ((0, cut, slice(0, begin)), (cut, 5, slice(begin, 10))):
            part = held.slots(first, last)
            assert [t.untyped_storage().data_ptr() for t in tensors_of(part)] == storages
            ends = psum[first:last] - rows.start
            parts.append(expert_mlp_ragged(x[rows], part, psum=ends, backend=backend, batch_invariant=True))
        assert torch.equal(torch.cat(parts), whole), cut
        wrong = expert_mlp_ragged(x[begin:], held.slots(0, 5 - cut), psum=psum[cut:] - begin, backend=backend)
        assert not torch.equal(wrong, whole[begin:]), "the first slots instead of the last"


def test_errors() -> None:
    psum = torch.tensor([3, 6], dtype=torch.int32, device=DEVICE)
    w13, w2 = weights(2, 24, 12, torch.float16)
    x = torch.zeros(6, 24, device=DEVICE, dtype=torch.float16)
    with pytest.raises(KernelError, match="multiples of 16 bytes"):  # the hidden row is 24 bytes wide
        expert_mlp_ragged(x, ExpertWeights(w13, w2), psum=psum, backend="triton")
    held, _, _ = scaled_weights(2, 128, 32)
    with pytest.raises(KernelError, match="x must be .*BlockScaled"):
        expert_mlp_ragged(torch.zeros(6, 127, device=DEVICE), held, psum=psum, backend="triton")
    with pytest.raises(KernelError, match="w13 .* BlockScaled and w2 .* torch.float16"):
        prepare_experts(scaled(held)[0], torch.zeros(2, 128, 32, device=DEVICE, dtype=torch.float16))
    if not ON_GPU:
        packed = ExpertWeights(*(PackedSlots([pack(one.float()) for one in w]) for w in (w13, w2)))
        with pytest.raises(KernelError, match="packed for oneDNN"):
            expert_mlp_ragged(x.float(), packed, psum=psum, backend="triton")
