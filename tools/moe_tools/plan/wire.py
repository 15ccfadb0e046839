"""What a dispatch and its combine take on the links, from exactly counted copies and measured rates.

S ep ranks. Rates are what the published tables reached (bytes of an even routing over time less a fixed start); a GPU
without tables gets the H200's share of its datasheet rates.
"""

from __future__ import annotations

from collections.abc import Mapping
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


@dataclass(frozen=True, slots=True)
class Transfer:
    """One way of one dispatch. `us`: its time; bytes: the busiest rank's, the larger of sent and received."""

    us: float
    network_bytes: float
    nvlink_bytes: float
    mean_network_bytes: float

    @property
    def bound(self) -> str:
        """Which link it waits for."""
        return "network" if self.network_bytes else "nvlink"


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
                return Transfer(0.0, 0.0, 0.0, 0.0)
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
        us = fixed + 1e6 * torch.maximum(network / rates[0], nvlink / rates[1]).max()
        return Transfer(float(us), float(network.max()), float(nvlink.max()), float((copies * far).sum(1).mean()) * row
                        if far.any() else 0.0)  # fmt: skip

    def _forwarded(self, counts: Counts, row: float, way: Way, scale: float) -> Transfer:
        """One copy per node over the network, from there one per rank over NVLink."""
        ranks = torch.arange(self.spec.ep)
        table, owner = self._table("normal")
        near = counts.rank_copies * (ranks.unsqueeze(0) != ranks.unsqueeze(1)) * (row * scale)
        nvlink = torch.maximum(near.sum(0), near.sum(1)).max()
        eff = self._share(owner, "nvlink_bytes_per_s") * float(table[f"{way}_bytes_per_s"][0])
        if self._one_domain:
            us = 2 * self._fixed("nvlink_fixed_us") + 1e6 * float(nvlink) / eff
            return Transfer(us, 0.0, float(nvlink), 0.0)
        own = torch.arange(counts.node_copies.shape[1]).unsqueeze(0) == (ranks // self.machine.nvlink_ranks).unsqueeze(
            1
        )
        sent = counts.node_copies.sum(1) * (row * scale)
        received = counts.node_copies.sum(0).repeat_interleave(self.machine.nvlink_ranks)[: len(ranks)]
        busiest = torch.maximum(sent, received * (row * scale) / self.machine.nvlink_ranks).max()
        rate = float(np.interp(np.log2(self.spec.ep), np.log2(table["ep"][1:]), table[f"{way}_bytes_per_s"][1:]))
        us = 2 * self._fixed("network_fixed_us") + 1e6 * float(busiest) / (
            rate * self._share(owner, "network_bytes_per_s")
        )
        remote = (counts.node_copies * ~own).sum(1) * (row * scale)
        return Transfer(us, float(remote.max()), float(nvlink), float(remote.mean()))

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
        nodes = -(-spec.ep // domain)
        network = whole * (1 - 1 / nodes) / min(domain, spec.ep)
        nvlink = whole * (1 - 1 / spec.ep)
        rates = self._low_latency_rates("dispatch")
        us = self._fixed("collective_fixed_us") + 1e6 * max(network / rates[0], nvlink / rates[1])
        return Transfer(us, network, nvlink, network)

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


def owner_fixed(machine: Machine, name: str) -> float:
    """A fixed part of a machine's wire tables, microseconds."""
    found = machine.wire.get(name)
    return float((found or load_machine(MEASURED).wire[name])["value"])
