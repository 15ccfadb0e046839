"""One step of a unit: the lockstep agrees on its shape, routes are replayed, every part is timed, the clock adds up.

Microseconds. A rank that is always the busiest stands for the ranks that wait for it (a layer waits for its busiest),
beside one with the mean load. Layers that are not replayed are taken to be like those that are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial
from typing import Final

import numpy as np

from moe_runtime.dispatch.overlap import Stage, Stages, interleave
from moe_runtime.dispatch.timeline import Costs, Summary, Timeline, Turn, simulate, summarize
from moe_runtime.engine.lockstep import AgreedStep, LockstepLimits, Wish, agree, cut_rows
from moe_tools.bench.floor import Hardware
from moe_tools.plan.costs import CostModel, LayerCosts
from moe_tools.plan.deployment import Deployment
from moe_tools.plan.hardware import Machine

MOST_HIDDEN: Final = 0.5
"""Of a layer's attention, that a negative gap takes away at most: assumed."""


@dataclass(frozen=True, slots=True)
class Constants:
    """What no table has, fitted to published runs (`published.py`; docs/planning.md lists them)."""

    gap_us: float
    """Decode, per layer and micro-batch: what no table has (norms, quantisation, gate, gaps) less what kernels hide of
    each other's starts when they run back to back; so it may be negative"""
    wire_stretch: float
    """Decode over a network: transfers of a running system over those of the unit tests"""
    prefill_stretch: float
    """Prefill: everything, over the tables; transfers take multiprocessors from products"""


@dataclass(frozen=True)
class Step:
    """What one step takes. Bytes and microseconds are per rank and step. Its parts are worked out when they are asked
    for: a search looks at many steps and shows few."""

    agreed: AgreedStep
    us: float
    imbalance: float
    """Rows of the busiest rank over the mean, mean over the layers"""
    network_bytes: float
    """Mean of the ranks"""
    find_terms: Callable[[], Mapping[str, float]] = field(repr=False, compare=False)
    find_summary: Callable[[], Summary] = field(repr=False, compare=False)
    find_bounds: Callable[[], Mapping[str, str]] = field(repr=False, compare=False)

    @cached_property
    def terms(self) -> Mapping[str, float]:
        """What the busiest rank computes, by parts."""
        return self.find_terms()

    @cached_property
    def summary(self) -> Summary:
        """The clock's, of the busiest rank and of a mean one."""
        return self.find_summary()

    @property
    def parts(self) -> Mapping[str, float]:
        """The terms, and the transfers during which the busiest rank computes nothing: they add up to the step."""
        return dict(self.terms) | {"transfers": self.summary.exposed_us[0]}

    @cached_property
    def bounds(self) -> Mapping[str, str]:
        """What each term waits for: bytes, arithmetic, a link, or the starts of its kernels."""
        return self.find_bounds()

    @property
    def bound(self) -> str:
        """The largest of what is exposed: one term's name."""
        return max(self.parts, key=self.parts.__getitem__)


@dataclass(frozen=True, slots=True)
class _Shape:
    """A step as agreed. `rows`, `layers`: per micro-batch; `costs[who][micro-batch]`: busiest rank, mean rank."""

    agreed: AgreedStep
    rows: list[int]
    costs: list[list[Costs]]
    layers: list[LayerCosts]


