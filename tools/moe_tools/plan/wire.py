"""What a dispatch and its combine take on the links, from exactly counted copies and measured rates.

S ep ranks. Rates are what the published tables reached (bytes of an even routing over time less a fixed start); a GPU
without tables gets the H200's share of its datasheet rates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import torch
from torch import Tensor

from moe_runtime.dispatch.spec import DispatchSpec
from moe_tools.plan.hardware import MEASURED, Machine, load_machine
from moe_tools.plan.replay import Counts

Way = Literal["dispatch", "combine"]
LL_ROW_BYTES: Final = {"dispatch": 7392, "combine": 14336}
"""Of one copy in the published runs: 7168 fp8 values with 56 fp32 scales, and 7168 bf16 values."""
LL_TOP_K: Final = 8
SMOOTH: Final = 4.0
"""Network and NVLink work at once: the fourth-power mean of both times meets DeepEP's EP16 to EP64 within 9 %."""


@dataclass(frozen=True, slots=True)
class Transfer:
    """One way of one dispatch. `us`: its time; bytes: the busiest rank's, the larger of sent and received;
    `network_us`, `nvlink_us`: what each link alone would take, without starts."""

    us: float
    network_bytes: float
    nvlink_bytes: float
    mean_network_bytes: float
    network_us: float
    nvlink_us: float


def slower_link(transfers: Sequence[Transfer]) -> str:
    """The link that `transfers` wait for: where all of them together would take longer."""
    network, nvlink = sum(one.network_us for one in transfers), sum(one.nvlink_us for one in transfers)
    return "network" if network > nvlink else "nvlink"


