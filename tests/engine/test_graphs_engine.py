"""Whole engines whose decode steps are captured, on the interpreted Triton kernels: the bits of the eager run."""

from __future__ import annotations

from collections.abc import Sequence
from io import StringIO
from pathlib import Path

import pytest
import torch
from moe_kernels import backends
from torch import Tensor

from moe_runtime import LLM
from moe_runtime.cli.console import PlainConsole
from moe_runtime.cli.generate import _show_speed
from moe_runtime.engine.graphs import GraphCounts, RankGraphs
from moe_runtime.engine.sampler import Sampled, Sampler
from moe_runtime.engine.sequence import SampleRow
from moe_runtime.engine.step_buffers import StepBuffers, StepFields
from moe_runtime.errors import CommunicationError
from moe_runtime.launch import graphs as launch_graphs
from moe_runtime.launch.build import LoadProgress
from moe_runtime.launch.compose import compose
from moe_runtime.layers.router import Router
from tests.api.tiny import greedy, tokens, wait_until_idle, write_tiny
from tests.doubles.cuda_graph import RecordedGraphs

PROMPTS = [[5, 6, 7], [9], [8, 10]]
LENGTHS = [4, 2, 2]
"""As many sequences at once as two prompts fill: the third joins where another has left, its prompt between decode
steps."""
WORDS = ["engine.prefix_caching=false", "num_threads=1", "engine.page_size=4", "engine.max_model_len=32"]
WORDS += ["engine.kv_cache_bytes=1MiB"]
LOCAL = ["dispatch=local", "ep=1", "engine.cuda_graph_sizes=[1,2]", "engine.max_num_seqs=2"]
GATHERED = ["dispatch=all_gather", "ep=4", "tp=2", "engine.cuda_graph_sizes=[2]", "engine.max_num_seqs=1"]

Bits = list[Tensor]
"""The logits that were sampled from, step by step."""

pytestmark = [
    pytest.mark.skipif(not backends.interpreted(), reason="needs TRITON_INTERPRET=1: kernels on CPU tensors"),
    # The interpreter computes rows that are no one's too.
    pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero):RuntimeWarning"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One dense layer, one of experts."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "kv_lora_rank": 16, "qk_rope_head_dim": 16}
    return write_tiny(tmp_path_factory.mktemp("tiny"), text=False, max_position_embeddings=64, **sizes)


@pytest.fixture
def bits(monkeypatch: pytest.MonkeyPatch) -> Bits:
    """On the kernels, with the double in place of CUDA graphs, and the engine's logits written down."""
    found: Bits = []
    sample = Sampler.sample

    def watched(sampler: Sampler, logits: Tensor, rows: Sequence[SampleRow]) -> list[Sampled]:
        found.append(logits.clone())
        return sample(sampler, logits, rows)

    monkeypatch.setattr(backends, "default_backend", lambda device: "triton")
    monkeypatch.setattr(launch_graphs, "graph_api", lambda device: RecordedGraphs())
    monkeypatch.setattr(Sampler, "sample", watched)
    return found


def run(folder: Path, *words: str, lengths: Sequence[int] = LENGTHS) -> tuple[list[tuple[int, ...]], GraphCounts, int]:
    """The tokens of the first prompts, what was captured and replayed, and the decode steps that ran eagerly."""
    with LLM(str(folder), overrides=[*WORDS, *words]) as llm:
        found = tokens(llm.generate(PROMPTS[: len(lengths)], [greedy(length) for length in lengths]))
        snapshot = llm.snapshot()
        return found, snapshot.graphs, snapshot.num_eager_decode_steps


def assert_same_bits(found: Bits, wanted: Bits) -> None:
    assert [x.shape for x in found] == [x.shape for x in wanted]
    for number, (x, y) in enumerate(zip(found, wanted, strict=True)):
        assert torch.equal(x, y), f"step {number}: {int((x != y).sum())} of {x.numel()} logits differ"