class StepTimer:
    """Times steps of one deployment; the shapes of equal steps are kept, whatever the constants."""

    def __init__(self, costs: CostModel, constants: Constants) -> None:
        self.costs, self.constants = costs, constants
        self._shapes: dict[tuple[int, bool, float, LockstepLimits], _Shape] = {}

    @property
    def deployment(self) -> Deployment:
        return self.costs.deployment

    def limits(self) -> LockstepLimits:
        """The runtime's own for this configuration."""
        return self.deployment.limits

    def decode(self, batch: int, kv_len: float, *, limits: LockstepLimits | None = None) -> Step:
        """A step in which every DP group decodes `batch` sequences of `kv_len` cached tokens."""
        return self._step(batch, decode=True, length=kv_len, limits=limits or self.limits())

    def prefill(self, tokens: int, prompt: int, *, limits: LockstepLimits | None = None) -> Step:
        """A step in which every DP group runs `tokens` tokens of prompts of `prompt` tokens."""
        return self._step(tokens, decode=False, length=prompt, limits=limits or self.limits())

    def decode_us(self, batch: int, kv_len: float, *, limits: LockstepLimits) -> float:
        """`decode(...).us` without its parts."""
        shape = self._shape(batch, decode=True, length=kv_len, limits=limits)
        return self._us(shape, decode=True)

    def prefill_us(self, tokens: int, prompt: int, *, limits: LockstepLimits) -> float:
        """`prefill(...).us` without its parts."""
        shape = self._shape(tokens, decode=False, length=prompt, limits=limits)
        return self._us(shape, decode=False)

    def _step(self, tokens: int, *, decode: bool, length: float, limits: LockstepLimits) -> Step:
        shape = self._shape(tokens, decode=decode, length=length, limits=limits)
        layers, count = len(self.deployment.model.moe_layers), shape.agreed.num_chunks
        moved = sum(layer.dispatch.mean_network_bytes + layer.combine.mean_network_bytes for layer in shape.layers)
        stretch = self._stretch(decode=decode)
        return Step(
            agreed=shape.agreed,
            us=self._us(shape, decode=decode),
            find_terms=lambda: {
                name: us * stretch for name, us in _terms(self._costs(shape, 0, decode=decode), layers, count).items()
            },
            find_summary=lambda: _stretched(summarize(self._timeline(shape, decode=decode)), stretch),
            imbalance=float(np.mean([layer.imbalance for layer in shape.layers])),
            network_bytes=moved * layers * count,
            find_bounds=partial(self._bounds, shape, decode=decode, length=length),
        )

    def _bounds(self, shape: _Shape, *, decode: bool, length: float) -> dict[str, str]:
        """What holds each term of the first micro-batch, which the others are like.

        "starts": what an infinitely fast machine would take is more than half of it.
        """
        found = self.costs.bounds(shape.rows[0], shape.layers[0], decode=decode, length=length)
        instant = CostModel(
            replace(self.deployment, machine=_instant(self.deployment.machine)), self.costs.routes, self.costs.replay,
            self.costs.kept,
        )  # fmt: skip
        (starts, _), layer = instant.micro_batch(shape.rows[0], shape.agreed, decode=decode, length=length)
        layers, chunks = len(self.deployment.model.moe_layers), shape.agreed.num_chunks
        fixed, whole = (_terms([own], layers, chunks) for own in (starts, shape.costs[0][0]))
        fixed["transfers"] = layer.dispatch.us + layer.combine.us
        whole["transfers"] = shape.layers[0].dispatch.us + shape.layers[0].combine.us
        return found | {name: "starts" for name, us in whole.items() if us and fixed[name] > us / 2}

    def _shape(self, tokens: int, *, decode: bool, length: float, limits: LockstepLimits) -> _Shape:
        """What the lockstep makes of equal wishes, and its costs before any constant; kept."""
        key = (tokens, decode, length, limits)
        if key in self._shapes:
            return self._shapes[key]
        layout = self.deployment.layout
        agreed = _agree(layout.dp, tokens, decode=decode, limits=limits)
        padded = max(agreed.padded_tokens)
        cut = cut_rows(padded, agreed.num_micro_batches, tp=layout.tp)
        rows = [max(1, round(part * tokens / padded)) for part in cut]
        parts = [self.costs.micro_batch(own, agreed, decode=decode, length=length) for own in rows]
        head = self.costs.curves.head(tokens if decode else tokens / length, tp=layout.tp)
        costs = [[part[0][who] for part in parts] for who in (0, 1)]
        for own in costs:
            own[-1] = replace(own[-1], last_us=head)
        self._shapes[key] = _Shape(agreed, rows, costs, [layer for _, layer in parts])
        return self._shapes[key]

    def _us(self, shape: _Shape, *, decode: bool) -> float:
        """The step's time: the busiest rank's, whom all others wait for."""
        costs, chunks = self._costs(shape, 0, decode=decode), shape.agreed.num_chunks
        return simulate([self._log(shape)], [costs], num_chunks=chunks).step_us * self._stretch(decode=decode)

    def _stretch(self, *, decode: bool) -> float:
        return 1.0 if decode else self.constants.prefill_stretch

    def _timeline(self, shape: _Shape, *, decode: bool) -> Timeline:
        """The clock's, of the busiest rank and of a mean one."""
        costs = [self._costs(shape, who, decode=decode) for who in (0, 1)]
        return simulate([self._log(shape)] * 2, costs, num_chunks=shape.agreed.num_chunks)

    def _log(self, shape: _Shape) -> list[Turn]:
        """The order in which the micro-batches' stages begin."""
        log: list[Turn] = []
        moe_layers = len(self.deployment.model.moe_layers)
        interleave(
            [_program(moe_layers, shape.agreed.num_chunks) for _ in shape.rows],
            lambda micro_batch, stage: log.append((micro_batch, stage)),
        )
        return log

    def _costs(self, shape: _Shape, who: int, *, decode: bool) -> list[Costs]:
        """Each micro-batch's, with the constants. `who`: 0 the busiest rank, 1 a mean one."""
        far = decode and self.deployment.layout.ep > self.deployment.machine.nvlink_ranks
        wire = self.constants.wire_stretch if far else 1.0
        gap = self.constants.gap_us if decode else 0.0
        model = self.deployment.model
        dense = model.num_layers - len(model.moe_layers)
        return [
            replace(
                own,
                first_us=own.first_us + dense * _least(gap, own.attention_us),
                attention_us=own.attention_us + _least(gap, own.attention_us),
                dispatch_us=own.dispatch_us * wire,
                combine_us=own.combine_us * wire,
            )
            for own in shape.costs[who]
        ]


