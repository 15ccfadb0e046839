"""Every layout of a question, evaluated: what a decode unit, a prefill unit, and one that does both would give."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final, TypeVar

from moe_models.base import ModelConfig

from moe_runtime.config import RuntimeConfig
from moe_runtime.engine.lockstep import LockstepLimits
from moe_runtime.errors import ConfigError
from moe_runtime.launch.placing import num_dispatched_shared
from moe_runtime.parallel.placement import ExpertPlacement, expected_load
from moe_tools.plan.answer import PHASES, Answer, Apart, Decode, Phase, Prefill, Refused, Together
from moe_tools.plan.costs import CostModel, Kept
from moe_tools.plan.deployment import Deployment, Layout, Obstacle, base_config, deploy, layouts
from moe_tools.plan.hardware import MEASURED, load_machine
from moe_tools.plan.placed import planned
from moe_tools.plan.published import FITTED
from moe_tools.plan.replay import Replay
from moe_tools.plan.routes import Routes, drawn, recorded
from moe_tools.plan.settings import PlanConfig
from moe_tools.plan.timing import Constants, Step, StepTimer, decode_shape

BATCHES: Final = (1, 2, 4, *range(8, 128, 8), *range(128, 256, 16), *range(256, 512, 32), *range(512, 1025, 64))
"""Sequences of a DP group that are tried."""
TOGETHER_TOKENS: Final = 2048
"""Most prompt tokens of a step where one unit does both: longer steps would be felt by everyone who decodes."""
_MOST_RANKS: Final = 1024
"""Of the units that are looked at for one that has enough memory."""

_Found = TypeVar("_Found", Decode, Together)
_Unit = TypeVar("_Unit", Decode, Prefill, Together)


class Evaluator:
    """Replays are kept per mesh and redundancy: backends share them."""

    def __init__(self, plan: PlanConfig, *, constants: Constants = FITTED) -> None:
        self.plan, self.constants = plan, constants
        self.machine = load_machine(plan.hardware)
        self.base, self.model = base_config(plan, self.machine)
        self.routes = _routes(plan, self.base, self.model)
        self._replays: dict[tuple[int, int], Replay] = {}
        self._measured = load_machine(MEASURED)
        self._kept: dict[tuple[int, int], Kept] = {}
        self._prompts: dict[tuple[Layout, LockstepLimits, int], Step] = {}

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
            return planned(self.plan, self.routes.loads, self.model, self.machine, ep=ep, redundant=redundant)
        shared = num_dispatched_shared(self.base, self.model)
        experts, top_k = self.model.n_routed_experts, self.model.num_experts_per_tok
        return ExpertPlacement.uniform(
            len(self.routes.layers), self.routes.num_logical, ep=ep, num_redundant=redundant,
            expected_load=expected_load(experts, shared, top_k=top_k),
        )  # fmt: skip

    def decode(self, layout: Layout) -> Decode | Refused:
        """The largest batch that fits and meets tpot_ms, or why none does."""
        made = {batch: self._deploy(layout, batch, batch) for batch in self._batches()}

        def judge(batch: int) -> Decode | Refused:
            found = self._decoded(made[batch], batch)
            if (most := self.plan.tpot_ms) is None or found.tpot_ms <= most:
                return found
            took = f"{_sequences(batch)} a DP group take {found.tpot_ms:.4g} ms"
            return Refused(layout, "decode", f"tpot_ms={most:g}: {took}", "tpot_ms", found.tpot_ms)

        return largest(layout, "decode", made, judge)

    def together(self, layout: Layout) -> Together | Refused:
        """The largest batch with which one unit decodes and prefills. Its steps have room for the batch and
        `prefill_tokens` prompt tokens beside it."""
        tokens = min(self.plan.prefill_tokens, TOGETHER_TOKENS)
        made = {batch: self._deploy(layout, batch, batch + tokens) for batch in self._batches()}
        return largest(layout, "one unit", made, lambda batch: self._judged(made[batch], batch, tokens))

    def _judged(self, made: Deployment, batch: int, tokens: int) -> Together | Refused:
        plan, layout = self.plan, made.layout
        prefill = self._prefilled(made, tokens)
        found = Together(
            self._decoded(made, batch), prefill, batch * plan.prompt_tokens / plan.output_tokens / tokens
        )  # fmt: skip
        if found.share > 1:
            reason = (
                f"{_sequences(batch)} need {found.share * tokens:.0f} prompt tokens a step to be replaced; a step has "
                f"room for {tokens}"
            )
            return Refused(layout, "one unit", reason, "prompts", found.share * tokens)
        if plan.tpot_ms is not None and found.tpot_ms > plan.tpot_ms:
            parts = f"{found.decode.tpot_ms:.4g} ms and {found.tpot_ms - found.decode.tpot_ms:.4g} ms of prompts"
            reason = f"tpot_ms={plan.tpot_ms:g}: {_sequences(batch)} a DP group take {parts} a step"
            return Refused(layout, "one unit", reason, "tpot_ms", found.tpot_ms)
        if plan.ttft_ms is not None and found.ttft_ms > plan.ttft_ms:
            reason = f"ttft_ms={plan.ttft_ms:g}: beside {_sequences(batch)} a prompt takes {found.ttft_ms:.4g} ms"
            return Refused(layout, "one unit", reason, "ttft_ms", found.ttft_ms)
        return found

    def _batches(self) -> Sequence[int]:
        return sorted(self.plan.batch or BATCHES)

    def _decoded(self, made: Deployment, batch: int) -> Decode:
        kv_len = self.plan.prompt_tokens + self.plan.output_tokens / 2
        return Decode(made, batch, self._timer(made).decode(batch, kv_len))

    def _prefilled(self, made: Deployment, tokens: int) -> Prefill:
        prompt, timer = self.plan.prompt_tokens, self._timer(made)
        key = (made.layout, timer.limits(), tokens)
        if key not in self._prompts:
            self._prompts[key] = timer.prefill(tokens, prompt)
        return Prefill(made, tokens, -(-prompt // tokens), self._prompts[key])

    def _timer(self, made: Deployment) -> StepTimer:
        layout = made.layout
        replay = self.replay(layout.ep, layout.redundant)
        kept = self._kept.setdefault((layout.ep, layout.redundant), Kept(self._measured))
        return StepTimer(CostModel(made, self.routes, replay, kept), self.constants)

    def prefill(self, layout: Layout) -> Prefill | Refused:
        """Steps of up to prefill_tokens tokens, halved until they meet ttft_ms, or the nearest miss."""
        plan = self.plan
        tokens, missed = plan.prefill_tokens, list[Refused]()
        while tokens >= min(plan.prompt_tokens, 512, plan.prefill_tokens):
            made = self._deploy(layout, max(1, -(-tokens // plan.prompt_tokens)), tokens)
            problem = made.obstacle()
            if problem is None:
                found = self._prefilled(made, tokens)
                if plan.ttft_ms is None or found.ttft_ms <= plan.ttft_ms:
                    return found
                reason = f"ttft_ms={plan.ttft_ms:g}: {tokens} tokens a step take {found.ttft_ms:.4g} ms"
                problem = Obstacle("ttft_ms", reason, found.ttft_ms)
            missed.append(_refused(layout, "prefill", problem))
            tokens //= 2
        timed = [one for one in missed if one.rule == "ttft_ms"]
        return min(timed, key=lambda one: one.least or 0.0) if timed else missed[-1]

    def nearest_ep(self, layout: Layout) -> int | None:
        """Twice, four times, … the ranks, until one sequence fits."""
        ep = layout.ep * 2
        while ep <= _MOST_RANKS:
            wider = Layout(ep, layout.tp, layout.redundant, layout.dispatch)
            if self._deploy(wider, self._batches()[0], self._batches()[0]).obstacle() is None:
                return ep
            ep *= 2
        return None

    def _deploy(self, layout: Layout, batch: int, tokens: int) -> Deployment:
        return deploy(layout, self.plan, self.base, self.model, self.machine, batch=batch, batched_tokens=tokens)


def largest(
    layout: Layout, phase: Phase, made: Mapping[int, Deployment], judge: Callable[[int], _Found | Refused]
) -> _Found | Refused:
    """The largest batch that fits in memory and that `judge` lets pass, or why the smallest does not."""
    batches = sorted(made)
    count = bisect_left(batches, True, key=lambda batch: made[batch].obstacle() is not None)
    if not count:
        problem = made[batches[0]].obstacle()
        assert problem is not None, "the smallest batch has an obstacle"
        least = Obstacle(problem.rule, f"{_sequences(batches[0])} a DP group: {problem.reason}", problem.least)
        return _refused(layout, phase, least)
    tried: dict[int, _Found | Refused] = {}

    def fails(batch: int) -> bool:
        tried[batch] = judge(batch)
        return isinstance(tried[batch], Refused)

    # A step of another shape may be shorter than one of fewer sequences; within a shape more take longer.
    for own in reversed(list(_same_shape(batches[:count], lambda batch: decode_shape(made[batch], batch)))):
        if fails(own[0]):
            continue
        best = own[-1] if len(own) == 1 or not fails(own[-1]) else own[bisect_left(own, True, key=fails) - 1]
        return tried[best] if best in tried else judge(best)
    return tried[batches[0]]


def _same_shape(batches: Sequence[int], shape: Callable[[int], object]) -> Iterator[Sequence[int]]:
    """`batches` in runs of one shape. Micro-batches, dispatches and steps without a graph only become more with the
    batch, so what lies between two of one shape has it too."""
    first = 0
    while first < len(batches):
        own = shape(batches[first])
        end = bisect_left(batches, True, lo=first + 1, key=lambda batch: shape(batch) != own)
        yield batches[first:end]
        first = end


def _refused(layout: Layout, phase: Phase, problem: Obstacle) -> Refused:
    return Refused(layout, phase, problem.reason, problem.rule, problem.least)


def _sequences(batch: int) -> str:
    return f"{batch} sequence{'s' if batch > 1 else ''}"


def evaluate(evaluator: Evaluator, *, on_layout: Callable[[str], None] = lambda _: None) -> Answer:
    """All layouts of the question; `on_layout` hears of each as its turn comes.

    ConfigError and TraceError for a question that has no answer.
    """
    plan = evaluator.plan
    decodes: list[Decode] = []
    prefills: list[Prefill] = []
    together: list[Together] = []
    refused: list[Refused] = []
    asked = dict(layouts(plan, evaluator.model, num_logical=evaluator.routes.num_logical))
    for number, (layout, problem) in enumerate(asked.items(), 1):
        on_layout(f"{number} of {len(asked)}, {layout}")
        for found in _units(evaluator, layout, problem):
            match found:
                case Decode():
                    decodes.append(found)
                case Prefill():
                    prefills.append(found)
                case Together():
                    together.append(found)
                case Refused():
                    refused.append(found)
    decodes.sort(key=lambda one: -one.tokens_per_s)
    prefills.sort(key=lambda one: -one.tokens_per_s)
    together.sort(key=lambda one: -one.tokens_per_s)
    apart = sorted(_apart(plan, decodes, prefills), key=lambda one: -one.tokens_per_s)
    full = [one.layout for one in refused if one.rule == "memory" and one.phase == "decode"]
    return Answer(
        plan, evaluator.model, evaluator.machine, evaluator.routes, evaluator.constants, tuple(decodes),
        tuple(prefills), tuple(apart), tuple(together), tuple(refused),
        evaluator.nearest_ep(max(full, key=lambda one: one.ep)) if full and not decodes else None,
    )  # fmt: skip


def _units(
    evaluator: Evaluator, layout: Layout, problem: Obstacle | None
) -> Iterator[Decode | Prefill | Together | Refused]:
    if problem is not None:
        yield from [_refused(layout, phase, problem) for phase in PHASES]
        return
    decode = _tried(evaluator.decode, layout, "decode")
    yield decode
    yield _tried(evaluator.prefill, layout, "prefill")
    if isinstance(decode, Refused):  # what cannot decode cannot do both
        yield replace(decode, phase="one unit")
    else:
        yield _tried(evaluator.together, layout, "one unit")


def _tried(one: Callable[[Layout], _Unit | Refused], layout: Layout, phase: Phase) -> _Unit | Refused:
    try:
        return one(layout)
    except ConfigError as error:
        return Refused(layout, phase, str(error), "configuration")


def _apart(plan: PlanConfig, decodes: Sequence[Decode], prefills: Sequence[Prefill]) -> Iterator[Apart]:
    """Each decode unit with as many of the best prefill units as keep up with it."""
    if not prefills:
        return
    best = prefills[0]
    for decode in decodes:
        prompts = decode.tokens_per_s / plan.output_tokens * plan.prompt_tokens * decode.deployment.layout.ep
        yield Apart(decode, best, prompts / best.tokens_per_s / best.deployment.layout.ep)


def _routes(plan: PlanConfig, base: RuntimeConfig, model: ModelConfig) -> Routes:
    shared = num_dispatched_shared(base, model)
    if plan.trace is not None:
        name = None if plan.fine_tune else Path(base.model).name or Path(base.model).resolve().name
        return recorded(plan.trace, model, name=name, num_layers=plan.layers, num_shared=shared)
    layers = min(plan.layers, len(model.moe_layers))
    return drawn(model, skew=plan.skew, num_layers=layers, seed=plan.seed, num_shared=shared)
