"""Defaults, then preset, then command line → one RuntimeConfig, through Hydra's compose API. Writes nothing."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from moe_runtime.config import RuntimeConfig, build_config, keys
from moe_runtime.errors import ConfigError
from moe_runtime.launch.data import data_path, model_path
from moe_runtime.launch.env import TorchrunEnv
from moe_runtime.launch.overrides import Overrides, parse_overrides
from moe_runtime.launch.topology import Topology, resolve
from moe_runtime.schema import Report, fail, read_tree

if TYPE_CHECKING:
    from moe_models.base import ModelConfig

_HYDRA = threading.Lock()  # Hydra keeps the state of a composition in one process-wide object


@dataclass(frozen=True, slots=True)
class Composed:
    """A run that is fully decided. `model_path`: the checkpoint folder, or the JSON file of a shape without weights."""

    config: RuntimeConfig
    topology: Topology
    model: ModelConfig
    model_path: Path
    words: tuple[str, ...]
    """The command line it came from."""

    @property
    def has_weights(self) -> bool:
        return self.model_path.is_dir()


def compose(words: Sequence[str], *, torchrun: TorchrunEnv | None = None, report: Report = fail) -> Composed:
    """The run that the `key=value` words ask for.

    Every problem goes to `report`, by default raised as ConfigError. Where `report` returns, the wrong key takes its
    default and the search for problems goes on; only a model that cannot be found or read ends it (ConfigError).
    """
    from moe_runtime.launch.conflicts import conflicts  # torch, which --help does without
    from moe_runtime.launch.shuffle import with_dispatch

    values = read_tree(keys(), compose_tree(parse_overrides(words, report=report), report=report), report=report)
    from moe_models.registry import load_config

    path = model_path(str(values["model"]))
    model = load_config(path)
    topology = _topology(values, model, torchrun, report)
    values |= {name: getattr(topology, name) for name in ("ep", "tp", "dp", "pp", "ranks_per_node")}
    config = replace(build_config(values), launcher=topology.launcher)
    if "auto" in (config.dispatch, config.decode_dispatch):
        config, why = with_dispatch(config, model)
        topology = replace(topology, reasons=(*topology.reasons, *why))
    for problem in conflicts(config, model, has_weights=path.is_dir()):
        report(problem)
    return Composed(config, topology, model, path, tuple(words))


def compose_tree(overrides: Overrides, *, report: Report = fail) -> dict[str, object]:
    """Defaults, preset and overrides as a plain tree, in that order of precedence; not yet checked."""
    import hydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    unreadable = {word: rule for word in overrides.grammar if (rule := _unreadable(word))}
    for word, rule in unreadable.items():
        report(ConfigError(f"{word}: {rule}"))
    words = [f"preset={overrides.preset}", *(word for word in overrides.grammar if word not in unreadable)]
    folder = data_path("configs")
    try:
        with _HYDRA, _own_hydra(), hydra.initialize_config_dir(config_dir=str(folder), version_base="1.3"):
            composed = hydra.compose("config", overrides=words)
        tree = cast(dict[str, Any], OmegaConf.to_container(composed, resolve=True))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"{str(error).splitlines()[0]} Check the YAML files in {folder}.") from None
    for name, value in (("preset", overrides.preset), *overrides.verbatim.items()):
        *sections, leaf = name.split(".")
        place = tree
        for section in sections:
            place = place[section]
        place[leaf] = value
    _drop_what_follows(tree, overrides.given)
    return tree


def _drop_what_follows(tree: dict[str, Any], given: frozenset[str]) -> None:
    """A preset fixes all of ep, tp and dp; where the command line sets one or two, one of the others follows anew."""
    sizes = {name for name in ("ep", "tp", "dp") if name in given and tree[name] is not None}
    if 0 < len(sizes) < 3:
        follower = next(name for name in ("dp", "ep", "tp") if name not in sizes)
        tree[follower] = None


@contextmanager
def _own_hydra() -> Iterator[None]:
    """Hydra's process-wide state is free within the block, also inside a program that Hydra itself started."""
    from hydra.core.global_hydra import GlobalHydra

    state = GlobalHydra.instance()
    before, state.hydra = state.hydra, None
    try:
        yield
    finally:
        GlobalHydra.instance().hydra = before  # by now another object


def _unreadable(word: str) -> str:
    """Why Hydra's grammar does not take `word` as one value, or an empty string."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    name = word.partition("=")[0]
    rule = next(key for key in keys() if key.name == name).rule()
    try:
        override = OverridesParser.create().parse_override(word)
    except HydraException:
        return f"the value cannot be read; {name} must be {rule}."
    return f"one run takes one value; {name} must be {rule}." if override.is_sweep_override() else ""


def _topology(values: dict[str, object], model: ModelConfig, torchrun: TorchrunEnv | None, report: Report) -> Topology:
    """The mesh asked for; what contradicts itself is reported and left out."""
    given = cast(dict[str, Any], values)
    return resolve(
        ep=given["ep"],
        tp=given["tp"],
        dp=given["dp"],
        num_heads=model.num_heads,
        pp=given["pp"],
        ranks_per_node=given["ranks_per_node"],
        launcher=given["launcher"],
        torchrun_world=None if torchrun is None else torchrun.world_size,
        torchrun_local_world=None if torchrun is None else torchrun.local_world_size,
        report=report,
    )
