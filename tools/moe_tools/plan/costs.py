"""What the parts of one micro-batch take: replayed routes, kernel curves, the wire; before any fitted constant."""

from __future__ import annotations

from dataclasses import astuple, dataclass, field, replace
from typing import Final

import numpy as np

from moe_runtime.dispatch.timeline import Costs
from moe_runtime.engine.lockstep import AgreedStep
from moe_tools.plan.curves import Curves, attention_weights
from moe_tools.plan.deployment import Deployment
from moe_tools.plan.hardware import MEASURED, Machine, load_machine
from moe_tools.plan.replay import Counts, Replay
from moe_tools.plan.routes import Routes
from moe_tools.plan.wire import Transfer, Wire, slower_link

MOST_TOKENS: Final = 65536
"""Tokens of all ranks that are counted one by one; of larger steps this many, and the counts are scaled."""

TP_START_US: Final = 8.0
"""Of an all-gather or a reduce-scatter over NVLink: assumed, no table has it."""
TP_RATE: Final = 0.8
"""Of NVLink's rate, that these two reach: assumed."""


@dataclass(frozen=True, slots=True)
class LayerCosts:
    """Means over the replayed layers, of one micro-batch."""

    busiest_us: float
    mean_us: float
    dispatch: Transfer
    combine: Transfer
    imbalance: float
    most_rows: float
    """Of the rank with the most"""
    most_active: float
    """Slots with any row, of the rank with the most"""


@dataclass(frozen=True, slots=True)
class Kept:
    """What cost models of one replay and one question share."""

    measured: Machine = field(default_factory=lambda: load_machine(MEASURED))
    """Whose tables stand for what a machine lacks"""
    counts: dict[tuple[int, bool], tuple[list[Counts], float]] = field(default_factory=dict)
    """(tokens of a rank, in order) → every replayed layer's counts, and real tokens per counted one"""
    layers: dict[tuple[str, str, int, int, bool], LayerCosts] = field(default_factory=dict)
    """(backend, machine, tokens of a rank, room for, decode) → what they cost"""