def decode_shape(deployment: Deployment, batch: int) -> tuple[int, int, bool]:
    """Micro-batches, dispatches of each, and whether it is captured: what the lockstep makes of a decode step."""
    agreed = _agree(deployment.layout.dp, batch, decode=True, limits=deployment.limits)
    return agreed.num_micro_batches, agreed.num_chunks, agreed.graph


def _agree(groups: int, tokens: int, *, decode: bool, limits: LockstepLimits) -> AgreedStep:
    wish = Wish(num_tokens=tokens, num_decode_tokens=tokens if decode else 0, outstanding=tokens)
    return agree([wish] * groups, limits=limits)


def _instant(machine: Machine) -> Machine:
    """`machine` with endless rates: of each table only the fixed part is left."""
    rates = Hardware(machine.rates.name, *[math.inf] * (len(fields(Hardware)) - 1))
    return replace(machine, key=f"{machine.key}, instant", rates=rates, kernels={}, wire={})


def _least(gap_us: float, attention_us: float) -> float:
    """What is hidden is at most a share of a layer's attention: small models have little to hide."""
    return max(gap_us, -MOST_HIDDEN * attention_us)


def _terms(costs: Sequence[Costs], layers: int, chunks: int) -> dict[str, float]:
    """Microseconds of a step on the busiest rank."""
    return {
        "attention": sum(own.attention_us for own in costs) * layers,
        "experts": sum(own.experts_us for own in costs) * layers * chunks,
        "shared expert": sum(own.shared_us for own in costs) * layers,
        "dense layers": sum(own.first_us for own in costs),
        "head": sum(own.last_us for own in costs),
    }


def _stretched(summary: Summary, factor: float) -> Summary:
    return Summary(
        summary.step_us * factor, summary.serial_us * factor, tuple([us * factor for us in summary.busy_us]),
        summary.wire_us * factor, tuple([us * factor for us in summary.exposed_us]),
        tuple([us * factor for us in summary.waiting_us]),
    )  # fmt: skip


def _program(moe_layers: int, chunks: int) -> Stages[None]:
    """The stages of a model's layers, as `MoELayer.stages` begins them."""
    for _ in range(moe_layers * chunks):
        yield Stage.DISPATCH
        yield Stage.COMBINE
