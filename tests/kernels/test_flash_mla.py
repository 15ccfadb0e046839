"""The FlashMLA adapter against a double that enforces what FlashMLA's documentation and host code ask for."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import pytest
import torch
from moe_kernels.errors import KernelError
from moe_kernels.mla import ScaledLatent, flash_mla, mla_absorbed, plan_absorbed
from moe_kernels.mla.flash_mla import FlashPlan
from moe_kernels.mla.reference import mla_absorbed_reference
from torch import Tensor

from tests.kernels.devices import DEVICE
from tests.kernels.paged import Step, step

SCALE = 0.1


@dataclass
class Metadata:
    """Filled by the first call; later calls must have the same shapes and lengths."""

    key: tuple[object, ...] | None = None
    calls: int = 0


def flash_mla_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    head_dim_v: int,
    tile_scheduler_metadata: Metadata,
    num_splits: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    is_fp8_kvcache: bool = False,
    indices: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    batch, queries, heads, width = q.shape
    assert q.dtype == k_cache.dtype
    assert q.dtype in (torch.bfloat16, torch.float16)
    assert k_cache.shape[1:] == (64, 1, width) and k_cache.stride(3) == 1 and q.stride(3) == 1
    assert width in (576, 512) and head_dim_v == 512 and queries == 1
    assert block_table.dtype == cache_seqlens.dtype == torch.int32
    assert block_table.shape[0] == batch and block_table.is_contiguous() and cache_seqlens.shape == (batch,)
    assert not (is_fp8_kvcache or causal)
    assert (cache_seqlens > 0).all() and (block_table >= 0).all()
    key = (tuple(q.shape), tuple(cache_seqlens.tolist()))
    assert tile_scheduler_metadata.key in (None, key), "metadata of another step"
    tile_scheduler_metadata.key = key
    tile_scheduler_metadata.calls += 1
    scale = width**-0.5 if softmax_scale is None else softmax_scale
    parts = (q[:, 0, :, :512], q[:, 0, :, 512:], k_cache[:, :, 0], block_table, cache_seqlens)
    out = mla_absorbed_reference(*(x.cpu() for x in parts), scale=scale).to(q)
    return out.unsqueeze(1), torch.zeros(batch, heads, queries, device=q.device)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put a double in the package's place, on a device that says it is Hopper."""

    def install(**members: object) -> None:
        module = ModuleType("flash_mla")
        given = {
            "get_mla_metadata": lambda: (Metadata(), None),
            "flash_mla_with_kvcache": flash_mla_with_kvcache,
        } | members
        for name, member in given.items():
            if member is not None:
                setattr(module, name, member)
        monkeypatch.setitem(sys.modules, "flash_mla", module)
        monkeypatch.setattr(flash_mla, "_capability", lambda device: (9, 0))

    return install


def make(lengths: list[int], dtype: torch.dtype = torch.float16) -> Step:
    rows = [torch.randn(length, 576).to(dtype) for length in lengths]
    return step(torch.randn(len(lengths), 2, 576).div(8).to(dtype), rows, latent=512, page_size=64, spare=1)


def plan_of(s: Step, **options: object) -> FlashPlan:
    plan = plan_absorbed(s.page_table, s.kv_lens, page_size=s.cache.shape[1], backend="flash_mla", **options)  # type: ignore[arg-type]
    assert isinstance(plan, FlashPlan)
    return plan


def run(s: Step, cache: Tensor | ScaledLatent, plan: FlashPlan) -> Tensor:
    return mla_absorbed(s.q_latent, s.q_rope, cache, s.page_table, s.kv_lens, scale=SCALE, plan=plan)


def test_result_and_one_metadata_for_all_layers(installed: Callable[..., None]) -> None:
    installed()
    s = make([70, 0, 64, 1])
    plan = plan_of(s)
    want = s.reference(scale=SCALE)
    for _ in range(2):
        torch.testing.assert_close(run(s, s.cache, plan).double().cpu(), want, atol=4e-3, rtol=4e-3)
    assert plan.metadata.calls == 2
    with pytest.raises(AssertionError):  # a mutant: FlashMLA's own scale
        torch.testing.assert_close(
            run(s, s.cache, plan).double().cpu(), s.reference(scale=576**-0.5), atol=4e-3, rtol=4e-3
        )
    none = make([])
    assert run(none, none.cache, plan_of(none)).shape == (0, 2, 512)


def test_what_it_cannot_serve(installed: Callable[..., None]) -> None:
    installed()
    s = make([70, 3])
    plan = plan_of(s)
    with pytest.raises(KernelError, match="reads pages of 64 rows only"):
        plan_absorbed(s.page_table, s.kv_lens, page_size=16, backend="flash_mla")
    with pytest.raises(KernelError, match="batch_invariant=True"):
        plan_of(s, batch_invariant=True)
    with pytest.raises(KernelError, match="must be 512, 64 and"):
        run(s, s.cache[..., 1:], plan)
    with pytest.raises(KernelError, match="all must be bf16 or fp16"):
        run(s, s.cache.float(), plan)
    with pytest.raises(KernelError, match="the cache is a ScaledLatent"):
        run(s, ScaledLatent.zeros(2, 64, latent=512, rope=64, device=DEVICE), plan)
    with pytest.raises(KernelError, match="1 tokens and a plan for 2"):
        run(Step(s.q_latent[:1], s.q_rope[:1], s.cache, s.page_table, s.kv_lens), s.cache, plan)


def test_where_it_is_absent_or_another(installed: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    s = make([3])
    if DEVICE == "cpu":
        with pytest.raises(KernelError, match=r"cpu has compute capability \(0, 0\)"):
            plan_of(s)
    monkeypatch.setattr(flash_mla, "_capability", lambda device: (9, 0))
    monkeypatch.setitem(sys.modules, "flash_mla", None)
    with pytest.raises(KernelError, match="flash_mla is not installed; build"):
        plan_of(s)
    installed(flash_mla_with_kvcache=None)
    with pytest.raises(KernelError, match="has no flash_mla_with_kvcache"):
        plan_of(s)
    installed(get_mla_metadata=lambda lengths, heads, groups: (SimpleNamespace(), None))
    with pytest.raises(KernelError, match="old revision"):
        plan_of(s)
