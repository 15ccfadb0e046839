"""Attention cores of multi-head latent attention.

T query tokens, h heads, C latent width, R rotary width, L cached rows, n queries, Dn/Dv per-head key/value widths.
"""

from __future__ import annotations

from moe_kernels.mla.absorbed import mla_absorbed
from moe_kernels.mla.expanded import mla_expanded, mla_expanded_batched
from moe_kernels.mla.plan import AbsorbedPlan, plan_absorbed

__all__ = ["AbsorbedPlan", "mla_absorbed", "mla_expanded", "mla_expanded_batched", "plan_absorbed"]
