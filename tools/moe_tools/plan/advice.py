"""What to change where nothing fits: the nearest value of each rule that stood in the way."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from moe_tools.plan.answer import PHASES, Answer, Phase, Refused
from moe_tools.plan.deployment import USABLE, Rule
from moe_tools.plan.evaluate import TOGETHER_TOKENS

_FOUND: Final[Mapping[Phase, str]] = MappingProxyType(
    {"decode": "decodes", "prefill": "prefills", "one unit": "together"}
)
"""Phase → the answer's field"""


def advice(answer: Answer) -> list[str]:
    """For each phase for which nothing was found: what the nearest layout needs, and what to set."""
    phases: dict[str, list[Phase]] = {}
    for phase in PHASES:
        if getattr(answer, _FOUND[phase]):
            continue
        for rule in ("tpot_ms", "ttft_ms", "prompts", "memory", "configuration", "layout"):
            found = [one for one in answer.refused if one.phase == phase and one.rule == rule]
            if found:
                remedy = _remedy(answer, min(found, key=lambda one: one.least or 0.0))
                phases.setdefault(remedy, []).append(phase)
                break
    return [f"{', '.join(which)}: {remedy}" for remedy, which in phases.items()]


def _remedy(answer: Answer, nearest: Refused) -> str:
    plan, layout, least = answer.plan, nearest.layout, nearest.least or 0.0
    rule: Rule = nearest.rule
    match rule:
        case "tpot_ms" | "ttft_ms":
            wanted = getattr(plan, rule)
            smaller = "a smaller batch=, " if plan.batch and rule == "tpot_ms" else ""
            return (
                f"nothing meets {rule}={wanted:g}. The least is {least:.4g} ms ({layout}). "
                f"Set {rule}={_up(least):g}, or try {smaller}{_OTHERWISE[rule]}."
            )
        case "prompts":
            batch = TOGETHER_TOKENS * plan.output_tokens // plan.prompt_tokens
            wider = f"prefill_tokens={math.ceil(least)} or " if least <= TOGETHER_TOKENS else ""
            smaller = f"Set {wider}batch={min(batch, 1024)}" if batch else "Give shorter prompts"
            return f"nothing fits. {layout}: {nearest.reason}. {smaller}, or serve prefill and decode apart."
        case "memory":
            room = USABLE * answer.machine.memory_bytes / 1e9
            wider = f"ep={answer.nearest_ep}, " if answer.nearest_ep else ""
            fewer = "batch=, " if plan.batch else ""
            return (
                f"nothing fits. The least needed is {least / 1e9:.4g} GB of {room:.4g} usable ({layout}). Set {wider}"
                f"kv_cache_dtype=fp8, a smaller {fewer}redundant=, prompt_tokens=, output_tokens= or prefill_tokens=, "
                "or take hardware with more memory."
            )
        case "configuration" | "layout":
            return f"nothing fits. {layout}: {nearest.reason}"


def _up(ms: float) -> float:
    """Rounded up to three digits, so that it is met."""
    step = 10.0 ** (math.floor(math.log10(ms)) - 2)
    return round(math.ceil(ms / step) * step, 6)


_OTHERWISE: Final[Mapping[str, str]] = MappingProxyType(
    {
        "tpot_ms": "other ep=, tp= and redundant=, or faster hardware",
        "ttft_ms": "more tp=, fewer prefill_tokens=, shorter prompts, or faster hardware",
    }
)


def refusals(answer: Answer) -> list[str]:
    """Each layout and reason once, with the phases that it rules out."""
    phases: dict[tuple[str, str], list[Phase]] = {}
    for one in answer.refused:
        phases.setdefault((str(one.layout), one.reason.splitlines()[0]), []).append(one.phase)
    return [f"{layout} {', '.join(which)}: {reason}" for (layout, reason), which in phases.items()]
