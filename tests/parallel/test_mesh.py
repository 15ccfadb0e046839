"""ProcessMesh over all small meshes."""

from __future__ import annotations

from itertools import product
from typing import get_args

import pytest

from moe_runtime.errors import ConfigError
from moe_runtime.parallel.mesh import AXES, Axis, ProcessMesh

SIZES = [*product((1, 2, 3), (1, 2, 3, 4), (1, 2, 4), (1, 2, 8))]


def meshes(pp: int, dp: int, tp: int, ranks_per_node: int) -> list[ProcessMesh]:
    return list(ProcessMesh.enumerate(pp=pp, dp=dp, tp=tp, ranks_per_node=ranks_per_node))


@pytest.mark.parametrize(("pp", "dp", "tp", "ranks_per_node"), SIZES)
def test_every_small_mesh(pp: int, dp: int, tp: int, ranks_per_node: int) -> None:
    all_ranks = meshes(pp, dp, tp, ranks_per_node)
    world = pp * dp * tp
    assert [mesh.rank for mesh in all_ranks] == list(range(world))
    sizes: dict[Axis, int] = {"world": world, "pp": pp, "dp": dp, "tp": tp, "ep": dp * tp}
    for axis in AXES:
        groups = {mesh.ranks(axis) for mesh in all_ranks}
        assert sorted(rank for group in groups for rank in group) == list(range(world)), "groups partition the world"
        assert {len(group) for group in groups} == {sizes[axis]}
        for mesh in all_ranks:
            assert mesh.ranks(axis)[mesh.rank_in_group(axis)] == mesh.rank
            assert list(mesh.ranks(axis)) == sorted(mesh.ranks(axis))
    for mesh in all_ranks:
        assert mesh.world == world
        assert mesh.ep == dp * tp
        assert mesh.rank == (mesh.pp_rank * dp + mesh.dp_rank) * tp + mesh.tp_rank
        assert mesh.ep_rank == mesh.dp_rank * tp + mesh.tp_rank
        assert mesh.node * ranks_per_node + mesh.local_rank == mesh.rank
        assert 0 <= mesh.local_rank < ranks_per_node
    assert {mesh.node for mesh in all_ranks} == set(range(all_ranks[0].num_nodes))


@pytest.mark.parametrize(("pp", "dp", "tp", "ranks_per_node"), SIZES)
def test_groups_cross_as_a_mesh_does(pp: int, dp: int, tp: int, ranks_per_node: int) -> None:
    """Two ranks that share a group along both of two different axes are one rank; dp and tp together span ep."""
    for mesh in meshes(pp, dp, tp, ranks_per_node):
        for first, second in (("pp", "dp"), ("pp", "tp"), ("dp", "tp"), ("pp", "ep")):
            shared = set(mesh.ranks(first)) & set(mesh.ranks(second))  # type: ignore[arg-type]
            assert shared == {mesh.rank}
        others = [ProcessMesh(pp=pp, dp=dp, tp=tp, rank=rank) for rank in mesh.ranks("dp")]
        assert sorted(rank for other in others for rank in other.ranks("tp")) == list(mesh.ranks("ep"))


def test_a_mesh_drawn_by_hand() -> None:
    # Two stages of two tp pairs, three ranks to a node:   stage 0: [0 1] [2 3]   stage 1: [4 5] [6 7]
    mesh = ProcessMesh(pp=2, dp=2, tp=2, rank=6, ranks_per_node=3)
    assert mesh.ranks("tp") == (6, 7)
    assert mesh.ranks("dp") == (4, 6)
    assert mesh.ranks("ep") == (4, 5, 6, 7)
    assert mesh.ranks("pp") == (2, 6)
    assert (mesh.node, mesh.local_rank, mesh.num_nodes) == (2, 0, 3)
    assert (mesh.pp_rank, mesh.dp_rank, mesh.tp_rank, mesh.ep_rank) == (1, 1, 0, 2)


def test_the_decode_unit_of_320() -> None:
    mesh = ProcessMesh(dp=80, tp=4, rank=319)
    assert (mesh.ep, mesh.node, mesh.num_nodes, mesh.dp_rank, mesh.tp_rank) == (320, 39, 40, 79, 3)


def test_axes_are_the_axis_type() -> None:
    assert get_args(Axis) == AXES


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"tp": 0}, "tp=0: must be at least 1. Set tp=1 or more."),
        ({"dp": -2}, "dp=-2: must be at least 1"),
        ({"pp": 0}, "pp=0: must be at least 1"),
        ({"ranks_per_node": 0}, "ranks_per_node=0: must be at least 1"),
        ({"dp": 2, "tp": 2, "rank": 4}, r"rank=4: must lie in 0..3 \(world = pp·dp·tp = 4\)"),
        ({"rank": -1}, "rank=-1: must lie in 0..0"),
    ],
)
def test_impossible_meshes(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ProcessMesh(**sizes)
