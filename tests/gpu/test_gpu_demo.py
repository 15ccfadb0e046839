"""The demo model end to end on a CUDA device: one rank, eight virtual ones, each dispatch; against fp32 on the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.gpu.answers import NEEDS_GPU, NEEDS_WHEELS, Bounds, Run, assert_follows, assert_same_bits, run

pytestmark = [NEEDS_GPU, NEEDS_WHEELS]

DEMO = Path(__file__).resolve().parents[2] / "models" / "demo"
NEW_TOKENS = 32
FP32 = Bounds(median=1e-3, worst=1e-2, margin=1e-2, least_prefix=NEW_TOKENS - 4)
"""Other orders of summation; an expert chosen otherwise at a tie moves a position by some 0.5."""
BF16 = Bounds(median=0.15, worst=1.5, margin=1.0, least_prefix=NEW_TOKENS // 4)
"""Three times what bf16 costs on a CPU over these prompts: median 0.05, worst 0.55 (an expert chosen otherwise); the
logits themselves spread by 2.4."""
FP8_CACHE = Bounds(median=0.2, worst=3.0, margin=1.5, least_prefix=NEW_TOKENS // 4)
"""Three times what bf16 with cached latents in fp8 costs on a CPU: median 0.065, worst 1.2, 24 tokens agree."""
IN_FP8 = "engine.kv_cache_dtype=fp8"
ON_GPU = ("device=cuda", "engine.cuda_graphs=off")
FIXED = ("engine.max_model_len=256", "engine.prefix_caching=false")
"""A short page table and the same steps in every run."""
THREADS = "num_threads=2"
"""Eight workers of pytest share the processor."""


def prompts(count: int) -> list[list[int]]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    lines = (DEMO / "prompts.jsonl").read_text(encoding="utf-8").splitlines()[:count]
    return [tokenizer.encode(json.loads(line)["prompt"]).ids[:48] for line in lines]


@pytest.fixture(scope="module")
def oracle() -> Run:
    """On the CPU, in fp32, one rank."""
    words = ("device=cpu", "dtype=float32", "dispatch=local", THREADS, *FIXED)
    return run(DEMO, prompts(8), words, new_tokens=NEW_TOKENS)


def on_gpu(*words: str, count: int = 8) -> Run:
    return run(DEMO, prompts(count), (*ON_GPU, THREADS, *FIXED, *words), new_tokens=NEW_TOKENS)


LAYOUTS = [
    ("ep=1", "dispatch=local"),
    ("ep=8", "tp=1", "dispatch=all_gather"),
    ("ep=8", "tp=1", "dispatch=all_to_all"),
    ("ep=8", "tp=2", "dispatch=all_to_all", "placement.num_redundant_experts=16"),
]


@pytest.mark.parametrize("words", LAYOUTS, ids=" ".join)
def test_fp32_gives_the_tokens_of_the_cpu(words: tuple[str, ...], oracle: Run) -> None:
    assert_follows(on_gpu("dtype=float32", *words), oracle, FP32)


@pytest.mark.parametrize("words", LAYOUTS, ids=" ".join)
def test_bf16_stays_near_the_cpu(words: tuple[str, ...], oracle: Run) -> None:
    assert_follows(on_gpu("dtype=bfloat16", *words), oracle, BF16)


@pytest.mark.parametrize("words", LAYOUTS[:2], ids=" ".join)
def test_a_latent_cache_in_fp8_stays_near_the_cpu(words: tuple[str, ...], oracle: Run) -> None:
    assert_follows(on_gpu("dtype=bfloat16", IN_FP8, *words), oracle, FP8_CACHE)


@pytest.mark.parametrize(
    ("words", "rows"),
    [(LAYOUTS[0], 8), (LAYOUTS[1], 1), (LAYOUTS[2], 1), ((*LAYOUTS[0], IN_FP8), 8)],
    ids=["ep=1", "ep=8 all_gather", "ep=8 all_to_all", "ep=1 fp8 cache"],
)
def test_graphs_change_no_bit(words: tuple[str, ...], rows: int) -> None:
    """Eight requests from first to last: every decode step fills a captured size, so that both runs have one shape."""
    shape = ("dtype=bfloat16", f"engine.max_num_seqs={rows}", f"engine.cuda_graph_sizes=[{rows}]", *words)
    eager = on_gpu(*shape)
    captured = on_gpu(*shape, "engine.cuda_graphs=on")
    assert (eager.captures, eager.replays) == (0, 0)
    assert captured.captures == 1 and captured.replays >= NEW_TOKENS - 2
    assert_same_bits(captured, eager)


@pytest.mark.parametrize("words", LAYOUTS[1:3], ids=" ".join)
def test_two_micro_batches_stay_near_the_cpu(words: tuple[str, ...], oracle: Run) -> None:
    cut = ("engine.two_batch_overlap=on", "engine.two_batch_tokens=2", "engine.two_batch_decode_tokens=2")
    assert_follows(on_gpu("dtype=float32", *cut, *words), oracle, FP32)


def test_padded_graphs_stay_near(oracle: Run) -> None:
    """Three requests in steps captured for four rows."""
    got = on_gpu("dtype=float32", *LAYOUTS[0], "engine.cuda_graph_sizes=[4]", "engine.cuda_graphs=on", count=3)
    assert got.replays
    assert_follows(got, Run(oracle.answers[:3], 0, 0), FP32)


@pytest.mark.parametrize("cache", ["auto", "fp8"])
def test_batch_invariance_on_the_device(cache: str) -> None:
    """Alone or among others, at ep=1 or ep=8: the same bits."""
    words = ("dtype=bfloat16", "engine.batch_invariant=true", f"engine.kv_cache_dtype={cache}")
    crowd = on_gpu(*words, *LAYOUTS[0])
    alone = on_gpu(*words, *LAYOUTS[0], count=1)
    spread = on_gpu(*words, *LAYOUTS[2])
    assert_same_bits(Run(crowd.answers[:1], 0, 0), alone)
    assert_same_bits(spread, crowd)


def test_the_same_run_twice_has_the_same_bits() -> None:
    words = ("dtype=bfloat16", *LAYOUTS[1])
    assert_same_bits(on_gpu(*words), on_gpu(*words))