@dataclass(frozen=True, slots=True)
class Wire:
    """The links of a unit and the backend that uses them."""

    machine: Machine
    base: Machine
    spec: DispatchSpec
    backend: str

    @classmethod
    def of(cls, machine: Machine, spec: DispatchSpec, backend: str) -> Wire:
        return cls(machine, load_machine(MEASURED), spec, backend)

    def transfer(self, counts: Counts, way: Way, *, decode: bool, capacity: int, scale: float = 1.0) -> Transfer:
        """`capacity`: tokens of a rank that the dispatch has room for; `scale`: real tokens per counted one."""
        row = self._row_bytes(way)
        match self.backend:
            case "local":
                return Transfer(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
            case "all_gather":
                return self._gather(way, capacity)
            case "all_to_all" if decode:
                return self._equal_blocks(row, capacity)
            case "all_to_all":
                return self._pairs(counts.copies * scale, row, way, self._fixed("collective_fixed_us"))
            case "deep_ep" if not decode:
                return self._forwarded(counts, row, way, scale)
        fixed = self._fixed("nvlink_fixed_us" if self._one_domain else "network_fixed_us")
        return self._pairs(counts.copies * scale, row, way, fixed)

    @property
    def _one_domain(self) -> bool:
        return self.spec.ep <= self.machine.nvlink_ranks

    def _row_bytes(self, way: Way) -> float:
        spec = self.spec
        if way == "combine" or not spec.rows.quantize or self.backend == "all_gather":
            return float(spec.row_bytes)
        return spec.hidden + 4.0 * -(-spec.hidden // 128)

    def _pairs(self, copies: Tensor, row: float, way: Way, fixed: float) -> Transfer:
        """Each copy goes from its home to its rank, or back."""
        ranks = torch.arange(copies.shape[0])
        domain = ranks // self.machine.nvlink_ranks
        far = domain.unsqueeze(0) != domain.unsqueeze(1)
        near = ~far & (ranks.unsqueeze(0) != ranks.unsqueeze(1))
        network = torch.maximum((copies * far).sum(0), (copies * far).sum(1)) * row
        nvlink = torch.maximum((copies * near).sum(0), (copies * near).sum(1)) * row
        rates = self._low_latency_rates(way)
        times = 1e6 * network / rates[0], 1e6 * nvlink / rates[1]
        us = fixed + torch.maximum(*times).max()
        mean = float((copies * far).sum(1).mean()) * row if far.any() else 0.0
        return Transfer(
            float(us), float(network.max()), float(nvlink.max()), mean, float(times[0].max()), float(times[1].max())
        )

    def _forwarded(self, counts: Counts, row: float, way: Way, scale: float) -> Transfer:
        """One copy per node over the network to the rank of the home's number there, which forwards it over NVLink,
        one copy per rank; combine takes the same ways back. Both links work at once."""
        ranks, domain = torch.arange(self.spec.ep), self.machine.nvlink_ranks
        node = ranks // domain
        sizes = torch.bincount(node)
        firsts = sizes.cumsum(0) - sizes
        # [S, M]: where a home's tokens enter a node; a short last node's ranks take those of several homes
        enters = firsts + (ranks % domain).unsqueeze(1) % sizes
        far = counts.node_copies * (torch.arange(len(sizes)) != node.unsqueeze(1)) * (row * scale)
        forwards = enters[:, node]  # [S, S]: who hands them to each rank
        near = counts.rank_copies * (forwards != ranks) * (row * scale)
        network = torch.maximum(far.sum(1), _received(far, enters))
        nvlink = torch.maximum(near.sum(0), _received(near, forwards))
        rates = [self._normal_rate(link, way) for link in ("network", "nvlink")]
        us = 1e6 * ((network / rates[0]) ** SMOOTH + (nvlink / rates[1]) ** SMOOTH).max() ** (1 / SMOOTH)
        fixed = self._fixed("nvlink_fixed_us" if self._one_domain else "network_fixed_us")
        most = float(network.max()), float(nvlink.max())
        times = [1e6 * num_bytes / rate for num_bytes, rate in zip(most, rates, strict=True)]
        return Transfer(2 * fixed + float(us), *most, float(far.sum(1).mean()), *times)

    def _normal_rate(self, link: str, way: Way) -> float:
        """Bytes per second of one rank that the kernels for many tokens reach on one link."""
        if link == "nvlink" and "nvlink_rate" in self.machine.wire:
            return float(self.machine.wire["nvlink_rate"]["value"]) * self.machine.rates.nvlink_bytes_per_s
        table, owner = self._table(f"normal_{link}")
        return float(table[f"{way}_bytes_per_s"]) * self._share(owner, f"{link}_bytes_per_s")

    def _equal_blocks(self, row: float, capacity: int) -> Transfer:
        """Room for every row to every rank, whatever the routing."""
        spec = self.spec
        block = capacity * min(spec.top_k, spec.rows.num_slots)
        copies = torch.full((spec.ep, spec.ep), float(block))
        return self._pairs(copies, row, "dispatch", self._fixed("collective_fixed_us"))

    def _gather(self, way: Way, capacity: int) -> Transfer:
        """Every token reaches every rank once; sums come back as fp32. A node's links share what enters it."""
        spec, domain = self.spec, self.machine.nvlink_ranks
        row = spec.row_bytes if way == "dispatch" else 4.0 * spec.hidden
        whole = spec.ep * capacity * row
        sizes = torch.bincount(torch.arange(spec.ep) // domain).double()
        enters = whole * (1 - sizes / spec.ep) / sizes  # over each link of a node; most where the last node is short
        network = float(enters.max())
        nvlink = whole * (1 - 1 / spec.ep)
        rates = self._low_latency_rates("dispatch")
        times = 1e6 * network / rates[0], 1e6 * nvlink / rates[1]
        us = self._fixed("collective_fixed_us") + max(times)
        return Transfer(us, network, nvlink, float((enters * sizes).sum()) / spec.ep, *times)

    def _low_latency_rates(self, way: Way) -> tuple[float, float]:
        """Network's and NVLink's bytes per second of one rank."""
        table, owner = self._table("low_latency")
        each = table["tokens"] * LL_TOP_K * LL_ROW_BYTES[way]
        times = table[f"{way}_us"]
        near = each * (1 - 1 / table["ep"][0]) / (times[0] - owner_fixed(owner, "nvlink_fixed_us")) * 1e6
        far = [
            each * (1 - 8 / ep) / (us - owner_fixed(owner, "network_fixed_us")) * 1e6
            for ep, us in zip(table["ep"][1:], times[1:], strict=True)
        ]
        network = float(np.interp(np.log2(max(self.spec.ep, 2)), np.log2(table["ep"][1:]), far))
        nvlink = near * self._share(owner, "nvlink_bytes_per_s")
        if "nvlink_rate" in self.machine.wire:
            nvlink = float(self.machine.wire["nvlink_rate"]["value"]) * self.machine.rates.nvlink_bytes_per_s
        return network * self._share(owner, "network_bytes_per_s"), nvlink

    def _table(self, name: str) -> tuple[Mapping[str, Any], Machine]:
        owner = self.machine if name in self.machine.wire else self.base
        return owner.wire[name], owner

    def _share(self, owner: Machine, rate: str) -> float:
        return float(getattr(self.machine.rates, rate) / getattr(owner.rates, rate))

    def _fixed(self, name: str) -> float:
        return owner_fixed(self.machine if name in self.machine.wire else self.base, name)


def _received(copies: Tensor, by: Tensor) -> Tensor:
    """[S]: bytes of `copies [S, N]` by the rank in `by [S, N]` that each goes through."""
    return torch.zeros(len(copies), dtype=copies.dtype).index_add_(0, by.flatten(), copies.flatten())


def owner_fixed(machine: Machine, name: str) -> float:
    """A fixed part of a machine's wire tables, microseconds."""
    found = machine.wire.get(name)
    return float((found or load_machine(MEASURED).wire[name])["value"])
