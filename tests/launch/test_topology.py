"""From some of ep, tp, dp to all of them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_runtime.config import Launcher
from moe_runtime.errors import ConfigError
from moe_runtime.launch.env import torchrun_env
from moe_runtime.launch.topology import resolve

Mesh = tuple[int | None, int | None, int | None]


def _resolve(mesh: Mesh, heads: int = 8, world: int | None = None) -> tuple[int, int, int]:
    ep, tp, dp = mesh
    topology = resolve(ep=ep, tp=tp, dp=dp, num_heads=heads, torchrun_world=world)
    return topology.ep, topology.tp, topology.dp


@pytest.mark.parametrize(
    ("given", "heads", "expected"),
    [
        ((None, None, None), 8, (1, 1, 1)),
        ((8, None, None), 8, (8, 1, 8)),
        ((31, None, None), 8, (31, 1, 31)),
        ((32, None, None), 8, (32, 4, 8)),
        ((320, None, None), 8, (320, 4, 80)),
        ((320, None, None), 6, (320, 1, 320)),  # 4 does not divide the heads
        ((34, None, None), 8, (34, 1, 34)),  # 4 does not divide ep
        ((320, 1, None), 8, (320, 1, 320)),
        ((320, None, 80), 8, (320, 4, 80)),
        ((None, 2, 3), 8, (6, 2, 3)),
        ((None, 2, None), 8, (2, 2, 1)),
        ((None, None, 5), 8, (5, 1, 5)),
        ((8, 2, 4), 8, (8, 2, 4)),
    ],
)
def test_the_rest_follows(given: Mesh, heads: int, expected: tuple[int, int, int]) -> None:
    assert _resolve(given, heads) == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [((None, None, None), (4, 1, 4)), ((None, 2, None), (4, 2, 2)), ((4, None, None), (4, 1, 4))],
)
def test_torchrun_gives_the_world(given: Mesh, expected: tuple[int, int, int]) -> None:
    assert _resolve(given, world=4) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((8, 3, None), "tp=3: must divide the model's 8 attention heads. Nearest: tp=4."),
        ((6, 4, None), "ep=6, tp=4: tp must divide ep. Nearest: tp=2, or ep=8."),
        ((8, None, 3), "ep=8, dp=3: dp must divide ep. Nearest: dp=4, or ep=9."),
        ((80, None, 5), "tp = ep/dp = 16 must divide the model's 8 attention heads. Nearest: dp=10 (tp=8)."),
        ((8, 4, 3), "ep must equal dp·tp = 12. Set ep=12, or keep ep=8 with dp=2"),
        ((0, None, None), "ep=0: must be at least 1. Nearest: ep=1."),
    ],
)
def test_contradictions_name_the_nearest_mesh(given: Mesh, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        _resolve(given)
    assert message in str(caught.value)


@given(
    ep=st.none() | st.integers(1, 400),
    tp=st.none() | st.integers(1, 12),
    dp=st.none() | st.integers(1, 60),
    heads=st.integers(1, 64),
)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_what_resolves_is_a_mesh(ep: int | None, tp: int | None, dp: int | None, heads: int) -> None:
    try:
        topology = resolve(ep=ep, tp=tp, dp=dp, num_heads=heads)
    except ConfigError:
        return
    assert topology.ep == topology.dp * topology.tp == topology.world
    assert heads % topology.tp == 0
    assert (ep or topology.ep, tp or topology.tp, dp or topology.dp) == (topology.ep, topology.tp, topology.dp)
    assert topology.reasons


@given(st.integers(1, 400), st.integers(1, 20), st.integers(1, 64))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_nearest_tp_is_valid(ep: int, tp: int, heads: int) -> None:
    try:
        resolve(ep=ep, tp=tp, dp=None, num_heads=heads)
    except ConfigError as error:
        named = (
            int(str(error).partition("tp=")[2].partition(" ")[0].rstrip(":,")) if "Nearest: tp=" in str(error) else 0
        )
        nearest = int(str(error).partition("Nearest: tp=")[2].rstrip(".").partition(",")[0])
        assert named == tp
        assert heads % nearest == 0


def test_launchers() -> None:
    def launcher(asked: Launcher, world: int | None) -> str:
        return resolve(
            ep=4,
            tp=None,
            dp=None,
            num_heads=8,
            launcher=asked,
            torchrun_world=world,
        ).launcher

    assert launcher("auto", None) == "virtual"
    assert launcher("auto", 4) == "torchrun"
    assert launcher("process", None) == "process"
    with pytest.raises(ConfigError, match="was not started by torchrun"):
        launcher("torchrun", None)
    with pytest.raises(ConfigError, match="torchrun started 2 processes.*Set ep=2"):
        launcher("auto", 2)
    with pytest.raises(ConfigError, match="each would run the whole world"):
        launcher("virtual", 4)


def test_pipeline_is_not_yet() -> None:
    with pytest.raises(ConfigError, match="not yet built"):
        resolve(ep=4, tp=None, dp=None, pp=2, num_heads=8)


_TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_RANK": "1",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "none",
}


def test_torchrun_variables() -> None:
    env = torchrun_env(_TORCHRUN)
    assert env is not None
    assert (env.rank, env.world_size, env.local_rank, env.node_rank, env.master_port) == (3, 4, 1, 1, 29500)
    assert torchrun_env({"PATH": "/bin"}) is None


def test_half_set_torchrun_variables() -> None:
    with pytest.raises(ConfigError, match="MASTER_PORT: not set"):
        torchrun_env({name: value for name, value in _TORCHRUN.items() if name != "MASTER_PORT"})
    with pytest.raises(ConfigError, match="RANK=x: torchrun's variables are whole numbers"):
        torchrun_env(_TORCHRUN | {"RANK": "x"})
