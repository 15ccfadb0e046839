"""Grouped GEMM in Triton against fp64. E slots, R rows, C rows per slot, K input width, N output width."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_kernels.errors import KernelError
from moe_kernels.grouped_gemm import PackedSlots, grouped_gemm_padded, grouped_gemm_ragged
from moe_kernels.grouped_gemm.configs import SMS, Config, columns, configure, separate_swiglu, shipped
from moe_kernels.grouped_gemm.reference import padded_reference, ragged_reference, slot_of_rows
from moe_kernels.linear.packed import pack
from moe_kernels.quant import dequantize, quantize_blocks, quantize_rows
from moe_kernels.scaled import BlockScaled
from torch import Tensor

from tests.kernels.conftest import first_difference
from tests.kernels.devices import DEVICE, DTYPES, ON_GPU
from tests.kernels.tiles import pin_tiles

# fp32: sums of K products of variance 1/K. Others: one rounding of the result (2^-11, 2^-8), of magnitude up to 5.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
# fp8 products are exact and summed in fp32. Tensor cores sum 32 at a time to 2^-13 of the largest: modelled, 1e-3.
FP8_TOLERANCE = 5e-3 if ON_GPU else 1e-5
HEIGHTS = (16, 32, 64, 128)
"""Of tiles; as mean rows per slot they select it where products are large."""
CASES = [(dtype, height) for dtype in DTYPES for height in HEIGHTS if dtype is not torch.float32 or height == 16]
"""fp32 has one configuration for all heights."""
COUNTS = ([3, 0, 5, 1], [0, 0, 0, 40], [33, 17, 0, 130], [0, 0, 0, 0])
N, K = (1100, 520) if ON_GPU else (300, 72)


def marks(counts: list[int], alignment: int = 1) -> tuple[Tensor, int]:
    """`psum [E] int32` and the rows that hold all spans."""
    psum, start = [], 0
    for count in counts:
        psum.append(start + count)
        start = -(-psum[-1] // alignment) * alignment
    return torch.tensor(psum, dtype=torch.int32, device=DEVICE), start


def owned(psum: Tensor, rows: int, alignment: int = 1) -> Tensor:
    return torch.tensor([owner >= 0 for owner in slot_of_rows(psum, rows, alignment=alignment)], dtype=torch.bool)


def operands(rows: int, slots: int, n: int, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    x, w = torch.randn(rows, k, device=DEVICE), torch.randn(slots, n, k, device=DEVICE).div(k**0.5)
    return x.to(dtype), w.to(dtype)


def fp8_operands(rows: int, slots: int, n: int, k: int) -> tuple[BlockScaled, BlockScaled]:
    """Quantised by torch: the interpreter's casts to fp8 truncate. Scales differ by orders of magnitude."""
    x, w = operands(rows, slots, n, k, torch.float32)
    x *= torch.rand(rows, 1, device=DEVICE).add_(0.1)
    quantized = quantize_blocks(w, backend="torch")
    quantized.scale.mul_(torch.rand(quantized.scale.shape, device=DEVICE).add_(0.5))
    return quantize_rows(x, backend="torch"), quantized


def plain(x: BlockScaled, w: BlockScaled) -> tuple[Tensor, Tensor]:
    return dequantize(x, backend="torch"), dequantize(w, block=(128, 128), backend="torch")


def close(got: Tensor, want: Tensor, bound: float) -> None:
    torch.testing.assert_close(got.cpu().double(), want, atol=bound, rtol=bound)


