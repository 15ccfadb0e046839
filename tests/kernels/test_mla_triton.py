"""Absorbed attention in Triton. T tokens, h heads, C latent, R rope, D = C + R, S rows per page."""

from __future__ import annotations

import pytest
import torch
from moe_kernels.errors import KernelError
from moe_kernels.mla import ScaledLatent, mla_absorbed, plan_absorbed, work
from moe_kernels.mla.work import PART_MULTIPLE, Config, WorkPlan, configure, plan_work
from torch import Tensor

from tests.kernels.devices import DEVICE, DTYPES, ON_GPU
from tests.kernels.paged import Step, step

SCALE = 0.25
LATENT, ROPE = 32, 16
LENGTHS = [0, 1, 15, 16, 17, 40]
# fp32: sums in another order; 16 bits: queries, rows and probabilities are rounded to 2^-11 or 2^-8.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
WIDTHS = [(4, LATENT, ROPE), (17, 24, 5)] + ([(128, 512, 64), (16, 512, 64), (32, 512, 64)] if ON_GPU else [])


def make(
    lengths: list[int],
    *,
    heads: int = 4,
    latent: int = LATENT,
    rope: int = ROPE,
    page_size: int = 16,
    dtype: torch.dtype = torch.float32,
    spare: int = 0,
) -> Step:
    width = latent + rope
    rows = [torch.randn(length, width).to(dtype) for length in lengths]
    queries = torch.randn(len(lengths), heads, width).mul(width**-0.25).to(dtype)
    return step(queries, rows, latent=latent, page_size=page_size, spare=spare)


def run(s: Step, *, plan: WorkPlan | None = None, scale: float = SCALE, batch_invariant: bool = False) -> Tensor:
    return mla_absorbed(
        s.q_latent,
        s.q_rope,
        s.cache,
        s.page_table,
        s.kv_lens,
        scale=scale,
        batch_invariant=batch_invariant,
        plan=plan,
        backend="triton",
    )


def plan_of(s: Step, *, batch_invariant: bool = False, lengths: list[int] | None = None) -> WorkPlan:
    return plan_work(
        s.page_table, s.kv_lens, page_size=s.cache.shape[1], batch_invariant=batch_invariant, lengths=lengths
    )


def close(got: Tensor, want: Tensor) -> None:
    bound = TOLERANCE[got.dtype]
    torch.testing.assert_close(got.double().cpu(), want, atol=bound, rtol=bound)


