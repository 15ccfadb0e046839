"""A decided run, or the error that ended it, as JSON: one process has it, the others receive it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import cast

from moe_runtime.config import build_config
from moe_runtime.errors import CheckpointError, ConfigError, MoeRuntimeError
from moe_runtime.launch.compose import Composed
from moe_runtime.launch.topology import Topology


def encode_run(composed: Composed) -> str:
    """JSON of configuration, topology and checkpoint folder; each process reads the model's own config.json."""
    document = {
        "config": _flat(asdict(composed.config)),
        "topology": asdict(composed.topology),
        "model_path": str(composed.model_path.resolve()),
        "words": list(composed.words),
    }
    return json.dumps(document)


def decode_run(payload: str | bytes) -> Composed:
    """The inverse of `encode_run`. Raises ConfigError where this machine cannot read the checkpoint's config.json."""
    from moe_models.registry import load_config  # torch, which a run that fails early does without

    document = json.loads(payload)
    values = document["config"]
    for name, value in values.items():
        if isinstance(value, list):
            values[name] = tuple(value)
    topology = document["topology"] | {"reasons": tuple(document["topology"]["reasons"])}
    path = Path(document["model_path"])
    return Composed(build_config(values), Topology(**topology), load_config(path), path, tuple(document["words"]))


def encode_error(error: BaseException) -> str:
    """Its kind, where users tell kinds apart, and its text."""
    match error:
        case ConfigError():
            kind = "config"
        case CheckpointError():
            kind = "checkpoint"
        case _:
            kind = "other"
    text = str(error) if isinstance(error, MoeRuntimeError) else f"{type(error).__name__}: {error}"
    return json.dumps({"kind": kind, "text": text})


def decode_error(payload: str | bytes) -> MoeRuntimeError:
    """The inverse of `encode_error`."""
    document = json.loads(payload)
    match document["kind"]:
        case "config":
            return ConfigError(document["text"])
        case "checkpoint":
            return CheckpointError(document["text"])
        case _:
            return MoeRuntimeError(document["text"])


def _flat(tree: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    values: dict[str, object] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            values |= _flat(cast("Mapping[str, object]", value), f"{prefix}{name}.")
        else:
            values[prefix + name] = value
    return values
