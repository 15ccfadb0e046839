"""The fused norm, rotation and cache write against fp64. n tokens, h heads, C latent, R rotary width."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from moe_kernels.errors import KernelError
from moe_kernels.latent import Prepared, mla_prepare_
from moe_kernels.latent.reference import latent_reference
from moe_kernels.mla import LatentCache, ScaledLatent
from moe_kernels.rope.reference import apply_rope_reference
from torch import Tensor

from tests.kernels.devices import DEVICE, DTYPES, ON_GPU

EPS = 1e-6
# One or two roundings of the output's dtype.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
WIDTHS = [(32, 16, 3), (20, 6, 1), *([(512, 64, 128)] if ON_GPU else [])]
BACKENDS = ["torch", "triton"]


@dataclass(frozen=True, slots=True)
class Problem:
    query: Tensor
    down: Tensor
    cos: Tensor
    sin: Tensor
    norm: Tensor
    cache: Tensor
    rows: Tensor

    @classmethod
    def make(cls, tokens: int, rank: int, width: int, heads: int, dtype: torch.dtype) -> Problem:
        """Query and down are slices; 3 pages of 4 rows, rows in random order."""
        angle = torch.rand(tokens, width // 2, device=DEVICE) * 6.28
        wide = torch.randn(tokens, heads, 8 + width, device=DEVICE).to(dtype)
        down = torch.randn(tokens, 24 + rank + width, device=DEVICE).to(dtype)
        norm = (torch.rand(rank, device=DEVICE) + 0.5).to(dtype)
        cache = torch.full((3, 4, rank + width), torch.nan, device=DEVICE, dtype=dtype)
        rows = torch.randperm(12, device=DEVICE)[:tokens].contiguous()
        return cls(wide[..., 8:], down[:, 24:], angle.cos(), angle.sin(), norm, cache, rows)

    def run(self, here: slice = slice(None), *, cached: bool = True, keep: bool = True, backend: str) -> Prepared:
        return mla_prepare_(
            self.query[here],
            self.down[here],
            self.cos[here],
            self.sin[here],
            kv_norm=self.norm,
            eps=EPS,
            cache=self.cache if cached else None,
            cache_rows=self.rows[here] if cached else None,
            keep_latent=keep,
            backend=backend,
        )

    def check(self, got: Tensor) -> None:
        bound = TOLERANCE[got.dtype]
        want = latent_reference(self.down, self.cos, self.sin, self.norm, EPS)
        torch.testing.assert_close(got.double(), want, atol=bound, rtol=bound)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rank", "width", "heads"), WIDTHS)
def test_matches_reference(rank: int, width: int, heads: int, dtype: torch.dtype, backend: str) -> None:
    problem = Problem.make(7, rank, width, heads, dtype)
    got = problem.run(backend=backend)
    assert got.latent is not None
    bound = TOLERANCE[dtype]
    want = apply_rope_reference(problem.query, problem.cos, problem.sin)
    torch.testing.assert_close(got.query_rope.double(), want, atol=bound, rtol=bound)
    problem.check(got.latent)
    flat = problem.cache.view(12, -1)
    assert torch.equal(flat[problem.rows], got.latent)
    assert int(flat.isnan().all(dim=1).sum()) == 12 - 7, "other rows are not written"
    with pytest.raises(AssertionError):  # mutants: the neighbour's row; another rotation
        problem.check(flat[problem.rows.roll(1)])
    with pytest.raises(AssertionError):
        problem.check(torch.cat((got.latent[:, :rank], got.latent[:, rank:].roll(1, 1)), dim=1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_rows_are_written_nowhere(backend: str) -> None:
    problem = Problem.make(5, 32, 16, 2, torch.float32)
    problem.rows[1] = problem.rows[4] = -1
    got = problem.run(keep=False, backend=backend)
    assert got.latent is None
    flat = problem.cache.view(12, -1)
    real = problem.rows[problem.rows >= 0]
    assert not flat[real].isnan().any()
    assert int(flat.isnan().all(dim=1).sum()) == 12 - 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_a_cache_and_without_tokens(backend: str) -> None:
    problem = Problem.make(3, 32, 16, 2, torch.float32)
    got = problem.run(cached=False, backend=backend)
    assert got.latent is not None
    problem.check(got.latent)
    assert problem.cache.isnan().all()
    empty = problem.run(slice(0), backend=backend)
    assert empty.latent is not None and empty.latent.shape == (0, 48) and empty.query_rope.shape == (0, 2, 16)


def test_a_narrower_cache_rounds_after_the_rows_dtype() -> None:
    problem = Problem.make(4, 32, 16, 2, torch.float32)
    cache = torch.zeros(3, 4, 48, device=DEVICE, dtype=torch.float16)
    got = mla_prepare_(problem.query, problem.down, problem.cos, problem.sin, kv_norm=problem.norm, eps=EPS,
                       cache=cache, cache_rows=problem.rows, backend="triton")  # fmt: skip
    assert got.latent is not None
    assert torch.equal(cache.view(12, 48)[problem.rows], got.latent.half())


def stored(cache: ScaledLatent) -> tuple[Tensor, ...]:
    """Flat rows; fp8 as its bytes."""
    return tuple(part.flatten(0, 1) for part in (cache.data.view(torch.uint8), cache.scale, cache.rope))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [32, 20, 300])
def test_an_fp8_cache_gets_the_bytes_of_torch(rank: int, dtype: torch.dtype, backend: str) -> None:
    """The same launch writes what `ScaledLatent.write_` makes of the rows, one group or several, the last one short."""
    problem = Problem.make(7, rank, 16, 2, dtype)
    problem.rows[2] = -1
    before = torch.randint(1, 100, (3, 4, rank), dtype=torch.uint8, device=DEVICE).view(torch.float8_e4m3fn)
    scale, rope = torch.rand(3, 4, -(-rank // 128), device=DEVICE), torch.rand(3, 4, 16, device=DEVICE).to(dtype)
    cache, wanted = (ScaledLatent(before.clone(), scale.clone(), rope.clone()) for _ in range(2))
    got = prepare(problem, cache, backend)
    assert got.latent is not None
    real = problem.rows >= 0
    wanted.write_(problem.rows[real], got.latent[real], backend="torch")
    for ours, theirs in zip(stored(cache), stored(wanted), strict=True):
        assert torch.equal(ours, theirs)
    # Mutants: values that were not rounded to the rows' dtype, a neighbour's row.
    if dtype is not torch.float32:
        wide = replace(problem, down=problem.down.float())
        prepare(wide, cache, backend)
        assert not torch.equal(stored(cache)[1], stored(wanted)[1])
    wanted.write_(problem.rows[real], got.latent[real].roll(1, 0), backend="torch")
    assert not torch.equal(stored(cache)[0], stored(wanted)[0])


def prepare(p: Problem, cache: LatentCache, backend: str) -> Prepared:
    return mla_prepare_(
        p.query, p.down, p.cos, p.sin, kv_norm=p.norm, eps=EPS, cache=cache, cache_rows=p.rows, backend=backend
    )


def test_a_token_does_not_depend_on_the_others() -> None:
    problem = Problem.make(6, 32, 16, 3, torch.float32)
    together = problem.run(backend="triton")
    assert together.latent is not None
    for t in range(6):
        alone = problem.run(slice(t, t + 1), backend="triton")
        assert alone.latent is not None
        assert torch.equal(alone.latent[0], together.latent[t])
        assert torch.equal(alone.query_rope[0], together.query_rope[t])


def test_errors() -> None:
    p = Problem.make(3, 32, 16, 2, torch.float32)
    with pytest.raises(KernelError, match=r"they must be \[n, h, R\], \[n, C\+R\] and \[C\]"):
        mla_prepare_(p.query, p.down[:, 1:], p.cos, p.sin, kv_norm=p.norm, eps=EPS, cache=None, cache_rows=None)
    with pytest.raises(KernelError, match=r"they must be \(3, 8\)"):
        mla_prepare_(p.query, p.down, p.cos[:, 1:], p.sin, kv_norm=p.norm, eps=EPS, cache=None, cache_rows=None)
    with pytest.raises(KernelError, match=r"cache_rows is None; with a cache it must be \(3,\) int64"):
        mla_prepare_(p.query, p.down, p.cos, p.sin, kv_norm=p.norm, eps=EPS, cache=p.cache, cache_rows=None)
    narrow = ScaledLatent.zeros(3, 4, latent=31, rope=16, rope_dtype=torch.float32, device=DEVICE)
    with pytest.raises(KernelError, match=r"cache\.data is \(3, 4, 31\) .* must be contiguous \[P, S, 32\]"):
        prepare(p, narrow, "torch")
    strided = ScaledLatent.zeros(3, 4, latent=32, rope=32, rope_dtype=torch.float32, device=DEVICE)
    strided = ScaledLatent(strided.data, strided.scale, strided.rope[..., ::2])
    with pytest.raises(KernelError, match=r"cache\.rope is \(3, 4, 16\) with strides .* must be contiguous"):
        prepare(p, strided, "torch")
    with pytest.raises(KernelError, match="keep nothing"):
        p.run(cached=False, keep=False, backend="torch")