class CostModel:
    """Costs of one deployment's micro-batches. `kept`: shared by models of one replay."""

    def __init__(self, deployment: Deployment, routes: Routes, replay: Replay, kept: Kept | None = None) -> None:
        self.deployment, self.routes, self.replay = deployment, routes, replay
        model = deployment.model
        self.kept = Kept() if kept is None else kept
        self.curves = Curves(deployment.machine, self.kept.measured, model, deployment.fp8)
        self.wire = Wire(deployment.machine, self.kept.measured, deployment.spec, deployment.layout.dispatch)

    def micro_batch(
        self, rows: int, agreed: AgreedStep, *, decode: bool, length: float
    ) -> tuple[tuple[Costs, Costs], LayerCosts]:
        """One micro-batch of `rows` rows of a group, on the busiest rank and on a mean one."""
        layout, model = self.deployment.layout, self.deployment.model
        local = rows / layout.tp
        chunk = max(1, round(min(agreed.chunk_tokens, local)))
        layer = self._layer(chunk, agreed, decode=decode)
        attention = self._attention(rows, decode=decode, length=length)
        dense = model.num_layers - len(model.moe_layers)
        wide = 2 * self.curves.linear(local, model.intermediate_size * model.hidden_size) + self.curves.linear(
            local, model.intermediate_size * model.hidden_size
        )
        shared = self.curves.shared(local) if self.deployment.config.shared_experts == "replicated" else 0.0
        busiest = Costs(
            first_us=dense * (attention + wide),
            attention_us=attention,
            shared_us=shared,
            experts_us=layer.busiest_us,
            dispatch_us=layer.dispatch.us,
            combine_us=layer.combine.us,
        )
        return (busiest, replace(busiest, experts_us=layer.mean_us)), layer

    def _attention(self, rows: float, *, decode: bool, length: float) -> float:
        """One layer's attention of a group's `rows` rows on a tp rank, its collectives included."""
        layout, model, curves = self.deployment.layout, self.deployment.model, self.curves
        heads, hidden, rank = model.num_heads // layout.tp, model.hidden_size, model.q_lora_rank
        if decode:
            us = curves.linear(rows, hidden * (model.latent_dim + (rank or 0)))
            us += curves.linear(rows, (rank or hidden) * heads * model.qk_head_dim)
            us += curves.absorbed(rows, heads)
            fp8 = self.deployment.config.engine.kv_cache_dtype == "fp8"
            us += curves.attention(rows, length, heads, fp8_cache=fp8)
            us += curves.linear(rows, heads * model.v_head_dim * hidden)
        else:
            us = rows / length * curves.prompt_attention(length, heads)
        return us + self._tensor_parallel(rows)

    def _tensor_parallel(self, rows: float) -> float:
        """An all-gather and a reduce-scatter of the group's rows over NVLink."""
        layout, machine = self.deployment.layout, self.deployment.machine
        if layout.tp == 1:
            return 0.0
        num_bytes = rows * self.deployment.model.hidden_size * 2 * (1 - 1 / layout.tp)
        return 2 * (TP_START_US + 1e6 * num_bytes / (TP_RATE * machine.rates.nvlink_bytes_per_s))

    def _layer(self, chunk: int, agreed: AgreedStep, *, decode: bool) -> LayerCosts:
        machine, dispatch, capacity = self.deployment.machine, self.deployment.layout.dispatch, agreed.chunk_tokens
        key = (dispatch, machine.key, chunk, capacity, decode)
        if key not in self.kept.layers:
            self.kept.layers[key] = self._counted(chunk, max(1, capacity), decode=decode)
        return self.kept.layers[key]

    def _counted(self, chunk: int, capacity: int, *, decode: bool) -> LayerCosts:
        counts, scale = self._replayed(chunk, in_order=not decode)
        busiest, mean, ways, imbalance = [], [], [], []
        ep = self.deployment.layout.ep
        for own in counts:
            rows, active = own.rows.double().numpy() * scale, own.active.double().numpy()
            curves = self.curves
            us = curves.experts_padded(active, rows) if decode else curves.experts_grouped(rows, active, ep=ep)
            busiest.append(float(us.max()))
            mean.append(float(us.mean()))
            imbalance.append(own.imbalance)
            ways.append(tuple([
                self.wire.transfer(own, way, decode=decode, capacity=capacity, scale=scale)
                for way in ("dispatch", "combine")
            ]))  # fmt: skip
        most = [
            float(np.mean([float(value.max()) for value in values]))
            for values in ([own.rows * scale for own in counts], [own.active for own in counts])
        ]
        there, back = (_mean([pair[way] for pair in ways]) for way in (0, 1))
        return LayerCosts(float(np.mean(busiest)), float(np.mean(mean)), there, back, float(np.mean(imbalance)), *most)

    def _replayed(self, chunk: int, *, in_order: bool) -> tuple[list[Counts], float]:
        key = (chunk, in_order)
        if key not in self.kept.counts:
            ep = self.deployment.layout.ep
            counted = min(chunk, max(1, MOST_TOKENS // ep))
            self.kept.counts[key] = (
                [
                    self.replay.count_even(layer, self.routes.step(layer, counted * ep, in_order=in_order, seed=layer))
                    for layer in range(self.replay.placement.num_layers)
                ],
                chunk / counted,
            )
        return self.kept.counts[key]

    def bounds(self, rows: int, layer: LayerCosts, *, decode: bool, length: float) -> dict[str, str]:
        """Whether bytes or arithmetic hold each term, by the floors of its main work; transfers: which link. Of one
        micro-batch of `rows` rows."""
        layout, model, rates = self.deployment.layout, self.deployment.model, self.deployment.machine.rates
        size, flops = (1.0, rates.fp8_flops) if self.deployment.fp8 else (2.0, rates.bf16_flops)
        weights = 3.0 * model.hidden_size * model.moe_intermediate_size
        projections = attention_weights(model, tp=layout.tp)
        heads, wide = model.num_heads // layout.tp, model.latent_dim + model.kv_lora_rank
        cached = 2.0 * rows * length * model.latent_dim if decode else 0.0
        pairs = 2.0 * heads * wide * rows * length * (flops / rates.bf16_flops) if decode else 0.0
        local = rows / layout.tp

        def held(num_bytes: float, operations: float) -> str:
            return "bytes" if num_bytes / rates.memory_bytes_per_s > operations / flops else "arithmetic"

        return {
            "attention": held(projections * size + cached, 2.0 * rows * projections + pairs),
            "experts": held(layer.most_active * weights * size, 2.0 * layer.most_rows * weights),
            "shared expert": held(weights * size, 2.0 * local * weights),
            "dense layers": held(size, 2.0 * local),
            "head": held(2.0, 2.0 * (rows if decode else rows / length) * flops / rates.bf16_flops),
            "transfers": slower_link((layer.dispatch, layer.combine)),
        }


def _mean(transfers: list[Transfer]) -> Transfer:
    return Transfer(*[float(np.mean(column)) for column in zip(*map(astuple, transfers), strict=True)])
