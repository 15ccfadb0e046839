"""Every layout of a question, evaluated: what a decode unit, a prefill unit, and one that does both would give."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from moe_models.base import ModelConfig

from moe_runtime.balance.planner import plan_placement
from moe_runtime.config import RuntimeConfig
from moe_runtime.errors import ConfigError
from moe_runtime.launch.placing import num_dispatched_shared
from moe_runtime.parallel.placement import ExpertPlacement, expected_load
from moe_tools.plan.costs import CostModel, Kept
from moe_tools.plan.hardware import Machine, load_machine
from moe_tools.plan.layouts import Deployment, Layout, Memory, base_config, deploy, layouts
from moe_tools.plan.published import FITTED
from moe_tools.plan.replay import Replay
from moe_tools.plan.routes import Routes, drawn, recorded
from moe_tools.plan.settings import PlanConfig
from moe_tools.plan.timing import Constants, Step, StepTimer

BATCHES: Final = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
"""Sequences of a DP group that are tried."""
TOGETHER_TOKENS: Final = 2048
"""Most tokens of a step where one unit does both: longer ones would be felt by everyone who decodes."""


@dataclass(frozen=True, slots=True)
class Decode:
    """A decode unit at the largest batch that was allowed."""

    deployment: Deployment
    batch: int
    step: Step
    memory: Memory

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
    memory: Memory

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
class Whole:
    """How requests are served from prompt to end. `prefill_share`: of all GPUs; apart only."""

    decode: Decode
    prefill: Prefill
    apart: bool
    tpot_ms: float
    tokens_per_s: float
    """New tokens per second and GPU, all GPUs counted"""
    prefill_share: float


@dataclass(frozen=True, slots=True)
class Refused:
    """A layout that cannot serve, and why."""

    layout: Layout
    phase: str
    reason: str


@dataclass(frozen=True, slots=True)
class Answer:
    """All that was found; `apart` and `together` best first."""

    plan: PlanConfig
    model: ModelConfig
    machine: Machine
    routes: Routes
    constants: Constants
    decodes: tuple[Decode, ...]
    prefills: tuple[Prefill, ...]
    apart: tuple[Whole, ...]
    together: tuple[Whole, ...]
    refused: tuple[Refused, ...]


class Evaluator:
    """Replays are kept per mesh and redundancy: backends share them."""

    def __init__(self, plan: PlanConfig, *, constants: Constants = FITTED) -> None:
        self.plan, self.constants = plan, constants
        self.machine = load_machine(plan.hardware)
        self.base, self.model = base_config(plan, self.machine)
        self.routes = _routes(plan, self.base, self.model)
        self._replays: dict[tuple[int, int], Replay] = {}
        self._kept: dict[tuple[int, int], Kept] = {}

    def replay(self, ep: int, redundant: int) -> Replay:
        """The placement of the question's policy. ConfigError where there is none of that size."""
        key = (ep, redundant)
        if key not in self._replays:
            nodes = self.machine.nvlink_ranks
            self._replays[key] = Replay.of(
                self._placement(ep, redundant), choice=self.plan.replica_choice, ranks_per_node=nodes
            )
        return self._replays[key]

    def _placement(self, ep: int, redundant: int) -> ExpertPlacement:
        if self.plan.policy != "uniform":
            return plan_placement(
                self.routes.loads, ep=ep, ranks_per_node=self.machine.nvlink_ranks, num_redundant=redundant,
                policy=self.plan.policy,
            )  # fmt: skip
        shared = num_dispatched_shared(self.base, self.model)
        experts, top_k = self.model.n_routed_experts, self.model.num_experts_per_tok
        return ExpertPlacement.uniform(
            len(self.routes.layers), self.routes.num_logical, ep=ep, num_redundant=redundant,
            expected_load=expected_load(experts, shared, top_k=top_k),
        )  # fmt: skip

    def decode(self, layout: Layout, *, beside: Prefill | None = None) -> Decode | str:
        """The largest batch that fits and meets tpot_ms, or why none does. `beside`: the unit also prefills."""
        plan = self.plan
        batches = sorted(plan.batch or BATCHES)
        tokens = min(plan.prefill_tokens, TOGETHER_TOKENS) if beside is not None else 1
        made = {batch: self._deploy(layout, batch, max(batch, tokens)) for batch in batches}
        count = bisect_left(batches, True, key=lambda batch: made[batch].obstacle() is not None)
        if not count:
            return f"{batches[0]} sequence(s): {made[batches[0]].obstacle()}"
        tried: dict[int, Decode] = {}

        def too_slow(batch: int) -> bool:
            tried[batch] = self._decoded(made[batch], batch)
            us = tried[batch].step.us + (0.0 if beside is None else prompt_us(plan, batch, beside))
            return plan.tpot_ms is not None and us / 1e3 > plan.tpot_ms

        if not too_slow(batches[count - 1]):
            return tried[batches[count - 1]]
        count = bisect_left(batches[: count - 1], True, key=too_slow)
        if not count:
            slow = tried.get(batches[0]) or self._decoded(made[batches[0]], batches[0])
            return f"tpot_ms={plan.tpot_ms:g}: {batches[0]} sequence(s) take {slow.tpot_ms:.1f} ms"
        return tried.get(batches[count - 1]) or self._decoded(made[batches[count - 1]], batches[count - 1])

    def _decoded(self, made: Deployment, batch: int) -> Decode:
        kv_len = self.plan.prompt_tokens + self.plan.output_tokens / 2
        return Decode(made, batch, self._timer(made).decode(batch, kv_len), made.memory())

    def _timer(self, made: Deployment) -> StepTimer:
        layout = made.layout
        replay = self.replay(layout.ep, layout.redundant)
        kept = self._kept.setdefault((layout.ep, layout.redundant), {})
        return StepTimer(CostModel(made, self.routes, replay, kept), self.constants)

    def prefill(self, layout: Layout) -> Prefill | str:
        """Steps of up to prefill_tokens tokens, halved until they meet ttft_ms, or why none does."""
        plan = self.plan
        tokens, reason = plan.prefill_tokens, "nothing was tried"
        while tokens >= min(plan.prompt_tokens, 512, plan.prefill_tokens):
            made = self._deploy(layout, max(1, -(-tokens // plan.prompt_tokens)), tokens)
            problem = made.obstacle()
            if problem is None:
                step = self._timer(made).prefill(tokens, plan.prompt_tokens)
                found = Prefill(made, tokens, -(-plan.prompt_tokens // tokens), step, made.memory())
                if plan.ttft_ms is None or found.ttft_ms <= plan.ttft_ms:
                    return found
                problem = f"ttft_ms={plan.ttft_ms:g}: {tokens} tokens a step take {found.ttft_ms:.0f} ms"
            reason, tokens = problem, tokens // 2
        return reason

    def _deploy(self, layout: Layout, batch: int, tokens: int) -> Deployment:
        return deploy(layout, self.plan, self.base, self.model, self.machine, batch=batch, batched_tokens=tokens)


def evaluate(plan: PlanConfig, *, on_layout: Callable[[Layout], None] = lambda _: None) -> Answer:
    """All layouts of the question. ConfigError and TraceError for a question that has none."""
    evaluator = Evaluator(plan)
    decodes: list[Decode] = []
    prefills: list[Prefill] = []
    refused: list[Refused] = []
    for layout, problem in dict(layouts(plan, evaluator.model)).items():
        on_layout(layout)
        for phase, one in (("decode", evaluator.decode), ("prefill", evaluator.prefill)):
            try:
                found = one(layout) if problem is None else problem
            except ConfigError as error:
                found = str(error)
            match found:
                case Decode():
                    decodes.append(found)
                case Prefill():
                    prefills.append(found)
                case str():
                    refused.append(Refused(layout, phase, found))
    decodes.sort(key=lambda one: -one.tokens_per_s)
    prefills.sort(key=lambda one: -one.tokens_per_s)
    apart = sorted(_apart(plan, decodes, prefills), key=lambda whole: -whole.tokens_per_s)
    together = sorted(_together(evaluator, prefills), key=lambda whole: -whole.tokens_per_s)
    return Answer(
        plan, evaluator.model, evaluator.machine, evaluator.routes, evaluator.constants, tuple(decodes),
        tuple(prefills), tuple(apart), tuple(together), tuple(refused),
    )  # fmt: skip


def _apart(plan: PlanConfig, decodes: Sequence[Decode], prefills: Sequence[Prefill]) -> Iterator[Whole]:
    """Each decode unit with as many GPUs of the best prefill unit as keep up with it."""
    if not prefills:
        return
    best = prefills[0]
    for decode in decodes:
        needed = decode.tokens_per_s / plan.output_tokens * plan.prompt_tokens / best.tokens_per_s
        share = needed / (1 + needed)
        yield Whole(decode, best, True, decode.tpot_ms, decode.tokens_per_s * (1 - share), share)


def _together(evaluator: Evaluator, prefills: Sequence[Prefill]) -> Iterator[Whole]:
    """One unit for both: while a batch decodes one token, prompts take the time of the requests that replace it."""
    for prefill in prefills:
        layout = prefill.deployment.layout
        decode = evaluator.decode(layout, beside=prefill)
        if isinstance(decode, Decode):
            us = decode.step.us + prompt_us(evaluator.plan, decode.batch, prefill)
            rate = decode.batch * layout.dp / layout.ep / us * 1e6
            yield Whole(decode, prefill, False, us / 1e3, rate, 0.0)


def prompt_us(plan: PlanConfig, batch: int, prefill: Prefill) -> float:
    """What prompts take of each decode step where `batch` requests of a group are always under way."""
    return batch * plan.prompt_tokens / plan.output_tokens / prefill.tokens * prefill.step.us


def _routes(plan: PlanConfig, base: RuntimeConfig, model: ModelConfig) -> Routes:
    shared = num_dispatched_shared(base, model)
    if plan.trace is not None:
        return recorded(plan.trace, model, num_layers=plan.layers, num_shared=shared)
    layers = min(plan.layers, len(model.moe_layers))
    return drawn(model, skew=plan.skew, num_layers=layers, seed=plan.seed, num_shared=shared)