@pytest.mark.parametrize(("dtype", "height"), CASES)
@pytest.mark.parametrize(("counts", "alignment"), [*((c, 1) for c in COUNTS), (COUNTS[2], 8)])
def test_ragged(
    counts: list[int], alignment: int, height: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    pin_tiles(monkeypatch, height)
    psum, rows = marks(counts, alignment)
    x, w = operands(rows + 3, 4, N, K, dtype)
    real = owned(psum, rows + 3, alignment)
    x[~real] = torch.nan
    got = grouped_gemm_ragged(x, w, psum, alignment=alignment, backend="triton")
    want = ragged_reference(x.cpu(), w.cpu(), psum.cpu(), alignment=alignment)
    close(got[real], want[real], TOLERANCE[dtype])
    if counts is COUNTS[0]:
        with pytest.raises(AssertionError):  # mutants: experts swapped, the last row dropped
            close(grouped_gemm_ragged(x, w.roll(1, 0), psum, alignment=alignment, backend="triton")[real], want[real],
                  TOLERANCE[dtype])  # fmt: skip
        with pytest.raises(AssertionError):
            close(torch.cat((got[real][:-1], got[real][:1] * 0)), want[real], TOLERANCE[dtype])


@pytest.mark.parametrize(("dtype", "height"), CASES)
@pytest.mark.parametrize("counts", COUNTS[1:3])
def test_padded(counts: list[int], height: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    pin_tiles(monkeypatch, height)
    capacity = max(counts) + 5
    x, w = operands(4 * capacity, 4, N, K, dtype)
    x = x.view(4, capacity, K)
    real = torch.arange(capacity) < torch.tensor(counts).unsqueeze(1)
    x[~real] = torch.nan
    counted = torch.tensor(counts, dtype=torch.int32, device=DEVICE)
    got = grouped_gemm_padded(x, w, counted, backend="triton")
    want = padded_reference(x.cpu(), w.cpu(), counted.cpu())
    close(got[real], want[real], TOLERANCE[dtype])
    factors = torch.rand(4, capacity, device=DEVICE)
    got = grouped_gemm_padded(x, w, counted, row_weights=factors, backend="triton")
    close(got[real], (want * factors.cpu().unsqueeze(2))[real], TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("height", "number"), [(16, 0), (16, 1), (32, 0), (32, 1), (64, 0), (64, 1), (64, 2), (128, 0), (128, 1)]
)
@pytest.mark.parametrize("shape", [(4, 300, 272), (4, 384, 144)])
def test_fp8(shape: tuple[int, int, int], height: int, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tile of the table, narrow ones too."""
    pin_tiles(monkeypatch, height, number=number)
    slots, n, k = shape
    counts = [33, 0, 1, 70]
    psum, rows = marks(counts, 8)
    x, w = fp8_operands(rows, slots, n, k)
    real = owned(psum, rows, 8)
    x.scale[~real] = torch.nan
    dense, blocks = plain(x, w)
    want = ragged_reference(dense.cpu(), blocks.cpu(), psum.cpu(), alignment=8)[real]

    def ours(x: BlockScaled, w: BlockScaled) -> Tensor:
        return grouped_gemm_ragged(x, w, psum, alignment=8, out_dtype=torch.float32, backend="triton")[real]

    got = ours(x, w)
    close(got, want, FP8_TOLERANCE)
    if n == 300:
        column_major = BlockScaled(x.data, x.scale.t().contiguous().t())
        assert torch.equal(ours(column_major, w), got)
        return
    with pytest.raises(AssertionError):  # mutants: rows' scales moved by a row, blocks' by a slot
        close(ours(BlockScaled(x.data, x.scale.roll(1, 0)), w), want, FP8_TOLERANCE)
    with pytest.raises(AssertionError):
        close(ours(x, BlockScaled(w.data, w.scale.roll(1, 0))), want, FP8_TOLERANCE)


def test_fp8_padded_with_scales_of_any_strides() -> None:
    """Low-latency dispatch hands over scales whose last two dims are column-major: no view of `[E * C, G]`."""
    slots, capacity, n, k = 3, 20, 136, 272
    x, w = fp8_operands(slots * capacity, slots, n, k)
    counts = torch.tensor([20, 0, 7], dtype=torch.int32, device=DEVICE)
    data, scale = x.data.view(slots, capacity, k), x.scale.view(slots, capacity, -1)
    dense, block = plain(x, w)
    want = padded_reference(dense.view(slots, capacity, k).cpu(), block.cpu(), counts.cpu())
    real = torch.arange(capacity) < counts.cpu().unsqueeze(1)
    for held in (scale, scale.transpose(1, 2).contiguous().transpose(1, 2)):
        got = grouped_gemm_padded(BlockScaled(data, held), w, counts, out_dtype=torch.float32, backend="triton")
        close(got[real], want[real], FP8_TOLERANCE)
        by_torch = grouped_gemm_padded(BlockScaled(data, held), w, counts, out_dtype=torch.float32, backend="torch")
        close(by_torch[real], want[real], 1e-5)


@pytest.mark.parametrize(("height", "number"), [(16, 1), (64, 2), (128, 1)])
def test_narrow_tiles(height: int, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pin_tiles(monkeypatch, height, number=number)
    psum, rows = marks([33, 0, 1], 1)
    x, w = operands(rows, 3, N, K, torch.float16)
    got = grouped_gemm_ragged(x, w, psum, backend="triton")
    close(got, ragged_reference(x.cpu(), w.cpu(), psum.cpu()), TOLERANCE[torch.float16])


@settings(deadline=None, max_examples=15, derandomize=True)
@given(
    counts=st.lists(st.integers(0, 70), min_size=1, max_size=7),
    alignment=st.sampled_from([1, 16]),
    height=st.sampled_from(HEIGHTS),
    extra=st.integers(0, 40),
)
def test_every_row_finds_its_slot(counts: list[int], alignment: int, height: int, extra: int) -> None:
    """Slot e's weight is e + 1 times the identity; rows beyond the last slot are there as in a worst-case buffer."""
    psum, rows = marks(counts, alignment)
    total = rows + extra
    k = 16
    x = torch.arange(total, device=DEVICE).add(1.0).unsqueeze(1).expand(total, k).contiguous()
    w = torch.eye(k, device=DEVICE) * torch.arange(1.0, len(counts) + 1, device=DEVICE).view(-1, 1, 1)
    owners = torch.tensor(slot_of_rows(psum, total, alignment=alignment))
    got = grouped_gemm_ragged(x.half(), w.half(), psum, alignment=alignment, expected_rows=height, backend="triton")
    want = x.cpu() * (owners + 1).unsqueeze(1)
    real = owners >= 0
    assert torch.equal(got.cpu()[real], want.half()[real])


@pytest.mark.parametrize("kind", ["plain", "fp8"])
def test_unowned_rows_are_never_written(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    psum, rows = marks([5, 0, 18], 16)
    x, w = operands(rows + 2, 3, 40, 32, torch.float16)
    real = owned(psum, rows + 2, 16)
    empty = torch.empty

    def marked(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return empty(*shape, dtype=dtype, device=device).fill_(7.0)

    x8, w8 = fp8_operands(rows + 2, 3, 40, 32)
    monkeypatch.setattr(torch, "empty", marked)
    if kind == "plain":
        got = grouped_gemm_ragged(x, w, psum, alignment=16, backend="triton")
    else:
        got = grouped_gemm_ragged(x8, w8, psum, alignment=16, out_dtype=torch.float16, backend="triton")
    assert bool((got[~real] == 7.0).all())
    assert not bool((got[real] == 7.0).all())


@pytest.mark.parametrize("kind", ["float16", "float32", "fp8"])
def test_a_row_does_not_depend_on_its_companions(kind: str) -> None:
    """Alone, in a crowd, at other positions, padded, with NaN neighbours: the same bits."""
    n, k, total = 260, 144, 90
    dtype = torch.float16 if kind == "float16" else torch.float32
    x, w = operands(total, 3, n, k, dtype)
    if kind == "fp8":
        x8, w8 = fp8_operands(total, 3, n, k)

    def run(rows: Tensor, counts: list[int]) -> Tensor:
        psum, _ = marks(counts)
        data = x[rows] if kind != "fp8" else BlockScaled(x8.data[rows], x8.scale[rows])
        held = w if kind != "fp8" else w8
        return grouped_gemm_ragged(data, held, psum, out_dtype=torch.float32, backend="triton", batch_invariant=True)

    for slot in (0, 2):
        order = torch.randperm(total)
        counts = [0, 0, 0]
        counts[slot] = total
        crowd = run(order, counts)
        for row in (0, 63, total - 1):
            alone = run(order[row : row + 1], [int(slot == e) for e in range(3)])
            assert torch.equal(crowd[row], alone[0]), first_difference(crowd[row], alone[0])
        mixed = run(order, [30, 30, 30])
        part = mixed[30 * slot : 30 * slot + 30]
        assert torch.equal(part, crowd[30 * slot : 30 * slot + 30]), first_difference(part, crowd[30 * slot :][:30])


def test_nothing_to_do() -> None:
    w = torch.randn(3, 24, 16, device=DEVICE)
    none = torch.zeros(3, dtype=torch.int32, device=DEVICE)
    assert grouped_gemm_ragged(torch.empty(0, 16, device=DEVICE), w, none, backend="triton").shape == (0, 24)
    assert grouped_gemm_padded(torch.empty(3, 0, 16, device=DEVICE), w, none, backend="triton").shape == (3, 0, 24)
    assert grouped_gemm_ragged(torch.empty(5, 16, device=DEVICE), w[:0], none[:0], backend="triton").shape == (5, 24)


def test_errors() -> None:
    x, w = operands(6, 2, 16, 12, torch.float16)
    psum = torch.tensor([3, 6], dtype=torch.int32, device=DEVICE)
    with pytest.raises(KernelError, match="x is .*multiples of 16 bytes .8 values.*pad K to a multiple of 8"):
        grouped_gemm_ragged(x, w, psum, backend="triton")
    x, w = operands(6, 2, 16, 16, torch.float32)
    with pytest.raises(KernelError, match="w is .*call .contiguous"):
        grouped_gemm_ragged(x, w.transpose(1, 2).contiguous().transpose(1, 2), psum, backend="triton")
    with pytest.raises(KernelError, match="row marks are torch.int64.*use .to.torch.int32"):
        grouped_gemm_ragged(x, w, psum.long(), backend="triton")
    with pytest.raises(KernelError, match=r"row_weights are \(5,\)"):
        grouped_gemm_ragged(x, w, psum, row_weights=torch.ones(5, device=DEVICE), backend="triton")
    with pytest.raises(KernelError, match="slot must follow slot"):
        grouped_gemm_padded(x.view(2, 3, 16)[:, :2], w, psum, backend="triton")
    x8, w8 = fp8_operands(6, 2, 16, 16)
    with pytest.raises(KernelError, match=r"scales \(2, 2, 1\).*must be float8_e4m3fn and \(2, 1, 1\)"):
        grouped_gemm_ragged(x8, BlockScaled(w8.data, w8.scale.repeat(1, 2, 1)), psum, backend="triton")
    with pytest.raises(KernelError, match=r"scales \(3, 1\)"):
        grouped_gemm_ragged(BlockScaled(x8.data, x8.scale[:3]), w8, psum, backend="triton")
    with pytest.raises(KernelError, match="x must be .* torch.float32"):
        grouped_gemm_ragged(x8, w, psum, backend="triton")
    if not ON_GPU:
        packed = PackedSlots([pack(one) for one in w])
        with pytest.raises(KernelError, match="packed for oneDNN"):
            grouped_gemm_ragged(x, packed, psum, backend="triton")


# Configurations


def shared_bytes(size: int, config: Config) -> int:
    """Of the stages; barriers and the epilogue's staging come on top (the compiler's figure is in the AOT report)."""
    return config.stages * (config.block_m + config.tiles * config.block_n) * config.block_k * size


def test_configurations_fit_and_keep_enough_in_flight() -> None:
    for size, swiglu, entry in shipped():
        config = entry.config
        if size == 4:
            continue
        per_sm = config.programs_per_sm * shared_bytes(size, config)
        assert 2 * 40_960 < per_sm <= 226 * 1024 - 2048 * config.programs_per_sm, config
        assert config.block_k * size == 128  # one scale per step in fp8; 128-byte rows in shared memory
        assert config.tiles == 2 if swiglu else config.tiles in (1, 2)
        assert config.swap == (config.block_m < 64)


def test_choice_of_tiles() -> None:
    def tile(rows: int, slots: int, n: int, k: int, *, swiglu: bool, invariant: bool = False) -> tuple[int, int]:
        entry = configure(
            rows_per_slot=rows, slots=slots, n=n, k=k, dtype=torch.float8_e4m3fn, swiglu=swiglu,
            batch_invariant=invariant,
        )  # fmt: skip
        return entry.config.block_m, columns(entry.config, swiglu=swiglu)

    assert [tile(rows, 32, 2048, 7168, swiglu=True)[0] for rows in (0, 1, 16, 17, 32, 33, 64, 65, 4096)] == [
        16, 16, 16, 32, 32, 64, 64, 128, 128,
    ]  # fmt: skip
    assert tile(128, 8, 2048, 7168, swiglu=True) == (128, 128)  # 128 tiles for 132 SMs
    assert tile(256, 1, 2048, 7168, swiglu=True) == (64, 128)  # 32 tiles would leave most of them idle
    # One slot of 16 rows: 64 narrow tiles pull 29 MB of gate and up in 7 us, 32 wide ones in 9; many slots need none.
    assert tile(16, 1, 4096, 7168, swiglu=False) == (16, 64)
    assert tile(16, 8, 4096, 7168, swiglu=False) == (16, 128)
    assert tile(64, 1, 2112, 7168, swiglu=False) == (64, 64)  # q_a and kv_a together: 9 tiles of 256
    assert tile(4096, 1, 2112, 7168, swiglu=False) == (128, 256)
    assert SMS == 132
    shapes = [(r, e, n) for r in (1, 999) for e in (1, 256) for n in (64, 4096)]
    assert {tile(r, e, n, 128, swiglu=True, invariant=True) for r, e, n in shapes} == {(64, 128)}


def test_where_swiglu_is_apart() -> None:
    def apart(slots: int, rows: int, *, width: int = 2048, total: int | None = None) -> bool:
        return separate_swiglu(
            rows_per_slot=rows, total_rows=slots * rows if total is None else total, slots=slots, width=width, k=7168
        )

    assert [(e, r) for e in (1, 2, 4, 32) for r in (1, 16, 32, 64, 256) if apart(e, r)] == [
        (e, r) for e in (1, 2) for r in (1, 16, 32, 64)
    ]
    assert apart(1, 16, total=5120)  # room for the worst case of 320 ranks: most programs have nothing to do
    assert not apart(1, 16, total=40_000)  # even those take their time
    assert not apart(1, 16, width=2000)  # gate and up would share a block of scales
