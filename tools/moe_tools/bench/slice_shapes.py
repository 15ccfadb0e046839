"""What `bench slice` measures: a model's widths, and how one rank of a deployment meets them.

T tokens, H hidden, E routed experts, h heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import torch
from moe_kernels.gate import GateRule

from moe_tools.bench.floor import Hardware

Phase = Literal["decode", "prefill"]


@dataclass(frozen=True, slots=True)
class Widths:
    """A model of DeepSeek-V3's family. `dtype`: of activations, cache and the weights that are not fp8."""

    hidden: int = 7168
    intermediate: int = 2048
    dense_intermediate: int = 18_432
    experts: int = 256
    top_k: int = 8
    groups: int = 8
    heads: int = 128
    query_rank: int = 1536
    latent: int = 512
    rope: int = 64
    nope: int = 128
    value: int = 128
    vocab: int = 129_280
    page: int = 64
    moe_layers: int = 58
    dense_layers: int = 3
    dtype: torch.dtype = torch.bfloat16

    @property
    def layers(self) -> int:
        return self.moe_layers + self.dense_layers

    @property
    def rule(self) -> GateRule:
        """V3's: sigmoid, the best half of the groups by the sum of their two best, normalised."""
        return GateRule(
            top_k=self.top_k, num_groups=self.groups, top_groups=max(1, self.groups // 2), scoring="sigmoid",
            group_score="top2_sum", masked_score=float("-inf"), normalise=True, scale=2.5,
        )  # fmt: skip


V3: Final = Widths()


@dataclass(frozen=True, slots=True)
class Unit:
    """One rank of a deployment in one phase.

    `slots`: its routed experts; `tokens`: rows of its tp group in attention, of which `tokens / tp` enter the MoE here;
    `kv_len`: cached rows of each token that is decoded, or the length of the prompt, whose last `tokens` these are.
    """

    phase: Phase
    ep: int
    tp: int
    slots: int
    tokens: int
    kv_len: int

    @property
    def moe_tokens(self) -> int:
        return self.tokens // self.tp

    def rows_per_slot(self, widths: Widths) -> int:
        """What balanced routing over all ranks sends to each of this rank's slots."""
        return max(1, widths.top_k * self.moe_tokens // self.slots)

    @property
    def name(self) -> str:
        return f"{self.phase} EP{self.ep} TP{self.tp}"


UNITS: Final = (
    Unit("decode", ep=8, tp=1, slots=32, tokens=128, kv_len=4096),
    Unit("decode", ep=32, tp=1, slots=8, tokens=128, kv_len=4096),
    Unit("decode", ep=144, tp=1, slots=2, tokens=128, kv_len=4096),
    Unit("decode", ep=320, tp=4, slots=1, tokens=128, kv_len=4096),
    Unit("prefill", ep=8, tp=1, slots=32, tokens=4096, kv_len=4096),
    Unit("prefill", ep=32, tp=1, slots=8, tokens=4096, kv_len=4096),
)
"""DeepSeek's decode units and an 8-GPU node; prompts are computed at EP 8 and 32 only, as in their deployment."""


def modelled_network_us(unit: Unit, widths: Widths, hardware: Hardware) -> float:
    """Both of `modelled_transfers_us`."""
    return sum(modelled_transfers_us(unit, widths, hardware))


def modelled_transfers_us(unit: Unit, widths: Widths, hardware: Hardware) -> tuple[float, float]:
    """Dispatch (fp8 rows with scales) and combine (16 bit) of one layer at the links' rates: modelled, never measured.

    A copy per chosen expert. Of `ep` ranks 8 share a node by NVLink, the others are reached over the network; both at
    once, so the larger of the two is the time.
    """
    copies = unit.moe_tokens * widths.top_k
    remote = max(0.0, 1 - 8 / unit.ep)
    own_node = min(1.0, 8 / unit.ep) - 1 / unit.ep
    us_per_byte = 1e6 * max(remote / hardware.network_bytes_per_s, own_node / hardware.nvlink_bytes_per_s)
    dispatch = copies * (widths.hidden + -(-widths.hidden // 128) * 4)
    return dispatch * us_per_byte, copies * 2 * widths.hidden * us_per_byte
