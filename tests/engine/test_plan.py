"""StepPlan as a row of integers."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_runtime.engine.plan import ChunkKind, SequenceChunk, StepPlan

chunk_strategy = st.builds(
    SequenceChunk,
    st.integers(0, 2**62),
    st.integers(0, 9),
    st.lists(st.integers(-1, 9), min_size=1, max_size=5).map(tuple),
    st.lists(st.integers(0, 9), max_size=5).map(tuple),
    st.sampled_from(ChunkKind),
    st.booleans(),
    st.integers(0, 5),
)


@settings(deadline=None, derandomize=True, max_examples=100)
@given(chunks=st.lists(chunk_strategy, max_size=4))
def test_plans_survive_as_integers(chunks: list[SequenceChunk]) -> None:
    plan = StepPlan(tuple(chunks))
    row = plan.to_ints()
    assert all(type(value) is int for value in row)
    assert StepPlan.from_ints(row) == plan
    if chunks:
        with pytest.raises(ValueError, match=r"step plan|unpack"):
            StepPlan.from_ints(row[:-1])
