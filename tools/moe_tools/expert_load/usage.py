"""What the tool says of itself: `--help`, and a first line before the work begins."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from moe_tools.expert_load.words import COMMANDS, LAUNCH, OWN_KEYS, Command, Words


def help_text() -> str:
    """The tool's --help."""
    lines = [_USAGE]
    for command in COMMANDS:
        lines.append(f"{command}: {_ABOUT[command]}")
        lines += [f"  {key + '=':<15} {about}" for key, about in OWN_KEYS[command].items()]
        allowed = LAUNCH[command]
        if allowed is None:
            lines.append("  and every key of the launch (python -m moe_runtime --help)")
        elif allowed:
            lines.append(f"  and of the launch's keys: {', '.join(sorted(allowed))}")
        lines.append("")
    return "\n".join([*lines, _OTHERS])


def intro(words: Words) -> str:
    """One line on what begins now: the imports alone take seconds."""
    if words.command == "report" and "trace" not in words.own:
        return "report: first a run that is recorded, then a page about it"
    return f"{words.command}: {_ABOUT[words.command]}"


_USAGE: Final = """\
expert_load: where a model's tokens go, what balancing would change, and whether it did

  python -m moe_tools.expert_load report ep=32                    record the demo model, write a page about it
  python -m moe_tools.expert_load record model=demo ep=32 output=runs/load
  python -m moe_tools.expert_load report trace=runs/load output=report.html
  python -m moe_tools.expert_load plan trace=runs/load ep=32 placement.num_redundant_experts=32 output=plan.json
  python -m moe_tools.expert_load apply trace=runs/load plan=plan.json
  python -m moe_tools.expert_load compare trace=runs/load plan=plan.json
  python -m moe_tools.expert_load top trace=runs/load
"""
_ABOUT: Final[Mapping[Command, str]] = MappingProxyType(
    {
        "record": "run a model and save the trace of its experts' loads",
        "report": "one HTML page, pictures and a summary of a recording",
        "plan": "a placement file made for a recording",
        "apply": "run again under a plan, and record that",
        "compare": "what a plan promised and what was measured under it",
        "top": "watch a running engine",
    }
)
_OTHERS: Final = """\
Other programs' records: `report` and `plan` read vLLM's routed experts (*.npy, *.npz), Megatron's router traces
(*.jsonl) and TensorRT-LLM's statistics (meta_info.json), as trace=FILE or trace=FOLDER. They do not say where experts
were: give ep=, where nodes end (ranks_per_node=), which model it was (model=NAME or num_routed=N), and placement.file=
where experts were not spread evenly and in order, e.g.

  python -m moe_tools.expert_load report trace=routed.npz model=deepseek_v3 ep=32"""
