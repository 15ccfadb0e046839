"""What a question need not say: the model of its trace, and lengths that the model holds."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from dataclasses import replace

from moe_models.registry import load_config

from moe_runtime.balance.trace import has_trace, read_header
from moe_runtime.errors import ConfigError, TraceError
from moe_runtime.launch.data import model_path
from moe_tools.plan.settings import PlanConfig


def filled(plan: PlanConfig, given: Collection[str]) -> PlanConfig:
    """`plan`, of which the words have said `given`. What cannot be read is left for the work to tell of."""
    if plan.trace is not None and "model" not in given:
        plan = replace(plan, model=_of_trace(plan.trace) or plan.model)
    with suppress(ConfigError):
        return _within(plan, load_config(model_path(plan.model)).max_position_embeddings, given)
    return plan


def _of_trace(trace: str) -> str | None:
    """The model's name, where a model of that name is here."""
    with suppress(ConfigError, TraceError, OSError):
        name = read_header(trace).model if has_trace(trace) else ""
        if name:
            model_path(name)  # raises where there is none
            return name
    return None


def _within(plan: PlanConfig, most: int, given: Collection[str]) -> PlanConfig:
    """Lengths that nobody asked for, cut to `most` tokens together."""
    prompt, output = plan.prompt_tokens, plan.output_tokens
    if prompt + output <= most:
        return plan
    match "prompt_tokens" in given, "output_tokens" in given:
        case False, False:
            prompt, output = (max(1, most * part // (prompt + output)) for part in (prompt, output))
        case False, True:
            prompt = max(1, most - output)
        case True, False:
            output = max(1, most - prompt)
    return replace(plan, prompt_tokens=prompt, output_tokens=output)
