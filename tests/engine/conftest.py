"""Worlds and engines whose experts move."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from moe_runtime.engine.rebalance import Rebalancer
from moe_runtime.engine.sampler import Sampled, Sampler
from moe_runtime.engine.sequence import SampleRow
from moe_runtime.launch import rebalancing
from moe_runtime.parallel.placement import ExpertPlacement
from tests.api.tiny import write_tiny
from tests.engine.moving_runs import (
    Bits,
    by_chance,
)
from tests.engine.moving_world import Make, MovingWorld, inline


@pytest.fixture
def make() -> Iterator[Make]:
    """Virtual ranks that move experts; closed afterwards."""
    worlds: list[MovingWorld] = []

    def one(*args: Any, **kwargs: Any) -> MovingWorld:
        worlds.append(MovingWorld(*args, **kwargs))
        return worlds[-1]

    yield one
    for world in worlds:
        world.cluster.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny"), text=False, max_position_embeddings=64)


@pytest.fixture
def shuffled(monkeypatch: pytest.MonkeyPatch) -> list[ExpertPlacement]:
    """Each decision moves all experts; the placements before each."""
    before: list[ExpertPlacement] = []
    monkeypatch.setattr(rebalancing, "decide_apart", by_chance(before))
    monkeypatch.setattr(rebalancing, "Rebalancer", partial(Rebalancer, start=inline))
    return before


@pytest.fixture
def bits(monkeypatch: pytest.MonkeyPatch) -> Bits:
    found: Bits = {}
    choose = Sampler.sample

    def sample(self: Sampler, logits: Tensor, rows: Sequence[SampleRow]) -> list[Sampled]:
        for row, values in zip(rows, logits, strict=True):
            found[row.request_id, len(row.tokens)] = values.clone()
        return choose(self, logits, rows)

    monkeypatch.setattr(Sampler, "sample", sample)
    return found
