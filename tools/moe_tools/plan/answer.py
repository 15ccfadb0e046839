"""What the planner finds: units at their best, how they serve together, and what could not serve, with the reason."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal, get_args

from moe_models.base import ModelConfig

from moe_tools.plan.deployment import Deployment, Layout, Memory, Rule
from moe_tools.plan.hardware import Machine
from moe_tools.plan.routes import Routes
from moe_tools.plan.settings import PlanConfig
from moe_tools.plan.timing import Constants, Step

Phase = Literal["decode", "prefill", "one unit"]
PHASES: Final[tuple[Phase, ...]] = get_args(Phase)
_MOST_UNITS: Final = 64
"""Of decode units in a whole ratio of units."""
_CLOSE: Final = 0.97
"""A whole ratio of units is near enough where it gives so much of what fractions would."""


@dataclass(frozen=True, slots=True)
class Decode:
    """A decode unit at the largest batch that was allowed."""

    deployment: Deployment
    batch: int
    step: Step

    @property
    def memory(self) -> Memory:
        """Of one rank."""
        return self.deployment.memory

    @property
    def tpot_ms(self) -> float:
        return self.step.us / 1e3

    @property
    def tokens_per_s(self) -> float:
        """New tokens per second and GPU."""
        layout = self.deployment.layout
        return self.batch * layout.dp / layout.ep / self.step.us * 1e6


@dataclass(frozen=True, slots=True)
class Prefill:
    """A prefill unit in steps of `tokens` tokens per DP group."""

    deployment: Deployment
    tokens: int
    steps: int
    """That one prompt takes"""
    step: Step

    @property
    def memory(self) -> Memory:
        """Of one rank."""
        return self.deployment.memory

    @property
    def ttft_ms(self) -> float:
        """Of a prompt that need not wait."""
        return self.steps * self.step.us / 1e3

    @property
    def tokens_per_s(self) -> float:
        """Prompt tokens per second and GPU."""
        layout = self.deployment.layout
        return self.tokens * layout.dp / layout.ep / self.step.us * 1e6


@dataclass(frozen=True, slots=True)
class Apart:
    """A decode unit, and as many prefill units as keep up with it."""

    decode: Decode
    prefill: Prefill
    prefill_units: float
    """Per decode unit"""

    @property
    def ttft_ms(self) -> float:
        return self.prefill.ttft_ms

    @property
    def tpot_ms(self) -> float:
        return self.decode.tpot_ms

    @property
    def tokens_per_s(self) -> float:
        """New tokens per second and GPU, all GPUs counted."""
        return self._rate(self.prefill_units)

    def whole_units(self) -> tuple[int, int, float]:
        """(prefill units, decode units, new tokens per second and GPU): few whole units that come near the best."""
        best = (1, 1, 0.0)
        for decodes in range(1, _MOST_UNITS + 1):
            prefills = max(1, math.ceil(self.prefill_units * decodes - 1e-6))
            rate = self._rate(prefills / decodes)
            if rate > best[2]:
                best = (prefills, decodes, rate)
            if rate >= _CLOSE * self.tokens_per_s:
                break
        return best

    def _rate(self, prefill_units: float) -> float:
        decodes, prefills = self.decode.deployment.layout.ep, self.prefill.deployment.layout.ep
        return self.decode.tokens_per_s * decodes / (decodes + prefill_units * prefills)


@dataclass(frozen=True, slots=True)
class Together:
    """One unit for both: every request that ends is replaced. `prefill`: one step's prompt tokens, timed alone."""

    decode: Decode
    prefill: Prefill
    share: float
    """Steps that carry `prefill.tokens` prompt tokens, of all steps"""

    @property
    def tpot_ms(self) -> float:
        """Mean over steps with and without prompts."""
        return (self.decode.step.us + self.share * self.prefill.step.us) / 1e3

    @property
    def mixed_ms(self) -> float:
        """A step that carries prompt tokens too: both parts added up."""
        return (self.decode.step.us + self.prefill.step.us) / 1e3

    @property
    def memory(self) -> Memory:
        """Of one rank."""
        return self.decode.memory

    @property
    def network_bytes(self) -> float:
        """Mean of the ranks and of the steps, with and without prompts."""
        return self.decode.step.network_bytes + self.share * self.prefill.step.network_bytes

    @property
    def parts_us(self) -> Mapping[str, float]:
        """What the mean step is made of, on the busiest rank: a step's own, and its share of a step's prompts."""
        prompts = self.prefill.step.parts
        return {name: us + self.share * prompts[name] for name, us in self.decode.step.parts.items()}

    @property
    def bounds(self) -> Mapping[str, str]:
        """What each part waits for; two words where prompts wait for something else."""
        own, prompts = self.decode.step.bounds, self.prefill.step.bounds
        return {
            name: word if word == prompts.get(name, word) else f"{word}, prompts: {prompts[name]}"
            for name, word in own.items()
        }

    @property
    def bound(self) -> str:
        """The largest part's name."""
        return max(self.parts_us, key=self.parts_us.__getitem__)

    @property
    def ttft_ms(self) -> float:
        """Of a prompt that need not wait, beside a full batch that decodes."""
        return self.prefill.steps * self.mixed_ms

    @property
    def tokens_per_s(self) -> float:
        """New tokens per second and GPU."""
        layout = self.decode.deployment.layout
        return self.decode.batch * layout.dp / layout.ep / self.tpot_ms * 1e3


@dataclass(frozen=True, slots=True)
class Refused:
    """A layout that cannot serve, why, and the least that `rule` would have to allow (ms, bytes), where that helps."""

    layout: Layout
    phase: Phase
    reason: str
    rule: Rule
    least: float | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """All that was found, best first. `nearest_ep`: where nothing fits for want of memory, ranks that would do."""

    plan: PlanConfig
    model: ModelConfig
    machine: Machine
    routes: Routes
    constants: Constants
    decodes: tuple[Decode, ...]
    prefills: tuple[Prefill, ...]
    apart: tuple[Apart, ...]
    together: tuple[Together, ...]
    refused: tuple[Refused, ...]
    nearest_ep: int | None = None
