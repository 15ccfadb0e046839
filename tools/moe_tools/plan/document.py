"""An answer as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from moe_tools.plan.advice import advice
from moe_tools.plan.answer import Answer, Apart, Decode, Prefill, Together
from moe_tools.plan.placed import NO_FILES, Files, command
from moe_tools.plan.report import waits_ms


def as_json(answer: Answer, files: Files = NO_FILES) -> str:
    """Everything, one object."""
    return json.dumps(
        {
            "plan": asdict(answer.plan),
            "model_layers": answer.model.num_layers,
            "hardware": {"name": answer.machine.rates.name, "sources": dict(answer.machine.sources)},
            "routes": answer.routes.source,
            "recording_replayed": asdict(repeat) if (repeat := answer.routes.repeat) else None,
            "constants": asdict(answer.constants),
            "decode": [_unit(one, files) | {"batch": one.batch, "tpot_ms": one.tpot_ms} for one in answer.decodes],
            "prefill": [_unit(one, files) | {"tokens": one.tokens, "ttft_ms": one.ttft_ms} for one in answer.prefills],
            "apart": [_apart(one, files) for one in answer.apart],
            "together": [_together(one, files) for one in answer.together],
            "refused": [asdict(one) for one in answer.refused],
            "advice": advice(answer),
        },
        indent=1,
    )


def _unit(one: Decode | Prefill, files: Files) -> dict[str, Any]:
    step, layout = one.step, one.deployment.layout
    return {
        "layout": asdict(layout) | {"dp": layout.dp},
        "tokens_per_s_per_gpu": one.tokens_per_s,
        "memory_bytes": asdict(one.memory) | {"total": one.memory.total},
        "step_us": step.us,
        "terms_us": dict(step.terms),
        "wire_us": step.summary.wire_us,
        "exposed_us": step.summary.exposed_us[0],
        "waiting_us_of_a_mean_rank": waits_ms(one) * 1e3,
        "network_bytes": step.network_bytes,
        "imbalance": step.imbalance,
        "bounds": dict(step.bounds),
        "bound": step.bound,
        "micro_batches": step.agreed.num_micro_batches,
        "chunks": step.agreed.num_chunks,
        "graph": step.agreed.graph,
        "command": command(one.deployment, files),
    }


def _speed(one: Apart | Together, files: Files) -> dict[str, Any]:
    return {
        "decode": asdict(one.decode.deployment.layout),
        "prefill": asdict(one.prefill.deployment.layout),
        "batch": one.decode.batch,
        "tpot_ms": one.tpot_ms,
        "ttft_ms": one.ttft_ms,
        "tokens_per_s_per_gpu": one.tokens_per_s,
        "command": command(one.decode.deployment, files),
    }


def _apart(one: Apart, files: Files) -> Mapping[str, Any]:
    return _speed(one, files) | {
        "prefill_units_per_decode_unit": one.prefill_units,
        "prefill_command": command(one.prefill.deployment, files),
    }


def _together(one: Together, files: Files) -> Mapping[str, Any]:
    return _speed(one, files) | {
        "prompt_tokens_per_step": one.prefill.tokens,
        "step_with_prompts_ms": one.mixed_ms,
        "step_without_prompts_ms": one.decode.tpot_ms,
        "share_of_steps_with_prompts": one.share,
        "memory_bytes": asdict(one.memory) | {"total": one.memory.total},
        "network_bytes": one.network_bytes,
        "imbalance": one.decode.step.imbalance,
        "parts_us": dict(one.parts_us),
        "bounds": dict(one.bounds),
        "bound": one.bound,
        "step_without_prompts": _unit(one.decode, files),
        "prompts_of_a_step": _unit(one.prefill, files),
    }