def on_the_same_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the padded steps eagerly: the same shapes, no graph."""
    monkeypatch.setattr(RankGraphs, "_replay", RankGraphs._forward)


def test_one_rank(folder: Path, bits: Bits, monkeypatch: pytest.MonkeyPatch) -> None:
    replayed, counts, eager = run(folder, *LOCAL)
    assert counts.captures == 2 and counts.replays >= 2 and eager == 0
    first = bits.copy()
    bits.clear()
    on_the_same_rows(monkeypatch)
    assert run(folder, *LOCAL)[0] == replayed
    assert_same_bits(first, bits)


@pytest.mark.parametrize("cache", ["auto", "fp8"])
def test_one_rank_batch_invariant(folder: Path, bits: Bits, cache: str) -> None:
    """No padding changes its bits there, so the eager run is the one without graphs, and without padding."""
    words = [*LOCAL, "engine.batch_invariant=true", "engine.cuda_graph_sizes=[2]", f"engine.kv_cache_dtype={cache}"]
    replayed, counts, _ = run(folder, *words)
    assert counts.captures == 1 and counts.replays >= 2
    first = bits.copy()
    bits.clear()
    plain, counts, eager = run(folder, *words, "engine.cuda_graphs=off")
    assert counts == GraphCounts() and eager >= 2
    assert replayed == plain
    assert_same_bits(first, bits)


def test_four_ranks(folder: Path, bits: Bits, monkeypatch: pytest.MonkeyPatch) -> None:
    """tp=2, dp=2: one DP group is idle in the last step."""
    replayed, counts, eager = run(folder, *GATHERED, lengths=[3, 2])
    assert (counts, eager) == (GraphCounts(captures=1, replays=2), 0)
    first = bits.copy()
    bits.clear()
    on_the_same_rows(monkeypatch)
    assert run(folder, *GATHERED, lengths=[3, 2])[0] == replayed
    assert_same_bits(first, bits)


@pytest.mark.parametrize("dispatch", ["all_gather", "all_to_all"])
def test_two_micro_batches_in_one_graph(
    folder: Path, bits: Bits, monkeypatch: pytest.MonkeyPatch, dispatch: str
) -> None:
    words = ["ep=2", "tp=2", "engine.cuda_graph_sizes=[2,4]", "engine.max_num_seqs=3", f"dispatch={dispatch}"]
    words += ["engine.two_batch_overlap=on", "engine.two_batch_decode_tokens=2", "engine.two_batch_tokens=1000"]
    replayed, counts, eager = run(folder, *words)
    assert counts.captures == 2 and counts.replays >= 2 and eager == 0
    first = bits.copy()
    bits.clear()
    on_the_same_rows(monkeypatch)
    assert run(folder, *words)[0] == replayed
    assert_same_bits(first, bits)
    monkeypatch.undo()
    assert run(folder, "ep=2", "tp=2", f"dispatch={dispatch}")[0] == replayed, "as on a CPU without any of it"


def test_larger_steps_run_eagerly(folder: Path, bits: Bits) -> None:
    seen: list[LoadProgress] = []
    composed = compose([f"model={folder}", *WORDS, *LOCAL, "engine.cuda_graph_sizes=[1]"])
    with LLM.from_composed(composed, on_progress=seen.append) as llm:
        assert [progress.captured_rows for progress in seen] == [None, None, 1], "after both layers"
        outputs = llm.generate(PROMPTS[:2], [greedy(4), greedy(2)])
        snapshot = llm.snapshot()
        assert snapshot.graphs == GraphCounts(captures=1, replays=2), "the longer one is alone at last"
        assert snapshot.num_eager_decode_steps == 1
        text = StringIO()
        _show_speed(PlainConsole(text), llm, outputs, elapsed_s=1.0)
        assert "1 captured, replayed 2 times; 1 decode step without" in text.getvalue()
        assert tokens(llm.generate(PROMPTS[:1], greedy(4))) == tokens(outputs)[:1]
        load = llm.expert_load()
        assert load.sum(dim=1).tolist() == [2 * (3 + 3 + 1 + 1 + 3 + 3)], "top 2 of every token that ran, once"


def test_an_aborted_request_leaves_the_others_alone(folder: Path, bits: Bits, monkeypatch: pytest.MonkeyPatch) -> None:
    api = RecordedGraphs()
    monkeypatch.setattr(launch_graphs, "graph_api", lambda device: api)
    with LLM(str(folder), overrides=[*WORDS, *LOCAL]) as llm:
        alone = tokens(llm.generate(PROMPTS[:1], greedy(4)))
        stream = llm.stream(PROMPTS[1], greedy(25))
        next(stream)
        stream.close()
        assert tokens(llm.generate(PROMPTS[:1], greedy(4))) == alone
        wait_until_idle(llm)
        assert len(api.graphs) == 2 and not any(graph.released for graph in api.graphs)
    assert all(graph.released for graph in api.graphs), "with the engine"


def test_a_length_that_is_baked_in_shows(folder: Path, bits: Bits, monkeypatch: pytest.MonkeyPatch) -> None:
    """A capture that takes the length of a sequence from the host is right until the sequence grows."""
    words = [*LOCAL, "engine.cuda_graph_sizes=[1]"]
    run(folder, *words, lengths=[3])
    right = bits.copy()
    bits.clear()
    fields = StepBuffers.fields

    def wrong(buffers: StepBuffers, size: int) -> StepFields:
        found = fields(buffers, size)
        lengths = torch.zeros(size, dtype=torch.int64)
        lengths += 4  # a Python number: 3 tokens of the prompt and a first one
        return found._replace(kv_lens=lengths)

    monkeypatch.setattr(StepBuffers, "fields", wrong)
    run(folder, *words, lengths=[3])
    with pytest.raises(AssertionError, match="logits differ"):
        assert_same_bits(bits, right)


def test_a_rank_that_breaks_while_capturing_ends_the_start(
    folder: Path, bits: Bits, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, calls = Router.place, [0]

    def breaks(router: Router, x: Tensor, **rest: object) -> object:
        calls[0] += 1
        if calls[0] == 6:  # ranks 0-3 in the warm-up, then rank 1 of the capture
            return x.nonzero()
        return place(router, x, **rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Router, "place", breaks)
    with pytest.raises(CommunicationError, match=r"rank \d raised CaptureError \(step 0, layer 1\): aten.nonzero"):
        LLM(str(folder), overrides=[*WORDS, *GATHERED])
