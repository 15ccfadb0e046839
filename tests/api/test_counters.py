"""What LLM shows of itself: loads, snapshot, topology."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_runtime import LLM
from moe_runtime.engine.engine import StepReport
from moe_runtime.engine.owner import RequestOwner
from tests.api.tiny import (
    NUM_EXPERTS,
    NUM_MOE_LAYERS,
    TOP_K,
    greedy,
)


@pytest.mark.parametrize(("ep", "tp", "shared"), [(1, 1, "replicated"), (8, 4, "replicated"), (4, 1, "dispatched")])
def test_expert_load_counts_real_tokens_only(folder: Path, ep: int, tp: int, shared: str) -> None:
    overrides = [f"shared_experts={shared}", "num_threads=1", "engine.prefix_caching=false"]
    with LLM(str(folder), ep=ep, tp=tp, overrides=overrides) as llm:
        extra = shared == "dispatched"
        assert llm.expert_load().tolist() == [[0] * (NUM_EXPERTS + extra)] * NUM_MOE_LAYERS
        llm.generate([[5, 6, 7], [9]], greedy(4))
        load = llm.expert_load()
        assert load.shape == (NUM_MOE_LAYERS, NUM_EXPERTS + extra)
        # The last token of each output is never run.
        ran = 3 + 1 + 2 * (4 - 1)
        assert load.sum(dim=1).tolist() == [ran * (TOP_K + extra)] * NUM_MOE_LAYERS
        if extra:
            assert load[:, NUM_EXPERTS].tolist() == [ran] * NUM_MOE_LAYERS
        load -= 1
        assert int(llm.expert_load().sum()) == int(load.sum()) + load.numel(), "the caller's own tensor"
        load += 1
        received = llm.load_report().rank_load
        assert received.shape == (NUM_MOE_LAYERS, ep)
        assert received.sum(dim=1).tolist() == load.sum(dim=1).tolist()


def test_what_it_is(llm: LLM) -> None:
    topology = llm.topology
    assert (topology.ep, topology.dp, topology.tp, topology.launcher) == (4, 2, 2, "virtual")
    snapshot = llm.snapshot()
    assert snapshot.mesh == topology.mesh()
    assert snapshot.state == "running"
    assert len(snapshot.groups) == 2
    before = snapshot.num_output_tokens
    llm.generate([[5, 6, 7], [9], [8]], greedy(6))
    after = llm.snapshot()
    assert after.num_output_tokens - before == 18
    assert after.num_prompt_tokens - snapshot.num_prompt_tokens == 5
    assert after.num_finished_requests - snapshot.num_finished_requests == 3
    assert 0 < after.last_step_s <= after.busy_s <= after.uptime_s
    assert after.output_tokens_per_s > 0
    assert after.step > snapshot.step
    assert llm.num_steps >= after.step


def test_what_a_long_prompt_waited_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is scheduled with its first chunk; the chunks between bring nothing, and no update of a stream."""
    seen: list[StepReport] = []
    report = RequestOwner.report

    def watched(owner: RequestOwner, step: StepReport) -> None:
        seen.append(step)
        report(owner, step)

    monkeypatch.setattr(RequestOwner, "report", watched)
    words = ["engine.max_num_batched_tokens=4", "engine.max_num_seqs=4", "engine.prefix_caching=false"]
    with LLM(str(folder), ep=1, overrides=[*words, "num_threads=1"]) as llm:
        updates = list(llm.stream([5] * 40, greedy(2)))
    busy = [step.results for step in seen if step.agreed.num_tokens]
    assert [len(results) for results in busy] == [1, *[0] * 8, 1, 1]
    assert busy[0][0].token_id is None
    assert [len(update.outputs[0].token_ids) for update in updates] == [1, 2]
    metrics = updates[0].metrics
    assert metrics.queue_time_s is not None and metrics.ttft_s is not None
    assert metrics.queue_time_s < metrics.ttft_s / 2, "ten steps of equal work, of which nine come after the first"
