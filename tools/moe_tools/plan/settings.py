"""What `python -m moe_tools.plan` takes: key=value words, checked like the launch's own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, Literal, cast

from moe_runtime.errors import ConfigError, nearest
from moe_runtime.schema import Key, keys_of, read_tree, setting, shown
from moe_tools.plan.hardware import hardware_names

Policy = Literal["best", "eplb", "uniform"]
DEFAULT_SKEW: Final = 0.63
"""The least squares of four published figures of R1's imbalance (`sensitivity.SKEW_FIGURES`; a test holds it there)."""


@dataclass(frozen=True, slots=True)
class PlanConfig:
    """One question to the planner. Lists are the values of which every combination is a layout."""

    model: str = setting("deepseek_v3", "a shape in configs/shapes, a checkpoint folder or its config.json; "
                         "the trace's own where it is here", verbatim=True)  # fmt: skip
    hardware: str = setting("h200", "an entry of configs/hardware, or a JSON file of its form", verbatim=True)
    trace: str | None = setting(
        None, "per_token trace, or another program's routes, that are replayed; null: drawn by skew", verbatim=True
    )
    fine_tune: bool = setting(False, "the trace may be of a model of another name: one is a fine-tune of the other")
    skew: float = setting(
        DEFAULT_SKEW, "experts' popularity falls as 1/rank^skew; 0: even. The default fits published R1 loads",
        minimum=0.0, maximum=3.0,
    )  # fmt: skip
    prompt_tokens: int = setting(2048, "tokens of a prompt; cut, unless given, to what the model holds", minimum=1)
    output_tokens: int = setting(1024, "new tokens of a request; likewise", minimum=1)
    tpot_ms: float | None = setting(50.0, "most milliseconds per output token; null: no bound", minimum=0.01)
    ttft_ms: float | None = setting(None, "most milliseconds to the first token, without queueing", minimum=0.01)
    ep: tuple[int, ...] = setting((8, 16, 32, 64, 128), "ranks of a unit")
    tp: tuple[int, ...] = setting((1, 4), "ranks that share the attention heads")
    redundant: tuple[int, ...] = setting((0, 32), "redundant expert slots of a unit")
    dispatch: tuple[str, ...] = setting(("deep_ep", "all_to_all", "all_gather"), "dispatch backends")
    batch: tuple[int, ...] = setting((), "sequences of a DP group in decode; []: the most that meet tpot_ms and fit")
    prefill_tokens: int = setting(
        16384, "most prompt tokens of one step and DP group; one unit for both takes at most 2048", minimum=1
    )
    policy: Policy = setting("best", "who places the experts by their loads")
    groups: bool = setting(
        True, "expert groups stay on one node where they can, as live rebalancing places them; false: ranks are alike"
    )
    replica_choice: Literal["static", "round_robin", "nearest", "waterfill"] = setting(
        "static", "which copy a token goes to"
    )
    shared_experts: Literal["replicated", "dispatched"] = setting("replicated", "as in a run")
    kv_cache_dtype: Literal["auto", "fp8"] = setting("auto", "as engine.kv_cache_dtype")
    dispatch_buffer_bytes: int | None = setting(
        None, "as engine.dispatch_buffer_bytes; a larger buffer takes a step's tokens in fewer dispatches", minimum=1,
        size_in_bytes=True,
    )  # fmt: skip
    two_batch_decode_tokens: int | None = setting(
        None, "as engine.two_batch_decode_tokens: from so many rows on decode steps are cut in two, which overlap",
        minimum=2,
    )  # fmt: skip
    layers: int = setting(3, "layers whose routes are replayed; others are taken to be like them", minimum=1)
    seed: int = setting(0, "of drawn routes", minimum=0)
    top: int = setting(10, "rows of each table", minimum=1)
    json: str | None = setting(None, "file for everything as JSON", verbatim=True)
    html: str | None = setting(None, "file for one self-contained page", verbatim=True)
    placement: str | None = setting(
        None, "file for the fastest units' placements, planned from the trace's loads in all layers", verbatim=True
    )
    validate: bool = setting(False, "instead of planning: published runs beside what the planner says of them")

    def __post_init__(self) -> None:
        for name in ("ep", "tp", "dispatch"):
            if not getattr(self, name):
                raise ConfigError(f"{name}=[]: give at least one value, e.g. {name}={_EXAMPLES[name]}.")
        for name in ("ep", "tp", "batch", "redundant"):
            least = 0 if name == "redundant" else 1
            if bad := [value for value in getattr(self, name) if value < least]:
                raise ConfigError(f"{name}={bad[0]}: must be at least {least}. Nearest: {name}={least}.")
        if self.placement is not None and (self.trace is None or self.policy == "uniform"):
            raise ConfigError(
                f"placement={self.placement}: is planned from measured loads, with trace={self.trace or 'null'} and "
                f"policy={self.policy}. Give trace=DIR and policy=best, or leave placement out."
            )
        if self.fine_tune and self.trace is None:
            raise ConfigError("fine_tune=true: says something of a trace. Add trace=DIR, or leave fine_tune out.")
        if self.trace is not None and self.skew != DEFAULT_SKEW:
            raise ConfigError(
                f"trace={self.trace}, skew={self.skew:g}: a trace has its own skew. Leave one of them out."
            )


