"""What kernels take: tables measured by others, interpolated in the logarithm of each axis, scaled by physical floors.

The tables are of DeepSeek-V3's shapes on an H200. For another shape or another GPU everything above a table's fixed
part is multiplied by the ratio of the two floors (`bench.floor`): the larger of bytes over memory rate and operations
over arithmetic rate. Beyond the last row of a table time grows with the work. All times are microseconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from moe_models.base import ModelConfig
from numpy.typing import NDArray

from moe_tools.bench.floor import Arithmetic, Hardware, Work, expert_work, linear_work, mla_work
from moe_tools.plan.hardware import MEASURED, Machine, load_machine

Floats = NDArray[np.float64]

_V3_HIDDEN, _V3_WIDTH = 7168, 2048
_V3_LATENT, _V3_ROPE, _V3_HEADS = 512, 64, 128
_V3_ABSORBED = 128 * 128 * 512
"""Weights of one head-wise product with the latent: heads x head width x latent."""
SMOOTH: Final = 4.0
"""Bytes and arithmetic overlap: the fourth-power mean of both bounds meets the masked table within 4 %."""
FP8_CACHE_BYTES: Final = 1.14
"""Of one cached number: 512 fp8 values, 4 scales of 4 bytes and 64 bf16 values make 656 bytes of 576 numbers."""
HEAD_RATE: Final = 0.85
"""Of the memory rate, at which the vocabulary's product runs; no table has it."""


