"""The schema, the YAML defaults and the dataclasses say the same."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from moe_runtime.config import EngineConfig, RuntimeConfig, SamplingConfig, build_config, keys
from moe_runtime.engine.request import SamplingParams
from moe_runtime.errors import ConfigError
from moe_runtime.launch.compose import compose_tree
from moe_runtime.launch.overrides import parse_overrides
from moe_runtime.schema import read_tree


def _values(tree: dict[str, object]) -> dict[str, object]:
    return read_tree(keys(), tree)


def test_yaml_defaults_equal_the_dataclasses() -> None:
    composed = _values(compose_tree(parse_overrides([])))
    assert composed == _values({})
    assert build_config(composed | {"ep": 1, "tp": 1, "dp": 1, "ranks_per_node": 8}) == RuntimeConfig()


def test_yaml_names_every_key() -> None:
    tree: dict[str, Any] = compose_tree(parse_overrides([]))
    flat = {f"{a}.{b}" for a, v in tree.items() if isinstance(v, dict) for b in v}
    flat |= {a for a, v in tree.items() if not isinstance(v, dict)}
    assert flat == {key.name for key in keys()}


def test_sampling_keys_are_sampling_params() -> None:
    assert {f.name for f in fields(SamplingConfig)} <= {f.name for f in fields(SamplingParams)}


def test_every_key_is_documented_in_one_short_line() -> None:
    for key in keys():
        assert key.help, key.name
        assert "\n" not in key.help and len(key.help) <= 110, key.name
        assert not key.help.endswith("."), key.name


def test_defaults_pass_their_own_checks() -> None:
    for key in keys():
        assert key.check(key.default) == key.default


@pytest.mark.parametrize(
    ("tree", "name", "value"),
    [
        ({"engine": {"kv_cache_bytes": "1.5GiB"}}, "engine.kv_cache_bytes", 1610612736),
        ({"engine": {"kv_cache_bytes": "64 KiB"}}, "engine.kv_cache_bytes", 65536),
        ({"engine": {"kv_cache_bytes": 4096}}, "engine.kv_cache_bytes", 4096),
        ({"sampling": {"temperature": 1}}, "sampling.temperature", 1.0),
        ({"sampling": {"stop": ["a", "b,c"]}}, "sampling.stop", ("a", "b,c")),
        ({"ep": None}, "ep", None),
    ],
)
def test_values_are_read(tree: dict[str, object], name: str, value: object) -> None:
    read = _values(tree)[name]
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"ep": True}, "ep=true: must be a whole number, at least 1."),
        ({"ep": 2.5}, "ep=2.5: must be a whole number"),
        ({"seed": None}, "seed=null: must be a whole number, between 0 and 9223372036854775807."),
        ({"engine": 3}, "engine=3: is a group of keys"),
        ({"engine": {"page_sze": 3}}, "engine.page_sze: unknown key. Did you mean 'engine.page_size'?"),
        ({"engine": {"page_size": 2000}}, "must be between 1 and 1024. Nearest: engine.page_size=1024."),
        ({"seed": 2**63}, "must be between 0 and 9223372036854775807. Nearest: seed=9223372036854775807."),
        ({"sampling": {"seed": 2**63}}, "Nearest: sampling.seed=9223372036854775807."),
        ({"sampling": {"top_p": float("nan")}}, "sampling.top_p=nan: must be between 0 and 1."),
        ({"sampling": {"stop_token_ids": [1, True]}}, "sampling.stop_token_ids=[1,True]: must be a list of whole"),
        ({"model": ""}, "model=(nothing): must be a text."),
    ],
)
def test_wrong_values_name_value_rule_and_remedy(tree: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        _values(tree)
    assert message in str(caught.value)


def test_problems_can_be_collected() -> None:
    problems: list[ConfigError] = []
    values = read_tree(keys(), {"ep": "x", "nonsense": 1, "engine": {"page_size": 0}}, report=problems.append)
    assert len(problems) == 3
    assert values["engine.page_size"] == EngineConfig().page_size


def test_a_mesh_that_contradicts_itself_is_refused_at_birth() -> None:
    with pytest.raises(ConfigError, match="ep must equal dp·tp = 4"):
        RuntimeConfig(ep=8, dp=2, tp=2)