_EXAMPLES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "ep": "[8,32]", "tp": "1", "dispatch": "deep_ep", "trace": "runs/expert_load", "json": "plan.json",
        "html": "plan.html", "placement": "placement.json", "ttft_ms": "2000", "batch": "[64,128]",
    }
)  # fmt: skip


def parse_words(words: Sequence[str]) -> PlanConfig:
    """The question that the words ask. ConfigError: value, rule, remedy."""
    known = {key.name: key for key in keys_of(PlanConfig)}
    tree: dict[str, object] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals or not name or word.startswith("-"):
            bare = word.lstrip("-").partition("=")[0]
            hint = f" Write {bare}=VALUE." if bare in known else nearest(bare, known)
            raise ConfigError(f"{word}: settings are written key=value.{hint} `help` lists every key.")
        if name not in known:
            raise ConfigError(f"{name}: unknown key.{nearest(name, known)} `help` lists every key.")
        if name in tree:
            raise ConfigError(f"{word}: {name} is set twice. Give each key once.")
        tree[name] = _value(known[name], text)
    values = read_tree(known.values(), tree)
    config = PlanConfig(**cast(dict[str, Any], values))
    from moe_runtime.dispatch.factory import BACKENDS

    for backend in config.dispatch:
        if backend not in BACKENDS:
            raise ConfigError(f"dispatch={backend}: must be one of {', '.join(BACKENDS)}.{nearest(backend, BACKENDS)}")
    if config.validate and (other := next((name for name in tree if name not in ("validate", "seed")), None)):
        raise ConfigError(f"{other}=: says nothing of published runs. Leave it out, or leave validate=true out.")
    from moe_tools.plan.defaults import filled

    return config if config.validate else filled(config, tree)


def _value(key: Key, text: str) -> object:
    if not text:
        raise ConfigError(
            f"{key.name}=: has no value. Write {key.name}={_EXAMPLES.get(key.name) or shown(key.default)}."
        )
    if text == "null":
        return None
    if key.verbatim:
        return text
    if key.is_list and not text.startswith("["):
        return [_plain(part) for part in text.split(",")]
    if key.is_list:
        return [_plain(part.strip().strip("\"'")) for part in text.strip("[]").split(",") if part.strip()]
    return _plain(text)


def _plain(text: str) -> object:
    with suppress(ValueError):
        return cast(object, json.loads(text))
    return text


def help_text() -> str:
    """Every key, its default and its meaning."""
    from moe_runtime.dispatch.factory import BACKENDS
    from moe_runtime.launch.data import data_path

    rows: Mapping[str, str] = {
        f"{key.name}={shown(key.default)}": key.help + (f" ({', '.join(key.choices)})" if key.choices else "")
        for key in keys_of(PlanConfig)
    }
    width = max(map(len, rows))
    return "\n".join(
        [
            "python -m moe_tools.plan [key=value …]     which layout, before there is a cluster",
            "",
            f"model    {', '.join(sorted(path.stem for path in data_path('configs', 'shapes').glob('*.json')))}, demo",
            f"hardware {', '.join(hardware_names())}",
            f"dispatch {', '.join(BACKENDS)}",
            "",
            *[f"  {name:<{width}}  {text}" for name, text in rows.items()],
            "",
            "lists are written ep=8,32 or ep=[8,32]",
        ]
    )
