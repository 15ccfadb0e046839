"""Which code reads which checkpoint folder."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final, cast

from moe_models.base import Family, ModelConfig
from moe_models.deepseek_v2 import config as v2_config
from moe_models.deepseek_v2 import weights as v2_weights
from moe_models.deepseek_v3 import config as v3_config
from moe_models.deepseek_v3 import weights as v3_weights
from moe_models.schema import Json, ObjectReader, read_json_object
from moe_runtime.errors import ConfigError, nearest
from moe_runtime.loading.shard import TensorSpec

_FAMILY_OF_TYPE: Final = MappingProxyType(
    {"deepseek_v2": "deepseek_v2", "deepseek_v3": "deepseek_v3", "kimi_k2": "deepseek_v3"}
)
_FAMILY_OF_ARCHITECTURE: Final = MappingProxyType(
    {
        "DeepseekV2ForCausalLM": "deepseek_v2",
        "DeepseekV3ForCausalLM": "deepseek_v3",
        "KimiK2ForCausalLM": "deepseek_v3",
    }
)
_HUB_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")


def resolve_folder(model: str) -> Path:
    """The checkpoint folder that `model` names, with `~` expanded; nothing is ever downloaded.

    Raises ConfigError for a hub id (with the download command), a file, or a folder without config.json.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        if (path / "config.json").is_file():
            return path
        raise ConfigError(f"model={model!r}: the folder has no config.json, so it is no checkpoint.{_inner_hint(path)}")
    if path.exists():
        raise ConfigError(
            f"model={model!r} is a file; give the folder that holds config.json and *.safetensors"
            + (f": model={str(path.parent)!r}." if (path.parent / "config.json").is_file() else ".")
        )
    if _HUB_ID.fullmatch(model):
        folder = model.split("/")[1]
        raise ConfigError(
            f"model={model!r}: no such folder. It reads like a Hugging Face model id, and models are not downloaded "
            f"for you. Run: hf download {model} --local-dir {folder}   then: model={folder}"
        )
    siblings = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
    raise ConfigError(
        f"model={model!r}: no such folder. Give a checkpoint folder (config.json and *.safetensors)."
        f"{nearest(path.name, siblings)}"
    )


def load_config(path: Path | str) -> ModelConfig:
    """Read the config.json of a checkpoint folder, or the named JSON file; no weights are looked at.

    End-of-sequence ids come from generation_config.json beside it where that has some. Raises ConfigError.
    """
    given = Path(path)
    file = given / "config.json" if given.is_dir() else given
    config = parse_config(read_json_object(file), source=str(file))
    generation = file.with_name("generation_config.json")
    if generation.is_file():
        eos = ObjectReader(read_json_object(generation), str(generation)).token_ids("eos_token_id")
        config = dataclasses.replace(config, eos_token_ids=eos or config.eos_token_ids)
    return config


def parse_config(values: Mapping[str, Json], *, source: str) -> ModelConfig:
    """The content of a config.json; `source` is what errors call it. Raises ConfigError."""
    keys = ObjectReader(values, source)
    try:
        match _family(keys, values):
            case "deepseek_v2":
                return v2_config.parse_config(keys)
            case "deepseek_v3":
                return v3_config.parse_config(keys)
    except ConfigError as error:
        if str(error).startswith(source):
            raise
        # ModelConfig's own checks know the keys but not the file.
        raise ConfigError(f"{source}: {error}") from error


def tensor_specs(config: ModelConfig) -> tuple[TensorSpec, ...]:
    """Every tensor that belongs to the model in its checkpoint, layer by layer; optional ones are not read."""
    match config.family:
        case "deepseek_v2":
            return v2_weights.tensor_specs(config)
        case "deepseek_v3":
            return v3_weights.tensor_specs(config)


def is_mtp_tensor(config: ModelConfig, name: str) -> bool:
    """Whether a checkpoint tensor belongs to a multi-token-prediction layer, which the main model does not read."""
    return config.family == "deepseek_v3" and v3_weights.is_mtp_tensor(config, name)


def _family(keys: ObjectReader, values: Mapping[str, Json]) -> Family:
    known = f"Supported are model_type {', '.join(_FAMILY_OF_TYPE)} (DeepSeek-V2, V3, R1, V3.1, Moonlight, Kimi-K2)."
    model_type, architectures = values.get("model_type"), values.get("architectures")
    if model_type is not None and (not isinstance(model_type, str) or model_type not in _FAMILY_OF_TYPE):
        hint = nearest(model_type, _FAMILY_OF_TYPE) if isinstance(model_type, str) else ""
        keys.fail("model_type", f"not a model type that this runtime has. {known}{hint}")
    family = _FAMILY_OF_TYPE.get(model_type) if isinstance(model_type, str) else None
    if architectures is not None:
        if not isinstance(architectures, list) or len(architectures) != 1 or not isinstance(architectures[0], str):
            keys.fail("architectures", 'must be a list of one name, such as ["DeepseekV3ForCausalLM"].')
        of_architecture = _FAMILY_OF_ARCHITECTURE.get(architectures[0])
        if of_architecture is None:
            hint = nearest(architectures[0], _FAMILY_OF_ARCHITECTURE)
            keys.fail("architectures", f"must be one of {', '.join(_FAMILY_OF_ARCHITECTURE)}.{hint}")
        if family is not None and of_architecture != family:
            keys.fail("architectures", f"contradicts model_type={model_type!r}. Correct one of the two.")
        family = of_architecture
    if family is None:
        keys.fail("model_type", f"neither model_type nor architectures says what the model is. {known}")
    return cast(Family, family)


def _inner_hint(folder: Path) -> str:
    """The hub's cache keeps a checkpoint under snapshots/<revision>/; a person often names the folder above."""
    inner = sorted(p.parent for p in folder.glob("snapshots/*/config.json")) or sorted(
        p.parent for p in folder.glob("*/config.json")
    )
    return f" Did you mean model={str(inner[0])!r}?" if inner else " Give the folder that holds config.json."
