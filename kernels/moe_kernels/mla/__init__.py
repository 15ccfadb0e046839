"""Attention cores of multi-head latent attention.

T query tokens, h heads, C latent width, R rotary width, P pages, S rows per page, L cached rows, n queries, Dn/Dv
per-head key/value widths.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from torch import Tensor

from moe_kernels.backends import choose_backend
from moe_kernels.errors import KernelError
from moe_kernels.mla import absorbed
from moe_kernels.mla.expanded import mla_expanded_batched
from moe_kernels.mla.flash_mla import FlashPlan
from moe_kernels.mla.latent import LatentCache, ScaledLatent
from moe_kernels.mla.plan import AbsorbedPlan as GatherPlan
from moe_kernels.mla.plan import plan_absorbed as plan_gather
from moe_kernels.mla.work import WorkPlan

__all__ = [
    "BACKENDS",
    "AbsorbedPlan",
    "LatentCache",
    "ScaledLatent",
    "mla_absorbed",
    "mla_expanded_batched",
    "plan_absorbed",
]

AbsorbedPlan: TypeAlias = GatherPlan | WorkPlan | FlashPlan
"""What a backend makes of a step's page tables and lengths; opaque to callers, and it says which backend runs."""

BACKENDS = ("torch", "triton", "flash_mla")


def plan_absorbed(
    page_table: Tensor,
    kv_lens: Tensor,
    *,
    page_size: int,
    batch_invariant: bool = False,
    lengths: Sequence[int] | None = None,
    num_heads: int = 128,
    backend: str | None = None,
) -> AbsorbedPlan:
    """`page_table [T, max_pages]` int32 or int64, `kv_lens [T]` -> what `mla_absorbed` needs, once per step.

    `lengths`: the same as `kv_lens`, where the host knows them. `num_heads`: local heads of the calls to come; it only
    decides how sequences are cut. `triton` never reads from the device, and its plan's shapes depend on T, max_pages
    and `num_heads` alone unless `lengths` are given: leave them out where a CUDA graph is captured. Without `lengths`
    `torch` waits for `kv_lens` where they are on a device. `backend`: see `choose_backend`; `flash_mla` is never chosen
    unasked.
    Raises KernelError on shapes, on a page size that the backend cannot read and on a backend that is not there.
    """
    chosen = choose_backend(page_table, backend, op="plan_absorbed", offered=BACKENDS)
    if chosen == "torch":
        return plan_gather(page_table, kv_lens, page_size=page_size, batch_invariant=batch_invariant, lengths=lengths)
    if chosen == "flash_mla":
        from moe_kernels.mla.flash_mla import plan_flash

        return plan_flash(page_table, kv_lens, page_size=page_size, batch_invariant=batch_invariant)
    from moe_kernels.mla.work import plan_work

    return plan_work(
        page_table,
        kv_lens,
        page_size=page_size,
        batch_invariant=batch_invariant,
        lengths=lengths,
        num_heads=num_heads,
    )


def mla_absorbed(
    q_latent: Tensor,
    q_rope: Tensor,
    cache: LatentCache,
    page_table: Tensor,
    kv_lens: Tensor,
    *,
    scale: float,
    batch_invariant: bool = False,
    plan: AbsorbedPlan | None = None,
    backend: str | None = None,
) -> Tensor:
    """`q_latent [T, h, C]`, `q_rope [T, h, R]`, `cache [P, S, C+R]`, `page_table [T, max_pages]`, `kv_lens [T]`
    -> `[T, h, C]`: token t attends to the first `kv_lens[t]` rows of its pages; `kv_lens[t] = 0` gives zeros.

    Only those rows are read: what else the pages hold, and the table's entries past them, do not matter. `plan` is what
    `plan_absorbed` made of the same table, lengths and mode, to be shared by the layers of a step; its backend serves
    the call. Without one, `backend` chooses (see `choose_backend`). Scores are fp32 in every dtype; rows of a
    `ScaledLatent` are brought to the query's dtype first. With `batch_invariant` a token's bits depend on its query and
    its rows alone. Raises KernelError where shapes differ.
    """
    if type(plan) is GatherPlan and backend is None:  # a CPU's way costs no more than this
        return absorbed.mla_absorbed(
            q_latent, q_rope, cache, page_table, kv_lens, scale=scale, batch_invariant=batch_invariant, plan=plan
        )
    if plan is None:
        size = cache.page_size if isinstance(cache, ScaledLatent) else cache.shape[1]
        plan = plan_absorbed(
            page_table,
            kv_lens,
            page_size=size,
            batch_invariant=batch_invariant,
            num_heads=q_latent.shape[1],
            backend=backend,
        )
    found = "torch" if isinstance(plan, GatherPlan) else "triton" if isinstance(plan, WorkPlan) else "flash_mla"
    if backend not in (None, found):
        raise KernelError(
            f"mla_absorbed: backend={backend!r} and a plan made for {found!r}; plan with the same backend"
        )
    if isinstance(plan, GatherPlan):
        return absorbed.mla_absorbed(
            q_latent, q_rope, cache, page_table, kv_lens, scale=scale, batch_invariant=batch_invariant, plan=plan
        )
    if plan.batch_invariant != batch_invariant:
        raise KernelError(
            f"mla_absorbed got batch_invariant={batch_invariant} and a plan made for {plan.batch_invariant}"
        )
    if isinstance(plan, WorkPlan):
        from moe_kernels.mla import triton as kernels

        return kernels.mla_absorbed(q_latent, q_rope, cache, plan, scale=scale)
    from moe_kernels.mla.flash_mla import attend

    return attend(q_latent, q_rope, cache, plan, scale=scale)
