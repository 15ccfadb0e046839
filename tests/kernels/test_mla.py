"""Attention cores. T tokens, h heads, C latent, R rope, L cached rows, S rows per page."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch
from moe_kernels import backends
from moe_kernels.errors import KernelError
from moe_kernels.mla import ScaledLatent, absorbed, expanded, mla_absorbed, mla_expanded_batched, plan_absorbed
from moe_kernels.mla.plan import AbsorbedPlan
from moe_kernels.mla.reference import mla_absorbed_reference, mla_expanded_reference
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

DTYPES = (torch.float32, torch.bfloat16)
# fp32: rounding of sums; bf16: scores and probabilities are rounded to 2^-8 on the way.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
SCALE = 0.3


@dataclass(frozen=True, slots=True)
class Paged:
    """Sequences of `lengths` in shuffled pages; what no sequence owns is NaN."""

    cache: Tensor
    page_table: Tensor
    kv_lens: Tensor


def paged(rows: list[Tensor], *, page_size: int, spare_pages: int = 0, seed: int = 0) -> Paged:
    """Store each `[L, D]` of `rows`; the table is `spare_pages` wider than it needs to be, filled with -1."""
    pages = [-(-len(one) // page_size) for one in rows]
    order = torch.randperm(sum(pages) + 2, generator=torch.Generator().manual_seed(seed)).tolist()
    cache = torch.full((len(order), page_size, rows[0].shape[1]), torch.nan, dtype=rows[0].dtype)
    table = torch.full((len(rows), max(pages) + spare_pages), -1, dtype=torch.int32)
    for t, one in enumerate(rows):
        mine = [order.pop() for _ in range(pages[t])]
        table[t, : pages[t]] = torch.tensor(mine, dtype=torch.int32)
        for i, row in enumerate(one):
            cache[mine[i // page_size], i % page_size] = row
    return Paged(cache, table, torch.tensor([len(one) for one in rows]))


def sequences(lengths: list[int], width: int, dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(length, width).to(dtype) for length in lengths]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize(
    "lengths", [[1], [5, 0, 17, 1], [64, 65, 130, 3, 0, 7, 7, 128, 12], [0, 0], [9, 2100, 0, 1500, 40, 2050]]
)
def test_absorbed(lengths: list[int], batch_invariant: bool, dtype: torch.dtype) -> None:
    kv = paged(sequences(lengths, 20, dtype), page_size=4)
    q_latent, q_rope = torch.randn(len(lengths), 3, 14).to(dtype), torch.randn(len(lengths), 3, 6).to(dtype)
    got = mla_absorbed(
        q_latent, q_rope, kv.cache, kv.page_table, kv.kv_lens, scale=SCALE, batch_invariant=batch_invariant
    )
    want = mla_absorbed_reference(q_latent, q_rope, kv.cache, kv.page_table, kv.kv_lens, scale=SCALE)
    bound = TOLERANCE[dtype]
    torch.testing.assert_close(got.double(), want, atol=bound, rtol=bound)
    if max(lengths) > 1:
        fewer = (kv.kv_lens - 1).clamp(min=0)
        mutant = mla_absorbed_reference(q_latent, q_rope, kv.cache, kv.page_table, fewer, scale=SCALE)
        with pytest.raises(AssertionError):  # one row fewer
            torch.testing.assert_close(mutant, want, atol=bound, rtol=bound)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("latent", "rope"), [(14, 6), (64, 16), (33, 8)])
@pytest.mark.parametrize("heads", [1, 2, 8])
def test_a_token_depends_on_its_own_rows_alone(heads: int, latent: int, rope: int, dtype: torch.dtype) -> None:
    """Alone, among tokens of other lengths, in other pages of another size, under a wider table: the same bits."""
    lengths = [1, 63, 64, 65, 100, 128, 129, 5, 30, 200, 0, 7]
    rows = sequences(lengths, latent + rope, dtype)
    q_latent = torch.randn(len(lengths), heads, latent).to(dtype)
    q_rope = torch.randn(len(lengths), heads, rope).to(dtype)

    def run(tokens: list[int], page_size: int, spare_pages: int, seed: int) -> Tensor:
        kv = paged([rows[t] for t in tokens], page_size=page_size, spare_pages=spare_pages, seed=seed)
        return mla_absorbed(
            q_latent[tokens], q_rope[tokens], kv.cache, kv.page_table, kv.kv_lens, scale=SCALE, batch_invariant=True
        )

    everybody = list(range(len(lengths)))
    alone = torch.cat([run([t], 16, 0, t) for t in everybody])
    for tokens in (everybody, everybody[::-1], [9, 0], [3, 9, 3], everybody[1:], everybody * 2):
        for page_size, spare_pages in ((16, 0), (5, 3), (64, 1)):
            got = run(tokens, page_size, spare_pages, seed=len(tokens))
            assert torch.equal(got, alone[tokens]), (tokens, page_size)


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize(("lengths", "width"), [([1900], 20), ([700, 1100, 64], 160), ([33] * 40, 288)])
def test_bf16_scores_are_not_rounded(lengths: list[int], width: int, batch_invariant: bool) -> None:
    """Relative error, whatever the size of the step; scores in bf16 gave 4e-3 to 6e-3 in the large ones."""
    kv = paged(sequences(lengths, width, torch.bfloat16), page_size=16)
    kv.cache.nan_to_num_()
    rope = 8
    q_latent = torch.randn(len(lengths), 8, width - rope).mul(width**-0.25).bfloat16()
    q_rope = torch.randn(len(lengths), 8, rope).bfloat16()
    got = mla_absorbed(
        q_latent, q_rope, kv.cache, kv.page_table, kv.kv_lens, scale=SCALE, batch_invariant=batch_invariant
    )
    want = mla_absorbed_reference(q_latent, q_rope, kv.cache, kv.page_table, kv.kv_lens, scale=SCALE)
    assert (got.double() - want).norm() / want.norm() < 2.8e-3


def test_16_bit_products_on_other_devices() -> None:
    """Shapes and dtypes of the way that a CPU does not take."""
    like = torch.empty(2, 3, 10, dtype=torch.bfloat16, device="meta")
    assert absorbed._fp32_product(like, like.transpose(1, 2)).dtype is torch.float32


@pytest.mark.parametrize("page_size", [16, 48, 100])
def test_the_invariant_plan_is_small(page_size: int) -> None:
    """A prompt of 1000 tokens behind 3000: tables of pages, no row numbers for each token and cached row."""
    pages = -(-4000 // page_size)
    table = torch.arange(pages).expand(1000, pages)
    plan = plan_absorbed(table, torch.arange(3001, 4001), page_size=page_size, batch_invariant=True)
    assert isinstance(plan, AbsorbedPlan)
    held = {}
    for part in plan.parts:
        for owner in (part, *getattr(part, "blocks", ())):
            for field in fields(owner):
                value = getattr(owner, field.name)
                if isinstance(value, Tensor):
                    held[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    assert sum(held.values()) < 8 * (1000 * pages + 3 * 4096 + 2 * 1000 + 64 * pages)


def test_plan_serves_many_layers() -> None:
    kv = paged(sequences([5, 9], 20, torch.float32), page_size=4)
    q_latent, q_rope = torch.randn(2, 3, 14), torch.randn(2, 3, 6)
    for mode in (False, True):
        plan = plan_absorbed(kv.page_table, kv.kv_lens, page_size=4, batch_invariant=mode)
        want = mla_absorbed(q_latent, q_rope, kv.cache, kv.page_table, kv.kv_lens, scale=SCALE, batch_invariant=mode)
        got = mla_absorbed(
            q_latent, q_rope, kv.cache, kv.page_table, kv.kv_lens, scale=SCALE, batch_invariant=mode, plan=plan
        )
        assert torch.equal(got, want)
        with pytest.raises(KernelError, match="plan made for"):
            mla_absorbed(
                q_latent, q_rope, kv.cache, kv.page_table, kv.kv_lens, scale=SCALE, batch_invariant=not mode, plan=plan
            )


def test_no_tokens() -> None:
    empty = torch.empty(0, 2, 6)
    none = torch.empty(0, 3, dtype=torch.int32)
    for mode in (False, True):
        got = mla_absorbed(
            empty, torch.empty(0, 2, 4), torch.zeros(2, 4, 10), none, none[:, 0], scale=1.0, batch_invariant=mode
        )
        assert got.shape == (0, 2, 6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "start"), [(1, 0), (7, 0), (1, 6), (5, 9)])
@pytest.mark.parametrize("value_width", [5, 10, 12])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_expanded(
    monkeypatch: pytest.MonkeyPatch, backend: str, value_width: int, n: int, start: int, dtype: torch.dtype
) -> None:
    """`triton` is the way that a GPU goes, through torch's fused attention and its own causal bias."""
    monkeypatch.setattr(backends, "default_backend", lambda device: backend)
    heads, nope, rope, latent = 3, 6, 4, 16
    batch = 2
    q = torch.randn(batch, n, heads, nope + rope).to(dtype)
    rows = torch.randn(batch, start + n, latent + rope).to(dtype)
    kv, k_rope = rows[..., :latent], rows[..., latent:]
    w_k = torch.randn(heads, nope, latent).div(4).to(dtype)
    w_v = torch.randn(heads, value_width, latent).div(4).to(dtype)
    got = mla_expanded_batched(q, kv, k_rope, w_k, w_v, scale=SCALE, start=start)
    bound = TOLERANCE[dtype]
    for b in range(batch):
        want = mla_expanded_reference(q[b], kv[b], k_rope[b], w_k, w_v, scale=SCALE, start=start)
        torch.testing.assert_close(got[b].double(), want, atol=bound, rtol=bound)