@dataclass(frozen=True, slots=True)
class Curves:
    """Kernel times of one model on one machine; `fp8`: its large weights stay in fp8; `padded`: the decode table."""

    machine: Machine
    base: Machine
    """Whose tables serve where `machine` has none."""
    model: ModelConfig
    fp8: bool
    padded: str = "masked"

    @classmethod
    def of(cls, machine: Machine, model: ModelConfig, *, fp8: bool) -> Curves:
        return cls(machine, machine if machine.key == MEASURED else load_machine(MEASURED), model, fp8)

    def _table(self, name: str) -> tuple[Mapping[str, Any], Hardware]:
        """The table and the rates of the GPU on which it was measured."""
        owner = self.machine if name in self.machine.kernels else self.base
        return owner.kernels[name], owner.rates

    @property
    def _arithmetic(self) -> Arithmetic:
        return "fp8" if self.fp8 else "bf16"

    @property
    def _weight_bytes(self) -> float:
        return 1.0 if self.fp8 else 2.0

    def experts_padded(self, active: Floats, rows: Floats) -> Floats:
        """Decode: both products of ranks with `rows [..]` rows on `active [..]` slots that have any."""
        table, there = self._table(self.padded)
        fixed = float(table["fixed_us"])
        slots, at_most = np.maximum(active, 1.0), np.minimum(rows, table["rows"][-1])
        inside = bilinear(table["slots"], table["rows"], table["us"], slots, np.maximum(at_most, 1.0)) - fixed
        last = [row[-1] for row in table["us"]]
        flat = [row[0 if len(row) == 2 else 1] for row in table["us"]]
        weights = np.interp(np.log2(slots), np.log2(table["slots"]), flat) - fixed
        weights = np.where(slots > table["slots"][-1], weights * slots / table["slots"][-1], weights)
        products = (last[0] - fixed) * rows / table["rows"][-1]
        beyond = (weights**SMOOTH + products**SMOOTH) ** (1 / SMOOTH)
        us = np.where((rows > table["rows"][-1]) | (slots > table["slots"][-1]), beyond, inside)
        return np.where(rows > 0, fixed + us * self._expert_ratio(slots, rows, there), 0.0)

    def experts_grouped(self, rows: Floats, active: Floats, *, ep: int) -> Floats:
        """Prefill: both products with the sorting of their rows."""
        table, there = self._table("contiguous")
        rate = np.interp(np.log2(ep), np.log2(table["ep"]), table["flops_per_s"])
        per_row = 1e6 * 6.0 * _V3_HIDDEN * _V3_WIDTH / rate
        slots = np.maximum(active, 1.0)
        decode = self.experts_padded(active, np.maximum(rows, 1.0))
        us = table["fixed_us"] + rows * per_row * self._expert_ratio(slots, np.maximum(rows, 1.0), there)
        return np.where(rows > 0, np.maximum(us, decode), 0.0)

    def linear(self, rows: float, weights: float) -> float:
        """One dense product of `rows` tokens with a matrix of `weights` numbers."""
        if rows <= 0:
            return 0.0
        table, there = self._table("linear_fp8" if self.fp8 else "linear_bf16")
        fixed, sizes = float(table["fixed_us"]), table["weights"]
        columns = [_along(table["rows"], row, rows, fixed) - fixed for row in table["us"]]
        us = float(np.interp(weights, [0, *sizes], [0.0, *columns]))
        if weights > sizes[-1]:
            us *= weights / sizes[-1]
        side = weights**0.5
        work = linear_work(int(rows), n=int(side), k=int(side), weight_bytes=self._weight_bytes,
                           arithmetic=self._arithmetic)  # fmt: skip
        return fixed + us * self._ratio(work, work, there)

    def absorbed(self, rows: float, heads: int) -> float:
        """The query's and the output's products with the latent's up-projections, bf16."""
        table, there = self._table("absorb")
        fixed = float(table["fixed_us"])
        model = self.model
        width = heads * (model.qk_nope_head_dim + model.v_head_dim) * model.kv_lora_rank
        us = _along(table["rows"], table["us"], rows, fixed) - fixed
        work = Work(2.0 * width, 2.0 * rows * width)
        return fixed + us * self._ratio(work, Work(4.0 * _V3_ABSORBED, 4.0 * rows * _V3_ABSORBED), there)

    def attention(self, seqs: float, kv_len: float, heads: int, *, fp8_cache: bool) -> float:
        """The core of one layer's absorbed attention: `seqs` tokens over `kv_len` cached rows each."""
        if seqs <= 0:
            return 0.0
        table, there = self._table("mla_decode_fp8" if fp8_cache else "mla_decode")
        fixed, model, kv_bytes = float(table["fixed_us"]), self.model, FP8_CACHE_BYTES if fp8_cache else 2.0
        equal = seqs * kv_len / 4096
        us = _along(table["seqs"], table["us"], max(equal, 0.1), fixed) - fixed
        work = mla_work(1, 4096, heads=heads, latent=model.kv_lora_rank, rope=model.qk_rope_head_dim,
                        kv_bytes=kv_bytes)  # fmt: skip
        measured = mla_work(1, 4096, heads=_V3_HEADS, latent=_V3_LATENT, rope=_V3_ROPE, kv_bytes=kv_bytes)
        return fixed + us * self._ratio(work, measured, there)

    def prompt_attention(self, prompt: float, heads: int) -> float:
        """The whole attention of one layer for one prompt: linear in its tokens for the products, quadratic beyond."""
        table, there = self._table("mla_prefill")
        (first, second), (least, most) = table["tokens"], table["us"]
        square = (most / second - least / first) / (second - first)
        each = least / first - square * first
        model, share = self.model, heads / _V3_HEADS
        work = Work(0.0, 2.0 * attention_weights(model, tp=model.num_heads // heads), self._arithmetic)
        measured = Work(0.0, 2.0 * 187_107_328, "fp8")
        rates = there.bf16_flops / self.machine.rates.bf16_flops
        widths = (model.qk_head_dim + model.v_head_dim) / (192 + 128)
        return float(prompt * each * self._ratio(work, measured, there) + prompt**2 * square * share * rates * widths)

    def shared(self, rows: float) -> float:
        """The shared experts of one layer."""
        model = self.model
        if not model.n_shared_experts or rows <= 0:
            return 0.0
        table, there = self._table("shared")
        fixed = float(table["fixed_us"])
        us = _along(table["rows"], table["us"], rows, fixed) - fixed
        width = model.n_shared_experts * model.moe_intermediate_size
        return fixed + us * self._ratio(self._experts(rows, 1, model.hidden_size, width), _v3_experts(rows, 1), there)

    def head(self, rows: float, *, tp: int) -> float:
        """The vocabulary's product, bf16; no table: its floor over `HEAD_RATE`."""
        numbers = self.model.vocab_size * self.model.hidden_size / tp
        return self.machine.rates.floor_us(Work(2 * numbers, 2 * rows * numbers)) / HEAD_RATE

    def _expert_ratio(self, slots: Floats, rows: Floats, there: Hardware) -> Floats:
        """This shape on this machine, over V3's in fp8 on the measured one."""
        model, here = self.model, self.machine.rates
        weights, v3 = 3.0 * model.hidden_size * model.moe_intermediate_size, 3.0 * _V3_HIDDEN * _V3_WIDTH
        flops = here.fp8_flops if self.fp8 else here.bf16_flops
        ours = np.maximum(slots * weights * self._weight_bytes / here.memory_bytes_per_s, 2 * rows * weights / flops)
        return ours / np.maximum(slots * v3 / there.memory_bytes_per_s, 2 * rows * v3 / there.fp8_flops)

    def _experts(self, rows: float, slots: int, hidden: int, width: int) -> Work:
        return expert_work(int(rows), slots, hidden=hidden, intermediate=width, weight_bytes=self._weight_bytes,
                           arithmetic=self._arithmetic)  # fmt: skip

    def _ratio(self, ours: Work, measured: Work, there: Hardware) -> float:
        return self.machine.rates.floor_us(ours) / there.floor_us(measured)


def _v3_experts(rows: float, slots: int) -> Work:
    return expert_work(int(rows), slots, hidden=_V3_HIDDEN, intermediate=_V3_WIDTH, weight_bytes=1.0, arithmetic="fp8")


def attention_weights(model: ModelConfig, *, tp: int) -> float:
    """Numbers in one layer's attention projections of a rank."""
    heads, rank = model.num_heads // tp, model.q_lora_rank
    down = model.hidden_size * (model.latent_dim + (rank or 0))
    query = (rank or model.hidden_size) * heads * model.qk_head_dim
    latent = heads * (model.qk_nope_head_dim + model.v_head_dim) * model.kv_lora_rank
    return down + query + latent + heads * model.v_head_dim * model.hidden_size


def bilinear(
    xs: Sequence[float], ys: Sequence[float], table: Sequence[Sequence[float]], x: Floats, y: Floats
) -> Floats:
    """`table[i][k]` at `xs[i], ys[k]`, interpolated in log2 of both axes; outside, the edge's value."""
    values, logs = np.asarray(table, dtype=np.float64), (np.log2(xs), np.log2(ys))
    at = [np.interp(np.log2(value), log, np.arange(len(log))) for value, log in zip((x, y), logs, strict=True)]
    low = [np.minimum(place.astype(int), len(log) - 2) for place, log in zip(at, logs, strict=True)]
    (i, k), (u, v) = low, (at[0] - low[0], at[1] - low[1])
    near = values[i, k] * (1 - u) + values[i + 1, k] * u
    far = values[i, k + 1] * (1 - u) + values[i + 1, k + 1] * u
    return np.asarray(near * (1 - v) + far * v)


def _along(xs: Sequence[float], us: Sequence[float], x: float, fixed: float) -> float:
    """Interpolated in log2 of the axis; below the table its first value, beyond it with the work."""
    if x > xs[-1]:
        return fixed + (us[-1] - fixed) * x / xs[-1]
    return float(np.interp(np.log2(x), np.log2(xs), us))