@pytest.mark.parametrize("page_size", [16, 32, 64])
@pytest.mark.parametrize(("heads", "latent", "rope"), WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_mixed_lengths(dtype: torch.dtype, heads: int, latent: int, rope: int, page_size: int) -> None:
    """Pages in any order, NaN in all that no sequence owns."""
    s = make(LENGTHS, heads=heads, latent=latent, rope=rope, page_size=page_size, dtype=dtype, spare=1)
    want = s.reference(scale=SCALE)
    close(run(s), want)
    close(run(s, batch_invariant=True), want)


def test_mutants() -> None:
    """What a wrong scale, a row too few, a page too far and a dropped part would give does not pass."""
    s = make([40, 17, 200])
    want = s.reference(scale=SCALE)
    close(run(s), want)
    plan = plan_of(s)
    (chunk,) = plan.chunks
    assert chunk.num_partials
    last, dropped = chunk.tokens.clone(), chunk.tokens.clone()
    last[:, 0] -= 1
    assert dropped[2, 0] > dropped[2, 1]
    dropped[2, 0] = dropped[2, 1]
    other = Step(s.q_latent, s.q_rope, s.cache.nan_to_num(), s.page_table.roll(1, 1).clamp(min=0), s.kv_lens)
    mutants = [
        run(s, scale=SCALE * 1.1),
        run(s, plan=replaced(plan, last)),
        run(s, plan=replaced(plan, dropped)),
        run(other),
    ]
    for mutant in mutants:
        with pytest.raises(AssertionError):
            close(mutant, want)


def replaced(plan: WorkPlan, tokens: Tensor) -> WorkPlan:
    """The plan of one chunk with another table of tokens."""
    (chunk,) = plan.chunks
    other = work.WorkChunk(chunk.first, chunk.count, tokens, chunk.items, chunk.num_partials)
    return WorkPlan((other,), plan.page_table, plan.page_size, plan.batch_invariant)


@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_are_merged(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Sequences of one and of several parts, in one chunk of tokens and in several."""
    monkeypatch.setattr(work, "INVARIANT_PART", 64)
    s = make([300, 0, 64, 65, 129, 1], dtype=dtype)
    want = s.reference(scale=SCALE)
    close(run(s), want)
    close(run(s, batch_invariant=True), want)
    plan = plan_of(s, batch_invariant=True)
    sizes = plan.chunks[0].tokens
    parts = -(-sizes[:, 0] // sizes[:, 1])
    assert parts.tolist() == [5, 0, 1, 2, 3, 1]
    monkeypatch.setattr(work, "_MOST_PARTIALS", 10)
    cut = plan_of(s, batch_invariant=True)
    assert len(cut.chunks) == 3
    assert torch.equal(run(s, plan=plan, batch_invariant=True), run(s, plan=cut, batch_invariant=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_depends_on_its_own_rows_alone(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Alone, among tokens of other lengths, in other pages of another size, under a wider table: the same bits."""
    monkeypatch.setattr(work, "INVARIANT_PART", 64)
    lengths = [1, 63, 64, 65, 130, 0, 7]
    rows = [torch.randn(length, LATENT + ROPE).to(dtype) for length in lengths]
    queries = torch.randn(len(lengths), 4, LATENT + ROPE).to(dtype)

    def out(tokens: list[int], page_size: int, spare: int, seed: int) -> Tensor:
        some = [rows[t] for t in tokens]
        s = step(queries[tokens], some, latent=LATENT, page_size=page_size, spare=spare, seed=seed)
        return run(s, batch_invariant=True)

    everybody = list(range(len(lengths)))
    alone = torch.cat([out([t], 16, 0, t) for t in everybody])
    for tokens, page_size, spare in ((everybody, 16, 0), (everybody[::-1], 64, 3), ([4, 0], 32, 1), ([3, 4, 3], 16, 7)):
        assert torch.equal(out(tokens, page_size, spare, len(tokens)), alone[tokens]), (tokens, page_size)


@pytest.mark.parametrize(("split_warps", "row_block", "num_stages"), [(True, 64, 2), (False, 32, 3), (False, 16, 2)])
def test_both_ways_of_one_block(
    monkeypatch: pytest.MonkeyPatch, split_warps: bool, row_block: int, num_stages: int
) -> None:
    """The way for many heads on shapes that the table gives another, and the reverse."""
    config = Config(16, row_block, 4 if not split_warps else 8, num_stages, split_warps, 1)
    monkeypatch.setattr("moe_kernels.mla.triton.configure", lambda *_, **__: config)
    for page_size in (16, 64):
        s = make(LENGTHS, heads=18, page_size=page_size, dtype=torch.float16)
        close(run(s), s.reference(scale=SCALE))


def test_plan_serves_many_layers_and_strided_queries() -> None:
    s = make([40, 3, 17])
    wide = torch.cat((s.q_latent, s.q_rope), dim=2)
    views = Step(wide[..., :LATENT], wide[..., LATENT:], s.cache, s.page_table.long(), s.kv_lens.int())
    plan = plan_absorbed(views.page_table, views.kv_lens, page_size=16, backend="triton")
    assert isinstance(plan, WorkPlan)
    want = run(s)
    assert torch.equal(run(views, plan=plan), want)
    assert torch.equal(run(views, plan=plan), want)
    hinted = plan_of(s, lengths=[40, 3, 17])
    assert torch.equal(run(s, plan=hinted), want)


def test_no_tokens_and_no_rows() -> None:
    assert run(make([])).shape == (0, 4, LATENT)
    for mode in (False, True):
        assert not run(make([0, 0]), batch_invariant=mode).any()


@pytest.mark.parametrize("num_heads", [4, 128])
@pytest.mark.parametrize(
    "lengths", [[1], [4096] * 3, [100_000, 1, 0, 700], [130_000], [64 * i for i in range(70)], [0, 0]]
)
def test_work_covers_every_row_once(monkeypatch: pytest.MonkeyPatch, lengths: list[int], num_heads: int) -> None:
    """In both modes, within the bounds that shapes alone set, for a device of many multiprocessors."""
    monkeypatch.setattr(work, "num_multiprocessors", lambda device: 132)
    table = torch.zeros(len(lengths), max(1, -(-max(lengths) // 64)) + 3, dtype=torch.int32)
    lens = torch.tensor(lengths)
    for mode in (False, True):
        plan = plan_work(table, lens, page_size=64, batch_invariant=mode, num_heads=num_heads)
        seen = [0] * len(lengths)
        for chunk in plan.chunks:
            partials: list[int] = []
            for item, token in enumerate(chunk.items.tolist()):
                if token == chunk.count:
                    continue
                length, size, first_item, first_partial = chunk.tokens[token].tolist()
                part = item - first_item
                assert size % PART_MULTIPLE == 0 and part * size < length
                seen[chunk.first + token] += min(length, (part + 1) * size) - part * size
                if length > size:
                    partials.append(first_partial + part)
            assert sorted(partials) == list(range(len(partials)))
            assert len(partials) <= chunk.num_partials
        assert seen == lengths


def test_a_long_sequence_is_cut_and_an_even_batch_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """132 multiprocessors, two blocks of 64 heads."""
    monkeypatch.setattr(work, "num_multiprocessors", lambda device: 132)

    def num_parts(lengths: list[int]) -> list[int]:
        table = torch.zeros(len(lengths), max(lengths) // 64, dtype=torch.int32)
        (chunk,) = plan_work(table, torch.tensor(lengths), page_size=64, batch_invariant=False).chunks
        return (-(-chunk.tokens[:, 0] // chunk.tokens[:, 1])).tolist()

    assert num_parts([4096] * 128) == [1] * 128
    (alone,) = num_parts([4096])
    assert alone >= 16
    assert num_parts([65_536] + [1024] * 31)[0] > num_parts([65_536] + [1024] * 31)[1]


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_a_plan_reads_nothing_back(batch_invariant: bool) -> None:
    """Tensors without values have no lengths to read: shapes come from the table's shape alone."""
    table = torch.zeros(9, 80, dtype=torch.int32, device="meta")
    lens = torch.zeros(9, dtype=torch.int64, device="meta")
    plan = plan_work(table, lens, page_size=64, batch_invariant=batch_invariant)
    assert [len(chunk.items) for chunk in plan.chunks] == ([9 * 5] if batch_invariant else [9 + 8])


@pytest.mark.parametrize("latent", [LATENT, 160])
def test_scaled_latent(latent: int) -> None:
    """fp8 rows: the kernel reads what `read` gives, and that is near to what was written."""
    lengths = [0, 1, 17, 70]
    s = make(lengths, latent=latent)
    pages, size, width = s.cache.shape
    values = s.cache.nan_to_num(nan=1e4).flatten(0, 1)
    cache = ScaledLatent.zeros(pages, size, latent=latent, rope=ROPE, rope_dtype=torch.float32, device=DEVICE)
    rows = torch.randperm(pages * size, device=DEVICE)
    cache.write_(rows, values[rows], backend="torch")
    read = cache.dense(torch.float32)
    # e4m3 has 3 bits behind the point: half a step is 2^-4 of the value, or of the smallest normal one.
    torch.testing.assert_close(read.flatten(0, 1), values, atol=2e-2, rtol=2**-4)
    assert cache.width == width

    def attend(cache: ScaledLatent, batch_invariant: bool) -> Tensor:
        return mla_absorbed(
            s.q_latent,
            s.q_rope,
            cache,
            s.page_table,
            s.kv_lens,
            scale=SCALE,
            batch_invariant=batch_invariant,
            backend="triton",
        )

    for mode in (False, True):
        got = attend(cache, mode)
        dense = Step(s.q_latent, s.q_rope, read, s.page_table, s.kv_lens)
        close(got, dense.reference(scale=SCALE))
        wrong = ScaledLatent(cache.data, cache.scale.roll(1, 1), cache.rope)
        mutant = attend(wrong, mode)
        with pytest.raises(AssertionError):  # scales of the neighbouring row
            close(mutant, dense.reference(scale=SCALE))
    plain = mla_absorbed(s.q_latent, s.q_rope, cache, s.page_table, s.kv_lens, scale=SCALE, backend="torch")
    close(plain, dense.reference(scale=SCALE))


def test_configurations_do_not_depend_on_the_batch() -> None:
    assert configure(128, 512, itemsize=2) == Config(64, 64, 8, 2, True, 1)
    assert configure(16, 512, itemsize=2).head_block == 16
    assert all(
        PART_MULTIPLE % configure(h, c, itemsize=i).row_block == 0 for h in (2, 128) for c in (64, 512) for i in (2, 4)
    )


def test_bad_input() -> None:
    s = make([5, 17])
    with pytest.raises(KernelError, match="page_size is 24; it must be a power of two; the nearest is 32"):
        plan_absorbed(s.page_table, s.kv_lens, page_size=24, backend="triton")
    with pytest.raises(KernelError, match="one length per table row"):
        plan_absorbed(s.page_table, s.kv_lens[:1], page_size=16, backend="triton")
    with pytest.raises(KernelError, match="the longest 40, for 2 table rows of 2 pages of 16; widen the table"):
        plan_work(s.page_table, s.kv_lens, page_size=16, batch_invariant=False, lengths=[40, 1])
    with pytest.raises(KernelError, match="pages of 16 rows, the cache has 32"):
        run(make([5, 17], page_size=32), plan=plan_of(s))
    with pytest.raises(KernelError, match="batch_invariant=True and a plan made for False"):
        run(s, plan=plan_of(s), batch_invariant=True)
    with pytest.raises(KernelError, match="backend='torch' and a plan made for 'triton'"):
        mla_absorbed(
            s.q_latent, s.q_rope, s.cache, s.page_table, s.kv_lens, scale=SCALE, plan=plan_of(s), backend="torch"
        )
    with pytest.raises(KernelError, match="the last must be 1"):
        run(Step(s.q_latent.mT.contiguous().mT, s.q_rope, s.cache, s.page_table, s.kv_lens))
    with pytest.raises(KernelError, match="alike"):
        run(Step(s.q_latent, s.q_rope.half(), s.cache, s.page_table, s.kv_lens))
    with pytest.raises(KernelError, match="backend='cuda' is not there; choose one of torch, triton, flash_mla"):
        plan_absorbed(s.page_table, s.kv_lens, page_size=16, backend="cuda")