@pytest.mark.parametrize("start", [0, 9])
@pytest.mark.parametrize(("limit", "calls"), [(2 * 3 * 16 * 20, 1), (3 * 16 * 20, 2), (2 * 16 * 20, 4), (1, 6)])
def test_expanded_within_its_memory(monkeypatch: pytest.MonkeyPatch, limit: int, calls: int, start: int) -> None:
    """Sequences, then heads, take turns: no more keys and values at once than the limit, and the same result."""
    batch, n, heads, nope, rope, latent = 2, 16 - start, 3, 6, 4, 16
    q = torch.randn(batch, n, heads, nope + rope)
    rows = torch.randn(batch, 16, latent + rope)
    weights = torch.randn(heads, nope, latent), torch.randn(heads, 10, latent)
    args = (q, rows[..., :latent], rows[..., latent:], *weights)
    want = mla_expanded_batched(*args, scale=SCALE, start=start)
    sizes: list[int] = []
    attend = F.scaled_dot_product_attention

    def counted(q: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        sizes.append(key.numel() + value.numel())
        mask = options.get("attn_mask")
        assert mask is None or mask.numel() <= max(limit, 16)
        return attend(q, key, value, **options)

    monkeypatch.setattr(expanded, "_MAX_ELEMENTS", limit)
    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    torch.testing.assert_close(mla_expanded_batched(*args, scale=SCALE, start=start), want, atol=1e-5, rtol=1e-5)
    assert max(sizes) <= max(limit, 16 * 20)
    assert len(sizes) == (calls if limit > 1 or not start else calls * n)  # a mask of one query at a time


def test_both_forms_agree() -> None:
    """Absorbing the key weight into the query and the value weight into the output changes nothing but rounding."""
    heads, nope, rope, latent, n, start = 2, 6, 4, 16, 3, 5
    rows = torch.randn(start + n, latent + rope)
    q = torch.randn(n, heads, nope + rope)
    w_k, w_v = torch.randn(heads, nope, latent), torch.randn(heads, 7, latent)
    kv_rows = rows.unsqueeze(0)
    (want,) = mla_expanded_batched(
        q.unsqueeze(0), kv_rows[..., :latent], kv_rows[..., latent:], w_k, w_v, scale=SCALE, start=start
    )
    kv = paged([rows] * n, page_size=4)
    q_latent = torch.einsum("nhd,hdc->nhc", q[..., :nope], w_k)
    lens = torch.arange(start + 1, start + n + 1)
    out = mla_absorbed(q_latent, q[..., nope:], kv.cache, kv.page_table, lens, scale=SCALE)
    torch.testing.assert_close(torch.einsum("nhc,hdc->nhd", out, w_v), want, atol=1e-4, rtol=1e-4)


def test_errors() -> None:
    with pytest.raises(KernelError, match="widths must add up"):
        mla_absorbed(
            torch.zeros(1, 2, 6),
            torch.zeros(1, 2, 4),
            torch.zeros(2, 4, 11),
            torch.zeros(1, 1, dtype=torch.int32),
            torch.ones(1, dtype=torch.int64),
            scale=1.0,
        )


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_lengths_known_on_the_host_make_the_same_plan(batch_invariant: bool) -> None:
    """Nothing is asked of the tensor then, whose contents may be on a device."""
    lens, table = torch.tensor([700, 3, 1500]), torch.arange(3 * 100).view(3, 100)
    options: dict[str, Any] = {"page_size": 16, "batch_invariant": batch_invariant}
    lengths = (700, 3, 1500)
    told = plan_absorbed(table, lens, lengths=lengths, **options)
    q, rope, cache = torch.randn(3, 2, 16), torch.randn(3, 2, 4), torch.randn(300, 16, 20)
    use: dict[str, Any] = {"scale": SCALE, "batch_invariant": batch_invariant}
    want = mla_absorbed(q, rope, cache, table, lens, plan=plan_absorbed(table, lens, **options), **use)
    assert torch.equal(mla_absorbed(q, rope, cache, table, lens, plan=told, **use), want)
    with FakeTensorMode() as fake:
        plan_absorbed(fake.from_tensor(table), fake.from_tensor(lens), lengths=lengths, **options)


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("latent", [14, 160])
def test_fp8_rows_are_read_as_their_plain_copies(latent: int, batch_invariant: bool) -> None:
    """The same bits as from a plain cache of the dequantised rows; other rows are never read."""
    lengths = [5, 0, 130, 1]
    kv = paged(sequences(lengths, latent + 6, torch.float32), page_size=4)
    pages, size, width = kv.cache.shape
    mine = kv.cache.view(-1, width).isfinite().all(dim=1)
    fp8 = ScaledLatent.zeros(pages, size, latent=latent, rope=6, rope_dtype=torch.float32)
    fp8.scale.fill_(torch.nan)
    fp8.rope.fill_(torch.nan)
    fp8.write_(mine.nonzero().squeeze(1), kv.cache.view(-1, width)[mine])
    q_latent, q_rope = torch.randn(len(lengths), 3, latent), torch.randn(len(lengths), 3, 6)

    def attend(cache: Tensor | ScaledLatent) -> Tensor:
        return mla_absorbed(
            q_latent, q_rope, cache, kv.page_table, kv.kv_lens, scale=SCALE, batch_invariant=batch_invariant
        )

    want = attend(fp8.dense(torch.float32))
    assert torch.equal(attend(fp8), want)
    assert not torch.equal(attend(kv.cache), want), "rounding shows"
    wrong = ScaledLatent(fp8.data, fp8.scale * 2, fp8.rope)
    assert not torch.equal(attend(wrong), want)
    narrow = ScaledLatent.zeros(pages, size, latent=latent - 1, rope=6, rope_dtype=torch.float32)
    with pytest.raises(KernelError, match=rf"cached rows of {latent + 5}, .* widths must add up"):
        attend(narrow)
