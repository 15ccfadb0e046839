"""A decided run as JSON: one process composes it, the others receive it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import cast

from moe_runtime.config import build_config
from moe_runtime.launch.compose import Composed
from moe_runtime.launch.topology import Topology


def encode_run(composed: Composed) -> bytes:
    """JSON of configuration, topology and checkpoint folder; each process reads the model's own config.json."""
    document = {
        "config": _flat(asdict(composed.config)),
        "topology": asdict(composed.topology),
        "model_path": str(composed.model_path.resolve()),
        "words": list(composed.words),
    }
    return json.dumps(document).encode()


def decode_run(payload: bytes) -> Composed:
    """The inverse of `encode_run`. Raises ConfigError where this machine cannot read the checkpoint's config.json."""
    from moe_models.registry import load_config  # torch, which a run that fails early does without

    document = json.loads(payload)
    values = document["config"]
    for name in ("sampling.stop", "sampling.stop_token_ids"):
        values[name] = tuple(values[name])
    topology = document["topology"] | {"reasons": tuple(document["topology"]["reasons"])}
    path = Path(document["model_path"])
    return Composed(
        build_config(values), Topology(**topology), load_config(path), path, tuple(document["words"])
    )


def _flat(tree: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    values: dict[str, object] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            values |= _flat(cast("Mapping[str, object]", value), f"{prefix}{name}.")
        else:
            values[prefix + name] = value
    return values
