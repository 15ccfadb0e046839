"""Finds the files that ship with the project: configs/ and models/demo/.

A checkout's folders win over the packaged copy: an editable install leaves one behind that does not follow edits.
"""

from __future__ import annotations

from pathlib import Path

from moe_runtime.errors import ConfigError, nearest

_CHECKOUT = Path(__file__).resolve().parents[2]
_PACKAGED = _CHECKOUT / "moe_runtime_data"
"""In an installed wheel `moe_runtime` and `moe_runtime_data` lie side by side."""


def data_path(*parts: str) -> Path:
    """The absolute path of a shipped file or folder. Raises ConfigError where the installation lacks it."""
    for root in (_CHECKOUT, _PACKAGED):
        if root == _CHECKOUT and not (root / "pyproject.toml").is_file():
            continue  # site-packages may hold another project's `configs`
        if (found := root.joinpath(*parts)).exists():
            return found
    raise ConfigError(
        f"{'/'.join(parts)}: missing from this installation of moe_runtime ({_CHECKOUT}). Install it again."
    )


def preset_names() -> tuple[str, ...]:
    """The presets that ship with the project, sorted."""
    return tuple(sorted(path.stem for path in data_path("configs", "preset").glob("*.yaml")))


def shape_names() -> tuple[str, ...]:
    """Models known by their configuration alone (configs/shapes), sorted."""
    return tuple(sorted(path.stem for path in data_path("configs", "shapes").glob("*.json")))


def model_path(model: str) -> Path:
    """The checkpoint folder that `model` names, or the JSON file of a shape without weights. Known names come first:
    a folder that is called like one is ./demo.

    Raises ConfigError: for a hub id with the download command, otherwise with the nearest name.
    """
    from moe_models.registry import resolve_folder  # torch, which --help does without

    if model == "demo":
        return data_path("models", "demo")
    if model in shape_names():
        return data_path("configs", "shapes", f"{model}.json")
    try:
        if "/" in model or model.startswith("~") or Path(model).exists():
            return resolve_folder(model)
    except (OSError, RuntimeError) as error:  # RuntimeError: whose home ~name is, nobody knows
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"model={model}: cannot be read ({reason}). Give a checkpoint folder.") from None
    known = ("demo", *shape_names())
    raise ConfigError(
        f"model={model}: no such folder, nor a known name ({', '.join(known)}). "
        f"Give a checkpoint folder (config.json and *.safetensors) or a known name.{nearest(model, known)}"
    )
