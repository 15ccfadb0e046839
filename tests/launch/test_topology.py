"""From some of ep, tp, dp to all of them."""

from __future__ import annotations

import re

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
    [
        ((None, None, None), (4, 1, 4)),
        ((None, 2, None), (4, 2, 2)),
        ((None, None, 2), (4, 2, 2)),
        ((None, 2, 2), (4, 2, 2)),
        ((4, None, None), (4, 1, 4)),
    ],
)
def test_torchrun_gives_the_world(given: Mesh, expected: tuple[int, int, int]) -> None:
    assert _resolve(given, world=4) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((8, 3, None), "tp=3: must divide the model's 8 attention heads. Nearest: tp=4."),
        ((6, 4, None), "ep=6, tp=4: tp must divide ep. Nearest: tp=2, or ep=8."),
        ((8, None, 3), "ep=8, dp=3: dp must divide ep. Nearest: dp=4, or ep=6."),
        ((80, None, 5), "tp = ep/dp = 16 must divide the model's 8 attention heads. Nearest: dp=10, or ep=40."),
        ((8, 4, 3), "ep=8, dp=3, tp=4: ep must equal dp·tp = 12. Nearest: dp=2, or ep=12."),
        ((8, 3, 3), "tp=3: must divide the model's 8 attention heads. Leave tp and dp out, and keep ep=8."),
        ((0, None, None), "ep=0: must be between 1 and 65536. Nearest: ep=1."),
        ((10**9, None, None), "ep=1000000000: must be between 1 and 65536. Nearest: ep=65536."),
        ((None, 8, 65536), "dp=65536, tp=8: dp·tp = 524288 ranks are more than 65536. Nearest: dp=8192."),
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


_KEY = re.compile(r"\b(ep|tp|dp|pp)=(\d+)")


@given(
    ep=st.none() | st.integers(-1, 400),
    tp=st.none() | st.integers(1, 20),
    dp=st.none() | st.integers(1, 60),
    pp=st.integers(1, 3),
    heads=st.integers(1, 64),
    world=st.none() | st.integers(1, 40),
)
@settings(max_examples=400, deadline=None, derandomize=True)
def test_every_suggested_value_makes_a_mesh(
    ep: int | None, tp: int | None, dp: int | None, pp: int, heads: int, world: int | None
) -> None:
    def problems(asked: dict[str, int | None]) -> list[str]:
        found: list[ConfigError] = []
        topology = resolve(
            ep=asked["ep"],
            tp=asked["tp"],
            dp=asked["dp"],
            pp=asked["pp"] or 1,
            num_heads=heads,
            torchrun_world=world,
            report=found.append,
        )
        assert topology.ep == topology.dp * topology.tp
        return [str(error) for error in found]

    asked: dict[str, int | None] = {"ep": ep, "tp": tp, "dp": dp, "pp": pp}
    found = problems(asked)
    for text in found:
        remedy = text.split("Nearest: ")[-1] if "Nearest: " in text else text.split(". ", 1)[1]
        named = [{name: int(value)} for name, value in _KEY.findall(remedy)]
        assert named, text
        changes = named if "Nearest: " in text else [{name: value for one in named for name, value in one.items()}]
        for change in changes:
            left_out = {"tp": None, "dp": None} if "tp and dp out" in text else {}
            again = problems({**asked, **left_out, **change})
            assert text not in again
            if len(found) == 1:
                assert not again, (text, change)


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


def test_launcher_virtual_is_not_bound_by_torchruns_one_process() -> None:
    topology = resolve(ep=None, tp=2, dp=3, num_heads=8, launcher="virtual", torchrun_world=1, torchrun_local_world=1)
    assert (topology.ep, topology.launcher, topology.ranks_per_node) == (6, "virtual", 8)


def test_torchrun_tells_how_many_ranks_a_node_has() -> None:
    def per_node(given: int | None) -> int:
        return resolve(
            ep=None, tp=None, dp=None, num_heads=8, ranks_per_node=given, torchrun_world=4, torchrun_local_world=2
        ).ranks_per_node

    assert (per_node(None), per_node(3)) == (2, 3)


def test_all_problems_of_a_mesh_are_told() -> None:
    found: list[ConfigError] = []
    resolve(ep=8, tp=3, dp=5, pp=2, num_heads=8, launcher="torchrun", report=found.append)
    assert [str(error).partition(":")[0] for error in found] == ["launcher=torchrun", "pp=2", "tp=3", "ep=8, dp=5"]


def test_pipeline_is_not_yet() -> None:
    with pytest.raises(ConfigError, match=r"not yet built\. Set pp=1; as many ranks without them: dp=8\."):
        resolve(ep=None, tp=None, dp=4, pp=2, num_heads=8)


_TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "none",
}


def test_torchrun_variables() -> None:
    env = torchrun_env(_TORCHRUN)
    assert env is not None
    assert (env.rank, env.world_size, env.local_rank, env.local_world_size, env.master_port) == (3, 4, 1, 2, 29500)
    assert torchrun_env({"PATH": "/bin"}) is None


def test_half_set_torchrun_variables() -> None:
    with pytest.raises(ConfigError, match="MASTER_PORT: not set"):
        torchrun_env({name: value for name, value in _TORCHRUN.items() if name != "MASTER_PORT"})
    with pytest.raises(ConfigError, match="RANK=x: torchrun's variables are whole numbers"):
        torchrun_env(_TORCHRUN | {"RANK": "x"})
